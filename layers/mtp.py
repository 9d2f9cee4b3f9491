"""Multi-Token Prediction modules (arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

import torch
from torch import nn

import moe_ep

from .config import ModelConfig
from .norm import RMSNorm
from .transformer import TransformerBlock


class MtpModule(nn.Module):
    """Looks one token further than the module before it, keeping the causal chain.

    From the hidden state of position ``i`` at the depth before and the embedding of a later token: ``h' =
    block(proj [hidden_norm(h); embedding_norm(embedding)])``. Its logits are ``head(final_norm(h'))`` with
    the main model's head; embeddings, too, are the main model's.

    Parameters besides the block's: ``hidden_norm.weight``, ``embedding_norm.weight``, ``final_norm.weight``
    (``[H]`` each), ``proj.weight [H, 2H]``.
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: moe_ep.Communicator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.hidden_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)
        self.embedding_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)
        self.proj = nn.Linear(2 * config.hidden, config.hidden, bias=False, **factory)
        self.block = TransformerBlock(config, comm, **factory)
        self.final_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)

    def forward(
        self, h_BSH: torch.Tensor, embedding_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``h_BSH``, ``embedding_BSH [B, S, H]`` -> ``h' [B, S, H]`` (before final_norm) and the auxiliary
        loss.
        """
        return self.block(self.mix(h_BSH, embedding_BSH), rotary)

    def mix(self, h_BSH: torch.Tensor, embedding_BSH: torch.Tensor) -> torch.Tensor:
        """What the block gets, ``[B, S, H]``."""
        mixed = torch.cat((self.hidden_norm(h_BSH), self.embedding_norm(embedding_BSH)), dim=-1)
        return self.proj(mixed)
