"""How many parameters a configuration has, by part, without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. The parts are disjoint, and ``main + mtp == total``.

    ``routed`` and ``routed_active`` count the routed experts of the main model: all of them, and the
    ``num_topk`` that one token visits. ``mtp`` holds whole MTP modules, their experts included; the embedding
    and the head, which MTP modules share with the main model, are counted once, in ``embedding`` and
    ``head``.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    router: int
    shared: int
    routed: int
    routed_active: int
    norms: int
    mtp: int
    mtp_routed: int
    mtp_routed_active: int

    @property
    def main(self) -> int:
        """The model without MTP."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense_ffn
            + self.router
            + self.shared
            + self.routed
            + self.norms
        )

    @property
    def total(self) -> int:
        """Everything that is trained."""
        return self.main + self.mtp

    @property
    def active(self) -> int:
        """What one token uses in the main model: all but the experts it does not visit and the embedding (a
        look-up).
        """
        return self.main - self.embedding - self.routed + self.routed_active

    @property
    def active_with_mtp(self) -> int:
        """``active`` plus what a token uses in the MTP modules."""
        return self.active + self.mtp - self.mtp_routed + self.mtp_routed_active


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts the parameters of ``config``. The expert bias, a buffer, is not a parameter."""
    c = config
    expert = swiglu_parameters(c.hidden, c.moe_ffn_hidden)
    shared = swiglu_parameters(c.hidden, c.shared_ffn_hidden)
    router = c.num_experts * c.hidden
    moe_ffn = router + shared + c.num_experts * expert
    attention = attention_parameters(c)
    block_norms = 2 * c.hidden
    mtp_module = attention + block_norms + moe_ffn + 2 * c.hidden * c.hidden + 3 * c.hidden
    return ParameterCounts(
        embedding=c.vocab_size * c.hidden,
        head=c.vocab_size * c.hidden,
        attention=c.num_layers * attention,
        dense_ffn=c.num_dense_layers * swiglu_parameters(c.hidden, c.ffn_hidden),
        router=c.num_moe_layers * router,
        shared=c.num_moe_layers * shared,
        routed=c.num_moe_layers * c.num_experts * expert,
        routed_active=c.num_moe_layers * c.num_topk * expert,
        norms=c.num_layers * block_norms + c.hidden,
        mtp=c.mtp_layers * mtp_module,
        mtp_routed=c.mtp_layers * c.num_experts * expert,
        mtp_routed_active=c.mtp_layers * c.num_topk * expert,
    )


def count_parameters_per_rank(config: ModelConfig, ep_size: int) -> int:
    """Parameters on one rank: dense ones are replicated, each MoE layer's routed experts are spread over
    ``ep_size``.
    """
    counts = count_parameters(config)
    routed = counts.routed + counts.mtp_routed
    return counts.total - routed + routed // ep_size


def swiglu_parameters(hidden: int, ffn_hidden: int) -> int:
    """Gate, up and down projections of one SwiGLU feed-forward."""
    return 3 * hidden * ffn_hidden


def attention_parameters(config: ModelConfig) -> int:
    """One Multi-head Latent Attention with the norms of its latents."""
    c = config
    q_out = c.num_heads * c.qk_head_dim
    query = c.hidden * q_out if c.q_lora_rank is None else c.q_lora_rank * (c.hidden + 1 + q_out)
    key_value_down = c.hidden * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    key_value_up = c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + key_value_down + key_value_up + c.num_heads * c.v_head_dim * c.hidden
