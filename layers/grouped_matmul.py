"""One matrix product per expert over rows that are sorted by expert, as one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_ep.streams import named_range

from . import transformer_engine
from .row_groups import RowGroups
from .weight_gradients import give, put_or_return

LARGE_PRODUCT = 10_000_000_000
"""Multiplications of an expert's product from which on it is cuBLAS's: about 30 us on an H200."""


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

    A `WeightGradStore` or `GradientSums` may take the weight's gradient. CUDA bfloat16 runs torch's grouped matmul if
    ``I`` and ``O`` are multiples of 8 (it wants 16-byte strides), or for large products whose ``splits`` are known, on
    Hopper with Transformer Engine, cuBLAS; all else runs a loop of plain products.
    """
    return matmul_by_expert(rows_NI, weight_LOI, RowGroups(tokens_per_expert, splits, rows_NI.shape[0]))


def matmul_by_expert(rows_NI: torch.Tensor, weight_LOI: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """`grouped_matmul`, for several products of the same rows' experts."""
    [weight_LOI], put = give(rows_NI, weight_LOI)
    if uses_grouped_mm(rows_NI, weight_LOI):
        return _GroupedMatmul.apply(rows_NI.contiguous(), weight_LOI.contiguous(), groups, put)
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
    def forward(ctx, rows_NI, weight_LOI, groups, put):
        ctx.save_for_backward(rows_NI, weight_LOI)
        ctx.groups, ctx.put = groups, put
        with named_range("moe_ep.experts.matmul"):
            if _is_large(weight_LOI, groups):
                out_NO = rows_NI.new_empty(rows_NI.shape[0], weight_LOI.shape[1])
                transformer_engine.rows_by_weights(rows_NI, None, weight_LOI, None, groups.splits, out_NO)
                return out_NO
            return F.grouped_mm(rows_NI, weight_LOI.transpose(1, 2), offs=groups.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        rows_NI, weight_LOI = ctx.saved_tensors
        groups = ctx.groups
        grad_NO = grad_NO.contiguous()
        is_large = _is_large(weight_LOI, groups)

        def weight_gradient(into: torch.Tensor | None) -> torch.Tensor:
            with named_range("moe_ep.experts.matmul.wgrad"):
                if is_large:
                    return transformer_engine.rows_by_rows(grad_NO, rows_NI, groups.splits, into)
                grad_weight = F.grouped_mm(grad_NO.t(), rows_NI, offs=groups.ends)
                return grad_weight if into is None else into.add_(grad_weight)

        grad_rows = None
        if ctx.needs_input_grad[0]:
            with named_range("moe_ep.experts.matmul.dgrad"):
                if is_large:
                    grad_rows = transformer_engine.rows_by_transposed_weights(
                        grad_NO, weight_LOI, groups.splits
                    )
                else:
                    grad_rows = F.grouped_mm(grad_NO, weight_LOI, offs=groups.ends)
        wanted = ctx.needs_input_grad[1]
        return grad_rows, put_or_return(weight_gradient, ctx.put, wanted), None, None


def _is_large(weight_LOI: torch.Tensor, groups: RowGroups) -> bool:
    """Whether a product for each expert is better than one kernel for all.

    cuBLAS's products are a few percent faster, but each takes the host about 10 us, so an expert's should take the GPU
    longer. The host has to know the experts' rows. It depends on the shapes alone: forward and backward agree.
    """
    if not groups.are_known or groups.num_rows * weight_LOI[0].numel() < LARGE_PRODUCT * len(weight_LOI):
        return False
    return transformer_engine.can_run(weight_LOI.device)


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

        def weight_gradient(into: torch.Tensor | None) -> torch.Tensor:
            total = weight_LOI.new_zeros(weight_LOI.shape) if into is None else into
            with named_range("moe_ep.experts.matmul.wgrad"):
                for expert, (start, end) in enumerate(segments):
                    if end > start:
                        total[expert].addmm_(grad_NO[start:end].t(), rows_NI[start:end])
            return total

        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.zeros_like(rows_NI)
            with named_range("moe_ep.experts.matmul.dgrad"):
                for expert, (start, end) in enumerate(segments):
                    if end > start:
                        torch.mm(grad_NO[start:end], weight_LOI[expert], out=grad_rows[start:end])
        wanted = ctx.needs_input_grad[1]
        return grad_rows, put_or_return(weight_gradient, ctx.put, wanted), None, None
