"""Megatron's layers and models on GPUs with Transformer Engine, with Megatron's dispatcher and with moe_ep's."""

from __future__ import annotations

from functools import partial
from typing import Any

import megatron_dispatcher_cases
import torch
from megatron_layer_cases import DEEPSEEK_ROUTING
from megatron_model_cases import Gradients, make_fused, make_installed, make_stock, schedule
from megatron_models import begin, device, layer_config, layer_input, make_layer, run_layer

from moe_ep.megatron import DispatcherOptions, install
from moe_ep.megatron.experts import Fp8GroupedMLP

SHAPE = 128, 2, 256  # sequence, batch, hidden
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
FLOAT32 = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}
WIDE = {
    **BF16,
    **DEEPSEEK_ROUTING,
    "hidden_size": SHAPE[2],
    "ffn_hidden_size": 256,
    "moe_ffn_hidden_size": 128,
}
SHARED = {"moe_shared_expert_intermediate_size": 128}
FP8 = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}

LAYERS: dict[str, dict[str, Any]] = {
    "shared expert": SHARED,
    "shared expert overlap": {**SHARED, "moe_shared_expert_overlap": True},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "padded to capacity": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    "recompute": RECOMPUTE,
    "FP8 experts": FP8,
    "FP8 experts, padded by the router": {**FP8, "moe_router_padding_for_quantization": True},
    "FP8 experts, recompute": {**FP8, **RECOMPUTE},
}
MODEL = {
    "moe_grouped_gemm": True,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 64,
    "moe_router_topk": 4,
    "moe_layer_freq": [0, 0, 1],
    "mtp_num_layers": None,
}
"""With one MoE layer, whose input is the same in both models: another behind it would send a token to other experts now
and then, as rounding makes two scores change places.
"""

Tensors = dict[str, torch.Tensor]


def run_layers(world_size: int, backend: str) -> dict[str, tuple[Tensors, Tensors]]:
    """For each case what the stock layer and ours gave on this rank."""
    begin(world_size)
    results = {}
    for name, changes in LAYERS.items():
        x = layer_input(shape=SHAPE, dtype=torch.bfloat16)
        settings = {**WIDE, **changes, "expert_model_parallel_size": world_size}
        stock, ours = (make_layer(layer_config(**settings)) for _ in range(2))
        install(ours, backend=backend)
        results[name] = on_cpu(run_layer(stock, x)), on_cpu(run_layer(ours, x))
        assert ours.token_dispatcher.comm.backend == backend
    return results


def run_flex(backend: str) -> dict[str, tuple[Tensors, Tensors]]:
    """For each case what the all-to-all gave on this rank, and Megatron's own flex dispatcher."""
    begin(2)
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    results = {}
    for name in ("shared expert", "shared expert overlap", "capacity", "recompute"):
        x = layer_input(shape=SHAPE, dtype=torch.bfloat16)
        settings = {**WIDE, **LAYERS[name], "expert_model_parallel_size": 2}
        stock = run_layer(make_layer(layer_config(**settings)), x)
        results[name] = on_cpu(stock), on_cpu(run_layer(make_layer(layer_config(**settings, **flex)), x))
    return results


OWN_FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise", "fp8_experts": "blockwise"}
OWN_LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, OWN_FP8),
    "travelling in bfloat16": ({}, {"fp8_experts": "blockwise"}),
    "recompute": (RECOMPUTE, OWN_FP8),
    "shared expert overlap": (LAYERS["shared expert overlap"], OWN_FP8),
    "padded to capacity": (LAYERS["padded to capacity"], OWN_FP8),
    "in a model that computes in FP8": (FP8, {**OWN_FP8, "keep_fp8_weights": True}),
}


def run_own_experts(world_size: int, backend: str) -> dict[str, tuple[Tensors, Tensors]]:
    """For each case what the stock layer gave in bfloat16, and ours with FP8 experts."""
    begin(world_size)
    results = {}
    for name, (changes, options) in OWN_LAYERS.items():
        x = layer_input(shape=SHAPE, dtype=torch.bfloat16)
        settings = {**WIDE, **changes, "expert_model_parallel_size": world_size}
        ours = install(make_layer(layer_config(**settings)), backend=backend, **options)
        assert type(ours.experts) is Fp8GroupedMLP
        without = {key: value for key, value in settings.items() if key not in FP8}
        stock = make_layer(layer_config(**without))
        results[name] = on_cpu(run_layer(stock, x)), on_cpu(run_layer(ours, x))
    return results


def run_own_schedules(backend: str) -> dict[str, Gradients]:
    """Gradients with FP8 experts after three micro-batches, by schedule."""
    begin(2)
    make, fused = (
        partial(make, options={"backend": backend, **OWN_FP8}) for make in (make_installed, make_fused)
    )
    overlap = {"overlap_moe_expert_parallel_comm": True}
    delayed = {**overlap, "delay_wgrad_compute": True}
    return {
        "in turn": on_cpu(schedule(make, **MODEL)),
        "overlap": on_cpu(schedule(make, **MODEL, **overlap)),
        "overlap and delayed wgrad": on_cpu(schedule(make, **MODEL, **delayed)),
        "fused": on_cpu(schedule(fused, **MODEL)),
        "fused, overlap and delayed wgrad": on_cpu(schedule(fused, **MODEL, **delayed)),
    }


def run_schedules(backend: str) -> dict[str, Gradients]:
    """Gradients after three micro-batches, by dispatcher and schedule; "exact": the stock model's in float32."""
    begin(2)
    overlap = {"overlap_moe_expert_parallel_comm": True}
    results = {"exact": on_cpu(schedule(make_stock, **MODEL, **FLOAT32))}
    for name, make in (
        ("stock", make_stock),
        ("moe_ep", partial(make_installed, options={"backend": backend})),
    ):
        results[name] = on_cpu(schedule(make, **MODEL))
        results[f"{name}, overlap"] = on_cpu(schedule(make, **MODEL, **overlap))
        delayed = schedule(make, **MODEL, **overlap, delay_wgrad_compute=True)
        results[f"{name}, overlap and delayed wgrad"] = on_cpu(delayed)
    return results


def run_graph() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of a captured graph replayed with other tokens and routings, and what they should be."""
    begin(2)
    cases = megatron_dispatcher_cases
    num_tokens = 64
    options = DispatcherOptions(backend="nvlink")
    with device():
        dispatcher = cases.make_dispatcher(
            options, moe_expert_capacity_factor=8.0, moe_pad_expert_input_to_capacity=True
        )
        inputs = []
        for seed in (3, 40, 70):
            routing_map, probs = cases.routing(num_tokens, seed=seed)
            inputs.append(
                (cases.random(num_tokens, 1, cases.HIDDEN, seed=seed), routing_map, probs * routing_map)
            )
        static = [tensor.clone() for tensor in inputs[0]]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            cases.drive(dispatcher, *static)  # makes the communicator
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                y = cases.drive(dispatcher, *static)[0]
            results = []
            for given in inputs:
                for tensor, value in zip(static, given, strict=True):
                    tensor.copy_(value)
                graph.replay()
                results.append((y.cpu(), cases.wanted(*given).cpu()))
        torch.cuda.synchronize()
    return results


def on_cpu(tensors: Tensors) -> Tensors:
    return {name: None if tensor is None else tensor.detach().cpu() for name, tensor in tensors.items()}
