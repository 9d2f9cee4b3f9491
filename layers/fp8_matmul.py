"""The products of FP8 experts: operands that are quantised already, sums in float32, results in the layer's dtype.

On a Hopper GPU with Transformer Engine these run on its FP8 matrix units. Elsewhere the operands are dequantised, which
for powers of two as scales is exact in bfloat16 and float32, and multiplied by torch: the same mathematics.
"""

from __future__ import annotations

import logging

import torch

from moe_ep import Fp8Tokens
from moe_ep.fp8 import BLOCK

from . import transformer_engine
from .fp8_quantize import Fp8Columns, Fp8ColumnTiles, Fp8Weight, padded_splits, transpose_scales
from .grouped_matmul import matmul_by_expert
from .row_groups import RowGroups
from .weight_gradients import Gradients

_log = logging.getLogger("moe_ep")
_said: set[str] = set()


def rows_by_weights(rows: Fp8Tokens, weight: Fp8Weight, groups: RowGroups, out_NO: torch.Tensor) -> None:
    """``out[rows of e] = rows of e @ weight[e].T``: Fp8Tokens ``[N, I]``, weight ``[L, O, I]`` -> ``[N, O]``."""
    dtype = out_NO.dtype
    if _runs_on_transformer_engine(rows.device, dtype, groups, *weight.data.shape[1:]):
        scales = transpose_scales(rows.scale_inv, groups)
        operands = rows.data, scales, weight.data, weight.scale_inv
        transformer_engine.rows_by_weights(*operands, groups.splits, out_NO)
        return
    with torch.no_grad():
        wide = Fp8Tokens(rows.data, rows.scale_inv).dequantize(dtype)
        out_NO.copy_(matmul_by_expert(wide, weight.dequantize(dtype), groups))


def columns_by_columns(
    grad: Fp8Columns,
    rows: Fp8ColumnTiles,
    groups: RowGroups,
    dtype: torch.dtype,
    into: Gradients | None = None,
) -> Gradients:
    """``out[e] = grad of e.T @ rows of e``: columns of ``[N, O]`` and ``[N, I]`` -> ``[L, O, I]`` of ``dtype``.

    ``into``: add to that, ``[L, O, I]`` or an ``[O, I]`` for each expert, of any dtype, and return it.
    """
    out_features, in_features = grad.num_columns, rows.num_columns
    dtype = dtype if into is None else into[0].dtype
    if _runs_on_transformer_engine(grad.data.device, dtype, groups, out_features, in_features):
        # Zeros behind an expert's rows are multiplied, too, which takes no time: matrix units take 128 rows at once.
        operands = grad.data, grad.scale_inv, rows.data, rows.scale_inv
        splits = padded_splits(groups)
        return transformer_engine.columns_by_columns(*operands, in_features, splits, dtype, into)
    shape = len(groups.splits), out_features, in_features
    out = grad.scale_inv.new_zeros(shape, dtype=dtype) if into is None else into
    pairs = zip(grad.dequantize(groups, dtype), rows.dequantize(groups, dtype), strict=True)
    for e, (grad_OM, rows_IM) in enumerate(pairs):
        if grad_OM.shape[1]:
            out[e].addmm_(grad_OM, rows_IM.t())
    return out


def _runs_on_transformer_engine(
    device: torch.device, dtype: torch.dtype, groups: RowGroups, *features: int
) -> bool:
    if device.type != "cuda" or groups.num_rows == 0:
        return False
    reason = None
    if not transformer_engine.can_run(device):
        reason = transformer_engine.why_missing() or "FP8 in blocks needs a Hopper GPU"
    elif dtype not in (torch.bfloat16, torch.float32):
        reason = f"Transformer Engine's FP8 products give bfloat16 or float32, not {dtype}"
    elif any(size % BLOCK for size in features):
        reason = (
            f"Transformer Engine's FP8 products need widths that are multiples of {BLOCK}, not {features}"
        )
    elif any(size % transformer_engine.ROW_ALIGNMENT for size in groups.splits):
        reason = (
            "the experts' rows are no multiples of 16: dispatch with expert_alignment=16, and give a shared expert a "
            "multiple of 16 tokens"
        )
    if reason is not None and reason not in _said:
        _said.add(reason)
        _log.warning("FP8 experts multiply dequantised numbers: %s", reason)
    return reason is None
