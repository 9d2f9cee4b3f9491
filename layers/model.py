"""A causal language model in the manner of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import moe_ep
from moe_ep.errors import InvalidInput

from .config import ModelConfig
from .initialise import initialise_weights
from .moe_layer import MoELayer
from .mtp import MtpModule
from .norm import RMSNorm
from .rope import RotaryEmbedding
from .router import Router
from .transformer import TransformerBlock

IGNORED_TARGET = -100


@dataclass(frozen=True)
class ModelOutput:
    """``logits [B, S, V]`` of the next token, and with targets the losses, float32 scalars.

    - ``main_loss``: mean cross entropy in nats per token
    - ``mtp_loss``: mean over the MTP modules of theirs, unweighted (zero without MTP modules)
    - ``aux_loss``: sum over MoE layers of the weighted balance loss
    - ``loss``: ``main_loss + mtp_loss_weight * mtp_loss + aux_loss``, the one to differentiate
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class DeepSeekModel(nn.Module):
    """Embedding, ``num_layers`` blocks (the first ``num_dense_layers`` dense, the others MoE), norm, untied
    head; MTP.

    All MoE layers share ``comm``. Weights come from ``seed`` (see :func:`initialise_weights`), the same for
    every size of ``comm``. Parameters outside the blocks: ``embedding.weight [V, H]``, ``final_norm.weight
    [H]``, ``head.weight [V, H]``; blocks are ``layers.0``, ...; MTP modules ``mtp.0``, ...
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: moe_ep.Communicator,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.comm = comm
        self.embedding = nn.Embedding(config.vocab_size, config.hidden, **factory)
        self.rotary = RotaryEmbedding(config, device=device)
        self.layers = nn.ModuleList(
            TransformerBlock(config, None if i < config.num_dense_layers else comm, **factory)
            for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden, eps=config.norm_eps, **factory)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False, **factory)
        self.mtp = nn.ModuleList(MtpModule(config, comm, **factory) for _ in range(config.mtp_layers))
        initialise_weights(self, seed=seed, std=config.init_std)

    def routers(self) -> Iterator[Router]:
        """The routers of the MoE layers in order, those of the MTP modules last."""
        return (module for module in self.modules() if isinstance(module, Router))

    def raise_if_overflow(self) -> None:
        """`MoELayer.raise_if_overflow` of all layers."""
        for module in self.modules():
            if isinstance(module, MoELayer):
                module.raise_if_overflow()

    def forward(self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor | None = None) -> ModelOutput:
        """``tokens_BS [B, S]`` int64; ``targets_BS [B, S]``: the token after each, -100 where it doesn't
        count.

        MTP modules run only with targets. Every rank must call this equally often, and with or without
        targets alike. Losses are means over this rank's counted targets; none at all give a loss of zero.
        Raises InvalidInput for a bad shape or a sequence that is too long (or, with MTP, too short).
        """
        self.check(tokens_BS, targets_BS)
        rotary = self.rotary(tokens_BS.shape[1])
        h_BSH, *seen = self.embed(tokens_BS, targets_BS)
        aux_losses = []
        for layer in self.layers:
            h_BSH, aux_loss = layer(h_BSH, rotary)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        logits_BSV = self.predict(h_BSH, self.final_norm)
        if targets_BS is None:
            return ModelOutput(logits_BSV)

        main_loss = token_loss(logits_BSV, targets_BS)
        deeper = []
        for module, embedding_BSH in zip(self.mtp, seen, strict=True):
            length = embedding_BSH.shape[1]
            cut = rotary[0][:length], rotary[1][:length]
            h_BSH, aux_loss = module(h_BSH[:, :length], embedding_BSH, cut)
            aux_losses.append(aux_loss)
            deeper.append(h_BSH)
        mtp_loss = self.mtp_loss(deeper, targets_BS) if deeper else torch.zeros_like(main_loss)
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else torch.zeros_like(main_loss)
        loss = main_loss + self.config.mtp_loss_weight * mtp_loss + aux_loss
        return ModelOutput(logits_BSV, loss, main_loss, mtp_loss, aux_loss)

    def embed(self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor | None) -> list[torch.Tensor]:
        """``[B, S, H]`` of the tokens; with targets also ``[B, S - k, H]`` for MTP module ``k`` (from 1).

        Position ``i`` of module ``k`` sees token ``i + k``, which is ``targets[i + k - 1]``, and predicts
        ``targets[i + k]``; the last ``k`` positions have no target and are left out.
        """
        embedded = [self.embedding(tokens_BS)]
        if targets_BS is not None:
            last = targets_BS.shape[1] - 1
            for k in range(1, len(self.mtp) + 1):
                embedded.append(self.embedding(targets_BS[:, k - 1 : last].clamp(min=0)))
        return embedded

    def predict(self, h_BSH: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Logits ``[B, S, V]`` from the last block's output, ``[B, S, H]``, or an MTP module's with its norm."""
        # An MTP module may read the same h. As a view it gets the gradient of these logits in one piece, so that the
        # sum of both does not depend on whether they come from one backward (`MicroBatchSchedule` has two).
        return self.head(norm(h_BSH.view_as(h_BSH)))

    def mtp_loss(self, deeper: list[torch.Tensor], targets_BS: torch.Tensor) -> torch.Tensor:
        """Mean loss of the MTP modules, from what they return, ``[B, S - k, H]``."""
        losses = [
            token_loss(self.predict(h_BSH, module.final_norm), targets_BS[:, k:])
            for k, (module, h_BSH) in enumerate(zip(self.mtp, deeper, strict=True), start=1)
        ]
        return torch.stack(losses).mean()

    def check(self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor | None) -> None:
        """Raises InvalidInput for what forward can't take."""
        if tokens_BS.dim() != 2:
            raise InvalidInput(f"tokens must have shape [B, S]; got {tuple(tokens_BS.shape)}")
        seq_len, limit = tokens_BS.shape[1], self.config.max_seq_len
        if seq_len > limit:
            raise InvalidInput(f"tokens has sequences of {seq_len}; allowed are up to max_seq_len = {limit}")
        if targets_BS is None:
            return
        if targets_BS.shape != tokens_BS.shape:
            raise InvalidInput(
                f"targets must be shaped like tokens, {tuple(tokens_BS.shape)}; got {tuple(targets_BS.shape)}"
            )
        if seq_len <= len(self.mtp):
            raise InvalidInput(
                f"tokens has sequences of {seq_len}; {len(self.mtp)} MTP modules need more than that many"
            )


def token_loss(logits_BSV: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the targets that are not -100, in float32 (float64 for float64); 0 if there are
    none.
    """
    wide = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    total = F.cross_entropy(
        wide.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return total / (targets_BS != IGNORED_TARGET).sum().clamp(min=1)
