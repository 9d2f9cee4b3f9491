"""A pre-norm transformer block, dense or Mixture-of-Experts."""

from __future__ import annotations

import torch
from torch import nn

import moe_ep

from .attention import MultiHeadLatentAttention
from .config import ModelConfig
from .feed_forward import FeedForward
from .moe_layer import MoELayer
from .norm import RMSNorm


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    ``comm``: where the experts of an MoE block are; None makes a dense block. Submodules: ``attention_norm``,
    ``attention``, ``ffn_norm``, and either ``ffn`` (FeedForward) or ``moe`` (MoELayer).
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: moe_ep.Communicator | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attention_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)
        self.attention = MultiHeadLatentAttention(config, **factory)
        self.ffn_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)
        if comm is None:
            self.ffn = FeedForward(config.hidden, config.ffn_hidden, **factory)
        else:
            self.moe = MoELayer(config, comm, **factory)
        self.is_moe = comm is not None

    def forward(
        self, x_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x_BSH [B, S, H]``, the rotary tables for ``S`` -> ``[B, S, H]`` and the auxiliary loss (None if
        dense).
        """
        x_BSH, normed_BSH = self.attend(x_BSH, rotary)
        if self.is_moe:
            y_BSH, aux_loss = self.moe(normed_BSH)
        else:
            y_BSH, aux_loss = self.ffn(normed_BSH), None
        return x_BSH + y_BSH, aux_loss

    def attend(
        self, x_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half: the residual stream behind the attention, and its norm, which the feed-forward gets."""
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), rotary)
        return x_BSH, self.ffn_norm(x_BSH)
