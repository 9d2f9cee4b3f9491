"""Model and optimizer state for torch.distributed.checkpoint, which loads onto any expert-parallel size.

Dense tensors are plain (every rank has the same). Expert tensors, and the optimizer's tensors that belong to
them, become DTensors with the placements ``(Replicate over expert_dp, Shard(0) over ep)``: to the checkpoint
they are the one tensor ``[E, ...]`` of all experts, whatever the number of ranks. All of them are views of
the live tensors:

    state = {
        "model": sharded_model_state(model, groups),
        "optimizer": sharded_optimizer_state(model, optimizer, groups),
    }
    torch.distributed.checkpoint.save(state, checkpoint_id=directory)
    torch.distributed.checkpoint.load(state, checkpoint_id=directory)  # fills model and optimizer in place
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_ep.errors import InvalidInput

from .gradients import is_expert
from .groups import ParallelGroups


def sharded_model_state(model: nn.Module, groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """``model.state_dict()`` with expert parameters as DTensors of shape ``[E, ...]``; shares memory with the
    model.
    """
    experts = {name for name, parameter in model.named_parameters() if is_expert(parameter)}
    return {
        name: _shard(tensor, groups) if name in experts else tensor
        for name, tensor in model.state_dict().items()
    }


def sharded_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: ParallelGroups
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as ``{"<parameter name>.<state name>": tensor}``; shares memory with the
    optimizer.

    State that the optimizer has not made yet is made first, so that a fresh optimizer can be loaded into.
    Learning rates and other hyperparameters are not in it: they belong to the recipe. Raises InvalidInput if
    the optimizer has a parameter that the model has not.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    _materialise(optimizer)
    state = {}
    for parameter, entries in optimizer.state.items():
        if parameter not in names:
            raise InvalidInput(
                f"optimizer has a parameter of shape {tuple(parameter.shape)} that is not one of the model's"
            )
        for key, value in entries.items():
            if not isinstance(value, torch.Tensor):
                continue
            sharded = is_expert(parameter) and value.shape == parameter.shape
            state[f"{names[parameter]}.{key}"] = _shard(value, groups) if sharded else value
    return state


def load_sharded_model_state(
    model: nn.Module, groups: ParallelGroups, state: dict[str, torch.Tensor]
) -> None:
    """Copies ``state``, as :func:`sharded_model_state` made it (for the same ``groups``), into the model."""
    _copy_into(sharded_model_state(model, groups), state)


def load_sharded_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, groups: ParallelGroups, state: dict[str, torch.Tensor]
) -> None:
    """Copies ``state``, as :func:`sharded_optimizer_state` made it (for the same ``groups``), into the
    optimizer.
    """
    _copy_into(sharded_optimizer_state(model, optimizer, groups), state)


def _shard(local: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    if groups.mesh is None:
        return local.detach()
    return DTensor.from_local(local.detach(), groups.mesh, (Replicate(), Shard(0)), run_check=False)


@torch.no_grad()
def _copy_into(live: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    if live.keys() != state.keys():
        missing, unknown = sorted(live.keys() - state.keys()), sorted(state.keys() - live.keys())
        raise InvalidInput(
            f"state does not fit: {len(missing)} entries are missing, as {missing[:3]}, and {len(unknown)} "
            f"are unknown, as {unknown[:3]}"
        )
    for name, target in live.items():
        _local(target).copy_(_local(state[name]))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Makes a fresh optimizer create its state, by a step that changes nothing: zero gradients, learning rate
    0.
    """
    if optimizer.state:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for entries in optimizer.state.values():
        if isinstance(entries.get("step"), torch.Tensor):
            entries["step"].zero_()
