"""moe-ep tune."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import machine
from ..errors import InvalidInput
from ..launch import inside_launch, spawn
from ..tuning import Config
from . import arguments
from .command import communicator
from .jobs import jobs_of
from .ranks import process_group
from .table import print_table
from .tune import CALLS, TOLERANCE, Tuned, measure

HELP = """Find the best numbers of SMs for the sizes you train with, and write them to a file.

Two policies. Latency: the call alone is fastest. Throughput: beside bfloat16 matmuls on another stream, the time
until both have ended is shortest. Either takes the smallest number of SMs within 2 % of the best. The file is for
Communicator(config=...) or MOE_EP_CONFIG; see docs/tuning.md."""

SMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 132)
HEADER = ("operation", "dtype", "layout", "tokens", "SMs", "call us", "both us", "best for")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=[*arguments.OPS, "all"], help="what to tune (all)")
    arguments.add_sizes(parser, sms=SMS)
    parser.add_argument(
        "--compute-ratio",
        type=float,
        default=4.0,
        metavar="X",
        help="computation beside, as a multiple of the fastest communication alone (4)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("moe_ep_tuning.json"), metavar="FILE", help="write the choices here"
    )


def run(args: argparse.Namespace) -> int:
    if not args.compute_ratio > 0:
        raise InvalidInput(f"--compute-ratio is {args.compute_ratio:g}; it must be greater than 0")
    if arguments.AUTO in (args.num_sms or []):
        raise InvalidInput(f"--num-sms {arguments.AUTO} can't be tuned; give numbers")
    if inside_launch():
        run_rank(args)
        return 0
    num_gpus = torch.cuda.device_count()
    if num_gpus < args.nproc:
        raise InvalidInput(
            f"moe-ep tune needs a GPU for each of --nproc {args.nproc} ranks; there are {num_gpus}"
        )
    spawn(run_rank, args.nproc, args)
    return 0


def run_rank(args: argparse.Namespace) -> None:
    """This rank's part; rank 0 prints and writes."""
    with process_group("cuda") as (rank, size):
        device = torch.device("cuda", torch.cuda.current_device())
        sweep = arguments.sweep(args, arguments.sms_of(device), SMS)
        sweep.check(size)
        num_sms = sweep.sms_on(device)
        with torch.no_grad(), communicator(sweep, "nvlink") as comm:
            groups = jobs_of(sweep, comm, device)
            side_stream = comm.stream(device)
            tuned = measure(groups, num_sms, args.compute_ratio, args.iterations, device, side_stream)
        if rank == 0:
            facts = machine.facts(device)
            report(tuned, f"{size} ranks, {facts['device']}, torch {facts['torch']}", args.compute_ratio)
            config = Config(facts["device"], tuple(each.choice(sweep.hidden, size) for each in tuned))
            config.save(args.json)
            print(f"written to {args.json}: for Communicator(config=...) or MOE_EP_CONFIG")


def rows(tuned: list[Tuned]) -> list[list[tuple[str, ...]]]:
    """The lines of the table, in one group for each case."""
    return [[_line(each, i) for i in range(len(each.trials))] for each in tuned]


def _line(tuned: Tuned, i: int) -> tuple[str, ...]:
    case, trial = tuned.case, tuned.trials[i]
    best_for = [name for name in ("latency", "throughput") if getattr(tuned, name) == trial.num_sms]
    return (
        case.op,
        case.dtype,
        case.layout,
        str(case.num_tokens),
        str(trial.num_sms),
        f"{trial.call_us:.1f}",
        f"{trial.both_us:.1f}",
        ", ".join(best_for),
    )


def report(tuned: list[Tuned], where: str, compute_ratio: float) -> None:
    print(where)
    print_table(HEADER, rows(tuned), num_texts=3)
    print(
        f"call: one call alone, slowest rank. both: {CALLS} calls beside matmuls that alone take {compute_ratio:g} "
        f"times the {CALLS} calls\nat their fastest, until both have ended. Chosen: the smallest number of SMs "
        f"within {100 * TOLERANCE:g} % of the best."
    )
