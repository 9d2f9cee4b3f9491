"""Calling an autograd Function only where autograd has something to do."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad


class Function(torch.autograd.Function):
    """A Function whose ``forward`` is ``compute`` and some notes for ``backward``.

    ``call`` is ``apply``, less the microseconds that it takes where nothing is differentiated.
    """

    @staticmethod
    def compute(*args: Any) -> Any:
        """The forward alone."""
        raise NotImplementedError

    @classmethod
    def call(cls, *args: Any) -> Any:
        return cls.apply(*args) if _is_differentiated(args) else cls.compute(*args)


def _is_differentiated(args: tuple) -> bool:
    if forward_ad._current_level >= 0:  # forward mode: `apply` refuses it
        return True
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return False
