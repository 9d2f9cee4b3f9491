"""Checks of arguments, made on the host before anything is sent.

Each message says what was seen, what is allowed, and what to do.
"""

from __future__ import annotations

import torch

from . import fp8
from .backends.base import LAYOUTS
from .communicator import Communicator
from .errors import InvalidInput
from .handle import DispatchHandle

ROW_BYTES_MULTIPLE = 16
TOKEN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPE_NAMES = "float64, float32, bfloat16 or float16"


def check_tokens(name: str, x: torch.Tensor, comm: Communicator, num_rows: int | None = None) -> None:
    """``x`` is ``[rows, H]`` of the communicator's width."""
    if not isinstance(x, torch.Tensor):
        raise InvalidInput(f"{name} is a {type(x).__name__}; it must be a tensor or Fp8Tokens")
    if x.dim() != 2 or x.shape[1] != comm.hidden:
        raise InvalidInput(
            f"{name} has shape {tuple(x.shape)}; it must be [rows, {comm.hidden}], the communicator's hidden"
        )
    if x.dtype not in TOKEN_DTYPES:
        raise InvalidInput(f"{name} is {x.dtype}; allowed are {_DTYPE_NAMES}, and Fp8Tokens for dispatch")
    _check_contiguous(name, x)
    row_bytes = comm.hidden * x.element_size()
    if row_bytes % ROW_BYTES_MULTIPLE:
        raise InvalidInput(
            f"a row of {name} has {row_bytes} bytes (hidden {comm.hidden}, {x.dtype}); it must be a multiple of "
            f"{ROW_BYTES_MULTIPLE} bytes: use a hidden that is a multiple of {ROW_BYTES_MULTIPLE // x.element_size()}"
        )
    if num_rows is not None and x.shape[0] != num_rows:
        raise InvalidInput(f"{name} has {x.shape[0]} rows; this handle's dispatch had {num_rows}")


def check_fp8_tokens(name: str, x: fp8.Fp8Tokens, comm: Communicator) -> None:
    if x.shape[1] != comm.hidden:
        raise InvalidInput(
            f"{name} has shape {tuple(x.shape)}; it must be [rows, {comm.hidden}], the communicator's hidden"
        )
    check_fp8_hidden(comm)
    _check_contiguous(f"{name}.data", x.data)
    _check_contiguous(f"{name}.scale_inv", x.scale_inv)


def check_fp8_hidden(comm: Communicator) -> None:
    if comm.hidden % ROW_BYTES_MULTIPLE:
        raise InvalidInput(f"hidden is {comm.hidden}; FP8 rows need a multiple of {ROW_BYTES_MULTIPLE}")


def check_num_tokens(num_tokens: int, comm: Communicator) -> None:
    if num_tokens > comm.max_tokens_per_rank:
        raise InvalidInput(
            f"x has {num_tokens} tokens, more than this communicator's max_tokens_per_rank={comm.max_tokens_per_rank}"
        )


def check_topk_idx(topk_idx: torch.Tensor, num_tokens: int, device: torch.device, comm: Communicator) -> None:
    """Shape, dtype and device; the values are checked by `moe_ep.ids`."""
    if not isinstance(topk_idx, torch.Tensor):
        raise InvalidInput(f"topk_idx is a {type(topk_idx).__name__}; it must be an int64 or int32 tensor")
    if topk_idx.dtype not in (torch.int64, torch.int32):
        raise InvalidInput(f"topk_idx is {topk_idx.dtype}; allowed are int64 and int32")
    if topk_idx.shape != (num_tokens, comm.num_topk):
        raise InvalidInput(
            f"topk_idx has shape {tuple(topk_idx.shape)}; it must be {(num_tokens, comm.num_topk)}: "
            "one row for each row of x, num_topk columns"
        )
    _check_device("topk_idx", topk_idx, device)
    _check_contiguous("topk_idx", topk_idx)


def check_topk_weights(
    weights: torch.Tensor, num_tokens: int, x_dtype: torch.dtype, device: torch.device, comm: Communicator
) -> None:
    if not isinstance(weights, torch.Tensor):
        raise InvalidInput(f"topk_weights is a {type(weights).__name__}; it must be a float32 tensor or None")
    if weights.dtype != torch.float32 and (weights.dtype, x_dtype) != (torch.float64, torch.float64):
        raise InvalidInput(
            f"topk_weights is {weights.dtype}; it must be float32 (or float64 beside a float64 x)"
        )
    if weights.shape != (num_tokens, comm.num_topk):
        raise InvalidInput(
            f"topk_weights has shape {tuple(weights.shape)}; it must be topk_idx's, {(num_tokens, comm.num_topk)}"
        )
    _check_device("topk_weights", weights, device)
    _check_contiguous("topk_weights", weights)


def check_layout(layout: str, expert_alignment: int, max_recv_rows: int | None) -> None:
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout is {layout!r}; allowed are {' and '.join(map(repr, LAYOUTS))}")
    if not isinstance(expert_alignment, int) or expert_alignment < 1:
        raise InvalidInput(f"expert_alignment is {expert_alignment!r}; it must be an int of at least 1")
    if layout == "rank" and expert_alignment != 1:
        raise InvalidInput(
            f"expert_alignment is {expert_alignment} with layout='rank', whose rows are not grouped by expert; "
            "leave it at 1"
        )
    if max_recv_rows is not None and (not isinstance(max_recv_rows, int) or max_recv_rows < 0):
        raise InvalidInput(f"max_recv_rows is {max_recv_rows!r}; it must be None or an int of at least 0")


def check_fp8_mode(name: str, mode: str | None, dtype: torch.dtype | None = None) -> None:
    """``dtype`` is that of the tensor to be quantised, if there is one."""
    if mode is None:
        return
    if mode not in fp8.MODES:
        raise InvalidInput(f"{name} is {mode!r}; allowed are None and {', '.join(map(repr, fp8.MODES))}")
    if dtype not in (None, *fp8.QUANTISABLE):
        raise InvalidInput(
            f"{name} is {mode!r} with {dtype}; only bfloat16, float16 and float32 are quantised"
        )


def check_handle(handle: DispatchHandle, comm: Communicator) -> None:
    if not isinstance(handle, DispatchHandle):
        raise InvalidInput(f"handle is a {type(handle).__name__}; it must be the handle of a dispatch")
    if handle.communicator_id != comm.id:
        raise InvalidInput(
            "handle was made by another communicator; use it with the one whose dispatch returned it"
        )


def check_biases(biases: tuple[torch.Tensor, ...], rows: torch.Tensor, num_tokens: int) -> None:
    for i, bias in enumerate(biases):
        if not isinstance(bias, torch.Tensor):
            raise InvalidInput(f"bias {i} is a {type(bias).__name__}; it must be a tensor")
        wanted = num_tokens, rows.shape[1]
        if bias.shape != wanted or bias.dtype != rows.dtype:
            raise InvalidInput(
                f"bias {i} is {bias.dtype} of shape {tuple(bias.shape)}; it must be {rows.dtype} of shape {wanted}, "
                "as the result"
            )
        _check_device(f"bias {i}", bias, rows.device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidInput(f"{name} is on {tensor.device}; it must be on the tokens' device, {device}")


def _check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise InvalidInput(f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous() on it")
