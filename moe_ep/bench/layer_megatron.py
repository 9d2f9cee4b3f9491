"""Megatron-Core's MoELayer for moe-ep bench --layer: as it is, and with moe_ep's dispatcher."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..streams import named_range
from .layer import Layer, Sizes, Variant
from .layer_variants import router_weight

_DISPATCH = ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess")
_COMBINE = ("combine_preprocess", "token_combine", "combine_postprocess")
_FP8 = {"fp8": "e4m3", "fp8_recipe": "blockwise"}


def why_missing(device: torch.device) -> str | None:
    """Why Megatron's layers can't be measured here, as a sentence; None if they can."""
    if device.type != "cuda":
        return "Megatron's layers are left out: they need a GPU."
    for module in ("megatron.core", "transformer_engine.pytorch"):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"Megatron's layers are left out: {module} can't be imported ({error})."
    return None


def megatron_variants(sizes: Sizes, device: torch.device, world_size: int) -> list[Variant]:
    """Stock all-to-all and moe_ep's dispatcher, each in bfloat16 and with Megatron's FP8 experts, and moe_ep's FP8
    experts in Megatron's layer. Collective.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from ..megatron import install

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)

    def make(installed: dict[str, Any] | None, changes: dict[str, Any]) -> Layer:
        layer = _make_layer(sizes, device, world_size, changes)
        if installed is not None:
            install(layer, **installed)
        _name_parts(layer)
        return Layer(_forward_of(layer), list(layer.parameters()), lambda: _window_bytes(layer))

    fp8_wire = {"fp8": "blockwise", "fp8_backward": "blockwise"}
    cases = {
        "Megatron, all-to-all, bfloat16": (None, {}),
        "Megatron, all-to-all, FP8": (None, _FP8),
        "Megatron, moe_ep, bfloat16": ({}, {}),
        "Megatron, moe_ep, FP8": (fp8_wire, _FP8),
        "Megatron, moe_ep, its FP8 experts": ({**fp8_wire, "fp8_experts": "blockwise"}, _FP8),
    }
    return [Variant(name, lambda case=case: make(*case)) for name, case in cases.items()]


def _make_layer(sizes: Sizes, device: torch.device, world_size: int, changes: dict[str, Any]) -> Any:
    """With every fusion that Megatron has for it, as in its own benchmark of this layer."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.hidden // 128 or 1,
        ffn_hidden_size=sizes.ffn_hidden,
        moe_ffn_hidden_size=sizes.ffn_hidden,
        moe_shared_expert_intermediate_size=sizes.shared_ffn_hidden,
        num_moe_experts=sizes.num_experts,
        moe_router_topk=sizes.num_topk,
        moe_router_num_groups=sizes.num_groups,
        moe_router_group_topk=sizes.topk_groups,
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_router_fusion=True,
        moe_permute_fusion=True,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=world_size,
        expert_tensor_parallel_size=1,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        bf16=True,
        params_dtype=torch.bfloat16,
        **changes,
    )
    spec = get_moe_module_spec(True, sizes.num_experts, moe_grouped_gemm=True)
    layer = spec(config=config).to(device)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(router_weight(sizes, device))
    return layer


def _forward_of(layer: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, None]]:
    from megatron.core.fp8_utils import get_fp8_context

    def forward(x: torch.Tensor) -> torch.Tensor:
        with get_fp8_context(layer.config):
            y, _ = layer(x.unsqueeze(1))
        return y.squeeze(1), None

    return forward


def _name_parts(layer: Any) -> None:
    """Name the forward's parts as moe_ep's layers name theirs."""
    for names, part in ((_DISPATCH, "moe_ep.dispatch"), (_COMBINE, "moe_ep.combine")):
        for name in names:
            _name(layer.token_dispatcher, name, f"{part}.{name}")
    _name(layer.experts, "forward", "moe_ep.experts")


def _name(owner: Any, attribute: str, name: str) -> None:
    function = getattr(owner, attribute)

    def named(*args: Any, **kwargs: Any) -> Any:
        with named_range(name):
            return function(*args, **kwargs)

    setattr(owner, attribute, named)


def _window_bytes(layer: Any) -> int:
    comm = getattr(layer.token_dispatcher, "comm", None)
    return 0 if comm is None else comm.window_bytes
