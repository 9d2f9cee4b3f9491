"""Weight gradients that are computed later than the gradients they come from.

A backward has two halves: the gradients of activations, which the layers before wait for, and those of weights, which
nothing waits for until the optimiser. Kept apart, the second half can run while the result of the first travels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Compute = Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
"""Computes the gradient of a weight, or those of several."""

Later = Callable[[Compute], None]
"""Takes what computes a weight's gradient, and keeps it until it is run."""


class WeightGradStore:
    """Weight gradients that wait to be computed.

    A product whose forward ran inside `collecting` leaves its weight's gradient here when its backward runs; `run`
    computes what is there, in the order in which it came, and adds it to ``.grad`` as autograd would, hooks included.

    >>> layer, store = Linear(2, 3), WeightGradStore()
    >>> with store.collecting():
    ...     y = layer(torch.ones(1, 2, requires_grad=True))
    >>> y.sum().backward()
    >>> layer.weight.grad is None
    True
    >>> store.run()
    >>> layer.weight.grad
    tensor([[1., 1.],
            [1., 1.],
            [1., 1.]])
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[nn.Parameter], Compute]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """The products whose forward runs inside, in this thread."""
        before = getattr(_of_thread, "store", None)
        _of_thread.store = self
        try:
            yield
        finally:
            _of_thread.store = before

    def run(self) -> None:
        """Compute all that wait, on the current stream."""
        waiting, self._waiting = self._waiting, []
        waiting.reverse()
        while waiting:  # each one's memory is free before the next
            weights, compute = waiting.pop()
            with torch.no_grad():
                grads = compute()
            torch.autograd.backward(weights, grads)
            del compute, grads

    def put(self, weights: Sequence[nn.Parameter], compute: Compute) -> None:
        self._waiting.append((weights, compute))


_of_thread = threading.local()


def later(x: torch.Tensor, *weights: torch.Tensor) -> Later | None:
    """For the product of ``x`` and ``weights``: where the gradients of the weights are to be put; None: nowhere, they
    are autograd's as usual.

    A product for which it is not None hides the weights from autograd (``weight.detach()``), which would run the
    weights' hooks too early.
    """
    store = getattr(_of_thread, "store", None)
    if store is None or not torch.is_grad_enabled() or not x.requires_grad:
        return None
    if not all(weight.requires_grad and weight.is_leaf for weight in weights):
        return None
    return lambda compute: store.put(weights, compute)


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, whose weight gradient a `WeightGradStore` may keep for later."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``."""
        put = later(x, self.weight)
        if put is None:
            return F.linear(x, self.weight)
        return _Linear.apply(x, self.weight.detach(), put)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, put):
        ctx.save_for_backward(x, weight)
        ctx.put = put
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_MO, x_MI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        ctx.put(lambda: grad_MO.t() @ x_MI)
        return (grad_MO @ weight).view_as(x), None, None
