"""Rotary position embedding with YaRN context extension.

RoPE turns the feature pair ``(x[2i], x[2i + 1])`` at position ``p`` by the angle ``p * f_i``, ``f_i =
base^(-2i/d)``.

YaRN (arXiv:2309.00071, section 3) stretches the context by ``s = rope_scaling_factor``. A pair that turns
more than ``beta_fast`` times within the original context keeps its frequency, one that turns fewer than
``beta_slow`` times is slowed down by ``s``, and in between a linear ramp ``r_i`` mixes the two: ``f_i' = (1 -
r_i) f_i + r_i f_i / s``. Pair number ``d ln(L / (2 pi n)) / (2 ln base)`` turns ``n`` times within ``L``
positions; the ramp's ends are rounded outwards.

The attention temperature of the paper, ``m(a) = 0.1 a ln(s) + 1``, is split as DeepSeek-V3 does: the softmax
scale gets ``m(mscale_all_dim)^2`` (see :func:`softmax_scale`), the rotated features ``m(mscale) /
m(mscale_all_dim)``.
"""

from __future__ import annotations

import math

import torch

from .config import ModelConfig
from .precision import FullPrecisionModule


class RotaryEmbedding(FullPrecisionModule):
    """Tables of cosines and sines for every position below ``max_seq_len``; no parameters.

    Buffers (float32, not in checkpoints): ``cos_table`` and ``sin_table [max_seq_len, qk_rope_head_dim /
    2]``.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        position = torch.arange(config.max_seq_len, dtype=torch.float64)
        angle = torch.outer(position, rotary_frequencies(config))
        temperature = 1.0
        if config.uses_yarn:
            s = config.rope_scaling_factor
            temperature = yarn_temperature(s, config.mscale) / yarn_temperature(s, config.mscale_all_dim)
        self.register_buffer("cos_table", (angle.cos() * temperature).float().to(device), persistent=False)
        self.register_buffer("sin_table", (angle.sin() * temperature).float().to(device), persistent=False)

    def forward(self, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos, sin)``, each ``[seq_len, qk_rope_head_dim / 2]`` float32, for positions 0 to ``seq_len -
        1``.
        """
        return self.cos_table[:seq_len], self.sin_table[:seq_len]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the feature pairs of ``x [..., S, D]`` by the angles of ``cos``, ``sin [S, D / 2]``; result in
    x's dtype.
    """
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotary_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each feature pair, ``[qk_rope_head_dim / 2]`` float64, slowed down by YaRN
    where it applies.
    """
    dim = config.qk_rope_head_dim
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = config.rope_base ** (-2 * pair / dim)
    if not config.uses_yarn:
        return frequency
    low = max(math.floor(_pair_turning(config.beta_fast, config)), 0)
    high = min(math.ceil(_pair_turning(config.beta_slow, config)), dim - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / config.rope_scaling_factor * ramp


def yarn_temperature(scaling_factor: float, mscale: float) -> float:
    """``0.1 mscale ln(scaling_factor) + 1``: 1 without stretching."""
    return 0.1 * mscale * math.log(scaling_factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of attention scores: ``qk_head_dim^-1/2``, with YaRN times ``m(mscale_all_dim)^2``."""
    scale = config.qk_head_dim**-0.5
    if config.uses_yarn:
        scale *= yarn_temperature(config.rope_scaling_factor, config.mscale_all_dim) ** 2
    return scale


def _pair_turning(rotations: float, config: ModelConfig) -> float:
    """Number (not whole) of the feature pair that turns ``rotations`` times within the original context."""
    wavelengths = config.original_max_position / (2 * math.pi * rotations)
    return config.qk_rope_head_dim * math.log(wavelengths) / (2 * math.log(config.rope_base))
