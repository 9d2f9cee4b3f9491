"""Numbers that travel with rows, as 32-bit words behind each: packed, and unpacked.

On GPUs one kernel fills all columns of a call (csrc/deep_ep); elsewhere torch does, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from ... import _extension
from ...errors import InvalidInput

_WORDS_MULTIPLE = 4  # whole 16 bytes go by the kernels' bulk copies


class Ids(NamedTuple):
    """Expert ids ``[T, K]``, int64 or int32. They travel one higher, so that rows without a token, zeros, name none."""

    ids: torch.Tensor


@dataclass(frozen=True)
class Column:
    """What fills ``target [M, n]`` from ``source [m, n]``, m <= M, both of any strides; rows behind the m become 0.

    ``source`` is of a 32-bit dtype, int64 or bool; ``target`` of a 32-bit one or int64. ``how``:

    - "copy": as it is
    - "next": one higher
    - "place": the number of the column where the source is not 0, else -1
    - "local": ids that have travelled, as ids of the ``count`` experts from ``first`` on; -1 for others
    - "masked": as it is where ``ids``, which have travelled, int32, are of these experts; else 0
    """

    source: torch.Tensor
    target: torch.Tensor
    how: str = "copy"
    ids: torch.Tensor | None = None
    first: int = 0
    count: int = 0


def fill(columns: Sequence[Column]) -> None:
    """Fill the targets, on the current stream."""
    if not columns:
        return
    device = columns[0].target.device
    kernels = _extension.load_for(device) if device.type == "cuda" else None
    if kernels is None:
        for column in columns:
            fill_by_torch(column)
        return
    most = kernels.deep_ep.MAX_COLUMNS
    with torch.cuda.device(device):
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for begin in range(0, len(columns), most):
            described = [_describe(column, kernels.deep_ep) for column in columns[begin : begin + most]]
            kernels.deep_ep.fill_columns(described, stream)


def fill_by_torch(column: Column) -> None:
    """The same by torch's operators."""
    source, target = column.source, column.target
    if column.how == "next":
        source = source + 1
    elif column.how == "place":
        places = torch.arange(source.shape[1], dtype=target.dtype, device=source.device)
        source = torch.where(source != 0, places, -1)
    elif column.how == "local":
        source = _local_ids(source, column)
    elif column.how == "masked":
        source = torch.where(_local_ids(column.ids, column) >= 0, source, 0)
    target[: len(source)] = source
    target[len(source) :] = 0


def pack(numbers: Sequence[torch.Tensor | Ids], also: Sequence[Column] = ()) -> torch.Tensor | None:
    """32-bit words ``[T, n]`` of all ``numbers [T, ...]``, side by side; None if there are none.

    Tensors are of 32-bit dtypes and any strides. ``also``: columns to fill on the way.
    """
    if len(numbers) == 1 and isinstance(numbers[0], torch.Tensor) and numbers[0].is_contiguous():
        fill(also)
        return numbers[0].view(torch.int32)
    if not numbers:
        fill(also)
        return None
    tensors = [each.ids if isinstance(each, Ids) else each for each in numbers]
    width = sum(each.shape[1] for each in tensors)
    # NOTE: that one tensor is sent as it is and another one packed must not show: ranks may differ in that.
    filling = -width % _WORDS_MULTIPLE if len(tensors) > 1 else 0
    words = torch.empty((len(tensors[0]), width + filling), dtype=torch.int32, device=tensors[0].device)
    columns = []
    begin = 0
    for number, tensor in zip(numbers, tensors, strict=True):
        is_ids = isinstance(number, Ids)
        target = part(words, begin, tensor.shape[1], torch.int32 if is_ids else tensor.dtype)
        columns.append(Column(tensor, target, "next" if is_ids else "copy"))
        begin += tensor.shape[1]
    fill([*columns, *also])
    return words


def part(words: torch.Tensor, begin: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Some of the words, as what they were packed from; a view."""
    return words.view(dtype)[:, begin : begin + width]


def unpack(words: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors ``[N, ...]`` of the dtypes and widths of ``like``, which were packed in this order."""
    if len(like) == 1:
        return [words.view(like[0].dtype)]
    columns = []
    begin = 0
    for each in like:
        width = each.shape[1]
        target = each.new_empty((len(words), width))
        columns.append(Column(part(words, begin, width, each.dtype), target))
        begin += width
    fill(columns)
    return [column.target for column in columns]


def _local_ids(travelled: torch.Tensor, column: Column) -> torch.Tensor:
    ids = travelled - (1 + column.first)
    return torch.where((ids >= 0) & (ids < column.count), ids, -1)


_Numbers = tuple[int, object, int, int]


def _describe(column: Column, kernels: ModuleType) -> tuple:
    """A column of csrc/deep_ep/columns.h."""
    source, target = column.source, column.target
    ids = source if column.ids is None else column.ids
    return (
        _describe_numbers(source, kernels),
        _describe_numbers(target, kernels),
        _describe_numbers(ids, kernels),
        source.shape[0],
        target.shape[0],
        target.shape[1],
        getattr(kernels.How, column.how),
        column.first,
        column.count,
    )


def _describe_numbers(numbers: torch.Tensor, kernels: ModuleType) -> _Numbers:
    dtype = numbers.dtype
    if dtype == torch.int64:
        kind = kernels.Number.int64
    elif dtype == torch.bool:
        kind = kernels.Number.uint8
    elif dtype.itemsize == 4:
        kind = kernels.Number.int32
    else:
        raise InvalidInput(
            f"numbers beside rows are {dtype}; they must be of a dtype of 4 bytes, int64 or bool"
        )
    return numbers.data_ptr(), kind, numbers.stride(0), numbers.stride(1)
