"""Transformer Engine's grouped FP8 matrix product; the only file that imports it.

Its modules refuse FP8 input, so this calls what lies below them, `general_grouped_gemm`, with operands that were
quantised elsewhere: cuBLASLt multiplies them as they are, one product for each expert, over several streams. These
functions are no public interface of Transformer Engine, hence the pinned version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

VERSION = "2.20"
"""What this is written for, and tested with 2.20.2."""

ROW_ALIGNMENT = 16
"""Rows of each expert are a multiple of this: they are the inner dimension of a weight's gradient."""

_SCALES = 4  # a row of scales is a multiple of this


@functools.cache
def why_missing() -> str | None:
    """Why the products can't be had, in words; None if they can. Imports Transformer Engine, which takes seconds."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed: pip install 'moe_ep[te]'"
    os.environ.setdefault("NVTE_FRAMEWORK", "pytorch")  # where JAX is installed it would load that half, too
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        return f"transformer_engine can't be imported: {error}"
    version = importlib.import_module("transformer_engine").__version__
    if not version.startswith(f"{VERSION}."):
        return f"transformer_engine is {version}; the grouped FP8 product is written for {VERSION}"
    return None


def can_run(device: torch.device) -> bool:
    """Whether FP8 in blocks runs on this GPU: Hopper, and Transformer Engine."""
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and why_missing() is None
    )


def rows_by_weights(
    data_NI: torch.Tensor,
    scales: torch.Tensor,
    weight_LOI: torch.Tensor,
    weight_scales: torch.Tensor,
    splits: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``out[rows of e] = rows of e @ weight[e].T``: ``[N, O]`` of ``dtype``.

    ``data [N, I]`` in 1x128 blocks, float8_e4m3fn; ``scales`` float32 ``[N * I / 128]``, for each expert a matrix ``[I
    / 128, rows]``. ``weight [L, O, I]`` in 128x128 blocks, ``weight_scales [L, O / 128, S >= I / 128]``. ``splits``:
    rows of each expert, multiples of 16; I and O are multiples of 128.
    """
    out_NO = torch.empty(data_NI.shape[0], weight_LOI.shape[1], dtype=dtype, device=data_NI.device)
    blocks = data_NI.shape[1] // 128
    used = sum(splits)
    row_data = data_NI.view(torch.uint8)[:used].split(list(splits))
    row_scales = scales[: used * blocks].split([size * blocks for size in splits])
    rows = [
        _storage(data, each.view(blocks, len(data)), is_2d=False, dtype=dtype)
        for data, each in zip(row_data, row_scales, strict=True)
    ]
    pad = -weight_scales.shape[2] % _SCALES
    weight_scales = F.pad(weight_scales, (0, pad)) if pad else weight_scales
    weights = [
        _storage(data, each, is_2d=True, dtype=dtype)
        for data, each in zip(weight_LOI.view(torch.uint8), weight_scales, strict=True)
    ]
    _multiply(weights, rows, [out_NO], "TN", splits, single_output=True)
    return out_NO


def columns_by_columns(
    grad: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    splits: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``out[e] = grad of e.T @ rows of e``: ``[L, O, I]`` of ``dtype``; zero for an expert without rows.

    For each expert ``(data [O, M] or [I, M], scale_inv [ceil(M / 128), O or I])``: columns in blocks of 128 rows.
    """
    shape = len(splits), grad[0][0].shape[0], rows[0][0].shape[0]
    out_LOI = torch.empty(shape, dtype=dtype, device=grad[0][0].device)
    left = [_storage(*each, is_2d=False, dtype=dtype, columns=True) for each in rows]
    right = [_storage(*each, is_2d=False, dtype=dtype, columns=True) for each in grad]
    _multiply(left, right, list(out_LOI), "NT", splits, grad=True)
    return out_LOI


def _storage(
    data: torch.Tensor, scale_inv: torch.Tensor, *, is_2d: bool, dtype: torch.dtype, columns: bool = False
) -> Any:
    """The operand as Transformer Engine knows it. ``dtype``: what it pretends to be."""
    tex, storage = _types()
    operand = data.view(torch.uint8), scale_inv
    parts = (None, None, *operand) if columns else (*operand, None, None)
    return storage(*parts, tex.DType.kFloat8E4M3, None, is_2d, fake_dtype=dtype)


def _multiply(
    a: list[Any], b: list[Any], out: list[torch.Tensor], layout: str, splits: Sequence[int], **options: Any
) -> None:
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_grouped_gemm
    with torch.cuda.device(out[0].device):
        gemm(
            a,
            b,
            out,
            [None] * len(a),
            out[0].dtype,
            layout=layout,
            m_splits=list(splits),
            use_split_accumulator=True,
            **options,
        )


@functools.cache
def _types() -> tuple[Any, Any]:
    tex = importlib.import_module("transformer_engine_torch")
    return tex, importlib.import_module("transformer_engine.pytorch").Float8BlockwiseQTensorStorage
