"""moe-ep bench --low-latency: calls of few tokens, as a decoding server makes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from .. import machine
from ..compat.deep_ep import Buffer
from ..errors import InvalidInput
from ..launch import inside_launch
from .measure import gather, median
from .ranks import process_group, run_on_ranks
from .results import write

TOKENS = (1, 8, 32, 64, 128, 256)
SIZES = {"hidden": 7168, "num_topk": 8, "num_experts": 288}

_CALLS = 20  # in a graph
_SLEEP_CYCLES = 200_000  # a tenth of a millisecond: rows arrive before what receives them starts

LEGEND = """\
graph: of a call, among 20 of a CUDA graph one behind the other. kernels: with return_recv_hook, what sends and what
receives, each without waiting for the host. Microseconds of the slowest rank; dispatch is FP8 unless it says bf16."""

_COLUMNS = {
    "dispatch": "graph: dispatch",
    "dispatch_bf16": "bf16",
    "combine": "combine",
    "both": "both",
    "dispatch_send": "kernels: dispatch send",
    "dispatch_receive": "receive",
    "combine_send": "combine send",
    "combine_receive": "receive",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--low-latency",
        action="store_true",
        help="time deep_ep's low-latency calls instead, on GPUs; of the sizes --num-tokens, --hidden, --num-topk and "
        "--num-experts",
    )


def run(args: argparse.Namespace) -> int:
    if args.png is not None:
        raise InvalidInput("--png is not for --low-latency, which draws nothing; its table has --json")
    if not inside_launch() and torch.cuda.device_count() < args.nproc:
        raise InvalidInput(
            f"--low-latency needs a GPU for each of --nproc {args.nproc} ranks; there are {torch.cuda.device_count()}"
        )
    text = run_on_ranks(args.nproc, run_rank, args)
    if text is not None:
        report(json.loads(text))
        if args.json is not None:
            write(text, args.json)
    return 0


def run_rank(args: argparse.Namespace, command: str | None) -> str | None:
    """Measure on this rank, one of those that were launched. Rank 0 returns the results as JSON, the others None."""
    with process_group("cuda") as (rank, size):
        sizes = {name: getattr(args, name) or default for name, default in SIZES.items()}
        mine = {tokens: _measure(tokens, args.iterations, **sizes) for tokens in args.num_tokens or TOKENS}
        by_rank = gather(mine)
        slowest = {
            tokens: {name: max(of_rank[tokens][name] for of_rank in by_rank) for name in row}
            for tokens, row in mine.items()
        }
        facts = machine.facts(torch.device("cuda", torch.cuda.current_device()), command)
        results = {"machine": facts, "ranks": size, "sizes": sizes, "us": slowest}
        return json.dumps(results, indent=2) + "\n" if rank == 0 else None


def report(results: dict[str, Any]) -> None:
    m, sizes = results["machine"], results["sizes"]
    print(f"{results['ranks']} ranks, {m['device']}, torch {m['torch']}, CUDA {m['cuda']}, {m['date']}")
    print(f"hidden {sizes['hidden']}, top-{sizes['num_topk']} of {sizes['num_experts']} experts")
    print(f"$ {m['command']}\n")
    print("tokens  " + "  ".join(_COLUMNS.values()))
    for tokens, row in results["us"].items():
        cells = [f"{row[name]:>{len(title)}.1f}" for name, title in _COLUMNS.items()]
        print(f"{tokens:>6}  " + "  ".join(cells))
    print(f"\n{LEGEND}")


def _measure(tokens: int, iterations: int, hidden: int, num_topk: int, num_experts: int) -> dict[str, float]:
    group = dist.group.WORLD if dist.is_initialized() else None
    buffer = Buffer(group, low_latency_mode=True, explicitly_destroy=True)
    generator = torch.Generator("cuda").manual_seed(buffer.rank)
    scores = torch.rand(tokens, num_experts, device="cuda", generator=generator)
    weights, ids = scores.topk(num_topk)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16()
    room = num_experts // buffer.group_size, buffer.group_size * tokens, hidden
    expert_rows = torch.zeros(room, dtype=torch.bfloat16, device="cuda")

    def dispatch(use_fp8: bool = True, hook: bool = False) -> tuple:
        return buffer.low_latency_dispatch(
            x, ids, tokens, num_experts, use_fp8=use_fp8, return_recv_hook=hook
        )

    def combine(handle: tuple, hook: bool = False) -> tuple:
        return buffer.low_latency_combine(expert_rows, ids, weights, handle, return_recv_hook=hook)

    handle = dispatch()[2]
    combine(handle)
    results = {
        "dispatch": _graph_us(dispatch, iterations),
        "dispatch_bf16": _graph_us(lambda: dispatch(use_fp8=False), iterations),
        "combine": _graph_us(lambda: combine(handle), iterations),
        "both": _graph_us(lambda: combine(dispatch()[2]), iterations),
    }
    results |= _halves_us("dispatch", lambda: dispatch(hook=True)[-1], iterations)
    results |= _halves_us("combine", lambda: combine(handle, hook=True)[-1], iterations)
    torch.cuda.synchronize()
    buffer.destroy()
    return results


def _graph_us(call: Callable[[], object], iterations: int) -> float:
    """Of one call, in a graph of many."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()  # results are dropped at once, so that their memory serves all
    times = []
    for _ in range(iterations):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # ranks come together
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return median(times)


def _halves_us(name: str, call: Callable[[], Callable[[], None]], iterations: int) -> dict[str, float]:
    """Of the kernel that sends, and of that which receives."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(iterations):
            torch.cuda._sleep(_SLEEP_CYCLES)
            receive = call()
            torch.cuda._sleep(_SLEEP_CYCLES)
            receive()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if "low_latency" in event.name and name in event.name]
    kernels.sort(key=lambda event: event.time_range.start)
    times = [event.time_range.elapsed_us() for event in kernels]
    return {f"{name}_send": median(times[::2]), f"{name}_receive": median(times[1::2])}
