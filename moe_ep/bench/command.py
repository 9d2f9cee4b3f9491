"""moe-ep bench."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from .. import Communicator, machine
from ..errors import InvalidInput
from ..launch import inside_launch
from . import (
    arguments,
    collective,
    collective_report,
    deep_ep,
    layer_command,
    low_latency,
    overlap_command,
    picture,
    table,
)
from .plan import Sweep
from .ranks import process_group, run_on_ranks
from .results import Results, write
from .sweep import Bench

HELP = """Time dispatch and combine on this machine.

On GPUs that reach each other's memory: every operation, layout and dtype over numbers of SMs, beside NCCL doing the
same job and the copy engines' rate. Elsewhere: the collective backend next to the bare collectives that move the
same bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=["auto", "collective", "nvlink"],
        default="auto",
        help="auto: nvlink where it runs",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda with a GPU for each rank, else cpu"
    )
    parser.add_argument("--op", choices=[*arguments.OPS, "all"], help="what to time (all)")
    arguments.add_sizes(parser)
    parser.add_argument(
        "--weights", action="store_true", help="topk_weights travel with a cached handle, too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the results here")
    layer_command.add_arguments(parser)
    low_latency.add_arguments(parser)
    deep_ep.add_arguments(parser)
    overlap_command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.layer:
        return layer_command.run(args)
    if args.low_latency:
        return low_latency.run(args)
    if args.deep_ep:
        return deep_ep.run(args)
    if args.overlap:
        return overlap_command.run(args)
    if args.trace is not None:
        raise InvalidInput("--trace shows the streams of --overlap; give both")
    _check(args)
    text = run_on_ranks(args.nproc, run_rank, args)
    if text is not None:
        _report(text, args)
    return 0


def run_rank(args: argparse.Namespace, command: str | None) -> str | None:
    """Measure on this rank, one of those that were launched. Rank 0 returns the results as JSON, the others None."""
    with process_group(args.device) as (rank, size):
        if not _uses_kernels(args):
            results = collective.run_rank(arguments.workload(args), args.iterations)
            return None if results is None else json.dumps(results, indent=2) + "\n"
        device = torch.device("cuda", torch.cuda.current_device())
        sweep = arguments.sweep(args, arguments.sms_of(device))
        sweep.check(size)
        with torch.no_grad(), communicator(sweep, "nvlink") as comm:
            results = Bench(sweep, comm, device).run(machine.facts(device, command))
        return results.to_json() if rank == 0 else None


def communicator(sweep: Sweep, backend: str) -> Communicator:
    """One that has room for everything in ``sweep``."""
    return Communicator(
        hidden=sweep.hidden,
        max_tokens_per_rank=max(sweep.num_tokens),
        num_experts=sweep.num_experts,
        num_topk=sweep.num_topk,
        backend=backend,
    )


def _uses_kernels(args: argparse.Namespace) -> bool:
    """Whether the nvlink backend runs here; asked of the library itself, with sizes that cost nothing."""
    if args.backend != "auto":
        return args.backend == "nvlink"
    if args.device == "cpu" or not collective.on_gpu():
        return False
    sizes = {"hidden": 128, "max_tokens_per_rank": 1, "num_topk": 1}
    with Communicator(num_experts=dist.get_world_size(), **sizes) as comm:
        return comm.backend == "nvlink"


def _check(args: argparse.Namespace) -> None:
    """Raise what can be known to be wrong before ranks are started."""
    num_gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    if args.backend == "nvlink":
        if num_gpus < args.nproc and not inside_launch():
            raise InvalidInput(
                f"--backend nvlink needs a GPU for each of --nproc {args.nproc} ranks; there are {num_gpus}"
            )
    elif args.backend == "collective" or num_gpus == 0:
        workload = arguments.workload(args)
        if not inside_launch():
            workload.check(args.nproc)


def _report(text: str, args: argparse.Namespace) -> None:
    loaded = json.loads(text)
    if loaded.get("kind") == "sweep":
        results = Results.from_json(text)
        table.print_results(results)
        draw = picture.write_picture
    else:
        results = loaded
        collective_report.print_table(results)
        draw = collective_report.write_picture
    if args.json is not None:
        write(text, args.json)
    if args.png is not None:
        draw(results, args.png)
