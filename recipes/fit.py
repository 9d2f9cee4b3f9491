"""How much memory a rank needs, and whether it is there: said before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ep.layers import ModelConfig

from .config import TrainConfig
from .errors import RecipeError

# Bytes per parameter: weight, float32 gradient, two float32 moments, and a float32 master beside a bfloat16 weight.
STATE_BYTES = {torch.bfloat16: 2 + 4 + 8 + 4, torch.float32: 4 + 4 + 8, torch.float64: 8 + 8 + 16}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. `states` is exact; `activations` counts the large tensors kept for the backward pass."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.activations


def estimate_memory(model: ModelConfig, *, ep_size: int, tokens: int, dtype: torch.dtype) -> MemoryEstimate:
    """Memory of one rank whose micro-batch has `tokens` tokens."""
    states = model.parameters_per_rank(ep_size) * STATE_BYTES[dtype]
    c = model
    attention = 6 * c.hidden + 2 * c.num_heads * (2 * c.qk_head_dim + 2 * c.v_head_dim)
    dense = 4 * c.ffn_hidden
    moe = c.num_topk * (2 * c.hidden + 4 * c.moe_ffn_hidden) + 4 * c.shared_ffn_hidden
    blocks = c.num_layers + c.mtp_layers
    per_token = blocks * attention + c.num_dense_layers * dense + (blocks - c.num_dense_layers) * moe
    # Logits in the model's dtype, in float32, and their gradient.
    logits = (1 + c.mtp_layers) * c.vocab_size * (dtype.itemsize + 8)
    return MemoryEstimate(states, tokens * (per_token * dtype.itemsize + logits))


def check_fits(
    config: TrainConfig, *, world_size: int, local_ranks: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises RecipeError, with what to try instead, where this rank's share is more than the memory now free."""
    ep_size = config.ep_size(world_size)
    tokens = config.micro_batch(world_size) * config.seq_len
    need = estimate_memory(config.model, ep_size=ep_size, tokens=tokens, dtype=dtype)
    free = free_memory(device, local_ranks)
    if free is None or need.total <= free:
        return
    if need.states > free:
        advice = f"use more ranks (`moe-ep plan --preset {config.preset}` shows what they hold) or a smaller preset"
    else:
        advice = "raise --accumulate, lower --batch or --seq-len, or use more ranks"
    raise RecipeError(
        f"{config.preset} doesn't fit: with EP {ep_size} a rank needs about {gib(need.total)} "
        f"({gib(need.states)} weights and optimiser, {gib(need.activations)} activations), and "
        f"{'this GPU' if device.type == 'cuda' else 'its share of this machine'} has {gib(free)} free. "
        f"{advice[0].upper()}{advice[1:]}."
    )


def free_memory(device: torch.device, local_ranks: int) -> int | None:
    """Bytes that this rank may use: the GPU's free memory, or its share of the machine's. None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // local_ranks
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks
    except (ValueError, OSError, AttributeError):
        return None


def gib(num_bytes: float) -> str:
    """Example: 3221225472 -> '3.0 GiB'."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / (1 << 20):,.1f} MiB"
