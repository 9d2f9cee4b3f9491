"""Megatron's experts computing in FP8: its modules and parameters, moe_ep's products.

Only what a class does in `forward` and `backward_dw` changes. Parameters, their names and attributes, and the sharded
state dict are those of Megatron's class, so that checkpoints are, too.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import nn

from moe_ep import Fp8Tokens, fp8
from moe_ep.layers import WeightGradStore
from moe_ep.layers.fp8_experts import fp8_experts
from moe_ep.layers.fp8_weights import Fp8Weights
from moe_ep.layers.row_groups import RowGroups
from moe_ep.layers.weight_gradients import compute_anew

from ..errors import InvalidInput
from .main_gradients import MainGradients, add_to_main_grad

Matrices = list[torch.Tensor]


class Fp8Experts(nn.Module):
    """SwiGLU experts whose products, forward and backward, are of FP8 numbers in blocks (docs/fp8.md).

    A base of the classes that `use_fp8` gives to Megatron's experts.
    """

    is_first_microbatch: bool
    """Set by Megatron at the first micro-batch of a step, where weights have changed."""

    def prepare(self, *, keep_weights: bool) -> None:
        """To be called once, in place of a constructor. ``keep_weights``: in FP8, from micro-batch to micro-batch."""
        config = self.config
        self.fp8_weights = Fp8Weights(keep_weights)
        self.is_first_microbatch = True
        delayed = config.delay_wgrad_compute or config.overlap_dispatch_backward_with_experts_wgrad
        fused = config.gradient_accumulation_fusion
        if delayed:
            self.weight_gradients = WeightGradStore(add_to_main_grad if fused else compute_anew)
        else:
            self.weight_gradients = MainGradients() if fused else None

    def linears(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Megatron's modules with the weights of gate and up, and of the last product."""
        raise NotImplementedError

    def matrices(self) -> tuple[Matrices, Matrices]:
        """``[2F, H]``, gate first, and ``[H, F]`` of every local expert."""
        raise NotImplementedError

    def forward(
        self, rows: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """``rows [R, H]``, int64 rows of each expert ``[L]``, ``probs [R]`` -> ``[R, H]``, and no bias.

        ``rows`` may stand for FP8 tokens, as the dispatcher gives them; other rows are quantised.
        """
        self._run_hooks_of_linears()
        if self.is_first_microbatch:
            self.fp8_weights.forget()
            self.is_first_microbatch = False
        arrived = fp8.carried(rows)
        if arrived is None:
            tokens = fp8.quantize(rows)
        else:
            tokens = Fp8Tokens(arrived.data, arrived.scale_inv, carrier=rows)
        splits = tokens_per_expert.tolist()
        groups = RowGroups(tokens_per_expert.to(rows.device, non_blocking=True), splits, rows.shape[0])
        keeper = self.weight_gradients
        with contextlib.nullcontext() if keeper is None else keeper.collecting():
            return fp8_experts(tokens, probs.float(), *self.matrices(), groups, self.fp8_weights), None

    def backward_dw(self) -> None:
        """With delay_wgrad_compute: the weights' gradients of the backward before."""
        if not isinstance(self.weight_gradients, WeightGradStore):
            return
        self.weight_gradients.run()
        for linears in reversed(self.linears()):
            for linear in linears:
                # DDP gives what it does with a gradient to a module of Transformer Engine that puts gradients off.
                trigger = getattr(linear, "_trigger_wgrad_accumulation_and_reduce_hooks", None)
                if trigger is not None:
                    trigger()

    def _run_hooks_of_linears(self) -> None:
        """Of modules whose own forward does not run: among them, DDP's that waits for gathered parameters."""
        for linears in self.linears():
            for linear in linears:
                for hook in linear._forward_pre_hooks.values():
                    hook(linear, ())


class Fp8GroupedMLP(Fp8Experts, TEGroupedMLP):
    """Megatron's experts with Transformer Engine: parameters ``linear_fc1.weight0``, ..."""

    def linears(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return [self.linear_fc1], [self.linear_fc2]

    def matrices(self) -> tuple[Matrices, Matrices]:
        names = [f"weight{i}" for i in range(self.num_local_experts)]
        gate_up, down = ([getattr(linear, name) for name in names] for (linear,) in self.linears())
        return gate_up, down


class Fp8SequentialMLP(Fp8Experts, SequentialMLP):
    """Megatron's experts without Transformer Engine: parameters ``local_experts.0.linear_fc1.weight``, ..."""

    def linears(self) -> tuple[list[nn.Module], list[nn.Module]]:
        experts = self.local_experts
        return [expert.linear_fc1 for expert in experts], [expert.linear_fc2 for expert in experts]

    def matrices(self) -> tuple[Matrices, Matrices]:
        gate_up, down = ([linear.weight for linear in linears] for linears in self.linears())
        return gate_up, down


_CLASSES: dict[type[nn.Module], type[Fp8Experts]] = {
    TEGroupedMLP: Fp8GroupedMLP,
    SequentialMLP: Fp8SequentialMLP,
}


def check_experts(experts: nn.Module) -> None:
    """Raise InvalidInput for experts of a class that `use_fp8` does not know."""
    if type(experts) not in _CLASSES and not isinstance(experts, Fp8Experts):
        raise InvalidInput(
            f"fp8_experts takes Megatron's {' or '.join(known.__name__ for known in _CLASSES)}; the experts of this "
            f"layer are a {type(experts).__name__}: leave out fp8_experts, or give the layer experts of these classes"
        )


def use_fp8(experts: nn.Module, *, keep_weights: bool) -> None:
    """Have Megatron's experts, built, compute in FP8: they become a `Fp8GroupedMLP` or a `Fp8SequentialMLP`."""
    check_experts(experts)
    # As torch's fully_shard does: the module stays the same object, with its parameters, hooks and buffers.
    experts.__class__ = _CLASSES.get(type(experts), type(experts))
    experts.prepare(keep_weights=keep_weights)
