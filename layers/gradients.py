"""Gradients of replicated and sharded parameters, and the routers' loads, brought together over the ranks.

The loss that is minimised is the mean over all ``W`` ranks of each rank's own. Dense parameters are copies on
every rank, each with the gradient of that rank's loss, so theirs is the mean over ``W``. An expert has
already received, through dispatch and combine, the gradients of every loss in its expert-parallel group,
summed. What is missing is the sum over its copies (``expert_dp``) and the division by ``W``: **not** by the
number of copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.distributed as dist
from torch import nn

from .groups import ParallelGroups
from .router import Router

BUCKET_BYTES = 64 << 20


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a parameter is sharded over expert-parallel ranks instead of replicated on all."""
    return getattr(parameter, "is_expert", False)


@torch.no_grad()
def reduce_gradients(model: nn.Module, groups: ParallelGroups, *, dtype: torch.dtype | None = None) -> None:
    """Makes ``.grad`` of all parameters that of the mean loss over all ranks; in place, collective.

    Call once before the optimizer step, after all micro-batches. A missing ``.grad`` counts as zero.
    Gradients travel in flat buckets of about 64 MiB, in their own dtype or in ``dtype`` (for example float32
    for bfloat16 gradients).
    """
    if groups.world_size == 1:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    dense = [parameter.grad for parameter in parameters if not is_expert(parameter)]
    experts = [parameter.grad for parameter in parameters if is_expert(parameter)]
    _sum_in_buckets(dense, None, 1 / groups.world_size, dtype)
    group = groups.expert_dp_group if groups.expert_dp_size > 1 else "alone"
    _sum_in_buckets(experts, group, 1 / groups.world_size, dtype)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, groups: ParallelGroups, max_norm: float) -> torch.Tensor:
    """Scales all gradients so that the norm of the whole model's gradient is at most ``max_norm``;
    collective.

    Call after :func:`reduce_gradients`. Returns the norm before scaling, a float32 scalar, the same bits on
    every rank: dense gradients count once, expert gradients are summed over the expert-parallel ranks. A norm
    that is not finite leaves the gradients alone, so that the caller can see it and skip the step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    device = next(model.parameters()).device
    dense = _squared_norm((p.grad for p in parameters if not is_expert(p)), device)
    experts = _squared_norm((p.grad for p in parameters if is_expert(p)), device)
    if groups.world_size > 1:
        # One sum over all ranks, each copy counted, gives all of them the same bits; separate groups may not.
        dist.all_reduce(experts)
        experts = experts / groups.expert_dp_size
    norm = (dense + experts).sqrt()
    scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for parameter in parameters:
        parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm.float()


@torch.no_grad()
def update_expert_biases(model: nn.Module, groups: ParallelGroups) -> torch.Tensor:
    """Sums each router's load over all ranks, moves the expert biases by it, and resets the counters;
    collective.

    Call once per optimizer step. Returns the loads, int64 ``[routers, E]`` in the order of
    ``model.modules()``: how many of the (token, k) choices each expert got since the last call.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return torch.zeros(0, 0, dtype=torch.int64)
    load = torch.stack([router.tokens_per_expert for router in routers])
    if groups.world_size > 1:
        dist.all_reduce(load)
    for router, router_load in zip(routers, load, strict=True):
        router.update_expert_bias(router_load)
    return load


def _squared_norm(gradients: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    # float64 scalars: squares of float32 norms neither overflow nor lose digits in the sum.
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double()
        for g in gradients
    ]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def _sum_in_buckets(
    gradients: list[torch.Tensor],
    group: dist.ProcessGroup | str | None,
    factor: float,
    dtype: torch.dtype | None,
) -> None:
    """Sums over ``group`` (None: all ranks; "alone": just this one) and multiplies by ``factor``."""
    if group == "alone":
        for gradient in gradients:
            gradient.mul_(factor)
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).to(dtype or bucket[0].dtype)
        dist.all_reduce(flat, group=group)
        flat.mul_(factor)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of one dtype of at most BUCKET_BYTES (or a single larger tensor), the same on every rank."""
    by_dtype = sorted(gradients, key=lambda gradient: str(gradient.dtype))
    for _, same_dtype in groupby(by_dtype, key=lambda gradient: gradient.dtype):
        bucket, size = [], 0
        for gradient in same_dtype:
            if bucket and size + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket
