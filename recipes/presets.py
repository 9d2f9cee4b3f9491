"""Named runs, from minutes on a laptop's CPU to DeepSeek-V3.

DeepSeek-V3's sizes are the published ones (arXiv:2412.19437, section 4.2, and the released config.json). `train-s`,
`train-m`, `wide` and `layer` keep its structure (MLA, sigmoid scores, 4 of 8 groups, a shared expert, expert bias) at
sizes for one or two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_ep.layers import ModelConfig

from .config import TrainConfig
from .errors import RecipeError

_DEEPSEEK_ROUTING = {
    "num_topk": 8,
    "num_groups": 8,
    "topk_groups": 4,
    "score_function": "sigmoid",
    "routed_scaling": 2.5,
    "expert_bias": True,
    "bias_update_rate": 1e-3,
    "seq_aux_loss_coeff": 1e-4,
}

_DEEPSEEK_WIDTHS = {
    "hidden": 7168,
    "num_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "ffn_hidden": 18432,
    "moe_ffn_hidden": 2048,
    "shared_ffn_hidden": 2048,
}


def tiny() -> TrainConfig:
    """A few minutes on two CPU cores: bytes in, 16 experts, one MTP module."""
    return TrainConfig(
        preset="tiny",
        model=ModelConfig(
            vocab_size=256,
            num_layers=3,
            num_dense_layers=1,
            hidden=128,
            num_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            ffn_hidden=256,
            moe_ffn_hidden=64,
            shared_ffn_hidden=64,
            num_experts=16,
            num_topk=4,
            num_groups=4,
            topk_groups=2,
            mtp_layers=1,
            bias_update_rate=3e-3,
            max_seq_len=128,
            init_std=0.05,
        ),
        seq_len=128,
        batch=16,
        steps=300,
        lr=4e-3,
        warmup=40,
        eval_every=50,
        eval_windows=128,
        checkpoint_every=150,
    )


def train_s() -> TrainConfig:
    """0.51 B parameters: minutes on one or two GPUs."""
    return TrainConfig(
        preset="train-s",
        model=ModelConfig(
            **_DEEPSEEK_ROUTING,
            vocab_size=32768,
            num_layers=8,
            num_dense_layers=1,
            hidden=1024,
            num_heads=16,
            q_lora_rank=384,
            kv_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            ffn_hidden=3072,
            moe_ffn_hidden=256,
            shared_ffn_hidden=256,
            num_experts=64,
            mtp_layers=1,
            max_seq_len=1024,
        ),
        seq_len=1024,
        batch=32,
        steps=1000,
        accumulate=1,
        lr=6e-4,
        warmup=100,
        eval_every=100,
        eval_windows=64,
        checkpoint_every=500,
    )


def train_m() -> TrainConfig:
    """2.8 B parameters, 0.67 B active: loss curves on two large GPUs."""
    return TrainConfig(
        preset="train-m",
        model=ModelConfig(
            **_DEEPSEEK_ROUTING,
            vocab_size=32768,
            num_layers=12,
            num_dense_layers=1,
            hidden=2048,
            num_heads=16,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            ffn_hidden=6144,
            moe_ffn_hidden=512,
            shared_ffn_hidden=512,
            num_experts=64,
            mtp_layers=1,
            max_seq_len=2048,
        ),
        seq_len=2048,
        batch=64,
        steps=5000,
        accumulate=4,
        lr=4e-4,
        warmup=250,
        eval_every=250,
        eval_windows=64,
        checkpoint_every=1000,
    )


def wide() -> TrainConfig:
    """One dense and one MoE layer at DeepSeek-V3's true widths, 64 experts: 4.1 B parameters."""
    return TrainConfig(
        preset="wide",
        model=ModelConfig(
            **_DEEPSEEK_ROUTING,
            **_DEEPSEEK_WIDTHS,
            vocab_size=32768,
            num_layers=2,
            num_dense_layers=1,
            num_experts=64,
            max_seq_len=4096,
        ),
        seq_len=4096,
        batch=8,
        steps=500,
        accumulate=2,
        lr=2.2e-4,
        warmup=50,
        eval_every=100,
        eval_windows=16,
        checkpoint_every=500,
    )


def layer() -> TrainConfig:
    """One block of DeepSeek-V3's widths with 32 experts, for timings: 4096 tokens a step and rank on two GPUs."""
    return TrainConfig(
        preset="layer",
        model=ModelConfig(
            **_DEEPSEEK_ROUTING,
            **_DEEPSEEK_WIDTHS,
            vocab_size=256,
            num_layers=1,
            num_dense_layers=0,
            num_experts=32,
            max_seq_len=4096,
        ),
        seq_len=4096,
        batch=2,
        steps=100,
        lr=2.2e-4,
        warmup=10,
        eval_every=0,
        eval_windows=4,
        checkpoint_every=0,
    )


def deepseek_v3() -> TrainConfig:
    """DeepSeek-V3 itself: 671 B parameters, 37 B active, and an MTP module. `moe-ep plan` shows what it asks for."""
    return TrainConfig(
        preset="deepseek-v3",
        model=ModelConfig(
            **_DEEPSEEK_ROUTING,
            **_DEEPSEEK_WIDTHS,
            vocab_size=129280,
            num_layers=61,
            num_dense_layers=3,
            num_experts=256,
            mtp_layers=1,
            rope_scaling_factor=40.0,
            max_seq_len=4096,
            init_std=0.006,
        ),
        seq_len=4096,
        batch=15360,
        steps=235_000,
        accumulate=15,
        lr=2.2e-4,
        warmup=2000,
        eval_every=1000,
        checkpoint_every=1000,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "train-s": train_s,
    "train-m": train_m,
    "wide": wide,
    "layer": layer,
    "deepseek-v3": deepseek_v3,
}


def get_preset(name: str) -> TrainConfig:
    """Raises RecipeError for a name that isn't in PRESETS."""
    if name not in PRESETS:
        raise RecipeError(f"--preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]()
