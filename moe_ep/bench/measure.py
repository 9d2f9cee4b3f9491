"""Timing operations on all ranks at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARMUP = 5
HEAD_START = 1_000_000
"""Clock cycles, half a millisecond, in which the host, slower than the GPU, gets ahead of it."""

Operation = Callable[[int], object]
"""Gets the number of the call, by which it chooses among its inputs."""


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

    @staticmethod
    def of_ranks(medians: list[float]) -> Timing:
        return Timing(min(medians), median(medians), max(medians))


class Stopwatch:
    """Times calls that all ranks begin together. On a CPU all its clocks are the host's."""

    def __init__(self, device: torch.device, head_start: int = HEAD_START) -> None:
        self._on_gpu = device.type == "cuda"
        self._head_start = head_start
        self._number = torch.zeros(1, device=device)

    def device_us(self, operation: Operation, i: int) -> float:
        """Time of all that the call gives the GPU, from when every rank's GPU has come to it.

        The events lie around the whole call on the current stream, so they miss none of its kernels; the GPU sleeps
        first, so that the host's time is not in between, except where the call itself waits for the GPU.
        """
        if not self._on_gpu:
            return self.wall_us(operation, i)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.begin_together()
        begin.record()
        operation(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def begin_together(self) -> None:
        """What the GPU is given next it does when every rank's has come to it, and the host is some way ahead."""
        if self._on_gpu:
            torch.cuda._sleep(self._head_start)
        self._meet()

    def kernels_us(self, operation: Operation, iterations: int) -> float | None:
        """The time of a call's kernels and copies alone, added up: the median over ``iterations``. None on a CPU."""
        if not self._on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for i in range(iterations):
                self.begin_together()
                operation(i)
            self._wait()
        sums: list[float] = []
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        for event in sorted(events, key=lambda event: event.time_range.start):
            if "spin_kernel" in event.name:  # the head start
                sums.append(0.0)
            elif "nccl" not in event.name.lower():
                sums[-1] += event.time_range.elapsed_us()
        return median(sums)

    def wall_us(self, operation: Operation, i: int) -> float:
        """The host's time from before the call until the GPU has ended it."""
        self._meet()
        self._wait()
        start = time.perf_counter()
        operation(i)
        self._wait()
        return (time.perf_counter() - start) * 1e6

    def enqueue_us(self, operation: Operation, calls: int) -> float:
        """The host's time for one call that it need not wait for: that of many, divided."""
        self._meet()
        self._wait()
        start = time.perf_counter()
        for i in range(calls):
            operation(i)
        elapsed = time.perf_counter() - start
        self._wait()
        return elapsed / calls * 1e6

    def _meet(self) -> None:
        """The device does no more until every rank's does; on a CPU the host."""
        if not dist.is_initialized():
            return
        if self._on_gpu:
            dist.all_reduce(self._number)
        else:
            dist.barrier()

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def median_us(clock: Callable[[Operation, int], float], operation: Operation, iterations: int) -> float:
    """Median over ``iterations`` after a warm-up, on this rank; ``clock`` is a method of Stopwatch."""
    return median([clock(operation, i) for i in range(WARMUP + iterations)][WARMUP:])


def time_operations(
    operations: dict[str, Operation],
    iterations: int,
    device: torch.device,
    communication_s: Callable[[], float] | None = None,
    head_start: int = HEAD_START,
) -> dict[str, Timing]:
    """Time each operation ``iterations`` times, one after another in every round, so that all see the same machine.

    ``communication_s``: a clock of the time spent communicating so far.
    """
    watch = Stopwatch(device, head_start)
    times: dict[str, list[float]] = {name: [] for name in operations}
    outside: dict[str, list[float]] = {name: [] for name in operations}
    for i in range(WARMUP + iterations):
        for name, operation in operations.items():
            before = communication_s() if communication_s else 0.0
            elapsed = watch.device_us(operation, i)
            if i < WARMUP:
                continue
            times[name].append(elapsed)
            if communication_s:
                outside[name].append(elapsed - (communication_s() - before) * 1e6)
    return {name: _over_ranks(times[name], outside[name]) for name in operations}


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _over_ranks(times: list[float], outside: list[float]) -> Timing:
    everyone = gather([median(times), median(outside) if outside else -1.0])
    timing = Timing.of_ranks([us for us, _ in everyone])
    slowest = max(everyone)
    return Timing(timing.min_us, timing.median_us, timing.max_us, slowest[1] if outside else None)
