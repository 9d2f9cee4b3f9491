"""Transformer Engine's matrix products, one for each expert; the only file that imports it.

Its modules refuse FP8 input, so `csrc/grouped_gemm` calls what lies below them, the C interface to cuBLASLt, with
operands that were quantised elsewhere. Products run on four streams, so that the end of one lies beside the beginning
of the next.
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

from moe_ep import _extension

from .weight_gradients import Gradients

VERSION = "2.20"
"""What this is written for, and tested with 2.20.2."""

ROW_ALIGNMENT = 16
"""Rows of each expert are a multiple of this in FP8: they are the inner dimension of a weight's gradient."""

_SCALES = 4  # a row of a weight's scales is a multiple of this

_WORKSPACE_BYTES = 32 << 20

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


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
        return f"transformer_engine is {version}; the grouped products are written for {VERSION}"
    if _extension.load() is None:
        return f"moe_ep._C, which calls it, is missing: {_extension.why_missing()}"
    if not _extension.load().grouped_gemm.is_there():
        return "transformer_engine's library does not show its C interface"
    return None


def can_run(device: torch.device) -> bool:
    """Whether the products, FP8 in blocks among them, run on this GPU: Hopper, and Transformer Engine."""
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and why_missing() is None
    )


def rows_by_weights(
    rows_NI: torch.Tensor,
    scales: torch.Tensor | None,
    weight_LOI: torch.Tensor,
    weight_scales: torch.Tensor | None,
    splits: Sequence[int],
    out_NO: torch.Tensor,
) -> None:
    """``out[rows of e] = rows of e @ weight[e].T``: ``[N, O]``, contiguous. ``splits``: rows of each expert.

    Without scales all is of one dtype. In FP8: ``rows [N, I]`` float8_e4m3fn in 1x128 blocks; ``scales`` float32 ``[N *
    I / 128]``, for each expert a matrix ``[I / 128, rows]``; ``weight [L, O, I]`` in 128x128 blocks, ``weight_scales
    [L, O / 128, S >= I / 128]``; splits are multiples of 16, I and O of 128; out is bfloat16 or float32.
    """
    if weight_scales is not None:
        pad = -weight_scales.shape[2] % _SCALES
        weight_scales = F.pad(weight_scales, (0, pad)) if pad else weight_scales
    a, b = _matrices("rows", rows_NI, scales), _matrices("weights", weight_LOI, weight_scales)
    _multiply("rows_by_weights", a, b, _matrices("rows", out_NO), out_NO, splits)


def rows_by_transposed_weights(
    rows_NO: torch.Tensor, weight_LOI: torch.Tensor, splits: Sequence[int]
) -> torch.Tensor:
    """``out[rows of e] = rows of e @ weight[e]``: ``[N, O]`` and ``[L, O, I]`` -> ``[N, I]``, all of one dtype."""
    out_NI = rows_NO.new_empty(rows_NO.shape[0], weight_LOI.shape[2])
    a, b = _matrices("rows", rows_NO), _matrices("weights", weight_LOI)
    _multiply("rows_by_transposed_weights", a, b, _matrices("rows", out_NI), out_NI, splits)
    return out_NI


def rows_by_rows(
    grad_NO: torch.Tensor, rows_NI: torch.Tensor, splits: Sequence[int], into: torch.Tensor | None = None
) -> torch.Tensor:
    """``out[e] = grad of e.T @ rows of e``: ``[L, O, I]``, all of one dtype; zero for an expert without rows.

    ``into``: add to that, and return it.
    """
    shape = len(splits), grad_NO.shape[1], rows_NI.shape[1]
    out_LOI = rows_NI.new_empty(shape) if into is None else into
    a, b = _matrices("rows", grad_NO), _matrices("rows", rows_NI)
    out = _matrices("weights", out_LOI)
    _multiply("columns_by_columns", a, b, out, out_LOI, splits, adds=into is not None)
    return out_LOI


def columns_by_columns(
    grad: torch.Tensor,
    grad_scales: torch.Tensor,
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    in_features: int,
    splits: Sequence[int],
    dtype: torch.dtype,
    into: Gradients | None = None,
) -> Gradients:
    """The same of FP8 columns: ``grad`` in blocks of 128 rows, ``rows`` in tiles of 128 rows by 128 columns.

    For each expert of M rows, one behind the other: ``grad [O, M]`` and ``rows [I, M]`` float8_e4m3fn; ``grad_scales
    [ceil(M / 128), O]``, ``row_scales [I / 128, ceil(M / 128) rounded up to a multiple of 4]`` float32. ``into``: that,
    or an ``[O, I]`` for each expert; contiguous, bfloat16 or float32.
    """
    shape = len(splits), grad_scales.shape[1], in_features
    result = torch.empty(shape, dtype=dtype, device=grad.device) if into is None else into
    a = _matrices("columns", grad, grad_scales, width=shape[1])
    b = _matrices("column_tiles", rows, row_scales, width=shape[2])
    out = _matrices("weights", result) if isinstance(result, torch.Tensor) else _weights_apart(result)
    _multiply("columns_by_columns", a, b, out, result[0], splits, adds=into is not None)
    return result


def _weights_apart(weights: Sequence[torch.Tensor]) -> Any:
    """``[O, I]`` for each expert, each somewhere else."""
    return _matrices("weights", weights[0].unsqueeze(0), places=[weight.data_ptr() for weight in weights])


def _matrices(
    form: str,
    data: torch.Tensor,
    scales: torch.Tensor | None = None,
    width: int | None = None,
    places: Sequence[int] = (),
) -> Any:
    """As `csrc/grouped_gemm` knows them. ``width``: if it is not the data's last dimension."""
    kernels = _extension.load()
    is_weight = form == "weights"
    return kernels.grouped_gemm.Matrices(
        form=getattr(kernels.grouped_gemm.Form, form),
        data=data.data_ptr(),
        scales=0 if scales is None else scales.data_ptr(),
        dtype=getattr(kernels.DType, _DTYPES.get(data.dtype, "float32")),
        width=data.shape[-1] if width is None else width,
        height=data.shape[1] if is_weight else 0,
        scale_width=scales.shape[2] if is_weight and scales is not None else 0,
        places=places,
    )


def _multiply(
    product: str, a: Any, b: Any, out: Any, result: torch.Tensor, splits: Sequence[int], adds: bool = False
) -> None:
    kernels = _extension.load().grouped_gemm
    with torch.cuda.device(result.device):
        stream = torch.cuda.current_stream()
        workspace = _workspaces.get((result.device, stream.cuda_stream))
        if workspace is None:
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=result.device)
            _workspaces[result.device, stream.cuda_stream] = workspace
        kernels.multiply(
            product=getattr(kernels.Product, product),
            a=a,
            b=b,
            out=out,
            adds=adds,
            rows=splits,
            workspace=workspace.data_ptr(),
            workspace_bytes=_WORKSPACE_BYTES,
            stream=stream.cuda_stream,
        )
