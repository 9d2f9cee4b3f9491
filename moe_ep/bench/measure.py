"""Timing operations on all ranks at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_WARMUP = 5
_SLEEP_CYCLES = 500_000  # while the GPU waits, the host, which is slower, gets ahead of it


@dataclass(frozen=True)
class Timing:
    """Times of one operation in microseconds.

    The median over iterations is taken on each rank; ``min_us``, ``median_us`` and ``max_us`` are over the ranks.
    ``outside_us``: of the slowest rank's median, what it spent outside communication; None where unknown.
    """

    min_us: float
    median_us: float
    max_us: float
    outside_us: float | None = None


class Stopwatch:
    """Host time on a CPU, device time (events) on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"

    def time(self, operation: Callable[[], object]) -> float:
        """Microseconds of one call."""
        if not self._on_device:
            start = time.perf_counter()
            operation()
            return (time.perf_counter() - start) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        operation()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


def time_operations(
    operations: dict[str, Callable[[int], object]],
    iterations: int,
    device: torch.device,
    communication_s: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time each operation ``iterations`` times, one after another in every round, so that all see the same machine.

    Operations get the number of the round. ``communication_s``: a clock of the time spent communicating so far.
    """
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in operations}
    outside: dict[str, list[float]] = {name: [] for name in operations}
    for i in range(_WARMUP + iterations):
        for name, operation in operations.items():
            if dist.is_initialized():
                dist.barrier()
            before = communication_s() if communication_s else 0.0
            elapsed = watch.time(lambda operation=operation, i=i: operation(i))
            if i < _WARMUP:
                continue
            times[name].append(elapsed)
            if communication_s:
                outside[name].append(elapsed - (communication_s() - before) * 1e6)
    return {name: _over_ranks(times[name], outside[name]) for name in operations}


def _over_ranks(times: list[float], outside: list[float]) -> Timing:
    mine = [_median(times), _median(outside) if outside else -1.0]
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    medians = sorted(times for times, _ in everyone)
    slowest = max(everyone)
    return Timing(medians[0], _median(medians), medians[-1], slowest[1] if outside else None)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
