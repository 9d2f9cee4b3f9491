"""The rate at which the GPUs' copy engines move bytes to a peer: what a link can do, and the floor of every time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .measure import Stopwatch, gather, median_us

SIZES = tuple(mib << 20 for mib in (1, 4, 16, 64, 256))
_ITERATIONS = 10


@dataclass(frozen=True)
class CopyRate:
    """A copy of ``num_bytes`` on every rank at once, and the time on the slowest."""

    num_bytes: int
    us: float

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.us / 1e3


def measure(device: torch.device) -> list[CopyRate]:
    """Every rank copies to its right neighbour's symmetric memory at the same time, so both directions are busy.

    Empty with one rank, or without GPUs.
    """
    if device.type != "cuda" or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    import torch.distributed._symmetric_memory as symmetric_memory

    largest = max(SIZES)
    window = symmetric_memory.empty(largest, dtype=torch.uint8, device=device)
    exchanged = symmetric_memory.rendezvous(window, dist.group.WORLD.group_name)
    neighbour = (dist.get_rank() + 1) % dist.get_world_size()
    remote = exchanged.get_buffer(neighbour, (largest,), torch.uint8)
    local = torch.zeros(largest, dtype=torch.uint8, device=device)
    watch = Stopwatch(device)
    rates = []
    for size in SIZES:
        us = median_us(watch.device_us, lambda i, size=size: remote[:size].copy_(local[:size]), _ITERATIONS)
        rates.append(CopyRate(size, max(gather(us))))
    dist.barrier()  # nobody frees its window while another still writes to it
    return rates


def best_rate(rates: list[CopyRate]) -> float | None:
    """GB/s; None where nothing was measured."""
    return max((rate.gb_per_s for rate in rates), default=None)
