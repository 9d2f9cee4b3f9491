"""The rule by which tokens are given experts, in plain torch; `csrc/router` does the same on a GPU.

Scores ``s = sigmoid(x W^T)`` or ``softmax(x W^T)`` in float32. Selection, with ``b`` the expert bias:

1. If ``num_groups > 1``, experts are split into consecutive groups and only those in the best ``topk_groups``
   groups stay eligible. A group's score is the sum of its two highest ``s + b`` with sigmoid scores
   (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) and its highest ``s`` with softmax scores (DeepSeek-V2,
   arXiv:2405.04434).
2. The ``num_topk`` eligible experts with the highest ``s + b`` are chosen, in descending order.
3. Their weights are made from ``s`` alone: divided by their sum with sigmoid scores, as they are with softmax
   scores; then multiplied by ``routed_scaling``.

Ties, of groups as of experts, go to the lower number, on every device.

Example, 4 experts, top-2, sigmoid scores ``[0.5, 0.2, 0.4, 0.1]``, bias ``[0, 0.3, 0, 0]``, scaling 1: ``s +
b`` is ``[0.5, 0.5, 0.4, 0.1]``, so experts 0 and 1 are chosen, with weights ``0.5 / 0.7`` and ``0.2 / 0.7``.
"""

from __future__ import annotations

import torch

from .config import ModelConfig

TINY = 1e-20
"""Added to sums of scores that are divided by: all scores of a token may underflow to zero."""


def scores_of(logits: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """``logits [..., E]`` -> scores of the same shape."""
    return logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(dim=-1)


@torch.no_grad()
def choose_experts(
    scores: torch.Tensor, expert_bias: torch.Tensor | None, config: ModelConfig
) -> torch.Tensor:
    """``scores [..., E]``, ``expert_bias [E]`` -> int64 ``[..., K]``, best expert first."""
    if expert_bias is not None:
        scores = scores + expert_bias
    if config.num_groups > 1:
        scores = scores.masked_fill(~_eligible(scores, config), -torch.inf)
    return stable_topk(scores, config.num_topk)


def _eligible(scores: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Bool mask like ``scores [..., E]`` of the experts in each token's best groups."""
    grouped = scores.unflatten(-1, (config.num_groups, -1))
    best = min(2, grouped.shape[-1]) if config.score_function == "sigmoid" else 1
    group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
    chosen = stable_topk(group_scores, config.topk_groups)
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
    return mask.unsqueeze(-1).expand_as(grouped).flatten(-2)


def weigh_experts(scores: torch.Tensor, topk_idx: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The weights ``[..., K]`` of the experts ``topk_idx [..., K]``."""
    weights = scores.gather(-1, topk_idx)
    if config.score_function == "sigmoid":
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * config.routed_scaling


def stable_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the ``k`` highest of the last dimension, highest first, the lower index first among equals.

    NOTE: ``torch.topk`` leaves the order of equals open, and CPU and CUDA choose differently.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def count_experts(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs in ``expert_ids`` (any 1-D int64): int64 ``[num_experts]``, without a host
    wait.
    """
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))


@torch.no_grad()
def count_highest(scores_BSE: torch.Tensor, num_topk: int) -> torch.Tensor:
    """In how many of a sequence's tokens an expert's score is among the ``num_topk`` highest: ``[B, E]`` in
    scores' dtype.
    """
    top_BX = stable_topk(scores_BSE, num_topk).flatten(1)
    ones_BX = scores_BSE.new_ones(()).expand_as(top_BX)
    return torch.zeros_like(scores_BSE[:, 0]).scatter_add_(1, top_BX, ones_BX)


def balance_loss(scores_BSE: torch.Tensor, highest_BE: torch.Tensor, num_topk: int) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv:2412.19437, equations 17 to 20) without its
    coefficient; a scalar.

    For each sequence ``sum_i f_i P_i``, averaged over sequences. ``f_i = E / (K S)`` times the number of
    tokens that have expert ``i`` among their ``K`` highest scores, regardless of bias and groups, which is
    ``highest_BE``; ``P_i`` is the sequence's mean of ``s_i / sum_j s_j``. The gradient flows through ``P``
    only. Perfect balance gives 1.
    """
    _, seq_len, num_experts = scores_BSE.shape
    f_BE = highest_BE * (num_experts / (num_topk * seq_len))
    p_BE = (scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + TINY)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()


def sequence_balance_loss(scores_BSE: torch.Tensor, num_topk: int) -> torch.Tensor:
    """`balance_loss` of scores alone. No tokens give 0."""
    if scores_BSE.shape[0] * scores_BSE.shape[1] == 0:
        return scores_BSE.sum()
    return balance_loss(scores_BSE, count_highest(scores_BSE, num_topk), num_topk)
