"""Router: which experts each token goes to, and with what weight. `routing` states the rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import router_kernels
from .config import ModelConfig
from .precision import FullPrecisionModule, at_least_float32
from .routing import choose_experts, count_experts, scores_of, sequence_balance_loss, weigh_experts


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

    On a GPU, up to 1024 experts and top-32, the kernels of `router_kernels` do the work.
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
        x_BSH = x if x.dim() == 3 else x.unsqueeze(0)
        with torch.autocast(x.device.type, enabled=False):
            if router_kernels.can_route(x_BSH, self.weight, self.config):
                load_E = self.tokens_per_expert if self.training else None
                return RouterOutput(
                    *router_kernels.route(x_BSH, self.weight, self.expert_bias, load_E, self.config)
                )
            return self._route_torch(x_BSH)

    def _route_torch(self, x_BSH: torch.Tensor) -> RouterOutput:
        c = self.config
        scores_BSE = scores_of(F.linear(x_BSH.to(self.weight.dtype), self.weight), c)
        topk_idx_BSK = choose_experts(scores_BSE, self.expert_bias, c)
        weights_BSK = weigh_experts(scores_BSE, topk_idx_BSK, c)
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
