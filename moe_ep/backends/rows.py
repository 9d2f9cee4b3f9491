"""Gathering, placing and adding rows: in plain torch, on a CPU with the kernels of csrc/cpu where they are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _extension

_CACHE_BYTES = 1 << 20
_MAX_STEPS = 256


class Terms(NamedTuple):
    """``rows[sources[i]]`` is a term of the sum ``targets[i]``; no target twice, in ascending order."""

    rows: torch.Tensor
    targets: torch.Tensor
    sources: torch.Tensor


def gather_rows(
    rows: torch.Tensor, index: torch.Tensor, out: torch.Tensor, part_of: torch.Tensor | None = None
) -> None:
    """``out[i] = rows[index[i]]``; all contiguous. ``part_of``: the result that ``out`` is a part of."""
    kernels = _extension.load_cpu() if out.device.type == "cpu" else None
    if kernels is None:
        torch.index_select(rows, 0, index, out=out)
    elif len(out):
        kernels.gather_rows(
            source=rows.data_ptr(),
            index=index.data_ptr(),
            count=len(index),
            row_bytes=out[0].nbytes,
            target=out.data_ptr(),
            result_bytes=(out if part_of is None else part_of).nbytes,
        )


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
                gather_rows(tensor, index, rows[start : start + size], part_of=rows)
                start += size
        rows[start:end].fill_(padding)
        start = end
    return rows


def add_rows(
    first: Sequence[Terms], more: Sequence[Terms], out: torch.Tensor, biases: Sequence[torch.Tensor] = ()
) -> None:
    """``out[i]`` = biases, then the first terms, then ``more`` in order; rounded once to ``out``'s dtype.

    Of ``first`` no two have a target in common. A sum starts from its first term; an empty one is +0. Sums of bfloat16
    and float16 are kept in float32.
    """
    first, more = ([terms for terms in lists if len(terms.targets)] for lists in (first, more))
    if not len(out) or _add_with_kernel([*first, *more], out, biases):
        return
    on_cpu = out.device.type == "cpu"
    step = _rows_in_cache(out, len(first) + len(more)) if on_cpu else len(out)
    edges = torch.arange(0, len(out) + step, step, device=out.device)
    if step < len(out):
        bounds = [torch.searchsorted(terms.targets, edges).tolist() for terms in (*first, *more)]
    else:
        bounds = [[0, len(terms.targets)] for terms in (*first, *more)]
    exact = out.dtype in (torch.float32, torch.float64)
    for i, start in enumerate(range(0, len(out), step)):
        here = out[start : start + step]
        cut = [
            Terms(terms.rows, terms.targets[b[i] : b[i + 1]] - start, terms.sources[b[i] : b[i + 1]])
            for terms, b in zip((*first, *more), bounds, strict=True)
        ]
        firsts, others = cut[: len(first)], cut[len(first) :]
        copies = not biases and not any(len(terms.targets) for terms in others)
        total = here if exact or copies else here.new_empty(here.shape, dtype=torch.float32)
        if biases:
            total.copy_(biases[0][start : start + step])
            for bias in biases[1:]:
                total.add_(bias[start : start + step])
            others = [*firsts, *others]
        else:
            _set_first_terms(firsts, total)
        for terms in others:
            _add_terms(terms, total)
        if total is not here:
            here.copy_(total)


def _add_with_kernel(lists: list[Terms], out: torch.Tensor, biases: Sequence[torch.Tensor]) -> bool:
    """`add_rows` in one pass over memory; False if there is no kernel for it."""
    kernels = _extension.load_cpu() if out.device.type == "cpu" else None
    dtype = getattr(kernels.DType, str(out.dtype).removeprefix("torch."), None) if kernels else None
    if dtype is None:
        return False
    every = torch.arange(len(out), device=out.device)
    lists = [*(Terms(bias.contiguous(), every, every) for bias in biases), *lists]
    kernels.sum_rows(
        out=out.data_ptr(),
        rows=len(out),
        width=out[0].numel(),
        dtype=dtype,
        lists=[(*(tensor.data_ptr() for tensor in terms), len(terms.targets)) for terms in lists],
    )
    return True


def _set_first_terms(first: Sequence[Terms], total: torch.Tensor) -> None:
    if sum(len(terms.targets) for terms in first) < len(total):
        total.zero_()
    for rows, targets, sources in first:
        if len(targets) == len(total) and total.dtype == rows.dtype:  # all of them, and in order
            torch.index_select(rows, 0, sources, out=total)
        elif len(targets):
            total.index_copy_(0, targets, rows.index_select(0, sources).to(total.dtype))


def _add_terms(terms: Terms, total: torch.Tensor) -> None:
    if not len(terms.targets):
        return
    values = terms.rows.index_select(0, terms.sources).to(total.dtype)
    if total.device.type == "cpu":
        total.index_add_(0, terms.targets, values)
    else:
        # NOTE: not index_add_, whose atomics take subnormals for zero on CUDA.
        total.index_copy_(0, terms.targets, total.index_select(0, terms.targets).add_(values))


def _rows_in_cache(out: torch.Tensor, num_lists: int) -> int:
    """Rows of ``out`` to finish at a time, so that sums and gathered terms need not go to memory and back."""
    in_cache = _CACHE_BYTES // max(1, out[0].nbytes)
    at_least = len(out) * num_lists // _MAX_STEPS  # each step costs a few calls for every list
    return max(16, in_cache, at_least)
