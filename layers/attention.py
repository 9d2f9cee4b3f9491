"""Multi-head Latent Attention of DeepSeek-V2 and V3 (arXiv:2405.04434, section 2.1), in its training form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .config import ModelConfig
from .norm import RMSNorm
from .rope import rotate, softmax_scale
from .weight_gradients import Linear


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values are made from one small latent per token.

    A query or key head is ``[without position | rotated]``; the rotated part of the key is one vector per
    token, shared by all heads. Parameters (``n`` heads; ``D_n``, ``D_r``, ``D_v`` for qk_nope_head_dim,
    qk_rope_head_dim, v_head_dim; ``R_q``, ``R_kv`` for the ranks of the latents):

    - ``q_down.weight [R_q, H]``, ``q_norm.weight [R_q]``, ``q_up.weight [n (D_n + D_r), R_q]``; or, with
      ``q_lora_rank=None``, ``q_proj.weight [n (D_n + D_r), H]`` alone
    - ``kv_down.weight [R_kv + D_r, H]``: latent, then the rotated key; ``kv_norm.weight [R_kv]``
    - ``kv_up.weight [n (D_n + D_v), R_kv]``: for each head its key, then its value
    - ``out_proj.weight [H, n D_v]``
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        factory = {"device": device, "dtype": dtype}
        c, heads = config, config.num_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden, heads * c.qk_head_dim, **factory)
        else:
            self.q_down = Linear(c.hidden, c.q_lora_rank, **factory)
            self.q_norm = RMSNorm(c.q_lora_rank, eps=c.norm_eps, **factory)
            self.q_up = Linear(c.q_lora_rank, heads * c.qk_head_dim, **factory)
        self.kv_down = Linear(c.hidden, c.kv_lora_rank + c.qk_rope_head_dim, **factory)
        self.kv_norm = RMSNorm(c.kv_lora_rank, eps=c.norm_eps, **factory)
        self.kv_up = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), **factory)
        self.out_proj = Linear(heads * c.v_head_dim, c.hidden, **factory)

    def forward(self, x_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attends within each sequence, each position to itself and those before.

        ``x_BSH [B, S, H]``; ``rotary``: what :class:`RotaryEmbedding` gives for ``S``. Returns ``[B, S, H]``.
        """
        c, (cos, sin) = self.config, rotary
        q = self.q_proj(x_BSH) if c.q_lora_rank is None else self.q_up(self.q_norm(self.q_down(x_BSH)))
        q = q.unflatten(-1, (c.num_heads, c.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)

        latent, k_rope = self.kv_down(x_BSH).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv = self.kv_up(self.kv_norm(latent))
        kv = kv.unflatten(-1, (c.num_heads, c.qk_nope_head_dim + c.v_head_dim)).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, c.num_heads, -1, -1)

        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        y = causal_attention(q, k, v, self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """``q``, ``k [B, n, S, D]``, ``v [B, n, S, D_v]`` -> ``[B, n, S, D_v]``.

    On a GPU cuDNN takes values of another width as they are, and padding would cost it a third. torch's CPU
    kernel wants one width, and values padded with zeros are up to 2.5 times faster than the plain products it
    falls back to.
    """
    width = v.shape[-1]
    if v.device.type == "cpu" and width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]
