"""Training over several ranks: groups, the model on them, gradient reduction and checkpoint state."""

from __future__ import annotations

import torch

import moe_ep

from .config import ModelConfig
from .gradients import clip_grad_norm, is_expert, reduce_gradients, update_expert_biases
from .groups import ParallelGroups
from .model import DeepSeekModel
from .sharded_state import (
    load_sharded_model_state,
    load_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

__all__ = [
    "ParallelGroups",
    "build_model",
    "clip_grad_norm",
    "is_expert",
    "load_sharded_model_state",
    "load_sharded_optimizer_state",
    "reduce_gradients",
    "sharded_model_state",
    "sharded_optimizer_state",
    "update_expert_biases",
]


def build_model(
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    max_tokens_per_rank: int,
    backend: str = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    timeout_s: float = 100.0,
) -> DeepSeekModel:
    """The model on this rank, its MoE layers sharing one Communicator over ``groups.ep_group``; collective.

    ``max_tokens_per_rank``: the largest ``B * S`` of a forward; ``dtype``: of the parameters (routers stay
    float32); ``backend`` and ``timeout_s``: of the communicator, which is ``model.comm`` and the caller's to
    close. The weights depend on ``seed`` only, not on the number of ranks.
    """
    comm = moe_ep.Communicator(
        groups.ep_group,
        hidden=config.hidden,
        max_tokens_per_rank=max_tokens_per_rank,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        backend=backend,
        timeout_s=timeout_s,
    )
    return DeepSeekModel(config, comm, seed=seed, device=device, dtype=dtype)
