"""Weights from a seed that depend on a parameter's name and an expert's global number, never on the layout of
ranks.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from .experts import GroupedExperts
from .norm import RMSNorm
from .router import Router


@torch.no_grad()
def initialise_weights(module: nn.Module, *, seed: int, std: float) -> None:
    """Fills all weight matrices below ``module`` with ``N(0, std^2)`` and all norm weights with 1.

    Each matrix, and each expert of a stacked one, gets a random stream of its own, seeded by ``seed``, its
    name and the expert's global number: the same model comes out for every expert-parallel size, and on every
    rank without any communication. torch's global random state is neither read nor changed. Values are drawn
    in float32 on the parameter's device (CPU and CUDA streams differ), then rounded.
    """
    for name, submodule in module.named_modules():
        if isinstance(submodule, GroupedExperts):
            for weight_name, weight in submodule.named_parameters(recurse=False):
                for local, expert_weight in enumerate(weight):
                    _fill(expert_weight, f"{name}.{weight_name}.{submodule.first_expert + local}", seed, std)
        elif isinstance(submodule, (nn.Linear, nn.Embedding, Router)):
            _fill(submodule.weight, f"{name}.weight", seed, std)
        elif isinstance(submodule, RMSNorm):
            submodule.weight.fill_(1.0)


def _fill(weight: torch.Tensor, name: str, seed: int, std: float) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    weight.copy_(values.normal_(0.0, std, generator=generator))
