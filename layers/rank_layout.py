"""From rows of the rank layout, one for each token, to rows of its experts, and back.

Bit for bit what ``layout="expert"`` gives, in whose order the copies come: by expert, and inside an expert by row.

Example, K = 2, local experts 0 and 1: ``topk_idx = [[1, -1], [0, 1]]`` expands to the rows ``[row 1 | row 0, row 1]``
(expert 0, then expert 1); ``slot_NK = [[1, -1], [0, 2]]`` says where each copy went.

`csrc/rank_layout` does this on a GPU at the rate of its memory, without a wait; elsewhere it is done in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.autograd.function import once_differentiable

from moe_ep import Fp8Tokens, _extension, fp8
from moe_ep.streams import named_range

from .precision import at_least_float32

_KERNEL_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class ExpertOrder:
    """Where the copies of rows lie among ``num_rows`` (M) rows sorted by expert.

    - ``slot_NK [N, K]``: of row n's copy for its k-th expert; -1: there is none
    - ``tokens_per_expert`` int64 ``[L]``: rows of each expert, padding included; ``splits``: the same on the host, None
      where only the device knows
    - ``gaps`` int32 ``[L + 1, 2]``: begin and end of the rows behind each expert's that no copy takes, and of those
      behind all experts'; None if the kernels did not make this
    """

    slot_NK: torch.Tensor
    num_rows: int
    tokens_per_expert: torch.Tensor
    splits: list[int] | None
    gaps: torch.Tensor | None
    has_gaps: bool
    """Whether there can be such rows."""


def order_by_expert(
    topk_idx_NK: torch.Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    splits: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> ExpertOrder:
    """The order of rows for ``num_experts`` (L) local experts; ``topk_idx_NK [N, K]`` int64, -1 for none.

    ``alignment``: every expert's rows begin at a multiple of it. ``splits``: copies for each expert, as the host knows
    them; without it, and without ``max_rows``, the host waits for the device. ``max_rows``: so many rows, whatever the
    number of copies; those that don't fit are left out.
    """
    if max_rows is not None:
        splits = None
    elif splits is None:
        splits = _count(topk_idx_NK, num_experts).tolist()
    padded = None if splits is None else [-(-size // alignment) * alignment for size in splits]
    num_rows = max_rows if padded is None else sum(padded)
    has_gaps = splits is None or num_rows > sum(splits)
    kernels = _kernels_for_ids(topk_idx_NK, num_experts)
    if kernels is None:
        slot_NK, tokens_per_expert = _number_torch(topk_idx_NK, num_experts, alignment, num_rows)
        return ExpertOrder(slot_NK, num_rows, tokens_per_expert, padded, None, has_gaps)

    topk_idx_NK = topk_idx_NK.contiguous()
    sizes = topk_idx_NK.numel(), 2 * (num_experts + 1), kernels.MAX_COUNT_BLOCKS * num_experts
    numbers = torch.empty(sum(sizes), dtype=torch.int32, device=topk_idx_NK.device)
    slots, gaps, counts = numbers.split(sizes)
    tokens_per_expert = topk_idx_NK.new_empty(num_experts)
    with torch.cuda.device(topk_idx_NK.device), named_range("moe_ep.experts.number"):
        kernels.number(
            topk_idx=topk_idx_NK.data_ptr(),
            rows=topk_idx_NK.shape[0],
            num_topk=topk_idx_NK.shape[1],
            num_experts=num_experts,
            alignment=alignment,
            num_slots=num_rows,
            counts=counts.data_ptr(),
            slots=slots.data_ptr(),
            gaps=gaps.data_ptr(),
            tokens_per_expert=tokens_per_expert.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    slot_NK, gaps = slots.view_as(topk_idx_NK), gaps.view(-1, 2)
    return ExpertOrder(slot_NK, num_rows, tokens_per_expert, padded, gaps, has_gaps)


def expand_rows(
    tokens: torch.Tensor | Fp8Tokens, weights_NK: torch.Tensor, order: ExpertOrder
) -> tuple[torch.Tensor | Fp8Tokens, torch.Tensor]:
    """Copies each row ``[N, H]`` to its places: ``[M, H]``, and the router weight of each copy ``[M]``.

    Fp8Tokens stay as they are. Rows that no copy takes are zeros (Fp8: ``scale_inv`` 1) of weight 0.
    """
    if not isinstance(tokens, Fp8Tokens):
        return _Expand.apply(tokens, weights_NK, order)
    if tokens.carrier is None:
        data, scale_inv, weights_M = _expand(tokens.data, tokens.scale_inv, weights_NK, order)
        return Fp8Tokens(data, scale_inv), weights_M
    data, scale_inv, carrier, weights_M = _ExpandFp8.apply(
        tokens.carrier, tokens.data, tokens.scale_inv, weights_NK, order
    )
    return Fp8Tokens(data, scale_inv, carrier), weights_M


def reduce_rows(rows_MH: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Adds the copies ``[M, H]`` of each row up in ascending k, in float32 (float64 for float64), rounded once:
    ``[N, H]``. A sum starts from its first term, and an empty one is 0.

    The gradient may be one that stands for FP8 rows (`moe_ep.fp8.carry`) if that of ``rows_MH`` may.
    """
    out_NH = _Reduce.apply(rows_MH, order)
    if fp8.takes_carried_gradient(rows_MH):
        fp8.take_carried_gradient(out_NH)
    return out_NH


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, weights_NK, order):
        ctx.order = order
        ctx.set_materialize_grads(False)
        rows_MH, _, weights_M = _expand(rows_NH, None, weights_NK, order)
        return rows_MH, weights_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MH, grad_M):
        return *_reduce(grad_MH, grad_M, ctx.order), None


class _ExpandFp8(torch.autograd.Function):
    """The gradient takes the carriers' way."""

    @staticmethod
    def forward(ctx, carrier, data, scale_inv, weights_NK, order):
        ctx.order = order
        ctx.set_materialize_grads(False)
        data, scale_inv, weights_M = _expand(data, scale_inv, weights_NK, order)
        ctx.mark_non_differentiable(data, scale_inv)
        return data, scale_inv, fp8.make_carrier(data.shape, carrier.dtype, data.device), weights_M

    @staticmethod
    @once_differentiable
    def backward(ctx, _grad_data, _grad_scale_inv, grad_MH, grad_M):
        grad_NH, grad_NK = _reduce(grad_MH, grad_M, ctx.order)
        return grad_NH, None, None, grad_NK, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MH, order):
        ctx.order, ctx.dtype = order, rows_MH.dtype
        return _reduce(rows_MH, None, order)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH):
        carried = fp8.carried(grad_NH)
        if carried is None:
            return _expand(grad_NH, None, None, ctx.order)[0], None
        data, scale_inv, _ = _expand(carried.data, carried.scale_inv, None, ctx.order)
        return fp8.carry(Fp8Tokens(data, scale_inv), ctx.dtype), None


def _expand(
    rows_NH: torch.Tensor,
    scales_NS: torch.Tensor | None,
    weights_NK: torch.Tensor | None,
    order: ExpertOrder,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows, and what goes with them, at their places; not differentiable."""
    with named_range("moe_ep.experts.expand"):
        kernels = _kernels_for_rows(rows_NH, weights_NK, order)
        if kernels is None:
            return _expand_torch(rows_NH, scales_NS, weights_NK, order)
        # In names of their own, so that copies live until the launch.
        rows_NH, scales_NS, weights_NK = _aligned(rows_NH), _contiguous(scales_NS), _contiguous(weights_NK)
        num_rows = order.num_rows
        rows_MH = rows_NH.new_empty(num_rows, rows_NH.shape[1])
        scales_MS = None if scales_NS is None else scales_NS.new_empty(num_rows, scales_NS.shape[1])
        weights_M = None if weights_NK is None else weights_NK.new_empty(num_rows)
        with torch.cuda.device(rows_NH.device):
            kernels.expand(
                slots=order.slot_NK.data_ptr(),
                rows=rows_NH.shape[0],
                num_topk=order.slot_NK.shape[1],
                gaps=order.gaps.data_ptr(),
                num_gaps=len(order.gaps) if order.has_gaps else 0,
                from_rows=rows_NH.data_ptr(),
                to_rows=rows_MH.data_ptr(),
                row_bytes=rows_NH.shape[1] * rows_NH.element_size(),
                scales=_address(scales_NS),
                to_scales=_address(scales_MS),
                num_scales=0 if scales_NS is None else scales_NS.shape[1],
                weights=_address(weights_NK),
                to_weights=_address(weights_M),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        return rows_MH, scales_MS, weights_M


def _reduce(
    rows_MH: torch.Tensor | None, weights_M: torch.Tensor | None, order: ExpertOrder
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sums ``[N, H]`` of rows, and the weights ``[N, K]`` of copies (0 where there is none); not differentiable."""
    with named_range("moe_ep.experts.reduce"):
        kernels = _kernels_for_rows(rows_MH, weights_M, order)
        if kernels is None:
            sums_NH = None if rows_MH is None else _sum_by_slot(rows_MH, order.slot_NK)
            return sums_NH, None if weights_M is None else _pick_by_slot(weights_M, order.slot_NK)
        slot_NK, weights_M = order.slot_NK, _contiguous(weights_M)
        sums_NH, dtype, row_bytes = None, torch.float32, 0
        if rows_MH is not None:
            rows_MH = _aligned(rows_MH)
            sums_NH = rows_MH.new_empty(slot_NK.shape[0], rows_MH.shape[1])
            dtype, row_bytes = rows_MH.dtype, rows_MH.shape[1] * rows_MH.element_size()
        weights_NK = None if weights_M is None else weights_M.new_empty(slot_NK.shape)
        with torch.cuda.device(slot_NK.device):
            kernels.reduce(
                slots=slot_NK.data_ptr(),
                rows=slot_NK.shape[0],
                num_topk=slot_NK.shape[1],
                from_rows=_address(rows_MH),
                to_rows=_address(sums_NH),
                dtype=getattr(_extension.load().DType, _KERNEL_DTYPES[dtype]),
                row_bytes=row_bytes,
                weights=_address(weights_M),
                to_weights=_address(weights_NK),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        return sums_NH, weights_NK


def _kernels_for_ids(topk_idx_NK: torch.Tensor, num_experts: int) -> ModuleType | None:
    if not topk_idx_NK.is_cuda or torch.compiler.is_compiling() or topk_idx_NK.dtype != torch.int64:
        return None
    module = _extension.load_for(topk_idx_NK.device)
    if module is None:
        return None
    kernels = module.rank_layout
    fits = 0 < topk_idx_NK.shape[1] <= kernels.MAX_TOPK and 0 < num_experts <= kernels.MAX_EXPERTS
    return kernels if fits else None


def _kernels_for_rows(
    rows: torch.Tensor | None, weights: torch.Tensor | None, order: ExpertOrder
) -> ModuleType | None:
    """The kernels if they made this order, and take these rows and weights."""
    if order.gaps is None or (weights is not None and weights.dtype != torch.float32):
        return None
    if rows is not None:
        taken = rows.dtype in _KERNEL_DTYPES or rows.dtype == torch.float8_e4m3fn
        if not taken or rows.shape[1] * rows.element_size() % 16:
            return None
    return _extension.load().rank_layout


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous, at a multiple of 16 bytes."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _count(topk_idx_NK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Copies for each expert, ``[L]``."""
    ids = topk_idx_NK.flatten()
    counts = ids.new_zeros(num_experts + 1)
    counts.scatter_add_(0, torch.where(ids < 0, num_experts, ids), torch.ones_like(ids))
    return counts[:num_experts]


def _number_torch(
    topk_idx_NK: torch.Tensor, num_experts: int, alignment: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``slot_NK`` and ``tokens_per_expert``."""
    ids = topk_idx_NK.flatten().long()
    copies = _count(ids, num_experts)
    padded = (copies + alignment - 1) // alignment * alignment
    shift = padded.cumsum(0) - padded - (copies.cumsum(0) - copies)  # by the padding of the experts before
    by_expert = torch.where(ids < 0, num_experts, ids).sort(stable=True)
    place = torch.arange(len(ids), device=ids.device)
    place = place + torch.cat([shift, shift.new_zeros(1)])[by_expert.values]
    place = place.masked_fill((by_expert.values == num_experts) | (place >= num_rows), -1)
    slots = torch.empty_like(ids).scatter_(0, by_expert.indices, place)
    return slots.view(topk_idx_NK.shape), padded


def _expand_torch(
    rows_NH: torch.Tensor,
    scales_NS: torch.Tensor | None,
    weights_NK: torch.Tensor | None,
    order: ExpertOrder,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    slots = order.slot_NK.flatten().long()
    entries = (slots >= 0).nonzero().squeeze(1)
    places, sources = slots[entries], entries // max(order.slot_NK.shape[1], 1)

    def placed(rows: torch.Tensor, padding: float) -> torch.Tensor:
        return rows.new_full((order.num_rows, *rows.shape[1:]), padding).index_copy_(0, places, rows)

    as_bytes = rows_NH.dtype == torch.float8_e4m3fn  # which torch can't index
    rows_MH = placed((rows_NH.view(torch.uint8) if as_bytes else rows_NH)[sources], 0)
    return (
        rows_MH.view(rows_NH.dtype),
        None if scales_NS is None else placed(scales_NS[sources], 1),
        None if weights_NK is None else placed(weights_NK.flatten()[entries], 0),
    )


def _sum_by_slot(rows_MH: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
    accumulator = at_least_float32(rows_MH.dtype)
    shape = slot_NK.shape[0], rows_MH.shape[1]
    if rows_MH.shape[0] == 0:
        return rows_MH.new_zeros(shape)
    # Adding to -0.0 leaves every first term as it is, +0.0 would turn -0.0 into +0.0.
    sum_NH = rows_MH.new_full(shape, -0.0, dtype=accumulator)
    for slot_N in slot_NK.long().unbind(1):
        term_NH = rows_MH[slot_N.clamp(min=0)].to(accumulator)
        sum_NH += term_NH.masked_fill_((slot_N < 0).unsqueeze(1), -0.0)
    is_empty_N = (slot_NK < 0).all(1)
    return sum_NH.masked_fill_(is_empty_N.unsqueeze(1), 0.0).to(rows_MH.dtype)


def _pick_by_slot(weights_M: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
    if len(weights_M) == 0:
        return weights_M.new_zeros(slot_NK.shape)
    return weights_M[slot_NK.long().clamp(min=0)].masked_fill(slot_NK < 0, 0.0)
