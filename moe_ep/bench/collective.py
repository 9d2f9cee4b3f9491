"""The `collective` backend next to bare all_to_all_single calls."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from .. import Communicator, combine, dispatch
from .measure import Timing, gather, time_operations
from .workload import DTYPES, Workload


def run_rank(workload: Workload, iterations: int) -> dict[str, Any] | None:
    """Measure on this rank of the default group. Rank 0 returns the results, the others None."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # One thread each where ranks share the cores; their number is otherwise the user's (OMP_NUM_THREADS).
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    workload.check(size)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")
    topk_idx = workload.topk_idx(rank, size).to(device)
    topk_weights = torch.rand(topk_idx.shape, device=device)
    inputs = workload.inputs(rank, device)

    with (
        torch.no_grad(),
        Communicator(
            hidden=workload.hidden,
            max_tokens_per_rank=workload.num_tokens,
            num_experts=workload.num_experts,
            num_topk=workload.num_topk,
            backend="collective",
        ) as comm,
    ):
        first = dispatch(inputs[0], topk_idx, topk_weights, comm, layout=workload.layout)
        rows = [first.tokens, first.tokens.clone()]
        sent = workload.pairs_by_rank(topk_idx, size)
        received = _received(sent, rank)
        bare = BareAllToAll(sent, received, workload, device)
        off_rank = BareAllToAll(_without(sent, rank), _without(received, rank), workload, device)
        timings = time_operations(
            {
                "dispatch": lambda i: dispatch(
                    inputs[i % len(inputs)], topk_idx, topk_weights, comm, layout=workload.layout
                ),
                "dispatch, cached handle": lambda i: dispatch(
                    inputs[i % len(inputs)], None, topk_weights, comm, handle=first.handle
                ),
                "combine": lambda i: combine(rows[i % len(rows)], first.handle),
                "all_to_all_single, as dispatch": lambda i: bare.dispatch(),
                "all_to_all_single, as combine": lambda i: bare.combine(),
                "all_to_all_single, off-rank rows, as dispatch": lambda i: off_rank.dispatch(),
                "all_to_all_single, off-rank rows, as combine": lambda i: off_rank.combine(),
            },
            iterations,
            device,
            None if device.type == "cuda" else lambda: comm._impl.communication_s,
        )
        transport = comm._impl.transport
    results = None
    if rank == 0:
        off_rank_rows = sum(_without(sent, rank))
        results = dict(
            workload=asdict(workload),
            ranks=size,
            device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            transport=transport,
            threads_per_rank=torch.get_num_threads(),
            torch=torch.__version__,
            iterations=iterations,
            wire_bytes=off_rank_rows * workload.row_bytes,
            timings={name: asdict(timing) for name, timing in timings.items()},
            ratio=_ratio(timings, ""),
            ratio_off_rank=_ratio(timings, "off-rank rows, "),
        )
    return results


class BareAllToAll:
    """Two all_to_all_single calls between buffers that are ready: rows there, rows back."""

    def __init__(
        self, sent: list[int], received: list[int], workload: Workload, device: torch.device
    ) -> None:
        self._sent, self._received = sent, received
        dtype = DTYPES[workload.dtype]
        self._here, self._there = (
            torch.randn(sum(counts), workload.hidden, device=device).to(dtype) for counts in (sent, received)
        )

    def dispatch(self) -> None:
        if dist.is_initialized():
            dist.all_to_all_single(self._there, self._here, self._received, self._sent)

    def combine(self) -> None:
        if dist.is_initialized():
            dist.all_to_all_single(self._here, self._there, self._sent, self._received)


def _ratio(timings: dict[str, Timing], kind: str) -> float | None:
    """dispatch (routing exchanged) plus combine over the bare calls."""
    bare = [timings[f"all_to_all_single, {kind}as {op}"].max_us for op in ("dispatch", "combine")]
    ours = timings["dispatch"].max_us + timings["combine"].max_us
    return ours / sum(bare) if dist.is_initialized() and dist.get_world_size() > 1 else None


def _received(sent: list[int], rank: int) -> list[int]:
    return [counts[rank] for counts in gather(sent)]


def _without(counts: list[int], rank: int) -> list[int]:
    return [0 if r == rank else count for r, count in enumerate(counts)]


def on_gpu() -> bool:
    """Whether the default group's ranks have a GPU each."""
    return dist.is_initialized() and "nccl" in dist.get_backend_config()
