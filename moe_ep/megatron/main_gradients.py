"""Weight gradients that products add to Megatron's own (--gradient-accumulation-fusion).

Megatron's DistributedDataParallel keeps a step's gradients in ``main_grad`` of each parameter, in float32. It adds what
autograd has put into ``grad``, unless ``grad_added_to_main_grad`` says that the product has done it, which then gives
autograd a tensor of no meaning: hooks run when a gradient is there.
"""

from __future__ import annotations

from functools import partial

import torch

from moe_ep.layers.weight_gradients import Compute, Gradients, Keeper, Put, Weights, compute_anew


class MainGradients(Keeper):
    """Products whose forward runs inside `collecting` add their weights' gradients to ``main_grad``."""

    def take(self, weights: Weights) -> tuple[Weights, Put | None]:
        if not all(weight.requires_grad for weight in weights):
            return weights, None
        return weights, partial(add_to_main_grad, weights)


def add_to_main_grad(weights: Weights, compute: Compute) -> Gradients:
    """Has ``compute`` add to the weights' ``main_grad``, where they have one; returns what autograd is to get."""
    if not all(_takes_gradient(weight) for weight in weights):
        return compute_anew(weights, compute)
    compute(tuple(weight.main_grad for weight in weights))
    for weight in weights:
        weight.grad_added_to_main_grad = True
    nothing = torch.empty_like(weights[0])
    return tuple(nothing.detach() for _ in weights)  # that autograd need not copy


def _takes_gradient(weight: torch.Tensor) -> bool:
    has_one = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
    return has_one and not getattr(weight, "zero_out_wgrad", False)
