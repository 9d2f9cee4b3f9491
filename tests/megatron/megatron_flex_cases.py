"""Runs MoELayers with Megatron's flex dispatcher on moe_ep's deep_ep and with its all-to-all, on two ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron_layer_cases import BIASED_ROUTING, DEEPSEEK_ROUTING, PADDED, SHARED, UNUSED, Tensors, prepare
from megatron_models import HIDDEN, layer_config, layer_input, make_layer, run_layer

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "shared expert": SHARED,
    "shared expert overlap": {**SHARED, "moe_shared_expert_overlap": True},
    "sigmoid, groups and bias": DEEPSEEK_ROUTING,
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "a rank without rows": BIASED_ROUTING,
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "padded to capacity": PADDED,
    "uneven": {},
}
NOT_WITH = {"padded to capacity": "deepep"}  # Megatron refuses it
SEQUENCES = {"uneven": (5, 9)}


def run_all() -> dict[tuple[str, str], tuple[Tensors, Tensors]]:
    """For each backend and case what the all-to-all and the flex dispatcher gave on this rank."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    assert not set(UNUSED).isdisjoint(CASES)
    results = {}
    for name, changes in CASES.items():
        stock = run_case(name, changes)
        for backend in ("deepep", "hybridep"):
            if NOT_WITH.get(name) != backend:
                flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
                results[backend, name] = stock, run_case(name, {**changes, **flex})
    return results


def run_case(name: str, changes: dict[str, Any]) -> Tensors:
    """Two steps, of which the second finds buffers that are there already; its results."""
    layer = prepare(make_layer(layer_config(**changes)), name)
    rank = torch.distributed.get_rank()
    length = SEQUENCES[name][rank] if name in SEQUENCES else 6
    for seed in (5, 1):
        layer.zero_grad()
        results = run_layer(layer, layer_input(seed, (length, 2, HIDDEN)))
    return results


def where_deep_ep_is() -> list[str]:
    """Modules that Megatron takes its buffers from."""
    from megatron.core.transformer.moe import fused_a2a

    return [fused_a2a.Buffer.__module__, fused_a2a.HybridEPBuffer.__module__]
