"""Gathering, placing and adding rows, in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

_CACHE_BYTES = 1 << 20  # a temporary of this size stays in a core's cache


class Passes(NamedTuple):
    """`routing.SumLists` with its sizes on the host."""

    targets: torch.Tensor
    sources: torch.Tensor
    sizes: list[int]


def fit(rows: torch.Tensor, length: int, padding: float = 0.0) -> torch.Tensor:
    """The rows, cut or padded to ``length``."""
    if len(rows) >= length:
        return rows[:length]
    return torch.cat([rows, rows.new_full((length - len(rows), *rows.shape[1:]), padding)])


def expand(arrived: torch.Tensor, row_arrivals: torch.Tensor, padding: float) -> torch.Tensor:
    """The expert layout from the arrivals: row i is ``arrived[row_arrivals[i]]``, or padding where that is -1."""
    if not len(arrived):
        return arrived.new_full((len(row_arrivals), *arrived.shape[1:]), padding)
    rows = arrived.index_select(0, row_arrivals.clamp(min=0))
    nothing = row_arrivals < 0
    return rows.masked_fill_(nothing.view(-1, *[1] * (rows.dim() - 1)), padding)


def expand_blocks(
    sources: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    row_places: torch.Tensor,
    blocks: Sequence[int],
    splits: Sequence[int],
    padding: float,
) -> torch.Tensor:
    """The expert layout from where the arrivals of each source rank lie, which need not be one tensor.

    ``sources[r]`` is a tensor and, if its rows are not the arrivals in their order, their places in it. ``blocks`` are
    the sizes of the (local expert, source rank) blocks, ``splits`` those of the local experts, padding included.
    """
    like = sources[0][0]
    rows = like.new_empty(sum(splits), *like.shape[1:])
    sizes = iter(blocks)
    start = 0
    for split in splits:
        end = start + split
        for tensor, places in sources:
            size = next(sizes)
            if size:
                index = row_places[start : start + size]
                index = index if places is None else places.index_select(0, index)
                torch.index_select(tensor, 0, index, out=rows[start : start + size])
                start += size
        rows[start:end].fill_(padding)
        start = end
    return rows


def add_rows(
    rows: torch.Tensor, sums: Passes, out: torch.Tensor, biases: Sequence[torch.Tensor] = ()
) -> None:
    """``out[targets] += rows[sources]`` pass by pass, starting from the biases; rounded once to ``out``'s dtype.

    A sum starts from its first term; an empty one is +0. Sums of bfloat16 and float16 are kept in float32.
    """
    passes = list(_non_empty(sums))
    exact = out.dtype in (torch.float32, torch.float64)
    nothing_to_add = len(passes) + len(biases) <= 1
    total = out if exact or nothing_to_add else out.new_empty(out.shape, dtype=torch.float32)
    if biases:
        total.copy_(biases[0])
        for bias in biases[1:]:
            total.add_(bias)
    elif not passes:
        total.zero_()
    else:
        _set_first_terms(rows, *passes.pop(0), total)
    for targets, sources in passes:
        if rows.device.type == "cpu":
            _add_in_cache(rows, targets, sources, total)
        else:
            # NOTE: not index_add_, whose atomics take subnormals for zero on CUDA.
            terms = rows.index_select(0, sources).to(total.dtype)
            total.index_copy_(0, targets, terms.add_(total.index_select(0, targets)))
    if total is not out:
        out.copy_(total)


def _non_empty(sums: Passes) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for size, end in zip(sums.sizes, itertools.accumulate(sums.sizes), strict=True):
        if size:
            yield sums.targets[end - size : end], sums.sources[end - size : end]


def _set_first_terms(
    rows: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor, total: torch.Tensor
) -> None:
    if len(targets) == len(total):  # targets are sorted: they are all of them
        if total.dtype == rows.dtype:
            torch.index_select(rows, 0, sources, out=total)
        else:
            total.copy_(rows.index_select(0, sources))
    else:
        total.zero_()
        total.index_copy_(0, targets, rows.index_select(0, sources).to(total.dtype))


def _add_in_cache(rows: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor, total: torch.Tensor) -> None:
    """One pass, in steps so short that the gathered rows need not go to memory and back."""
    step = max(1, _CACHE_BYTES // (rows[0].nbytes or 1))
    for i in range(0, len(targets), step):
        terms = rows.index_select(0, sources[i : i + step])
        total.index_add_(0, targets[i : i + step], terms.to(total.dtype))
