"""Rotary frequencies, YaRN and its temperatures against formulas worked by hand."""

import math

import pytest
import torch

from moe_ep.layers import ModelConfig, RotaryEmbedding
from moe_ep.layers.rope import rotary_frequencies, rotate, softmax_scale, yarn_temperature

DEEPSEEK_V3 = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling_factor": 40.0,
    "original_max_position": 4096,
    "max_seq_len": 16384,
}


def test_plain_frequencies():
    expected = [1.0, 0.1, 0.01, 0.001]
    assert rotary_frequencies(ModelConfig(qk_rope_head_dim=8)).tolist() == pytest.approx(expected)


def test_yarn_frequencies_of_deepseek_v3():
    # Pair turning 32 times in 4096: 64 ln(4096 / (64 pi)) / (2 ln 10000) = 10.4715..; once: 22.5129..
    # so the ramp runs from pair 10 to pair 23.
    config = ModelConfig(**DEEPSEEK_V3)
    f = rotary_frequencies(config)
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    assert f[:11].tolist() == pytest.approx(plain[:11])
    assert f[23:].tolist() == pytest.approx([p / 40 for p in plain[23:]])
    for i in range(11, 23):
        r = (i - 10) / 13
        assert f[i].item() == pytest.approx(plain[i] * (1 - r) + plain[i] / 40 * r)


def test_yarn_waits_for_a_long_context():
    config = ModelConfig(**{**DEEPSEEK_V3, "max_seq_len": 4096})
    assert not config.uses_yarn
    assert rotary_frequencies(config)[-1].item() == pytest.approx(10000 ** (-62 / 64))
    assert softmax_scale(config) == pytest.approx(192**-0.5)


def test_temperatures():
    assert yarn_temperature(40, 1.0) == pytest.approx(0.1 * math.log(40) + 1)
    config = ModelConfig(**DEEPSEEK_V3)
    assert softmax_scale(config) == pytest.approx(192**-0.5 * 1.3688879454**2)
    cos, sin = RotaryEmbedding(config)(3)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, 32))
    config = ModelConfig(**DEEPSEEK_V3, mscale=2.0, mscale_all_dim=0.0)
    cos, sin = RotaryEmbedding(config)(3)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full((3, 32), 0.2 * math.log(40) + 1))
    assert softmax_scale(config) == pytest.approx(192**-0.5)


def test_rotation_is_a_complex_product_and_relative():
    config = ModelConfig(qk_rope_head_dim=8, max_seq_len=32)
    cos, sin = RotaryEmbedding(config)(32)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 8)
    angle = torch.outer(torch.arange(32.0), rotary_frequencies(config).float())
    expected = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)
    )
    torch.testing.assert_close(rotate(x, cos, sin), expected.flatten(-2))

    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = rotate(q.expand(32, 8), cos, sin), rotate(k.expand(32, 8), cos, sin)
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_tables_stay_float32():
    rotary = RotaryEmbedding(ModelConfig()).bfloat16()
    cos, _ = rotary(5)
    assert cos.dtype == torch.float32
    assert rotate(torch.ones(5, 8, dtype=torch.bfloat16), *rotary(5)).dtype == torch.bfloat16
    assert not rotary.state_dict()
