"""Router: which experts each token goes to, and with what weight.

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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import ModelConfig
from .precision import FullPrecisionModule, at_least_float32

TINY = 1e-20
"""Added to sums of scores that are divided by: all scores of a token may underflow to zero."""


class RouterOutput(NamedTuple):
    """``topk_idx [T, K]`` int64 and ``topk_weights [T, K]`` float32, best expert first; ``aux_loss``, a
    scalar.

    ``aux_loss`` is already multiplied by its coefficient: add it to the loss that is differentiated, not to
    the one that is shown. It is a constant zero when the coefficient is.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    aux_loss: torch.Tensor


class Router(FullPrecisionModule):
    """Chooses ``num_topk`` of ``num_experts`` experts for each token; stays in float32 in a bfloat16 model.

    Parameter: ``weight [E, H]``. Buffers: ``expert_bias [E]`` (if ``config.expert_bias``), used for choosing
    only, and ``tokens_per_expert [E]`` int64 (not in checkpoints), how often each expert was chosen in
    training mode since the last :meth:`update_expert_bias`: it adds up over micro-batches.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        dtype = at_least_float32(dtype)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden, device=device, dtype=dtype))
        bias = torch.zeros(config.num_experts, device=device, dtype=dtype) if config.expert_bias else None
        self.register_buffer("expert_bias", bias)
        load = torch.zeros(config.num_experts, device=device, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", load, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std)

    def forward(self, x: torch.Tensor) -> RouterOutput:
        """Routes ``x [B, S, H]`` (B sequences) or ``x [T, H]`` (one sequence); ``T = B * S`` rows result."""
        c = self.config
        x_BSH = x if x.dim() == 3 else x.unsqueeze(0)
        with torch.autocast(x.device.type, enabled=False):
            logits_BSE = F.linear(x_BSH.to(self.weight.dtype), self.weight)
        scores_BSE = logits_BSE.sigmoid() if c.score_function == "sigmoid" else logits_BSE.softmax(dim=-1)

        topk_idx_BSK = self._select(scores_BSE.detach())
        weights_BSK = scores_BSE.gather(-1, topk_idx_BSK)
        if c.score_function == "sigmoid":
            weights_BSK = weights_BSK / (weights_BSK.sum(dim=-1, keepdim=True) + TINY)
        weights_BSK = weights_BSK * c.routed_scaling

        if self.training:
            self.tokens_per_expert += count_experts(topk_idx_BSK.flatten(), c.num_experts)
        aux_loss = scores_BSE.new_zeros(())
        if c.seq_aux_loss_coeff > 0:
            aux_loss = c.seq_aux_loss_coeff * sequence_balance_loss(scores_BSE, c.num_topk)
        return RouterOutput(topk_idx_BSK.flatten(0, 1), weights_BSK.flatten(0, 1), aux_loss)

    @torch.no_grad()
    def update_expert_bias(self, tokens_per_expert_global: torch.Tensor, rate: float | None = None) -> None:
        """Moves each expert's bias by ``rate`` towards a balanced load, and sets the load counter back to
        zero.

        ``bias += rate * sign(mean(load) - load)`` (arXiv:2408.15664, algorithm 1), with
        ``tokens_per_expert_global [E]`` the load summed over all ranks and ``rate`` by default
        ``config.bias_update_rate``. Only the proportions of the load matter: counting each token twice, as
        recomputing activations does, changes nothing. Without an expert bias only the counter is reset.
        """
        if self.expert_bias is not None:
            load = tokens_per_expert_global.to(torch.float64)
            direction = (load.mean() - load).sign().to(self.expert_bias.dtype)
            self.expert_bias += (self.config.bias_update_rate if rate is None else rate) * direction
        self.tokens_per_expert.zero_()

    def _select(self, scores: torch.Tensor) -> torch.Tensor:
        c = self.config
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if c.num_groups > 1:
            scores = scores.masked_fill(~self._eligible(scores), -torch.inf)
        return stable_topk(scores, c.num_topk)

    def _eligible(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool mask like ``scores [..., E]`` of the experts in each token's best groups."""
        c = self.config
        grouped = scores.unflatten(-1, (c.num_groups, -1))
        best = min(2, grouped.shape[-1]) if c.score_function == "sigmoid" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = stable_topk(group_scores, c.topk_groups)
        mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return mask.unsqueeze(-1).expand_as(grouped).flatten(-2)


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


def sequence_balance_loss(scores_BSE: torch.Tensor, num_topk: int) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv:2412.19437, equations 17 to 20) without its
    coefficient; a scalar.

    For each sequence ``sum_i f_i P_i``, averaged over sequences. ``f_i = E / (K S)`` times the number of
    tokens that have expert ``i`` among their ``K`` highest scores, regardless of bias and groups; ``P_i`` is
    the sequence's mean of ``s_i / sum_j s_j``. The gradient flows through ``P`` only. Perfect balance gives
    1. No tokens give 0.
    """
    num_sequences, seq_len, num_experts = scores_BSE.shape
    if num_sequences * seq_len == 0:
        return scores_BSE.sum()
    top_BX = stable_topk(scores_BSE.detach(), num_topk).flatten(1)
    chosen_BE = torch.zeros_like(scores_BSE[:, 0]).scatter_add_(
        1, top_BX, scores_BSE.new_ones(()).expand_as(top_BX)
    )
    f_BE = chosen_BE * (num_experts / (num_topk * seq_len))
    p_BE = (scores_BSE / (scores_BSE.sum(dim=-1, keepdim=True) + TINY)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()
