"""The SwiGLU feed-forward of dense blocks, and of the expert that every token visits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from moe_ep.validate import check_fp8_mode

from .fp8_linear import Fp8Linear, fp8_activation
from .swiglu import kernels_for, weighted_swiglu
from .weight_gradients import Linear


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, arXiv:2002.05202), with gate and up in one matrix.

    Parameters: ``gate_up.weight [2F, H]`` (gate rows first), ``down.weight [H, F]``. ``linear``: what makes the modules
    that hold them, of (in_features, out_features).
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        *,
        linear: Callable[..., Linear] = Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = linear(hidden, 2 * ffn_hidden, device=device, dtype=dtype)
        self.down = linear(ffn_hidden, hidden, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., H]`` -> ``[..., H]``."""
        return self.down(self.activate(x))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., H]`` -> ``[..., F]``: all but the last product."""
        return swiglu(self.gate_up(x))


class SharedExperts(FeedForward):
    """The shared expert of an MoE layer; several shared experts are one of their summed width.

    ``fp8``: "blockwise": its products are of FP8 numbers, as those of `GroupedExperts` with ``fp8``;
    ``keep_fp8_weights`` likewise.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        *,
        fp8: str | None = None,
        keep_fp8_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_fp8_mode("fp8", fp8)
        linear = Linear if fp8 is None else partial(Fp8Linear, keep_fp8_weight=keep_fp8_weights)
        super().__init__(hidden, ffn_hidden, linear=linear, device=device, dtype=dtype)
        self.fp8 = fp8

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """As in FeedForward; with ``fp8`` the result stands for quantised tokens, as `down` takes them."""
        return super().activate(x) if self.fp8 is None else fp8_activation(self.gate_up(x))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for ``gate_up [..., 2F]``, gate first; ``[..., F]``. By the kernels of `swiglu` it is rounded
    once, otherwise after each of the two operations.
    """
    rows_NG = gate_up.reshape(-1, gate_up.shape[-1])
    if kernels_for(rows_NG, None, multiple=8) is not None:
        return weighted_swiglu(rows_NG, None).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
