"""FP8 with deep_ep's scales."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .utils.math import BLOCK, E4M3_MAX, LEAST_AMAX, ceil_div

_MANTISSA_BITS = 23


def quantize(x: torch.Tensor, rounded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [m, n]`` -> float8_e4m3fn ``[m, n]`` and float32 scales ``[m, ceil(n / 128)]``, by blocks of 128 columns.

    scale = max(amax, 1e-4) / 448, and with ``rounded`` the next power of two; data = x / scale. In float32, as
    deep_ep's low-latency kernel computes it: by products with 1 / 448 and with 1 / scale (448 / amax). NaNs count for
    no amax, and are 0x7F whatever their sign, as GPUs have it.
    """
    rows, columns = x.shape
    blocks = ceil_div(columns, BLOCK)
    tiles = F.pad(x.float(), (0, blocks * BLOCK - columns)).view(rows, blocks, BLOCK)
    amax = tiles.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=2).clamp(min=LEAST_AMAX)
    scales = amax * (1 / E4M3_MAX)
    if rounded:
        scales = _power_of_two_above(scales)
        inverse = torch.ones_like(scales) / scales
    else:
        inverse = torch.full_like(amax, E4M3_MAX) / amax
    values = (tiles * inverse.unsqueeze(2)).clamp(-E4M3_MAX, E4M3_MAX)
    data = torch.where(values.isnan(), math.nan, values).to(torch.float8_e4m3fn)
    return data.view(rows, blocks * BLOCK)[:, :columns].contiguous(), scales


def _power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not less; ``values`` are positive and normal."""
    bits = values.view(torch.int32)
    exponents = (bits + ((1 << _MANTISSA_BITS) - 1)) >> _MANTISSA_BITS
    return (exponents << _MANTISSA_BITS).view(torch.float32)
