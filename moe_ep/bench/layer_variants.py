"""The layers that moe-ep bench --layer measures: this package's own; `layer_megatron` has Megatron's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import Communicator
from ..layers import ModelConfig, MoELayer
from .layer import Layer, Sizes, Variant

_FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise", "fp8_experts": "blockwise"}


def own_variants(
    sizes: Sizes, device: torch.device, backend: str, overlap_chunks: int
) -> tuple[list[Variant], str]:
    """The variants, and the backend that they use."""
    with _communicator(sizes, backend) as comm:
        backend = comm.backend
    options = {
        "moe_ep, bfloat16": {},
        "moe_ep, FP8": _FP8,
        "moe_ep, FP8, weights kept in FP8": {**_FP8, "keep_fp8_weights": True},
        "moe_ep, FP8, shared expert too": {**_FP8, "fp8_shared": "blockwise"},
    }

    def make(changes: dict[str, Any]) -> Layer:
        comm = _communicator(sizes, backend)
        config = model_config(sizes, overlap_chunks=overlap_chunks, **changes)
        layer = MoELayer(config, comm, seed=0, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.router.weight.copy_(router_weight(sizes, device))
        return Layer(layer, list(layer.parameters()), lambda: comm.window_bytes, comm.close)

    return [
        Variant(name, lambda changes=changes: make(changes)) for name, changes in options.items()
    ], backend


def model_config(sizes: Sizes, **changes: Any) -> ModelConfig:
    return ModelConfig(
        hidden=sizes.hidden,
        num_experts=sizes.num_experts,
        num_topk=sizes.num_topk,
        moe_ffn_hidden=sizes.ffn_hidden,
        shared_ffn_hidden=sizes.shared_ffn_hidden,
        num_groups=sizes.num_groups,
        topk_groups=sizes.topk_groups,
        routed_scaling=2.5,
        expert_alignment=16,
        **changes,
    )


def router_weight(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """``[E, H]`` in bfloat16, for the router of every variant, so that all send the same tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes.num_experts, sizes.hidden, generator=generator) * 0.02
    return weight.to(device, torch.bfloat16)


def _communicator(sizes: Sizes, backend: str) -> Communicator:
    return Communicator(
        dist.group.WORLD if dist.is_initialized() else None,
        hidden=sizes.hidden,
        max_tokens_per_rank=sizes.num_tokens,
        num_experts=sizes.num_experts,
        num_topk=sizes.num_topk,
        backend=backend,
    )
