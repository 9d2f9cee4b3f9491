"""What a user may choose about the dispatcher, and what of a Megatron configuration it can't serve."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ..errors import InvalidInput


@dataclass(frozen=True)
class DispatcherOptions:
    """Arguments of `moe_ep.megatron.install`.

    - ``backend``, ``timeout_s``: as in `moe_ep.Communicator`.
    - ``max_tokens_per_rank``: the most tokens that a rank has in a micro-batch, (S / TP / CP) * B. None: what the
      largest rank has in the first one.
    - ``num_sms``: streaming multiprocessors for communication kernels. None: the config's
      ``moe_flex_dispatcher_num_sms``, and if that is None, too, moe_ep's own choice.
    - ``fp8``: "blockwise": tokens are quantised to FP8 before they travel and are dequantised where they arrive.
    - ``fp8_backward``: "blockwise": the same for the gradient on its way to the experts.
    - ``fp8_experts``: "blockwise": experts compute in FP8, forward and backward, by moe_ep's products: tokens that
      arrive in FP8 are multiplied as they are.
    - ``keep_fp8_weights``: weights of such experts are quantised once a step, and kept: less time, more memory.
    """

    backend: str = "auto"
    max_tokens_per_rank: int | None = None
    num_sms: int | None = None
    timeout_s: float = 100.0
    fp8: str | None = None
    fp8_backward: str | None = None
    fp8_experts: str | None = None
    keep_fp8_weights: bool = False

    def __post_init__(self) -> None:
        if self.fp8_experts not in (None, "blockwise"):
            raise InvalidInput(f"fp8_experts is {self.fp8_experts!r}; it must be None or 'blockwise'")
        if self.keep_fp8_weights and self.fp8_experts is None:
            raise InvalidInput(
                "keep_fp8_weights is True, but fp8_experts is None; give fp8_experts='blockwise'"
            )


def check_config(config: TransformerConfig, options: DispatcherOptions) -> None:
    """Raise InvalidInput for a setting that the dispatcher can't honour, naming the setting and what to do."""
    if config.num_moe_experts is None:
        raise InvalidInput("num_moe_experts is None; a MoELayer needs a number of experts")
    if config.moe_router_dtype == "fp64":
        raise InvalidInput(
            "moe_router_dtype is 'fp64', but probabilities travel in float32; set --moe-router-dtype fp32"
        )
    if config.moe_expert_rank_capacity_factor is not None:
        raise InvalidInput(
            f"moe_expert_rank_capacity_factor is {config.moe_expert_rank_capacity_factor}; moe_ep drops no tokens to "
            "fit a rank: leave it out, or bound each expert with --moe-expert-capacity-factor"
        )
    if config.variable_seq_lengths and options.max_tokens_per_rank is None:
        raise InvalidInput(
            "variable_seq_lengths is True, so the first micro-batch does not say how large others are; "
            "give install(model, max_tokens_per_rank=N)"
        )
    if config.variable_seq_lengths and config.moe_pad_expert_input_to_capacity:
        raise InvalidInput(
            "moe_pad_expert_input_to_capacity needs as many tokens on every rank, which variable_seq_lengths does not "
            "give; leave one of the two out"
        )
    _check_recompute_under_graphs(config)
    if options.fp8_experts is not None:
        _check_fp8_experts(config, options)


def _check_recompute_under_graphs(config: TransformerConfig) -> None:
    """Tokens leave the preprocess step as they are, so they lie in the graph's memory, which must not be freed."""
    recomputes_norm = config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules
    captures_preprocess = (
        config.cuda_graph_impl == "transformer_engine"
        and CudaGraphModule.moe_preprocess in config.cuda_graph_modules
    )
    if recomputes_norm and captures_preprocess:
        raise InvalidInput(
            "recompute_modules has 'layernorm' and cuda_graph_modules has moe_preprocess: the tokens to be dispatched "
            "are the graph's own output and can't be recomputed; leave one of the two out"
        )


def _check_fp8_experts(config: TransformerConfig, options: DispatcherOptions) -> None:
    plain_swiglu = (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
    )
    if not plain_swiglu:
        raise InvalidInput("fp8_experts are SwiGLU experts, without clamping and offset; set --swiglu")
    offloaded = set(config.offload_modules or ()) & {"expert_fc1", "moe_act", "fused_group_mlp"}
    unsupported = {
        "add_bias_linear": (config.add_bias_linear, "set --disable-bias-linear"),
        "moe_apply_probs_on_input": (config.moe_apply_probs_on_input, "leave it out"),
        "moe_mlp_glu_interleave_size": (config.moe_mlp_glu_interleave_size, "leave it out"),
        "use_transformer_engine_op_fuser": (config.use_transformer_engine_op_fuser, "leave it out"),
        "moe_paged_stash": (config.moe_paged_stash, "leave it out"),
        "fp8_param": (config.fp8_param, "their weights are bfloat16: leave out --fp8-param-gather"),
        "offload_modules": (
            config.fine_grained_activation_offloading and sorted(offloaded),
            "leave these modules out",
        ),
    }
    for name, (value, remedy) in unsupported.items():
        if value:
            raise InvalidInput(f"{name} is {value}, which fp8_experts can't honour; {remedy}")
    if options.keep_fp8_weights and config.fp8 is None:
        raise InvalidInput(
            "keep_fp8_weights is True, but Megatron says when weights have changed only where the model computes in "
            "FP8; set --fp8-format, or leave out keep_fp8_weights"
        )
