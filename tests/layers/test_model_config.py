"""ModelConfig: what it refuses, and the parameter counts of DeepSeek-V3 against the published ones."""

import pytest

from moe_ep.errors import InvalidInput
from moe_ep.layers import ModelConfig

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    num_layers=61,
    num_dense_layers=3,
    hidden=7168,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_hidden=18432,
    moe_ffn_hidden=2048,
    shared_ffn_hidden=2048,
    num_experts=256,
    num_topk=8,
    num_groups=8,
    topk_groups=4,
    mtp_layers=1,
)


def test_deepseek_v3_counts():
    counts = DEEPSEEK_V3.parameter_counts()
    assert (
        round(counts.main / 1e9, 1) == 671.0
    )  # arXiv:2412.19437: "671B total parameters with 37B activated"
    assert round(counts.active / 1e9) == 37
    assert round(counts.total / 1e9, 1) == 682.6
    assert round((counts.active_with_mtp + counts.embedding) / 1e9, 1) == 38.2
    assert round(DEEPSEEK_V3.parameters_per_rank(64) / 1e9, 1) == 27.8
    assert DEEPSEEK_V3.parameters_per_rank(1) == counts.total


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("hidden", 1.5),
        ("num_dense_layers", 4),
        ("q_lora_rank", 0),
        ("qk_rope_head_dim", 7),
        ("norm_eps", -1.0),
        ("rope_scaling_factor", 0.5),
        ("beta_fast", 1.0),
        ("num_groups", 3),
        ("topk_groups", 2),
        ("num_topk", 17),
        ("score_function", "relu"),
        ("score_function", "softmax"),
        ("layout", "token"),
        ("fp8", "tensorwise"),
        ("max_recv_rows", 0),
    ],
)
def test_refuses_and_names_the_field(field, value):
    with pytest.raises(InvalidInput, match=rf"ModelConfig\.{field} must be .*; got"):
        ModelConfig(**{field: value})


def test_refuses_too_few_eligible_experts():
    with pytest.raises(InvalidInput, match=r"num_topk must be <= 4, the experts in 1 of 4 groups; got 5"):
        ModelConfig(num_groups=4, topk_groups=1, num_topk=5)


def test_ep_size_must_divide_the_experts():
    with pytest.raises(InvalidInput, match=r"ep_size must divide num_experts \(16\); got 3"):
        ModelConfig().parameters_per_rank(3)
