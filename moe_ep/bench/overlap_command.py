"""What moe-ep bench does with --overlap."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import Communicator, machine
from ..errors import InvalidInput
from ..launch import inside_launch
from . import lanes, overlap_report
from .arguments import AUTO
from .overlap import OverlapBench
from .overlap_pieces import OverlapPlan
from .ranks import process_group, run_on_ranks
from .results import write

_ON_GPUS = {"num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 32, "dtype": "bfloat16"}
_ON_CPU = {"num_tokens": 128, "hidden": 64, "num_topk": 2, "num_experts": 8, "dtype": "float32"}
_OTHERS = ("op", "expert_alignment", "weights")  # choices of the sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("communication behind computation")
    group.add_argument(
        "--overlap",
        action="store_true",
        help="how much of the communication of a DeepSeek-V3 layer, or of two blocks, each kind of overlap hides; "
        "--num-sms: of communication beside computation (auto)",
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="its streams, for Perfetto or chrome://tracing"
    )


def run(args: argparse.Namespace) -> int:
    num_gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    plan = plan_of(args, on_gpu=num_gpus > 0 and (inside_launch() or num_gpus >= args.nproc))
    if not inside_launch():
        plan.check(args.nproc)
    text = run_on_ranks(args.nproc, run_rank, args, plan)
    if text is not None:
        _report(json.loads(text), args)
    return 0


def plan_of(args: argparse.Namespace, on_gpu: bool) -> OverlapPlan:
    """Raises InvalidInput for arguments that make no sense here."""
    for name in _OTHERS:
        if getattr(args, name) not in (None, False):
            raise InvalidInput(f"--{name.replace('_', '-')} is a choice of the sweep, without --overlap")
    sizes = dict(_ON_GPUS if on_gpu else _ON_CPU)
    for name in sizes:
        given = getattr(args, name)
        if isinstance(given, list):
            if len(given) > 1:
                raise InvalidInput(f"--{name.replace('_', '-')}: --overlap measures one; got {given}")
            given = given[0]
        if given is not None:
            sizes[name] = given
    if args.layout == "both":
        raise InvalidInput("--layout both is a choice of the sweep; --overlap measures one")
    num_sms = tuple(None if n == AUTO else n for n in args.num_sms or [AUTO])
    layout = args.layout or "expert"
    return OverlapPlan(num_sms=num_sms, iterations=args.iterations, layout=layout, **sizes)


def run_rank(args: argparse.Namespace, plan: OverlapPlan, command: str | None) -> str | None:
    """Measure on this rank, one of those that were launched. Rank 0 returns the results as JSON, the others None."""
    with process_group(args.device) as (rank, size):
        if dist.get_backend() == "gloo":
            device = torch.device("cpu")
            torch.set_num_threads(1)  # the ranks share the cores
        else:
            device = torch.device("cuda", torch.cuda.current_device())
        plan.check(size)
        shape = {name: getattr(plan, name) for name in ("hidden", "num_experts", "num_topk")}
        with Communicator(max_tokens_per_rank=plan.num_tokens, backend=args.backend, **shape) as comm:
            results = OverlapBench(plan, comm, device).run(machine.facts(device, command))
        return json.dumps(results, indent=2) + "\n" if rank == 0 else None


def _report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print, and write the files that were asked for."""
    overlap_report.print_results(results)
    spans = results.pop("spans")
    if args.trace is not None:
        lanes.write_trace(spans, args.trace)
    if args.png is not None:
        m = results["machine"]
        title = f"rank 0 of {results['ranks']}, {m['device']}, {m['date']}   $ {m['command']}"
        lanes.write_picture(spans[0], args.png, title)
    if args.json is not None:
        write(json.dumps(results, indent=2) + "\n", args.json)
