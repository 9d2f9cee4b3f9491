"""Dispatch and combine of random tokens against moe_ep.reference, bit for bit, wherever they can run here."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from .. import Communicator, _extension, functional, reference, testing
from ..launch import init_process_group, spawn
from .report import Fact

SECTION = "Self-test"
VIRTUAL_RANKS = 4
HIDDEN, NUM_EXPERTS, NUM_TOPK, MAX_TOKENS = 64, 16, 4, 64
_MAX_PROCESSES = 8
_TIMEOUT_S = 30.0

Outcome = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Dispatched tokens and weights, and sums, on the CPU."""


def virtual_fact() -> Fact:
    """Virtual ranks of this process, on the CPU."""
    return _fact(f"dispatch and combine on {VIRTUAL_RANKS} virtual ranks", lambda: virtual_differences("cpu"))


def virtual_gpu_fact() -> Fact:
    """Virtual ranks on one GPU, where they run the kernels.

    In a process of their own: `run_ranks` has settings to make before CUDA starts, and a process can be given up.
    """
    name = f"dispatch and combine on {VIRTUAL_RANKS} virtual ranks on one GPU"
    if _extension.load_for(torch.device("cuda", 0)) is None:
        return Fact(SECTION, name, "not run: there are no kernels for this GPU")

    def differences() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_run_virtual, 1, folder, timeout_s=2 * _TIMEOUT_S)
            return json.loads(Path(folder, "differences.json").read_text())

    return _fact(name, differences)


def _run_virtual(folder: str) -> None:
    try:
        found = virtual_differences("cuda")
    except Exception as error:  # whatever it is, it belongs in the report
        found = [f"{type(error).__name__}: {error}"]
    Path(folder, "differences.json").write_text(json.dumps(found))


def virtual_differences(device: str) -> list[str]:
    """What differs from the reference, in words, in either layout."""
    found = []
    for layout in reference.LAYOUTS:
        outcomes = testing.run_ranks(
            VIRTUAL_RANKS,
            lambda comm, layout=layout: dispatch_and_combine(comm, layout, device),
            device=device,
            **_sizes(VIRTUAL_RANKS),
        )
        expected = expected_outcomes(VIRTUAL_RANKS, layout)
        for rank in range(VIRTUAL_RANKS):
            found += compare(outcomes[rank], expected[rank], rank, layout)
    return found


def process_facts(num_processes: int) -> Iterable[Fact]:
    """Processes with a GPU each, by the nvlink backend; and whether what it builds on works."""
    num_processes = min(num_processes, _MAX_PROCESSES)
    name = f"dispatch and combine on {num_processes} GPU{'s' * (num_processes > 1)}, a process each"
    if _extension.load_for(torch.device("cuda", 0)) is None:
        yield Fact(SECTION, name, "not run: there are no kernels for this GPU")
        return
    reports: list[dict] = []

    def differences() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                spawn(_run_process, num_processes, folder, timeout_s=4 * _TIMEOUT_S)
            finally:
                reports.extend(json.loads(path.read_text()) for path in sorted(Path(folder).iterdir()))
        return [difference for report in reports for difference in report["differences"]]

    yield _fact(name, differences)
    if reports:
        why_not = next((report["symmetric_memory"] for report in reports if report["symmetric_memory"]), None)
        text = "works" if why_not is None else f"does not work: {why_not}"
        yield Fact(SECTION, "torch symmetric memory", text, ok=why_not is None)


def _run_process(folder: str) -> None:
    """One rank's part; what it finds goes to a file, errors included."""
    rank, size = init_process_group("cuda")
    report = {"differences": [], "symmetric_memory": _why_no_symmetric_memory()}
    try:
        for layout in reference.LAYOUTS:
            with Communicator(backend="nvlink", timeout_s=_TIMEOUT_S, **_sizes(size)) as comm:
                outcome = dispatch_and_combine(comm, layout, "cuda")
                comm.barrier()
            report["differences"] += compare(outcome, expected_outcomes(size, layout)[rank], rank, layout)
    except Exception as error:  # whatever it is, it belongs in the report
        report["differences"].append(f"rank {rank}: {type(error).__name__}: {error}")
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def _why_no_symmetric_memory() -> str | None:
    """None if this rank can write to its neighbour's and finds what its other neighbour wrote."""
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        rank, size = dist.get_rank(), dist.get_world_size()
        window = symmetric_memory.empty(
            1024, dtype=torch.int32, device=torch.device("cuda", torch.cuda.current_device())
        )
        window.zero_()
        exchanged = symmetric_memory.rendezvous(window, dist.group.WORLD.group_name)
        torch.cuda.synchronize()
        dist.barrier()
        exchanged.get_buffer((rank + 1) % size, (1024,), torch.int32).fill_(rank + 1)
        torch.cuda.synchronize()
        dist.barrier()
        found = int(window[0])
        wanted = (rank - 1) % size + 1
        dist.barrier()
    except Exception as error:  # whatever it is, it belongs in the report
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if found == wanted else f"rank {rank} reads {found} where its neighbour wrote {wanted}"


def _fact(name: str, differences: Callable[[], list[str]]) -> Fact:
    started = time.perf_counter()
    try:
        found = differences()
    except Exception as error:  # whatever it is, it belongs in the report
        found = [f"{type(error).__name__}: {error}"]
    seconds = time.perf_counter() - started
    if found:
        return Fact(SECTION, name, "FAILED: " + "; ".join(found), ok=False)
    return Fact(
        SECTION, name, f"equal to the reference, bit for bit, in both layouts ({seconds:.1f} s)", ok=True
    )


def _sizes(num_ranks: int) -> dict[str, int]:
    """Of a communicator; every rank has some experts."""
    num_experts = -(-NUM_EXPERTS // num_ranks) * num_ranks
    return {
        "hidden": HIDDEN,
        "max_tokens_per_rank": MAX_TOKENS,
        "num_experts": num_experts,
        "num_topk": NUM_TOPK,
    }


def _inputs(num_ranks: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(x, topk_idx, topk_weights) by rank; rank 0 has no tokens unless it is alone."""
    num_experts = _sizes(num_ranks)["num_experts"]
    generator = torch.Generator().manual_seed(0)
    x, topk_idx, topk_weights = [], [], []
    for rank in range(num_ranks):
        num_tokens = MAX_TOKENS * rank // (num_ranks - 1) if num_ranks > 1 else MAX_TOKENS
        x.append(torch.randn(num_tokens, HIDDEN, generator=generator))
        choices = torch.rand(num_tokens, num_experts, generator=generator).topk(NUM_TOPK).indices
        is_masked = torch.rand(num_tokens, NUM_TOPK, generator=generator) < 0.1
        topk_idx.append(choices.masked_fill(is_masked, -1))
        topk_weights.append(torch.rand(num_tokens, NUM_TOPK, generator=generator))
    return x, topk_idx, topk_weights


def dispatch_and_combine(comm: Communicator, layout: str, device: str) -> Outcome:
    mine = (each[comm.rank].to(device) for each in _inputs(comm.size))
    out = functional.dispatch(*mine, comm, layout=layout)
    sums = functional.combine(out.tokens * 2, out.handle)
    return out.tokens.cpu(), out.weights.cpu(), sums.cpu()


def expected_outcomes(num_ranks: int, layout: str) -> list[Outcome]:
    """By rank, from the reference."""
    num_experts = _sizes(num_ranks)["num_experts"]
    expected = reference.dispatch(*_inputs(num_ranks), num_experts=num_experts, layout=layout)
    sums = reference.combine([each.tokens * 2 for each in expected], expected)
    return [(each.tokens, each.weights, y) for each, y in zip(expected, sums, strict=True)]


def compare(outcome: Outcome, expected: Outcome, rank: int, layout: str) -> list[str]:
    """What differs, in words."""
    names = ("tokens", "weights", "sums")
    return [
        f"{layout} layout: {name} of rank {rank} differ"
        for name, found, wanted in zip(names, outcome, expected, strict=True)
        if not torch.equal(found, wanted)
    ]
