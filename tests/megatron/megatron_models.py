"""Small Megatron layers and models, equal in every process that makes them, and what a step does to them."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moe_ep.megatron import use_in_spec

HIDDEN, EXPERTS = 32, 8
SEQUENCE, BATCH = 6, 2
VOCABULARY, LENGTH = 128, 16


USE_TE = HAVE_TE and torch.cuda.is_available()


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def begin(ep_size: int) -> None:
    """Megatron's groups, and what its layers draw weights from on a GPU."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep_size)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)


def layer_config(config_class: type = TransformerConfig, **changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 48,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 1e-2,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    return config_class(**{**settings, **changes})


def make_layer(config: TransformerConfig, *, in_spec: bool = False, **options: Any) -> MoELayer:
    """A stock MoELayer, or a MoeEpLayer with ``options``."""
    spec = get_moe_module_spec(USE_TE, config.num_moe_experts, moe_grouped_gemm=USE_TE)
    layer = (use_in_spec(spec, **options) if in_spec else spec)(config=config)
    layer.set_layer_number(1)
    fill_parameters(layer)
    return layer.to(device())


def fill_parameters(module: torch.nn.Module) -> None:
    """From the parameter's name; those of experts differ by rank."""
    for name, parameter in module.named_parameters():
        of_expert = not getattr(parameter, "allreduce", True)
        seed = zlib.crc32(name.encode()) % 2**31 + (1000 * (dist.get_rank() + 1) if of_expert else 0)
        values = 0.2 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        with torch.no_grad():
            parameter.copy_(torch.ones_like(values) if "norm" in name else values)


def layer_input(
    seed: int = 1, shape: tuple[int, int, int] = (SEQUENCE, BATCH, HIDDEN), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[S, B, H]``, another on every rank."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    return torch.randn(shape, generator=generator, device="cpu").to(device(), dtype)


def layer_upstream(y: torch.Tensor) -> torch.Tensor:
    """What ``y [S, B, H]`` is multiplied by to make a loss."""
    return layer_input(seed=17, shape=y.shape, dtype=y.dtype)


def run_layer(layer: MoELayer, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input and of every parameter."""
    x = (layer_input() if x is None else x).clone().requires_grad_()
    with get_fp8_context(layer.config):
        y, _ = layer(x)
    (y * layer_upstream(y)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


def deepseek_v3_config(**changes: Any) -> MLATransformerConfig:
    """DeepSeek-V3 in miniature: MLA, a dense and two MoE layers, groups, sigmoid, expert bias, shared expert, MTP."""
    settings = {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "moe_ffn_hidden_size": 32,
        "multi_latent_attention": True,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 16,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        "apply_rope_fusion": False,
        "num_moe_experts": 16,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_shared_expert_intermediate_size": 32,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.1,
        "layernorm_epsilon": 1e-6,
        "gradient_accumulation_fusion": False,
    }
    return layer_config(MLATransformerConfig, **{**settings, **changes})


def make_gpt(config: MLATransformerConfig, *, in_spec: bool = False) -> GPTModel:
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=USE_TE, normalization="RMSNorm")
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=USE_TE)
    if in_spec:
        block, mtp = use_in_spec(block), use_in_spec(mtp)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
        share_embeddings_and_output_weights=False,
    )
    fill_parameters(model)
    return model.to(device())


def gpt_arguments(tokens: torch.Tensor) -> tuple[tuple, dict[str, torch.Tensor]]:
    """Of GPTModel's forward for ``tokens [B, LENGTH + 1]``."""
    tokens = tokens.to(device())
    positions = torch.arange(LENGTH, device=tokens.device).expand(len(tokens), -1).contiguous()
    loss_mask = torch.ones(len(tokens), LENGTH, device=tokens.device)
    # No mask: attention is causal.
    return (tokens[:, :-1], positions, None), {"labels": tokens[:, 1:], "loss_mask": loss_mask}
