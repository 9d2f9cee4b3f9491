"""Trains a small GPTModel of DeepSeek-V3's kind with Megatron's dispatcher and with moe_ep's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron_models import LENGTH, VOCABULARY, deepseek_v3_config, device, gpt_arguments, make_gpt
from megatron_on_cpu import CudaIsCpu

from moe_ep.megatron import MoeEpLayer, MoeEpTokenDispatcher, install

STEPS = 6
MICRO_BATCHES = 3

Training = tuple[list[float], torch.Tensor]
Gradients = dict[str, torch.Tensor]


def make_stock(**changes: Any) -> GPTModel:
    return make_gpt(deepseek_v3_config(**changes))


def make_installed(*, options: dict[str, Any] | None = None, **changes: Any) -> GPTModel:
    model = install(make_stock(**changes), **(options or {}))
    assert len(dispatchers(model)) == sum(isinstance(module, MoELayer) for module in model.modules()) > 0
    return model


def make_fused(*, options: dict[str, Any], **changes: Any) -> GPTModel:
    """With FP8 experts whose products add to ``main_grad``."""
    model = make_stock(**changes)
    configs = [module.experts.config for module in model.modules() if isinstance(module, MoELayer)]
    for config in configs:
        config.gradient_accumulation_fusion = True  # later than other modules ask for Apex
    install(model, **options)
    for config in configs:
        config.gradient_accumulation_fusion = False
    return model


def make_in_spec(**changes: Any) -> GPTModel:
    model = make_gpt(deepseek_v3_config(**changes), in_spec=True)
    assert sum(isinstance(module, MoeEpLayer) for module in model.modules()) == 3
    return model


MAKERS: dict[str, Callable[..., GPTModel]] = {
    "stock": make_stock,
    "installed": make_installed,
    "in spec": make_in_spec,
}

RECOMPUTES: dict[str, dict[str, Any]] = {
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute of MoE layers": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def dispatchers(model: GPTModel) -> list[MoeEpTokenDispatcher]:
    found = [module.token_dispatcher for module in model.modules() if isinstance(module, MoELayer)]
    return [dispatcher for dispatcher in found if isinstance(dispatcher, MoeEpTokenDispatcher)]


def text(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * dist.get_rank())
    return torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator, device="cpu")


def run_all() -> tuple[dict[str, Training], dict[str, Gradients | str]]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    trained = {name: train(make()) for name, make in MAKERS.items()}
    for name, changes in RECOMPUTES.items():
        trained[f"stock, {name}"] = train(make_stock(**changes))
        trained[f"installed, {name}"] = train(make_installed(**changes))
    return trained, run_schedules()


def train(model: GPTModel) -> Training:
    """The loss of every step, and a router's expert bias after them."""
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    arguments, keywords = gpt_arguments(text(seed=7))
    losses = []
    for _ in range(STEPS):
        ddp.zero_grad_buffer()
        loss = ddp(*arguments, **keywords).mean()
        loss.backward()
        finalize_model_grads([ddp], None)  # also moves the expert bias
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.decoder.layers[1].mlp.router.expert_bias.clone()


def run_schedules() -> dict[str, Gradients | str]:
    """Gradients after three micro-batches, by maker and schedule; or the error's message."""
    overlap = {"overlap_moe_expert_parallel_comm": True}
    results: dict[str, Gradients | str] = {
        "stock, no overlap": schedule(make_stock),
        "installed, no overlap": schedule(make_installed),
    }
    for name, make in MAKERS.items():
        results[f"{name}, overlap"] = schedule(make, **overlap)
        results[f"{name}, overlap and delayed wgrad"] = schedule(make, **overlap, delay_wgrad_compute=True)
    try:
        schedule(make_misdeclared, **overlap)
        results["misdeclared, overlap"] = "no error"
    except RuntimeError as error:
        results["misdeclared, overlap"] = str(error)
    return results


def make_misdeclared(**changes: Any) -> GPTModel:
    """With a config that says "alltoall", as which the schedule frees what a dispatch has read."""
    model = make_installed(**changes)
    model.config.moe_token_dispatcher_type = "alltoall"
    return model


def schedule(make: Callable[..., GPTModel], **changes: Any) -> Gradients:
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # what another loop has left there has another shape
    half = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    model = make(**{"moe_router_topk": 2, **half, **changes})
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    if changes.get("delay_wgrad_compute"):
        # Delayed gradients of Transformer Engine's modules otherwise replace those of the micro-batches before.
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    with CudaIsCpu() if device().type == "cpu" else contextlib.nullcontext():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([text(seed) for seed in range(MICRO_BATCHES)]),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
    for dispatcher in dispatchers(model):
        assert dispatcher.tokens_per_expert is None
        assert dispatcher.topk_idx is None
    return {
        name: parameter.main_grad if parameter.grad_added_to_main_grad else parameter.grad
        for name, parameter in model.named_parameters()
    }


def forward_step(texts, model, return_schedule_plan=False):
    arguments, keywords = gpt_arguments(next(texts))
    run = model.build_schedule_plan if return_schedule_plan else model
    return run(*arguments, **keywords), lambda losses: (losses.float().mean(), {})
