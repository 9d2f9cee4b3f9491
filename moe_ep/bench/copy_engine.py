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


class CopyToNeighbour:
    """Copies up to ``most_bytes`` to the right neighbour's symmetric memory, by a copy engine, on the current stream.

    Making it is collective, on a machine whose GPUs reach each other; drop it behind a barrier.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._window = symmetric_memory.empty(most_bytes, dtype=torch.uint8, device=device)
        exchanged = symmetric_memory.rendezvous(self._window, dist.group.WORLD.group_name)
        neighbour = (dist.get_rank() + 1) % dist.get_world_size()
        self._remote = exchanged.get_buffer(neighbour, (most_bytes,), torch.uint8)
        self._local = torch.zeros(most_bytes, dtype=torch.uint8, device=device)

    def __call__(self, num_bytes: int) -> None:
        self._remote[:num_bytes].copy_(self._local[:num_bytes])


def measure(device: torch.device) -> list[CopyRate]:
    """Every rank copies at the same time, so both directions are busy. Empty with one rank, or without GPUs."""
    if device.type != "cuda" or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    copy = CopyToNeighbour(device, max(SIZES))
    watch = Stopwatch(device)
    rates = []
    for size in SIZES:
        us = median_us(watch.device_us, lambda i, size=size: copy(size), _ITERATIONS)
        rates.append(CopyRate(size, max(gather(us))))
    dist.barrier()  # nobody frees its window while another still writes to it
    return rates


def best_rate(rates: list[CopyRate]) -> float | None:
    """GB/s; None where nothing was measured."""
    return max((rate.gb_per_s for rate in rates), default=None)
