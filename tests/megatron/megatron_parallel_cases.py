"""Expert tensor parallelism: stock MoELayers and moe_ep's on four ranks, two for each half of the experts."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron_models import layer_config, layer_input, make_layer, run_layer

from moe_ep.megatron import install

# Megatron's all-to-all gathers different numbers of rows among the ranks of an expert, which gloo can't.
GATHER = {"moe_token_dispatcher_type": "allgather"}
CASES = {
    "ETP": GATHER,
    "ETP, shared expert": {**GATHER, "moe_shared_expert_intermediate_size": 40},
    "ETP, padded to capacity": {
        "moe_expert_capacity_factor": 1.0,
        "moe_pad_expert_input_to_capacity": True,
    },
    "TP and ETP": {**GATHER, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}

Tensors = dict[str, torch.Tensor]


def run_all() -> dict[str, tuple[Tensors, Tensors]]:
    results = {}
    for tensor_parallel in (1, 2):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
        )
        for name, changes in CASES.items():
            if changes.get("tensor_model_parallel_size", 1) == tensor_parallel:
                stock, ours = (
                    make_layer(layer_config(expert_tensor_parallel_size=2, **changes)) for _ in "ab"
                )
                results[name] = run_layer(stock, layer_input()), run_layer(install(ours), layer_input())
        parallel_state.destroy_model_parallel()
    return results
