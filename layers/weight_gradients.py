"""Weight gradients that don't go to autograd from the products they come from.

A backward has two halves: the gradients of activations, which the layers before wait for, and those of weights, which
nothing waits for until the optimiser. Kept apart, the second half can run later, while the result of the first travels
(`WeightGradStore`); and products can add it themselves to what is there, of other products of the same weight
(`GradientSums`) or of other micro-batches (`GradAccumulation`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Weights = tuple[torch.Tensor, ...]

Gradients = torch.Tensor | Weights
"""Of one weight, or of several."""

Compute = Callable[[Gradients | None], Gradients]
"""Computes the gradient of a weight, or those of several, and adds them to what it is given, if anything: of the
weights' dtype, or, for products of FP8 numbers, of any.
"""

Put = Callable[[Compute], Gradients | None]
"""Takes what computes a weight's gradient, and returns what autograd is to get for it."""


class Keeper(ABC):
    """Takes the weight gradients of the products whose forward runs inside `collecting`, in this thread."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """The products whose forward runs inside, in this thread."""
        before = _keeper()
        _of_thread.keeper = self
        try:
            yield
        finally:
            _of_thread.keeper = before

    @abstractmethod
    def take(self, weights: Weights) -> tuple[Weights, Put | None]:
        """What a product is to multiply by, and where its backward puts the weights' gradients; None: nowhere."""


def compute_anew(weights: Weights, compute: Compute) -> Gradients:
    """The gradients of ``weights``, in memory of their own."""
    return compute(None)


@torch.no_grad()
def add_to_grad(weights: Weights, compute: Compute) -> Gradients | None:
    """Has ``compute`` add to the weights' ``.grad``, or be it if there is none; returns what autograd is to get.

    Autograd would have a gradient written, read that and ``.grad``, and write their sum. It still does for weights with
    hooks, whose gradients have another dtype, or that are on a CPU, where a product rounds differently if it adds.
    """
    if not all(_takes_products(weight) for weight in weights):
        return compute(None)
    if any(weight.grad is None for weight in weights):
        grads = compute(None)
        for weight, grad in zip(weights, (grads,) if isinstance(grads, torch.Tensor) else grads, strict=True):
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
    else:
        compute(weights[0].grad if len(weights) == 1 else tuple(weight.grad for weight in weights))
    return None


def _takes_products(weight: torch.Tensor) -> bool:
    if not weight.is_cuda or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return False
    grad = weight.grad
    if grad is None:
        return getattr(weight, "grad_dtype", weight.dtype) == weight.dtype
    return grad.dtype == weight.dtype and grad.is_contiguous()


class WeightGradStore(Keeper):
    """Weight gradients that wait to be computed.

    A product whose forward ran inside `collecting` leaves its weight's gradient here when its backward runs; `run`
    computes what is there, in the order in which it came, and adds it to ``.grad`` as autograd would, hooks included.
    ``gradients``: what autograd gets for weights, by what computes their gradients; None: nothing.

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

    def __init__(self, gradients: Callable[[Weights, Compute], Gradients | None] = compute_anew) -> None:
        self._gradients = gradients
        self._waiting: list[tuple[Sequence[torch.Tensor], Compute]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def run(self) -> None:
        """Compute all that wait, on the current stream."""
        waiting, self._waiting = self._waiting, []
        waiting.reverse()
        while waiting:  # each one's memory is free before the next
            weights, compute = waiting.pop()
            with torch.no_grad():
                grads = self._gradients(weights, compute)
            if grads is not None:
                torch.autograd.backward(weights, grads)
            del compute, grads

    def take(self, weights: Weights) -> tuple[Weights, Put | None]:
        if not all(weight.requires_grad and weight.is_leaf for weight in weights):
            return weights, None
        # Hidden from autograd, which would run the weights' hooks too early.
        hidden = tuple(weight.detach() for weight in weights)
        return hidden, lambda compute: self._waiting.append((weights, compute))


class GradAccumulation(Keeper):
    """Adds to ``.grad`` in the products, over micro-batches.

    What `add_to_grad` says of a product whose forward ran inside `collecting` happens when its backward runs. So it is
    for ``backward``, and not for ``torch.autograd.grad``.

    >>> layer = Linear(2, 3)
    >>> for _ in range(2):
    ...     with GradAccumulation().collecting():
    ...         y = layer(torch.ones(1, 2, requires_grad=True))
    ...     y.sum().backward()
    >>> layer.weight.grad
    tensor([[2., 2.],
            [2., 2.],
            [2., 2.]])
    """

    def take(self, weights: Weights) -> tuple[Weights, Put | None]:
        if not all(weight.requires_grad and weight.is_leaf for weight in weights):
            return weights, None
        return weights, partial(add_to_grad, weights)


class GradientSums(Keeper):
    """What several products of one graph have for the gradient of a weight, added up by the products.

    Autograd would have each write its own, and then add them up: for experts that is three times their weights' memory
    to read or write for each product after the first. Products whose forward ran inside `collecting` add to one tensor
    instead, which autograd gets when the last of them has run. Another `Keeper` around it comes first.

    >>> layer, sums = Linear(2, 3), GradientSums()
    >>> with sums.collecting():
    ...     y = layer(torch.ones(1, 2, requires_grad=True)) + layer(torch.ones(1, 2, requires_grad=True))
    >>> y.sum().backward()
    >>> layer.weight.grad
    tensor([[2., 2.],
            [2., 2.],
            [2., 2.]])
    """

    def __init__(self) -> None:
        self._summed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a weight, and what stands for it
        self._sums: dict[int, torch.Tensor] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        if _keeper() is not None:
            yield
            return
        with super().collecting():
            yield

    def take(self, weights: Weights) -> tuple[Weights, Put | None]:
        if len(weights) > 1 or not weights[0].requires_grad:
            return weights, None
        [weight] = weights
        key, sums = id(weight), self._sums
        if key not in self._summed:
            self._summed[key] = weight, _Summed.apply(weight, sums, key)

        def put(compute: Compute) -> None:
            sums[key] = compute(sums.get(key))

        return (self._summed[key][1],), put


class _Summed(torch.autograd.Function):
    """Stands for a weight. Autograd comes here when all products of it have run."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, sums: dict[int, torch.Tensor], key: int) -> torch.Tensor:
        ctx.sums, ctx.key = sums, key
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        total = ctx.sums.pop(ctx.key, None)
        if grad is not None:  # of a use that is no product
            total = grad if total is None else total.add_(grad)
        return total, None, None


_of_thread = threading.local()


def _keeper() -> Keeper | None:
    return getattr(_of_thread, "keeper", None)


def give(x: torch.Tensor, *weights: torch.Tensor) -> tuple[Weights, Put | None]:
    """For the product of ``x`` and ``weights``: what to multiply by instead of the weights, and where their gradients
    are to be put; None: nowhere, they are autograd's as usual.
    """
    keeper = _keeper()
    if keeper is None or not torch.is_grad_enabled() or not x.requires_grad:
        return weights, None
    return keeper.take(weights)


def put_or_return(compute: Compute, put: Put | None, wanted: bool) -> Gradients | None:
    """What autograd gets for the weight, or for several."""
    if put is not None:
        return put(compute)
    return compute(None) if wanted else None


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, whose weight gradient a `Keeper` may take."""

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
        [weight], put = give(x, self.weight)
        return F.linear(x, weight) if put is None else _Linear.apply(x, weight, put)


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

        def weight_gradient(into: torch.Tensor | None) -> torch.Tensor:
            return grad_MO.t() @ x_MI if into is None else into.addmm_(grad_MO.t(), x_MI)

        return (grad_MO @ weight).view_as(x), ctx.put(weight_gradient), None
