"""Timing, as deep_ep's benchmarks do it."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ....errors import BackendUnavailable, InvalidInput

_L2_BYTES = 256_000_000  # more than any GPU's
_SLEEP_CYCLES = 20_000_000


def flush_l2_cache(enabled: bool = True) -> None:
    """Have a GPU's second-level cache hold something else."""
    if enabled and torch.cuda.is_available():
        torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda").zero_()


def bench(
    fn: Callable[[], object],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], object] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Average, least and most seconds of ``fn()``: by CUDA events, or by the clock where there is no GPU.

    ``post_fn()`` is called behind each, untimed. The first of the tests does not count.
    """
    if num_tests < 2:
        raise InvalidInput(
            f"num_tests is {num_tests}; it must be at least 2, of which the first does not count"
        )
    for _ in range(num_warmups):
        fn()
    times = (_by_events if torch.cuda.is_available() else _by_clock)(fn, num_tests, post_fn, flush_l2)[1:]
    return statistics.fmean(times), min(times), max(times)


def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], object] | None = None,
) -> float | list[float] | tuple | list:
    """Average seconds of the kernels whose names contain ``kernel_names``, by torch's profiler; 0 for none.

    A list for a tuple of names. ``num_kernels_per_period``: ``fn`` launches the kernel so many times, and each has its
    own average. ``barrier_comm_profiling``: ranks meet before each call (by ``barrier``, or an all_reduce), behind a
    long kernel, so that hosts' delays don't count. With EP_USE_NVIDIA_TOOLS=1, under which the profiler can't run,
    nothing is measured and every time is 1. Raises BackendUnavailable without a GPU.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    if os.environ.get("EP_USE_NVIDIA_TOOLS", "0") != "0":
        return 1 if isinstance(kernel_names, str) else (1,) * len(names)
    if not torch.cuda.is_available():
        raise BackendUnavailable("bench_kineto times kernels, for which there must be a GPU; use bench")

    def meet() -> None:
        torch.cuda._sleep(_SLEEP_CYCLES)
        if barrier is not None:
            barrier()
        else:
            dist.all_reduce(torch.ones(1, device="cuda"))

    fn()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with _silence(suppress_kineto_output), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(num_tests):
            flush_l2_cache(flush_l2)
            if barrier_comm_profiling:
                meet()
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    durations = [_durations(profiler, name, num_kernels_per_period) for name in names]
    return durations[0] if isinstance(kernel_names, str) else durations


def _durations(profiler: torch.profiler.profile, name: str, per_period: int) -> float | list[float]:
    kernels = [
        event for event in profiler.events() if name in event.name and event.device_type.name == "CUDA"
    ]
    kernels.sort(key=lambda event: event.time_range.start)
    seconds = [event.time_range.elapsed_us() * 1e-6 for event in kernels]
    if len(seconds) % per_period:
        raise InvalidInput(
            f"{len(seconds)} kernels are named {name!r}, which is no multiple of num_kernels_per_period={per_period}"
        )
    averages = [statistics.fmean(seconds[i::per_period]) if seconds else 0.0 for i in range(per_period)]
    return averages[0] if per_period == 1 else averages


def _by_events(fn, num_tests: int, post_fn, flush_l2: bool) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_tests)]
    for start, end in pairs:
        flush_l2_cache(flush_l2)
        start.record()
        fn()
        end.record()
        if post_fn is not None:
            post_fn()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def _by_clock(fn, num_tests: int, post_fn, _flush_l2: bool) -> list[float]:
    times = []
    for _ in range(num_tests):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
        if post_fn is not None:
            post_fn()
    return times


@contextlib.contextmanager
def _silence(enabled: bool) -> Iterator[None]:
    """Nothing written to this process's standard output and error, also by its libraries."""
    if not enabled:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
