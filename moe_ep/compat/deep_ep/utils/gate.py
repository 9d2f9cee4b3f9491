"""Router scores with a known imbalance: rank 0 gets ``ratio`` times as many tokens as the others.

All of them are float32 ``[N, E]``, on the GPU if there is one; a token's experts are its K highest scores.
"""

from __future__ import annotations

import torch

from ....errors import InvalidInput

_STEPS_OF_BISECTION = 20
_MOST_FACTOR = 100.0
_LOWEST_CHOSEN = 0.9


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float, precise: bool
) -> torch.Tensor:
    """``precise``: exactly unbalanced, but less like a router's scores; else on average."""
    make = get_precise_unbalanced_scores if precise else get_random_unbalanced_scores
    return make(num_tokens, num_experts, num_ranks, num_topk, ratio)


def get_random_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> torch.Tensor:
    """Uniform scores, those of rank 0's experts larger by a factor."""
    factor = 1.0
    if ratio != 1.0:
        factor = map_unbalanced_ratio_to_factor(num_tokens, num_experts, num_ranks, num_topk, ratio)
    return get_scores_by_factor(num_tokens, num_experts, num_ranks, factor)


def get_scores_by_factor(num_tokens: int, num_experts: int, num_ranks: int, factor: float) -> torch.Tensor:
    """Scores uniform in [0, 1), for rank 0's experts in [0, factor)."""
    scores = torch.rand((num_tokens, num_experts), dtype=torch.float32, device=_device())
    scores[:, : num_experts // num_ranks] *= factor
    return scores


def map_unbalanced_ratio_to_factor(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> float:
    """The factor in [1, 100] for which rank 0 gets ``ratio`` times the tokens of the others' mean, by bisection."""
    low, high = 1.0, _MOST_FACTOR
    for _ in range(_STEPS_OF_BISECTION):
        middle = (low + high) / 2
        scores = get_scores_by_factor(num_tokens, num_experts, num_ranks, middle)
        ranks = scores.topk(num_topk, dim=1).indices // (num_experts // num_ranks)
        tokens = torch.zeros((num_tokens, num_ranks), device=ranks.device, dtype=torch.float32)
        tokens = tokens.scatter_(1, ranks, 1.0).sum(0)
        if tokens[0] > ratio * tokens[1:].mean():
            high = middle
        else:
            low = middle
    return low


def get_precise_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> torch.Tensor:
    """Low scores, but for experts chosen by `generate_rank_count` and `generate_topk_idx`."""
    rank_count = generate_rank_count(num_tokens, num_experts, num_ranks, num_topk, ratio)
    chosen = generate_topk_idx(rank_count, num_tokens, num_experts, num_ranks, num_topk)
    scores = torch.rand((num_tokens, num_experts), dtype=torch.float32, device=chosen.device) * _LOWEST_CHOSEN
    high = (
        1 - torch.rand(chosen.shape, dtype=torch.float32, device=chosen.device) * (1 - _LOWEST_CHOSEN) * 0.99
    )
    return scores.scatter_(1, chosen, high)


def generate_rank_count(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> torch.Tensor:
    """int32 ``[N, R]``: how many of a token's K experts are on each rank.

    As many ranks for each token as a uniform router would choose, as far as the ratio allows; rank 0 in ``ratio`` times
    as many tokens as each other rank, and these in equally many (to within one).
    """
    if ratio < 1:
        raise InvalidInput(f"ratio is {ratio}; it must be at least 1")
    device, others, per_rank = _device(), num_ranks - 1, num_experts // num_ranks
    if others == 0:
        return torch.full((num_tokens, 1), num_topk, dtype=torch.int32, device=device)
    drawn = torch.rand((num_tokens, num_experts), device=device, dtype=torch.float32).topk(num_topk).indices
    seen = torch.zeros((num_tokens, num_ranks), dtype=torch.int64, device=device)
    width = seen.scatter_(1, drawn // per_rank, 1).sum(1)
    fewest = -(-num_topk // per_rank)  # a rank has no more experts than that to choose from
    width = width.clamp(max=max(fewest, int(others / ratio) + 1), min=fewest)

    wanted = round(int(width.sum()) * ratio / (others + ratio))
    must = width == num_ranks
    order = torch.rand(num_tokens, device=device, dtype=torch.float32) + must.float()
    special = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    special[order.argsort(descending=True)[: max(wanted, int(must.sum()))]] = 1

    # The others are dealt out like cards, so that a token gets each at most once and all are in equally many.
    dealt = width - special
    first = dealt.cumsum(0) - dealt
    turn = torch.randperm(others, device=device) + 1
    choice = torch.arange(num_topk, device=device) % width.unsqueeze(1)
    card = turn[(first.unsqueeze(1) + choice - special.unsqueeze(1)) % others]
    ranks = torch.where((choice == 0) & (special.unsqueeze(1) == 1), 0, card)
    count = torch.zeros((num_tokens, num_ranks), dtype=torch.int32, device=device)
    count.scatter_add_(1, ranks, torch.ones_like(ranks, dtype=torch.int32))
    return count[torch.randperm(num_tokens, device=device)]


def generate_topk_idx(
    rank_count: torch.Tensor, num_tokens: int, num_experts: int, num_ranks: int, num_topk: int
) -> torch.Tensor:
    """int64 ``[N, K]``: as many random experts of each rank as ``rank_count [N, R]`` says."""
    if rank_count.shape != (num_tokens, num_ranks) or bool((rank_count.sum(1) != num_topk).any()):
        raise InvalidInput(
            f"rank_count has shape {tuple(rank_count.shape)}; it must be {(num_tokens, num_ranks)} with rows that add "
            f"up to {num_topk}"
        )
    shape = num_tokens, num_ranks, num_experts // num_ranks
    draw = torch.rand(shape, dtype=torch.float32, device=rank_count.device)
    place = draw.argsort(dim=2).argsort(dim=2)
    return (place < rank_count.unsqueeze(2)).flatten(1).nonzero()[:, 1].view(num_tokens, num_topk)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
