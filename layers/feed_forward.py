"""The SwiGLU feed-forward of dense blocks, and of the expert that every token visits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .weight_gradients import Linear


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, arXiv:2002.05202), with gate and up in one matrix.

    Parameters: ``gate_up.weight [2F, H]`` (gate rows first), ``down.weight [H, F]``.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * ffn_hidden, device=device, dtype=dtype)
        self.down = Linear(ffn_hidden, hidden, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., H]`` -> ``[..., H]``."""
        return self.down(self.activate(x))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., H]`` -> ``[..., F]``: all but the last product."""
        return swiglu(self.gate_up(x))


class SharedExperts(FeedForward):
    """The shared expert of an MoE layer; several shared experts are one of their summed width."""


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for ``gate_up [..., 2F]``, gate first; ``[..., F]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
