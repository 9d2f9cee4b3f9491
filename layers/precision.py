"""Modules whose tensors stay in float32 when the model around them goes to bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` if it is float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class FullPrecisionModule(nn.Module):
    """A module that follows ``.to(device)`` and ``.double()`` but ignores ``.bfloat16()`` and ``.half()``."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FullPrecisionModule:
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_wide, recurse)
