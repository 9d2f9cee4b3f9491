"""What a call launches on a GPU, and how long it takes there."""

from collections.abc import Callable

import torch


def kernels_of(name: str, fn: Callable[[], object], repeats: int = 10) -> float:
    """How many kernels a call launches; prints their microseconds."""
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            fn()
        torch.cuda.synchronize()
    times = {}
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not event.name.startswith("moe_ep."):  # a named range
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    count, total = (sum(map(of, times.values())) / repeats for of in (len, sum))
    print(f"\n{name}: {total:.1f} us, {count:g} kernels")
    for kernel, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"  {sum(each) / repeats:7.1f} us  {len(each) / repeats:g} x {kernel[:100]}")
    return count
