"""From rows deduplicated per rank (``layout="rank"``) to rows per local expert, and back.

Both directions are gathers, so they are deterministic and bit for bit what ``layout="expert"`` gives.

Example, K = 2, local experts 0 and 1: ``topk_idx = [[1, -1], [0, 1]]`` expands to the rows ``[row 1 | row 0,
row 1]`` (expert 0, then expert 1); ``slot_NK = [[1, -1], [0, 2]]`` says where each of them went.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def expand_rows(
    rows_NH: torch.Tensor, weights_NK: torch.Tensor, topk_idx_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies each row once for each local expert it names (waits for the device to learn how many rows that
    is).

    ``rows_NH [N, H]``, ``weights_NK [N, K]``, ``topk_idx_NK [N, K]`` local expert ids or -1. Returns rows
    ``[M, H]`` sorted by expert and inside an expert by row, their weights ``[M]``, and ``slot_NK [N, K]``
    int64: where the row of ``(n, k)`` went, or -1.
    """
    flat_idx = topk_idx_NK.flatten()
    entries = (flat_idx >= 0).nonzero().squeeze(1)
    entry_M = entries[flat_idx[entries].sort(stable=True).indices]
    slot_NK = torch.full_like(flat_idx, -1, dtype=torch.int64)
    slot_NK[entry_M] = torch.arange(len(entry_M), device=slot_NK.device)
    slot_NK = slot_NK.view_as(topk_idx_NK)
    source_M = entry_M // max(topk_idx_NK.shape[1], 1)
    return _Expand.apply(rows_NH, source_M, slot_NK), weights_NK.flatten()[entry_M], slot_NK


def reduce_rows(rows_MH: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
    """Adds the rows ``[M, H]`` of one token in ascending k, in float32 (float64 for float64), rounded once:
    ``[N, H]``.
    """
    return _Reduce.apply(rows_MH, slot_NK)


def _sum_by_slot(rows_MH: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
    accumulator = torch.promote_types(rows_MH.dtype, torch.float32)
    # Adding to -0.0 leaves every first term as it is, +0.0 would turn -0.0 into +0.0.
    sum_NH = rows_MH.new_full((slot_NK.shape[0], rows_MH.shape[1]), -0.0, dtype=accumulator)
    if rows_MH.shape[0] == 0:
        return sum_NH.abs().to(rows_MH.dtype)
    for slot_N in slot_NK.unbind(1):
        term_NH = rows_MH[slot_N.clamp(min=0)].to(accumulator)
        sum_NH += term_NH.masked_fill_((slot_N < 0).unsqueeze(1), -0.0)
    return sum_NH.to(rows_MH.dtype)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH, source_M, slot_NK):
        ctx.save_for_backward(slot_NK)
        return rows_NH[source_M]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MH):
        (slot_NK,) = ctx.saved_tensors
        return _sum_by_slot(grad_MH, slot_NK), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MH, slot_NK):
        ctx.save_for_backward(slot_NK)
        ctx.num_rows = rows_MH.shape[0]
        return _sum_by_slot(rows_MH, slot_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH):
        (slot_NK,) = ctx.saved_tensors
        entries = (slot_NK.flatten() >= 0).nonzero().squeeze(1)
        source_M = torch.empty(ctx.num_rows, dtype=torch.int64, device=slot_NK.device)
        source_M[slot_NK.flatten()[entries]] = entries // max(slot_NK.shape[1], 1)
        return grad_NH[source_M], None
