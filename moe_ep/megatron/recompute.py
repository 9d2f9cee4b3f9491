"""Layers whose forward runs again in backward: the same routing need not be exchanged a second time."""

from __future__ import annotations

import weakref

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

import moe_ep


class RecomputeCache:
    """Handles of the first forwards of ``layer``, which in training runs without gradients first and with them again.

    Both runs have the same stored input, by which they are told apart from those of other micro-batches; an entry lives
    as long as that.
    """

    def __init__(self, layer: MoELayer) -> None:
        self._layer = weakref.ref(layer)
        self._entries: weakref.WeakKeyDictionary[torch.UntypedStorage, tuple] = weakref.WeakKeyDictionary()
        self._begun: tuple[torch.UntypedStorage, torch.Tensor] | None = None

    def take(self, x: torch.Tensor) -> tuple[torch.Tensor, moe_ep.DispatchHandle] | tuple[None, None]:
        """``(topk_idx, handle)`` of the first forward on ``x`` if this is the second."""
        if not (self._layer().training and torch.is_grad_enabled()):
            return None, None
        return self._entries.pop(x.untyped_storage(), (None, None))

    def begin(self, x: torch.Tensor, topk_idx: torch.Tensor) -> None:
        """A forward on ``x`` has begun."""
        first = self._layer().training and not torch.is_grad_enabled()
        self._begun = (x.untyped_storage(), topk_idx) if first else None

    def remember(self, handle: moe_ep.DispatchHandle) -> None:
        """The forward that has begun got this handle."""
        if self._begun is not None:
            storage, topk_idx = self._begun
            self._begun = None
            self._entries[storage] = topk_idx, handle
