"""One matrix product per expert over rows that are sorted by expert, as one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from moe_ep.streams import named_range

from .row_groups import RowGroups
from .weight_gradients import Compute, Later, later


def grouped_matmul(
    rows_NI: torch.Tensor,
    weight_LOI: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """``out[rows of expert e] = rows[rows of expert e] @ weight[e].T``: ``[N, I]``, ``[L, O, I]`` -> ``[N,
    O]``.

    Expert ``e`` owns ``tokens_per_expert[e]`` consecutive rows, in order of ``e``. ``splits`` says the same
    on the host; without it, and without torch's grouped matmul, the counts are fetched, which waits for the
    device. Rows past the last expert's, which only static sizes have, come out undefined and get an undefined
    gradient: nothing may read them. An expert without rows gets a zero weight gradient.

    A `WeightGradStore` may keep the weight's gradient for later. CUDA bfloat16 runs torch's grouped matmul if
    ``I`` and ``O`` are multiples of 8 (it wants 16-byte strides); all else a loop of plain products.
    """
    return matmul_by_expert(rows_NI, weight_LOI, RowGroups(tokens_per_expert, splits, rows_NI.shape[0]))


def matmul_by_expert(rows_NI: torch.Tensor, weight_LOI: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """`grouped_matmul`, for several products of the same rows' experts."""
    put = later(rows_NI, weight_LOI)
    if put is not None:
        weight_LOI = weight_LOI.detach()
    if uses_grouped_mm(rows_NI, weight_LOI):
        return _GroupedMatmul.apply(rows_NI.contiguous(), weight_LOI, groups.ends, put)
    return _LoopedMatmul.apply(rows_NI, weight_LOI, groups.segments, put)


def uses_grouped_mm(rows_NI: torch.Tensor, weight_LOI: torch.Tensor) -> bool:
    """Whether torch's grouped matmul takes these tensors."""
    _, out_features, in_features = weight_LOI.shape
    return (
        rows_NI.is_cuda
        and rows_NI.dtype == weight_LOI.dtype == torch.bfloat16
        and rows_NI.shape[0] > 0
        and out_features % 8 == in_features % 8 == 0
        and torch.cuda.get_device_capability(rows_NI.device) >= (8, 0)
    )


class _GroupedMatmul(torch.autograd.Function):
    # NOTE: torch's own derivative of grouped_mm refuses expanded gradients, which y.sum().backward() makes.
    @staticmethod
    def forward(ctx, rows_NI, weight_LOI, ends, put):
        ctx.save_for_backward(rows_NI, weight_LOI, ends)
        ctx.put = put
        with named_range("moe_ep.experts.matmul"):
            return torch.nn.functional.grouped_mm(rows_NI, weight_LOI.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_LOI, ends = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()

        def weight_gradient() -> torch.Tensor:
            with named_range("moe_ep.experts.matmul.wgrad"):
                return torch.nn.functional.grouped_mm(grad_NO.t(), rows_NI, offs=ends)

        grad_rows = None
        if ctx.needs_input_grad[0]:
            with named_range("moe_ep.experts.matmul.dgrad"):
                grad_rows = torch.nn.functional.grouped_mm(grad_NO, weight_LOI, offs=ends)
        wanted = ctx.needs_input_grad[1]
        return grad_rows, now_or_later(weight_gradient, ctx.put, wanted), None, None


class _LoopedMatmul(torch.autograd.Function):
    # Against slicing and concatenating under autograd this spares a copy of rows and one of gradients.
    @staticmethod
    def forward(ctx, rows_NI, weight_LOI, segments, put):
        ctx.save_for_backward(rows_NI, weight_LOI)
        ctx.segments, ctx.put = segments, put
        out_NO = rows_NI.new_zeros(rows_NI.shape[0], weight_LOI.shape[1])
        with named_range("moe_ep.experts.matmul"):
            for expert, (start, end) in enumerate(segments):
                if end > start:
                    torch.mm(rows_NI[start:end], weight_LOI[expert].t(), out=out_NO[start:end])
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_LOI = ctx.saved_tensors
        segments = ctx.segments

        def weight_gradient() -> torch.Tensor:
            grad_weight = torch.empty_like(weight_LOI)
            with named_range("moe_ep.experts.matmul.wgrad"):
                for expert, (start, end) in enumerate(segments):
                    torch.mm(grad_NO[start:end].t(), rows_NI[start:end], out=grad_weight[expert])
            return grad_weight

        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.zeros_like(rows_NI)
            with named_range("moe_ep.experts.matmul.dgrad"):
                for expert, (start, end) in enumerate(segments):
                    if end > start:
                        torch.mm(grad_NO[start:end], weight_LOI[expert], out=grad_rows[start:end])
        wanted = ctx.needs_input_grad[1]
        return grad_rows, now_or_later(weight_gradient, ctx.put, wanted), None, None


def now_or_later(
    weight_gradient: Compute, put: Later | None, wanted: bool
) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """The gradient of the weight, or those of several, if autograd is to have it."""
    if put is not None:
        put(weight_gradient)
        return None
    return weight_gradient() if wanted else None
