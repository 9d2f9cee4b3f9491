"""How much one MoE layer sends: expected rows and bytes of dispatch and combine under uniform routing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_ep.layers import ModelConfig

FP8_BLOCK = 128


@dataclass(frozen=True)
class LayerTraffic:
    """Of one rank, one MoE layer, one direction (it sends as much as it receives).

    rows: expected rows that go to other ranks; a token goes once to each rank that holds one of its experts.
    dispatch_bf16, dispatch_fp8, combine_bf16: bytes of these rows. Routing data (some 100 bytes a token) and rows
    that stay on their rank are not counted.
    """

    rows: float
    dispatch_bf16: float
    dispatch_fp8: float
    combine_bf16: float


def layer_traffic(model: ModelConfig, *, ep_size: int, tokens: int) -> LayerTraffic:
    """Traffic of a rank with `tokens` tokens."""
    rows = tokens * (ep_size - 1) * rank_probability(model, ep_size)
    hidden = model.hidden
    return LayerTraffic(
        rows=rows,
        dispatch_bf16=rows * 2 * hidden,
        dispatch_fp8=rows * (hidden + 4 * math.ceil(hidden / FP8_BLOCK)),
        combine_bf16=rows * 2 * hidden,
    )


def rank_probability(model: ModelConfig, ep_size: int) -> float:
    """Chance that a token has at least one expert on a given rank, averaged over the ranks.

    Uniform routing: `topk_groups` of the groups are drawn, then `num_topk` of their experts, all sets being equally
    likely. Exact, by counting: over how many of the drawn experts the rank has, the chance that none is chosen.

    Example: 256 experts without groups, top-8, 2 ranks: 1 - C(128, 8)/C(256, 8) = 0.9965.
    """
    group_size = model.num_experts // model.num_groups
    reachable = model.topk_groups * group_size
    local = model.num_experts // ep_size
    total = 0.0
    for rank in range(ep_size):
        first, last = rank * local, (rank + 1) * local
        # ways[j][s]: number of ways to draw j groups in which this rank has s experts together.
        ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(model.topk_groups)]
        for group in range(model.num_groups):
            low, high = group * group_size, (group + 1) * group_size
            overlap = max(0, min(last, high) - max(first, low))
            for drawn in range(model.topk_groups - 1, -1, -1):
                for held, count in ways[drawn].items():
                    more = ways[drawn + 1]
                    more[held + overlap] = more.get(held + overlap, 0) + count
        sets = math.comb(reachable, model.num_topk) * math.comb(model.num_groups, model.topk_groups)
        misses = sum(n * math.comb(reachable - held, model.num_topk) for held, n in ways[-1].items())
        total += 1.0 - misses / sets
    return total / ep_size
