"""Megatron's layers and models with FP8 experts beside the same in bfloat16; every run is on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron_layer_cases import DEEPSEEK_ROUTING
from megatron_model_cases import Gradients, make_fused, make_installed, make_stock, schedule, train
from megatron_models import layer_config, layer_input, make_layer, run_layer

from moe_ep import fp8
from moe_ep.errors import InvalidInput
from moe_ep.megatron import MoeEpLayer, install
from moe_ep.megatron.experts import Fp8SequentialMLP

SHAPE = 48, 2, 128  # sequence, batch, hidden
WIDE = {
    **DEEPSEEK_ROUTING,
    "hidden_size": SHAPE[2],
    "moe_ffn_hidden_size": 128,
    "moe_aux_loss_coeff": 0.0,
    "bf16": True,
    "params_dtype": torch.bfloat16,
}
FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise", "fp8_experts": "blockwise"}
SHARED = {"moe_shared_expert_intermediate_size": 128}
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, FP8),
    "travelling in bfloat16": ({}, {"fp8_experts": "blockwise"}),
    "shared expert overlap": ({**SHARED, "moe_shared_expert_overlap": True}, FP8),
    "recompute": ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, FP8),
    "capacity": ({"moe_expert_capacity_factor": 0.5}, FP8),
    "padded to capacity": (
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        FP8,
    ),
}
"""By name, changes of the config and options."""

Tensors = dict[str, torch.Tensor]


def run_all() -> dict[str, Any]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    return {
        "layers": run_layers(),
        "quantised in experts": count_quantised(),
        "state": run_state(),
        "kept": run_kept(),
        "hooks": run_hooks(),
        "refused": run_refused(),
        "trained": {
            "stock": train(make_stock()),
            "FP8": train(make_fp8()),
            "fused": train(make_fused(options=FP8)),
        },
        "gradients": run_schedules(),
        "fused": run_fused(),
    }


def wide_layer(changes: dict[str, Any], options: dict[str, Any] | None, **how: Any) -> torch.nn.Module:
    layer = make_layer(layer_config(**{**WIDE, **changes}), **how).bfloat16()
    return layer if options is None else install(layer, **options)


def wide_input(seed: int = 1) -> torch.Tensor:
    return layer_input(seed, SHAPE, torch.bfloat16)


def run_layers() -> dict[str, tuple[Tensors, Tensors]]:
    """What the stock layer and ours gave on this rank."""
    results = {}
    for name, (changes, options) in LAYERS.items():
        stock, ours = wide_layer(changes, None), wide_layer(changes, options)
        assert type(ours.experts) is Fp8SequentialMLP
        results[name] = run_layer(stock, wide_input()), run_layer(ours, wide_input())
    layer = make_layer(layer_config(**WIDE), in_spec=True, **FP8).bfloat16()
    assert type(layer) is MoeEpLayer
    results["in spec"] = results["plain"][0], run_layer(layer, wide_input())
    return results


def count_quantised() -> dict[str, int]:
    """How often rows or gradients were quantised in the experts, rather than arriving so."""
    calls, original = [], fp8.quantize
    fp8.quantize = lambda x: calls.append(x.shape) or original(x)
    counts = {}
    try:
        for name, (changes, options) in LAYERS.items():
            calls.clear()
            run_layer(wide_layer(changes, options), wide_input())
            counts[name] = len(calls)
    finally:
        fp8.quantize = original
    return counts


def run_state() -> dict[str, Any]:
    """The names in state dicts, and outputs before and after loading what the other kind of layer has saved."""
    stock, ours, other = wide_layer({}, None), wide_layer({}, FP8), wide_layer({}, FP8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    x = wide_input()
    before = other(x)[0].detach()
    other.load_state_dict(stock.state_dict())
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = [
        (list(layer.state_dict()), list(layer.sharded_state_dict(metadata=dict(metadata))))
        for layer in (stock, ours)
    ]
    return {"names": names, "outputs": (ours(x)[0].detach(), other(x)[0].detach(), before)}


def run_kept() -> list[torch.Tensor]:
    """Outputs with kept weights: at first, after a change that leaves no trace, and at the next first micro-batch."""
    layer = make_layer(layer_config(**WIDE)).bfloat16()
    layer.config.fp8 = "e4m3"  # later than the check that Transformer Engine is there
    install(layer, **FP8, keep_fp8_weights=True)
    layer.config.fp8 = None
    x = wide_input()
    outputs = [layer(x)[0].detach()]
    for parameter in layer.experts.parameters():
        parameter.data.mul_(2)
    outputs.append(layer(x)[0].detach())
    layer.experts.is_first_microbatch = True
    outputs.append(layer(x)[0].detach())
    return outputs


def run_hooks() -> list[int]:
    """Indices of the experts' modules in the order in which a hook before their forward was called."""
    layer = wide_layer({}, FP8)
    called = []
    for linears in layer.experts.linears():
        for index, linear in enumerate(linears):
            linear.register_forward_pre_hook(lambda module, *_, index=index: called.append(index))
    layer(wide_input())
    return called


def run_refused() -> dict[str, str]:
    """By flag, the message; the layer must stay as it is."""
    layer = wide_layer({}, None)
    config, experts = layer.config, layer.experts
    changes = {
        "activation_func": torch.nn.functional.gelu,
        "activation_func_clamp_value": 7.0,
        "add_bias_linear": True,
        "moe_apply_probs_on_input": True,
        "moe_mlp_glu_interleave_size": 32,
        "use_transformer_engine_op_fuser": True,
        "moe_paged_stash": True,
        "fp8_param": True,
    }
    messages = {}
    for name, value in changes.items():
        before = getattr(config, name)
        setattr(config, name, value)
        messages[name] = message_of(lambda: install(layer, **FP8))
        setattr(config, name, before)
    config.fine_grained_activation_offloading, config.offload_modules = True, ["moe_act", "attn_norm"]
    messages["offload_modules"] = message_of(lambda: install(layer, **FP8))
    config.fine_grained_activation_offloading = False
    messages["keep_fp8_weights"] = message_of(lambda: install(layer, **FP8, keep_fp8_weights=True))
    messages["keep without FP8"] = message_of(lambda: install(layer, keep_fp8_weights=True))
    messages["fp8_experts"] = message_of(lambda: install(layer, fp8_experts="rowwise"))
    layer.experts = torch.nn.Identity()
    messages["experts"] = message_of(lambda: install(layer, **FP8))
    layer.experts = experts
    assert type(experts) is not Fp8SequentialMLP and config.moe_token_dispatcher_type == "alltoall"
    return messages


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except InvalidInput as error:
        return str(error)
    return "no error"


def make_fp8(**changes: Any) -> torch.nn.Module:
    return make_installed(options=FP8, **changes)


def run_schedules() -> dict[str, Gradients]:
    """After three micro-batches."""
    overlap = {"overlap_moe_expert_parallel_comm": True}
    return {
        "FP8": schedule(make_fp8),
        "FP8, overlap": schedule(make_fp8, **overlap),
        "FP8, overlap and delayed wgrad": schedule(make_fp8, **overlap, delay_wgrad_compute=True),
    }


def run_fused() -> dict[str, Any]:
    make, overlap = partial(make_fused, options=FP8), {"overlap_moe_expert_parallel_comm": True}
    layer = wide_layer({}, None)
    layer.experts.config.gradient_accumulation_fusion = True
    return {
        "without main_grad": run_layer(install(layer, **FP8), wide_input()),
        "in turn": schedule(make),
        "overlap and delayed wgrad": schedule(make, **overlap, delay_wgrad_compute=True),
    }


def run_tensor_parallel() -> tuple[Tensors, Tensors]:
    """Two ranks that each have a slice of every expert."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2
    )
    sizes = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 2,
        "sequence_parallel": True,
        "moe_ffn_hidden_size": 256,
    }
    stock, ours = wide_layer(sizes, None), wide_layer(sizes, FP8)
    return run_layer(stock, wide_input()), run_layer(ours, wide_input())
