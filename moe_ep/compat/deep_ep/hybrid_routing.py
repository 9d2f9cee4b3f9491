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


class TopkOfMaps:
    """How many experts a token of a routing map may have: K, which all ranks must agree on."""

    def __init__(self, ranks: Communicators) -> None:
        self._ranks = ranks
        self._agreed: dict[int, int] = {}

    def of(self, routing_map: torch.Tensor) -> int:
        """K for such maps ``[N, E]``. Collective with the first map of E experts: K is the most that a token of any
        rank has in it, rounded up to a multiple of 8."""
        num_experts = routing_map.shape[1]
        if num_experts <= _TOPK_STEP:
            return num_experts
        if num_experts not in self._agreed:
            here = int(routing_map.sum(1).max()) if len(routing_map) else 0
            most = max(1, self._ranks.largest(here))
            self._agreed[num_experts] = min(num_experts, align(most, _TOPK_STEP))
        return self._agreed[num_experts]


def choose(
    num_tokens: int,
    topk_of_maps: TopkOfMaps,
    routing_map: torch.Tensor | None,
    probs: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
) -> tuple[Choice, int]:
    """The choice of a map with its probs, or of ids with their weights; and E."""
    if (routing_map is None) == (topk_idx is None):
        raise InvalidInput(
            "give either routing_map (and probs), or topk_idx (and topk_weights, num_of_experts), or a handle; "
            f"routing_map is {'not ' if routing_map is not None else ''}None, topk_idx is "
            f"{'not ' if topk_idx is not None else ''}None"
        )
    if routing_map is not None:
        check_numbers("routing_map", routing_map, (num_tokens, num_experts), torch.bool)
        num_experts = routing_map.shape[1]
        topk_idx = topk_indices(routing_map, topk_of_maps.of(routing_map))
    else:
        if num_experts is None:
            raise InvalidInput("num_of_experts is None; topk_idx does not tell it")
        idx_dtype = torch.int32 if topk_idx.dtype == torch.int32 else torch.int64
        check_numbers("topk_idx", topk_idx, (num_tokens, None), idx_dtype)
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
