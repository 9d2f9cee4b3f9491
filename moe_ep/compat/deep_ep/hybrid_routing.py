"""Routing as HybridEPBuffer's callers give it: maps of experts, or ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import InvalidInput
from .elastic_sizes import align
from .transport import Communicators, check_numbers

TOO_MANY = -2
"""In place of a token's first id: the token has more experts than columns. No dispatch takes it for an expert."""

_TOPK_STEP = 8


@dataclass(frozen=True)
class Choice:
    """topk_idx: ``[N, K]``, -1 for none. weights: float32 ``[N, K]``; dense: the same by expert ``[N, E]``; or None."""

    topk_idx: torch.Tensor
    weights: torch.Tensor | None
    dense: torch.Tensor | None


class Room:
    """How much there may be of what all ranks must make room for alike: tokens of a rank, experts of a token.

    ``max_tokens``: a first guess, which may differ by rank.
    """

    def __init__(self, ranks: Communicators, max_tokens: int) -> None:
        self._ranks = ranks
        self._guess = max_tokens
        self._topk_of_maps: dict[int, int] = {}
        self.max_tokens = 0

    def make(self, num_tokens: int, routing_map: torch.Tensor | None, may_wait: bool) -> None:
        """Room for a call with so many tokens here, and this map ``[N, E]`` if ids are not given.

        Collective. ``may_wait``: so may the host; ranks then find out what the others need. Otherwise they do so only
        where nothing is known yet, or all of them have more tokens than there is room for.
        """
        num_experts = 0 if routing_map is None else routing_map.shape[1]
        known = self.max_tokens >= max(1, num_tokens) and (
            routing_map is None or num_experts in self._topk_of_maps
        )
        if known and not may_wait:
            return
        topk = routing_map.sum(1).max() if num_experts and num_tokens else 0
        most_tokens, most_topk = self._ranks.largest(max(1, num_tokens, self._guess), topk)
        if most_tokens > self.max_tokens:  # with some to spare the next time
            self.max_tokens = max(most_tokens, self.max_tokens + self.max_tokens // 2)
        if num_experts:
            so_far = self._topk_of_maps.get(num_experts, 1)
            self._topk_of_maps[num_experts] = min(num_experts, align(max(so_far, most_topk), _TOPK_STEP))

    def topk(self, num_experts: int) -> int:
        """K for maps of so many experts."""
        return self._topk_of_maps[num_experts]


def choose(
    num_tokens: int,
    room: Room,
    may_wait: bool,
    routing_map: torch.Tensor | None,
    probs: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
) -> tuple[Choice, int]:
    """The choice of a map with its probs, or of ids with their weights; and E. Collective, see `Room.make`."""
    if (routing_map is None) == (topk_idx is None):
        raise InvalidInput(
            "give either routing_map (and probs), or topk_idx (and topk_weights, num_of_experts), or a handle; "
            f"routing_map is {'not ' if routing_map is not None else ''}None, topk_idx is "
            f"{'not ' if topk_idx is not None else ''}None"
        )
    if routing_map is not None:
        check_numbers("routing_map", routing_map, (num_tokens, num_experts), torch.bool)
        num_experts = routing_map.shape[1]
        room.make(num_tokens, routing_map, may_wait)
        topk_idx = topk_indices(routing_map, room.topk(num_experts))
    else:
        if num_experts is None:
            raise InvalidInput("num_of_experts is None; topk_idx does not tell it")
        idx_dtype = torch.int32 if topk_idx.dtype == torch.int32 else torch.int64
        check_numbers("topk_idx", topk_idx, (num_tokens, None), idx_dtype)
        room.make(num_tokens, None, may_wait)
    return weigh(topk_idx, num_experts, probs, topk_weights), num_experts


def weigh(
    topk_idx: torch.Tensor,
    num_experts: int,
    probs: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
) -> Choice:
    """The ids with ``probs [N, E]`` or ``topk_weights [N, K]``, float32."""
    num_tokens, num_topk = topk_idx.shape
    if topk_weights is not None:
        check_numbers("topk_weights", topk_weights, (num_tokens, num_topk), torch.float32)
        return Choice(topk_idx, topk_weights.contiguous(), to_experts(topk_weights, topk_idx, num_experts))
    if probs is None:
        return Choice(topk_idx, None, None)
    check_numbers("probs", probs, (num_tokens, num_experts), torch.float32)
    weights = probs.gather(1, topk_idx.clamp(min=0).long())
    return Choice(topk_idx, torch.where(topk_idx < 0, 0.0, weights), probs)


def topk_indices(routing_map: torch.Tensor, num_topk: int) -> torch.Tensor:
    """The experts of each token in ascending order, then -1: int64 ``[N, num_topk]`` from bool ``[N, E]``.

    A token with more gets TOO_MANY, so that the dispatch refuses it where it checks ids anyway.

    >>> topk_indices(torch.tensor([[True, False, True], [False, True, False]]), 2)
    tensor([[ 0,  2],
            [ 1, -1]])
    """
    num_experts = routing_map.shape[1]
    place = routing_map.cumsum(1)
    columns = torch.where(routing_map & (place <= num_topk), place - 1, num_topk)
    experts = torch.arange(num_experts, device=routing_map.device).expand_as(columns)
    ids = experts.new_full((len(columns), num_topk + 1), -1)
    ids.scatter_(1, columns, experts)
    ids = ids[:, :num_topk].contiguous()
    if num_topk < num_experts:
        ids[:, 0].masked_fill_(place[:, -1] > num_topk, TOO_MANY)
    return ids


def to_experts(weights: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``[N, E]`` from ``[N, K]``, 0 for experts that are not chosen."""
    dense = weights.new_zeros(len(weights), num_experts + 1)
    dense.scatter_(1, torch.where(topk_idx < 0, num_experts, topk_idx).long(), weights)
    return dense[:, :num_experts].contiguous()
