"""Multi-head Latent Attention against its formulas written with einsum."""

import pytest
import torch
import torch.nn.functional as F

from moe_ep.layers import ModelConfig, MultiHeadLatentAttention, RMSNorm, RotaryEmbedding
from moe_ep.layers.rope import rotate, softmax_scale


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def reference(attention, x_BSH, cos, sin):
    c, p = attention.config, dict(attention.named_parameters())
    d_n, d_v, heads, eps = c.qk_nope_head_dim, c.v_head_dim, c.num_heads, c.norm_eps
    if c.q_lora_rank is None:
        q = torch.einsum("bsh,oh->bso", x_BSH, p["q_proj.weight"])
    else:
        down = torch.einsum("bsh,rh->bsr", x_BSH, p["q_down.weight"])
        q = torch.einsum("bsr,or->bso", rms_norm(down, p["q_norm.weight"], eps), p["q_up.weight"])
    q = q.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3)
    compressed = torch.einsum("bsh,rh->bsr", x_BSH, p["kv_down.weight"])
    latent, k_rope = compressed[..., : c.kv_lora_rank], compressed[..., c.kv_lora_rank :]
    kv = torch.einsum("bsr,or->bso", rms_norm(latent, p["kv_norm.weight"], eps), p["kv_up.weight"])
    kv = kv.unflatten(-1, (heads, d_n + d_v)).permute(0, 2, 1, 3)

    scores = torch.einsum("bnqd,bnkd->bnqk", q[..., :d_n], kv[..., :d_n])
    scores = scores + torch.einsum("bnqd,bkd->bnqk", rotate(q[..., d_n:], cos, sin), rotate(k_rope, cos, sin))
    seq_len = x_BSH.shape[1]
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    probabilities = (scores * softmax_scale(c)).masked_fill(~mask, -torch.inf).softmax(-1)
    y = torch.einsum("bnqk,bnkd->bqnd", probabilities, kv[..., d_n:]).flatten(-2)
    return torch.einsum("bso,ho->bsh", y, p["out_proj.weight"])


@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("yarn", [False, True])
def test_equals_einsum(q_lora_rank, yarn):
    stretch = {"rope_scaling_factor": 4.0, "original_max_position": 8} if yarn else {}
    config = ModelConfig(q_lora_rank=q_lora_rank, max_seq_len=16, **stretch)
    assert config.uses_yarn == yarn
    torch.manual_seed(0)
    attention = MultiHeadLatentAttention(config, dtype=torch.float64)
    for norm in attention.modules():
        if isinstance(norm, RMSNorm):
            norm.weight.data.uniform_(0.5, 1.5)
    cos, sin = (table.double() for table in RotaryEmbedding(config)(11))
    x = torch.randn(2, 11, config.hidden, dtype=torch.float64)
    y = attention(x, (cos, sin))
    torch.testing.assert_close(y, reference(attention, x, cos, sin))

    got = torch.autograd.grad(y.square().sum(), list(attention.parameters()))
    wanted = torch.autograd.grad(
        reference(attention, x, cos, sin).square().sum(), list(attention.parameters())
    )
    torch.testing.assert_close(got, wanted)


def test_is_causal():
    config = ModelConfig(max_seq_len=16)
    attention, rotary = MultiHeadLatentAttention(config), RotaryEmbedding(config)(9)
    x = torch.randn(1, 9, config.hidden)
    y = attention(x, rotary)
    changed = x.clone()
    changed[:, 5:] += 1
    z = attention(changed, rotary)
    torch.testing.assert_close(z[:, :5], y[:, :5])
    assert not torch.allclose(z[:, 5:], y[:, 5:])


def test_compiles_without_graph_breaks():
    config = ModelConfig(max_seq_len=16)
    attention, rotary = MultiHeadLatentAttention(config), RotaryEmbedding(config)(8)
    x = torch.randn(1, 8, config.hidden)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rotary), attention(x, rotary))


def test_rms_norm():
    norm = RMSNorm(6, eps=1e-6)
    norm.weight.data.uniform_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight, 1e-6))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-6))
