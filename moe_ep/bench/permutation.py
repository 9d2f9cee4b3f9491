"""The index lists with which torch's own operators permute rows around an all-to-all."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Permutation:
    """One rank's side of a routing. *Arrivals* are the tokens that come to this rank, its own among them.

    Arrivals lie in a *pool*, those from other ranks together, by (source, token): at its end on rank 0, else at its
    start, so that on the first and the last rank the pool is in the order of the rank layout.
    """

    own_tokens: torch.Tensor
    """Tokens of this rank that stay here."""
    sent_tokens: torch.Tensor
    """Tokens to send, by (destination, token)."""
    send_counts: list[int]
    receive_counts: list[int]
    """Rows by peer; 0 for this rank."""
    own_first: bool
    order: torch.Tensor | None
    """``[N]`` place in the pool of each row of the output; one past the pool's end for padding; None: row i is at i."""
    entry_rows: torch.Tensor | None
    entry_starts: torch.Tensor | None
    """Expert layout: the output rows of each place in the pool, and where each place's begin."""
    pair_rows: torch.Tensor
    pair_starts: torch.Tensor
    """The rows [own tokens or received back] of each token of this rank, and where each token's begin."""

    @property
    def num_received(self) -> int:
        return sum(self.receive_counts)

    @property
    def num_arrivals(self) -> int:
        return self.num_received + len(self.own_tokens)


def permutation(
    topk_idx: list[torch.Tensor], rank: int, num_experts: int, layout: str, alignment: int
) -> Permutation:
    """The lists of ``rank``, from the routing ``topk_idx[r] [T, K]`` of every rank r; on the CPU."""
    num_ranks = len(topk_idx)
    per_rank = num_experts // num_ranks
    is_here = [(ids // per_rank == rank) & (ids >= 0) for ids in topk_idx]
    arriving = [here.any(1).nonzero().flatten() for here in is_here]
    goes_to = [(topk_idx[rank] // per_rank == r).any(1).nonzero().flatten() for r in range(num_ranks)]
    others = [r for r in range(num_ranks) if r != rank]
    own = arriving[rank]

    own_first = rank == 0
    sources = [rank, *others] if own_first else [*others, rank]
    starts, place = {}, 0
    for source in sources:
        starts[source] = place
        place += len(arriving[source])
    places = torch.cat([starts[r] + torch.arange(len(arriving[r])) for r in range(num_ranks)])

    order, entry_rows, entry_starts = places, None, None
    if layout == "expert":
        order, entry_rows, entry_starts = _expert_order(topk_idx, is_here, places, rank, per_rank, alignment)
    elif torch.equal(places, torch.arange(len(places))):
        order = None

    # What comes back lies by (serving rank, token), behind this rank's own rows.
    returned = [own, *(goes_to[r] for r in others)]
    tokens = torch.cat(returned)
    by_token = tokens.argsort(stable=True)
    return Permutation(
        own_tokens=own,
        sent_tokens=torch.cat([goes_to[r] for r in others] or [own[:0]]),
        send_counts=[0 if r == rank else len(goes_to[r]) for r in range(num_ranks)],
        receive_counts=[0 if r == rank else len(arriving[r]) for r in range(num_ranks)],
        own_first=own_first,
        order=order,
        entry_rows=entry_rows,
        entry_starts=entry_starts,
        pair_rows=by_token,
        pair_starts=_starts(torch.bincount(tokens, minlength=len(topk_idx[rank]))),
    )


def _expert_order(
    topk_idx: list[torch.Tensor],
    is_here: list[torch.Tensor],
    places: torch.Tensor,
    rank: int,
    per_rank: int,
    alignment: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the expert layout: (place in the pool of each row, rows by place, where each place's begin)."""
    experts = torch.cat([ids[here] for ids, here in zip(topk_idx, is_here, strict=True)]) - rank * per_rank
    per_arrival = torch.cat([here.sum(1) for here in is_here])
    per_arrival = per_arrival[per_arrival > 0]
    entry_places = places.repeat_interleave(per_arrival)

    counts = torch.bincount(experts, minlength=per_rank)
    padded = (counts + alignment - 1) // alignment * alignment
    by_expert = experts.argsort(stable=True)
    within = torch.arange(len(experts)) - _starts(counts).repeat_interleave(counts)
    rows_by_expert = _starts(padded).repeat_interleave(counts) + within
    rows = torch.empty_like(rows_by_expert)
    rows[by_expert] = rows_by_expert

    order = torch.full((int(padded.sum()),), len(places))
    order[rows] = entry_places
    by_place = entry_places.argsort(stable=True)
    return order, rows[by_place], _starts(torch.bincount(entry_places, minlength=len(places)))


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0) - counts
