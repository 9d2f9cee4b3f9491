"""Which row goes where, for backends that have nothing but messages between ranks.

A *pair* is (token, rank that holds at least one of its experts): one row on the wire. An *entry* is (token, k) with an
expert: one row of the expert layout. Senders order both by (destination rank, token, k), so receivers see them by
(source rank, token, k) and all positions follow from counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import RoutingSpec

NUM_RANGES = 3  # arrivals before this rank's own, its own, and after
MIN_BLOCK_ROWS = 8


class Segments:
    """A tensor's rows by rank: consecutive segments of the given lengths."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        self.starts = [0, *itertools.accumulate(counts)]
        self.total = self.starts[-1]

    def of(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        return rows[self.starts[rank] : self.starts[rank + 1]]


@dataclass(frozen=True)
class SendPlan:
    """This rank's tokens, as a sender."""

    tokens: torch.Tensor  # [S] token of each pair
    entries: torch.Tensor  # [Q] position in topk_idx.flatten() of each entry
    codes: torch.Tensor  # [Q] what the receiver must know of each entry, see `encode`
    entry_ranks: torch.Tensor  # [Q] where each entry goes
    counts: torch.Tensor  # [2, R] pairs and entries for each rank
    sums: SumLists  # how the rows that come back add up to tokens: lists [K, R], sources counted within their rank


@dataclass(frozen=True)
class SumLists:
    """Sums of ragged lists of rows, ``out[targets[i]] += rows[sources[i]]``, in lists without a target twice.

    Slot j holds the j-th term of every sum, so that the terms of one sum are added in a fixed order. Entries are
    sorted by (list, target); ``sizes`` says how long each list is.
    """

    targets: torch.Tensor
    sources: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class ReceivePlan:
    """The arrivals (rows in the order of the rank layout) and where they go."""

    tokens_per_expert: torch.Tensor  # [L]
    padded_tokens_per_expert: torch.Tensor  # [L]
    rows: (
        torch.Tensor
    )  # rank layout: local expert ids [N, K]; expert layout: arrival of each row [N], -1 = padding
    rows_needed: torch.Tensor  # [1]
    splits: torch.Tensor  # [L] rows of each local expert in the output
    blocks: (
        torch.Tensor
    )  # [L * R] on the host: rows of each (local expert, source rank); [0] where they are not of use
    row_places: (
        torch.Tensor
    )  # [N] place of each row within its source rank's arrivals, if there are blocks; else [0]
    entry_rows: (
        torch.Tensor
    )  # [P] flat position of each arrived entry among the row weights; the last one + 1 = dropped
    sums: SumLists  # how expert rows add up to arrivals: lists [NUM_RANGES, K], targets counted within their range


def plan_sends(topk_idx: torch.Tensor, spec: RoutingSpec) -> SendPlan:
    """``topk_idx [T, K]`` int64, ids already checked."""
    num_ranks = spec.num_experts // spec.num_local_experts
    num_topk = topk_idx.shape[1]
    device = topk_idx.device
    flat_idx = topk_idx.flatten()
    rank_of = torch.where(flat_idx < 0, num_ranks, flat_idx // spec.num_local_experts)
    ranks, entries = rank_of.sort(stable=True)
    per_rank = torch.bincount(ranks, minlength=num_ranks + 1)[:num_ranks]
    num_entries = flat_idx.numel() - int((flat_idx < 0).sum())
    ranks, entries = ranks[:num_entries], entries[:num_entries]
    tokens = entries // num_topk

    new_pair = torch.ones(num_entries, dtype=torch.bool, device=device)
    new_pair[1:] = (tokens[1:] != tokens[:-1]) | (ranks[1:] != ranks[:-1])
    starts = new_pair.nonzero().flatten()
    pairs_per_rank = torch.bincount(ranks[starts], minlength=num_ranks)
    codes = encode(flat_idx[entries] % spec.num_local_experts, entries % num_topk, new_pair, num_topk)

    # The owner adds the ranks of a token in ascending order of the highest k that each served: a pair's last entry.
    last = torch.ones_like(new_pair)
    last[:-1] = new_pair[1:]
    last_entries = entries[last]
    is_last = torch.zeros(flat_idx.numel(), dtype=torch.int64, device=device)
    is_last[last_entries] = 1
    slots = (is_last.view(-1, num_topk).cumsum(1) - 1).flatten()[last_entries]
    pair_ranks, pair_tokens = ranks[starts], tokens[starts]
    within = (
        torch.arange(len(starts), device=device) - (pairs_per_rank.cumsum(0) - pairs_per_rank)[pair_ranks]
    )
    sums = _sum_lists(slots * num_ranks + pair_ranks, pair_tokens, within, num_topk * num_ranks)
    counts = torch.stack([pairs_per_rank, per_rank])
    return SendPlan(pair_tokens, entries, codes, ranks, counts, sums)


def encode(expert: torch.Tensor, k: torch.Tensor, new_pair: torch.Tensor, num_topk: int) -> torch.Tensor:
    """One int32 per entry: its local expert, its k, and whether it begins a pair."""
    return ((expert * num_topk + k) * 2 + new_pair).int()


def plan_receives(codes: torch.Tensor, arrivals: Segments, rank: int, spec: RoutingSpec) -> ReceivePlan:
    """``codes [P]`` in the order (source rank, token, k); ``arrivals`` by source rank."""
    device = codes.device
    codes = codes.long()
    own = arrivals.starts[rank], arrivals.starts[rank + 1]
    num_topk, num_local = spec.num_topk, spec.num_local_experts
    new_arrival = codes & 1
    k = (codes >> 1) % num_topk
    expert = (codes >> 1) // num_topk
    arrival = new_arrival.cumsum(0) - 1

    counts = torch.bincount(expert, minlength=num_local)
    alignment = spec.expert_alignment
    padded = (counts + alignment - 1) // alignment * alignment
    if spec.layout == "rank":
        return _plan_rank_layout(expert, k, arrival, counts, arrivals.total, spec)

    ends = padded.cumsum(0)
    num_needed = int(ends[-1])
    num_rows = num_needed if spec.max_recv_rows is None else spec.max_recv_rows
    order = expert.argsort(stable=True)
    sorted_expert = expert[order]
    place = torch.arange(len(codes), device=device) - (counts.cumsum(0) - counts)[sorted_expert]
    entry_rows = torch.empty_like(codes)
    entry_rows[order] = (ends - padded)[sorted_expert] + place
    entry_rows.clamp_(max=num_rows)
    row_arrivals = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
    row_arrivals[entry_rows] = arrival
    row_arrivals[num_rows] = -1

    kept = entry_rows < num_rows
    position = kept.cumsum(0) - kept.long()  # kept entries before this one
    first_entry = new_arrival.nonzero().flatten()
    slot = position - position[first_entry][arrival]
    range_of = (arrival >= own[0]).long() + (arrival >= own[1]).long()
    starts = torch.tensor([0, *own], device=device)
    sums = _sum_lists(
        (range_of * num_topk + slot)[kept],
        (arrival - starts[range_of])[kept],
        entry_rows[kept],
        NUM_RANGES * num_topk,
    )
    splits = (ends.clamp(max=num_rows) - (ends - padded).clamp(max=num_rows)).cpu()
    rows = row_arrivals[:num_rows]
    blocks, row_places = _plan_blocks(sorted_expert, arrival[order], rows, arrivals, spec)
    return ReceivePlan(counts, padded, rows, ends[-1:].clone(), splits, blocks, row_places, entry_rows, sums)


def _plan_blocks(
    sorted_expert: torch.Tensor,
    sorted_arrival: torch.Tensor,
    rows: torch.Tensor,
    arrivals: Segments,
    spec: RoutingSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes and places of the blocks of rows that have one expert and one source rank.

    On a CPU, rows of a block are gathered from where the source's arrivals lie straight to where they belong. That is
    worth a call for each block only if blocks are long.
    """
    num_ranks = len(arrivals.counts)
    num_blocks = spec.num_local_experts * num_ranks
    on_cpu = rows.device.type == "cpu"
    if not on_cpu or spec.max_recv_rows is not None or len(rows) < MIN_BLOCK_ROWS * num_blocks:
        return torch.empty(0, dtype=torch.int64, device="cpu"), rows.new_empty(0)
    starts = torch.tensor(arrivals.starts, device=sorted_arrival.device)
    source = torch.searchsorted(starts, sorted_arrival, right=True) - 1
    blocks = torch.bincount(sorted_expert * num_ranks + source, minlength=num_blocks)
    row_source = torch.searchsorted(starts, rows, right=True) - 1
    return blocks, rows - starts[row_source.clamp(min=0)]


def _plan_rank_layout(
    expert: torch.Tensor,
    k: torch.Tensor,
    arrival: torch.Tensor,
    counts: torch.Tensor,
    num_arrivals: int,
    spec: RoutingSpec,
) -> ReceivePlan:
    num_topk = spec.num_topk
    num_rows = num_arrivals if spec.max_recv_rows is None else spec.max_recv_rows
    entry_rows = torch.where(arrival < num_rows, arrival * num_topk + k, num_rows * num_topk)
    ids = torch.full((num_rows * num_topk + 1,), -1, dtype=torch.int64, device=expert.device)
    ids[entry_rows] = expert
    no_sums = SumLists(*(torch.empty(0, dtype=torch.int64, device=expert.device) for _ in range(3)))
    needed = torch.tensor([num_arrivals], device=expert.device)
    ids = ids[: num_rows * num_topk].view(num_rows, num_topk).contiguous()
    splits = counts.to("cpu", copy=True)
    blocks, row_places = torch.empty(0, dtype=torch.int64, device="cpu"), ids.new_empty(0)
    return ReceivePlan(counts, counts.clone(), ids, needed, splits, blocks, row_places, entry_rows, no_sums)


def _sum_lists(lists: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor, num_lists: int) -> SumLists:
    order = (lists * (int(targets.max()) + 1 if len(targets) else 1) + targets).argsort()
    return SumLists(targets[order], sources[order], torch.bincount(lists, minlength=num_lists))
