"""Tables of low-latency calls, and what is done by them: rows to their experts' places, and back into sums.

This is what is left of the calls around moe_ep's dispatch and combine. Shapes are fixed, so that the device need not
tell the host a number. Where there are kernels for low-latency calls, these do all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .utils.math import pack_ue8m0

Hook = Callable[[], None]


class Dispatched(NamedTuple):
    """What a low-latency dispatch gives, by this rank's L experts with room for R * T rows each.

    ``rows``: ``[L, R * T, H]`` and, of FP8, scales. ``counts [L]`` and ``source_token [L, R * T]`` int32. ``ranges
    [L, R]`` int64: the first row from rank r in the upper 32 bits, the number of rows in the lower. ``sent``: what
    combine needs; of the calls' own kind.
    """

    rows: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    source_token: torch.Tensor
    ranges: torch.Tensor
    sent: Any


class Tables(NamedTuple):
    """Where rows lie, for the M = R * T rows that a rank may receive.

    ``slots [M, K]`` int64: a row's place among all experts' ``L * R * T``, for each of its token's experts, or -1.
    ``source_rank``, ``source_token`` ``[M]`` int32, -1 for rows that hold no token.
    """

    slots: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor
    per_expert_and_rank: torch.Tensor  # int64 [L, R]


def make_tables(
    ids: torch.Tensor,
    sources: torch.Tensor,
    tokens: torch.Tensor,
    num_local_experts: int,
    num_ranks: int,
    capacity: int,
) -> Tables:
    """From the rows' local expert ids ``[M, K]`` (-1 for none): rows of an expert are in the order of arrival."""
    present = ids.new_zeros((len(ids), num_local_experts + 1))
    present.scatter_(1, torch.where(ids < 0, num_local_experts, ids), 1)
    present = present[:, :num_local_experts]
    place = (present.cumsum(0) - 1).gather(1, ids.clamp(min=0))
    slots = torch.where(ids < 0, -1, ids * capacity + place)
    per_rank = present.new_zeros((num_ranks + 1, num_local_experts))
    per_rank.index_add_(0, torch.where(sources < 0, num_ranks, sources), present)
    return Tables(slots, sources, tokens, per_rank[:num_ranks].t().contiguous())


def row_ranges(tables: Tables) -> torch.Tensor:
    """`Dispatched.ranges`."""
    counts = tables.per_expert_and_rank
    begins = counts.cumsum(1) - counts
    return (begins << 32) | counts


def expand(
    received: tuple[torch.Tensor, ...], tables: Tables, shape: tuple[int, int], as_exponents: bool
) -> tuple[tuple[torch.Tensor, ...], Hook]:
    """The received rows in each of their experts' places: memory, and what fills it."""
    rows, fill_rows = scattered(received[0], tables.slots, shape)
    if len(received) == 1:
        return (rows,), fill_rows
    scales = pack_ue8m0(received[1]) if as_exponents else received[1]
    places, fill_places = scattered(scales, tables.slots, shape)
    # Column-major in the last two dimensions, as bulk copies of a matrix product want them.
    columns = places.new_empty((shape[0], places.shape[2], shape[1])).transpose(1, 2)

    def fill() -> None:
        fill_rows()
        fill_places()
        columns.copy_(places)

    return (rows, columns), fill


def add_up(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[M, H]`` in the dtype of ``rows``: weighted sums by ascending k in float32; rows without a slot aren't read."""
    total = torch.zeros((len(slots), rows.shape[1]), dtype=torch.float32, device=rows.device)
    for k in range(slots.shape[1]):
        slot = slots[:, k]
        term = rows.index_select(0, slot.clamp(min=0)).float() * weights[:, k : k + 1]
        total += torch.where(slot.unsqueeze(1) >= 0, term, 0.0)
    return total.to(rows.dtype)


def scattered(rows: torch.Tensor, slots: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, Hook]:
    """``[L, R * T, n]``, and what copies ``rows [M, n]`` there."""
    num_slots = shape[0] * shape[1]
    # One more row takes what has no slot, so that the device need not count.
    memory = rows.new_empty((num_slots + 1, rows.shape[1]))
    target = torch.where(slots < 0, num_slots, slots)

    def fill() -> None:
        for k in range(slots.shape[1]):
            _bytes(memory).index_copy_(0, target[:, k], _bytes(rows))

    return memory[:-1].view(*shape, rows.shape[1]), fill


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: not every operator knows it."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows
