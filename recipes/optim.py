"""AdamW on float32 master weights, its decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.adamw import adamw

from .config import TrainConfig


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, min_ratio: float) -> float:
    """The rate of optimiser step `step`, counted from 1.

    Linear from peak/warmup at step 1 to `peak` at step `warmup`, then half a cosine down to `peak * min_ratio` at
    step `steps`, and constant after it. Example: peak 1, warmup 2, steps 6, min_ratio 0: 0.5, 1, 0.854, 0.5, 0.146, 0.
    """
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done)))


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (torch's fused one) whose moments, and whose weights, are float32 even where the model's are not.

    A parameter in bfloat16 gets float32 gradients (`Tensor.grad_dtype`), so that micro-batches add up and ranks
    reduce without rounding, and a float32 copy, `state[p]["master"]`, which the update moves and the parameter is
    rounded from. A float32 or float64 parameter is its own master. All state exists from the start, so that a
    checkpoint can be loaded at once.

    params: parameters, or groups with their own `weight_decay`.
    """

    def __init__(self, params, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self._prepare(parameter)

    def _prepare(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        weight = parameter.detach()
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.grad_dtype = torch.float32
            weight = state["master"] = weight.float()
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from `.grad`; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            masters = [state.get("master", p) for p, state in zip(parameters, states, strict=True)]
            adamw(
                masters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return loss

    def set_lr(self, lr: float) -> None:
        """The rate of the next steps, in all groups."""
        for group in self.param_groups:
            group["lr"] = lr


def make_optimizer(model: nn.Module, config: TrainConfig) -> MasterAdamW:
    """Weight decay for matrices (embedding, head and experts included), none for norms and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return MasterAdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
