"""Runs stock MoELayers and moe_ep's side by side on two ranks; imported in processes that may run Megatron on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron_models import layer_config, layer_input, make_layer, run_layer

import moe_ep
from moe_ep.megatron import MoeEpLayer, MoeEpTokenDispatcher, install

DEEPSEEK_ROUTING = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
}
BIASED_ROUTING = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SHARED = {"moe_shared_expert_intermediate_size": 40}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "shared expert": SHARED,
    "shared expert overlap": {**SHARED, "moe_shared_expert_overlap": True},
    "shared expert overlap with a gate": {
        **SHARED,
        "moe_shared_expert_overlap": True,
        "moe_shared_expert_gate": True,
    },
    "sigmoid, groups and bias": DEEPSEEK_ROUTING,
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "capacity by position": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
    "padded to capacity": PADDED,
    "padded to capacity, some experts unused": {**PADDED, **BIASED_ROUTING},
    "padded to capacity, top-4": {**PADDED, **DEEPSEEK_ROUTING, "moe_expert_capacity_factor": 1.5},
    "padded to a capacity of few experts": {
        **PADDED,
        "num_moe_experts": 2,
        "moe_expert_capacity_factor": 0.7,
    },
    "a rank without rows": BIASED_ROUTING,
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "bfloat16 router": {"moe_router_dtype": None, "bf16": True, "params_dtype": torch.bfloat16},
}
UNUSED = {"padded to capacity, some experts unused": [1, 6], "a rank without rows": [0, 1, 2, 3]}
"""Experts that are kept from being chosen."""

Tensors = dict[str, torch.Tensor]


def run_all() -> dict[str, tuple[Tensors, Tensors]]:
    """For each case what the stock layer and ours gave on this rank; "in spec: ..." is built with MoeEpLayer."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    results = {}
    for name, changes in CASES.items():
        stock = run_layer(prepare(make_layer(layer_config(**changes)), name), case_input(changes))
        ours = run_layer(prepare(install(make_layer(layer_config(**changes))), name), case_input(changes))
        results[name] = stock, ours
        if name in ("plain", "shared expert overlap", "sigmoid, groups and bias"):
            layer = make_layer(layer_config(**changes), in_spec=True)
            assert type(layer) is MoeEpLayer
            assert type(layer.token_dispatcher) is MoeEpTokenDispatcher
            results[f"in spec: {name}"] = stock, run_layer(layer)
    results["a wrong backward"] = results["plain"][0], run_with_wrong_backward()
    return results


def prepare(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    for expert in UNUSED.get(name, []):
        layer.router.expert_bias[expert] = -100.0
    return layer.bfloat16() if name == "bfloat16 router" else layer


def case_input(changes: dict[str, Any]) -> torch.Tensor:
    return layer_input(dtype=changes.get("params_dtype", torch.float32))


def run_with_wrong_backward() -> Tensors:
    """The gradients of expert rows go to the wrong rows."""
    function = moe_ep.functional._Combine
    right = function.backward

    def wrong(ctx, *gradients):
        rows, *others = right(ctx, *gradients)
        return rows.flip(0), *others

    function.backward = staticmethod(wrong)
    try:
        return run_layer(install(make_layer(layer_config())))
    finally:
        function.backward = staticmethod(right)
