"""ModelConfig: every size and switch of a DeepSeek-V3-style model, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ep.errors import InvalidInput

from .sizes import ParameterCounts, count_parameters, count_parameters_per_rank


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Mixture-of-Experts language model in the manner of DeepSeek-V3
    (arXiv:2412.19437).

    The defaults are a toy that runs anywhere; real presets live in ``moe_ep.recipes``. Raises
    ``InvalidInput`` naming the field when a value, or a combination of values, cannot work.

    Model: ``vocab_size`` token ids, ``num_layers`` blocks of which the first ``num_dense_layers`` have a
    dense feed-forward of width ``ffn_hidden`` and the others a Mixture of Experts; ``hidden`` the width of
    the residual stream; ``max_seq_len`` the longest sequence; ``norm_eps`` of every RMSNorm; ``init_std`` of
    every weight matrix.

    Attention (Multi-head Latent Attention): ``num_heads`` heads, queries made through a latent of
    ``q_lora_rank`` (None: directly), keys and values through one of ``kv_lora_rank``; a query or key head is
    ``qk_nope_head_dim`` features without position followed by ``qk_rope_head_dim`` rotated ones; a value head
    is ``v_head_dim`` wide.

    Positions: ``rope_base``; YaRN (arXiv:2309.00071) stretches ``original_max_position`` by
    ``rope_scaling_factor`` (1.0: plain RoPE) with the ramp between ``beta_fast`` and ``beta_slow`` rotations
    and the attention temperatures ``mscale`` and ``mscale_all_dim``. It takes effect when ``max_seq_len >
    original_max_position``.

    Experts: ``num_experts`` SwiGLU experts of width ``moe_ffn_hidden``, ``num_topk`` per token, and one
    shared expert of width ``shared_ffn_hidden`` (0: none). ``num_groups`` and ``topk_groups`` limit a token
    to experts of the best groups. ``score_function`` "sigmoid" (DeepSeek-V3: weights normalised to sum 1) or
    "softmax" (DeepSeek-V2: not normalised); weights are then multiplied by ``routed_scaling``.
    ``expert_bias`` turns on balancing without an auxiliary loss, moving each bias by ``bias_update_rate`` per
    step; ``seq_aux_loss_coeff`` weighs the sequence-wise auxiliary loss (0: none).

    Multi-Token Prediction: ``mtp_layers`` extra modules whose mean loss is weighted by ``mtp_loss_weight``.

    ``fp8_experts`` (None or "blockwise"): the routed experts multiply in FP8, as in `GroupedExperts`;
    ``fp8_shared``: so does the shared expert; ``keep_fp8_weights`` for them.

    Moving tokens, as in ``moe_ep.dispatch``: ``layout``, ``expert_alignment``, ``fp8`` (None or "blockwise"),
    ``max_recv_rows`` (None: exact sizes); with layout="rank", too, alignment and ``max_recv_rows`` are those of
    the rows that experts get. As in ``moe_ep.combine``, ``fp8_backward`` (None or "blockwise").
    ``overlap_chunks``: 0 moves and computes in turn; 1 runs the shared expert while tokens travel; n > 1 (2 to 4) also
    sends tokens through the experts in n chunks, one computed while others travel. Each chunk is a dispatch of its own,
    with ``max_recv_rows`` rows if that is given.
    ``overlap_num_sms``: multiprocessors of communication beside computation (None: the communicator's
    choice).
    """

    vocab_size: int = 256
    num_layers: int = 3
    num_dense_layers: int = 1
    hidden: int = 64
    num_heads: int = 4
    q_lora_rank: int | None = 32
    kv_lora_rank: int = 16
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = 16
    ffn_hidden: int = 128
    moe_ffn_hidden: int = 32
    shared_ffn_hidden: int = 32
    num_experts: int = 16
    num_topk: int = 4
    num_groups: int = 1
    topk_groups: int = 1
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    routed_scaling: float = 1.0
    expert_bias: bool = True
    bias_update_rate: float = 1e-3
    seq_aux_loss_coeff: float = 1e-4
    mtp_layers: int = 0
    mtp_loss_weight: float = 0.1
    rope_base: float = 10000.0
    rope_scaling_factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.02
    layout: Literal["expert", "rank"] = "expert"
    expert_alignment: int = 1
    fp8: Literal["blockwise"] | None = None
    fp8_backward: Literal["blockwise"] | None = None
    fp8_experts: Literal["blockwise"] | None = None
    fp8_shared: Literal["blockwise"] | None = None
    keep_fp8_weights: bool = False
    max_recv_rows: int | None = None
    overlap_chunks: int = 0
    overlap_num_sms: int | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_routing()
        self._check_dispatch()

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model (each MTP module has one more)."""
        return self.num_layers - self.num_dense_layers

    @property
    def uses_yarn(self) -> bool:
        """Whether YaRN changes the rotary frequencies and the softmax scale."""
        return self.rope_scaling_factor > 1.0 and self.max_seq_len > self.original_max_position

    def parameter_counts(self) -> ParameterCounts:
        """Number of parameters of the whole model by part, with totals and the active share of one token."""
        return count_parameters(self)

    def parameters_per_rank(self, ep_size: int) -> int:
        """Number of parameters held by one rank: the dense part whole, the routed experts divided by
        ``ep_size``.
        """
        if ep_size < 1 or self.num_experts % ep_size:
            raise InvalidInput(f"ep_size must divide num_experts ({self.num_experts}); got {ep_size}")
        return count_parameters_per_rank(self, ep_size)

    def _check_ranges(self) -> None:
        at_least_one = (
            "vocab_size num_layers hidden num_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
            "v_head_dim ffn_hidden moe_ffn_hidden num_experts num_topk num_groups topk_groups "
            "original_max_position max_seq_len expert_alignment"
        )
        for name in at_least_one.split():
            _require(
                isinstance(getattr(self, name), int) and getattr(self, name) >= 1,
                self,
                name,
                "an integer >= 1",
            )
        for name in ("num_dense_layers", "shared_ffn_hidden", "mtp_layers", "overlap_chunks"):
            _require(
                isinstance(getattr(self, name), int) and getattr(self, name) >= 0,
                self,
                name,
                "an integer >= 0",
            )
        for name in ("q_lora_rank", "max_recv_rows", "overlap_num_sms"):
            _require(
                getattr(self, name) is None or getattr(self, name) >= 1, self, name, "None or an integer >= 1"
            )
        for name in (
            "bias_update_rate",
            "seq_aux_loss_coeff",
            "mtp_loss_weight",
            "norm_eps",
            "init_std",
            "mscale",
            "mscale_all_dim",
        ):
            _require(getattr(self, name) >= 0, self, name, ">= 0")
        for name in ("routed_scaling", "rope_base", "beta_fast", "beta_slow"):
            _require(getattr(self, name) > 0, self, name, "> 0")
        _require(
            self.num_dense_layers <= self.num_layers,
            self,
            "num_dense_layers",
            f"<= num_layers ({self.num_layers})",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0, self, "qk_rope_head_dim", "even (features are rotated in pairs)"
        )
        _require(self.rope_scaling_factor >= 1, self, "rope_scaling_factor", ">= 1")
        _require(
            self.beta_fast > self.beta_slow, self, "beta_fast", f"greater than beta_slow ({self.beta_slow})"
        )
        _require(
            self.mtp_layers < self.max_seq_len, self, "mtp_layers", f"below max_seq_len ({self.max_seq_len})"
        )

    def _check_routing(self) -> None:
        _require(
            self.score_function in ("sigmoid", "softmax"), self, "score_function", "'sigmoid' or 'softmax'"
        )
        _require(
            self.num_experts % self.num_groups == 0,
            self,
            "num_groups",
            f"a divisor of num_experts ({self.num_experts})",
        )
        _require(
            self.topk_groups <= self.num_groups, self, "topk_groups", f"<= num_groups ({self.num_groups})"
        )
        reachable = self.topk_groups * (self.num_experts // self.num_groups)
        _require(
            self.num_topk <= reachable,
            self,
            "num_topk",
            f"<= {reachable}, the experts in {self.topk_groups} of {self.num_groups} groups",
        )
        if self.expert_bias:
            _require(
                self.score_function == "sigmoid",
                self,
                "score_function",
                "'sigmoid' where expert_bias is on (turn expert_bias off)",
            )

    def _check_dispatch(self) -> None:
        _require(self.layout in ("expert", "rank"), self, "layout", "'expert' or 'rank'")
        for name in ("fp8", "fp8_backward", "fp8_experts", "fp8_shared"):
            _require(getattr(self, name) in (None, "blockwise"), self, name, "None or 'blockwise'")
        if self.fp8_experts is not None:
            _require(
                self.expert_alignment % 16 == 0,
                self,
                "expert_alignment",
                "a multiple of 16 with fp8_experts, whose products take rows by 16",
            )
            _require(
                self.max_recv_rows is None or self.max_recv_rows % 16 == 0,
                self,
                "max_recv_rows",
                "None or a multiple of 16 with fp8_experts",
            )


def _require(holds: bool, config: ModelConfig, name: str, allowed: str) -> None:
    if not holds:
        raise InvalidInput(f"ModelConfig.{name} must be {allowed}; got {getattr(config, name)!r}")
