"""moe-ep bench."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ..launch import inside_launch, spawn
from . import report
from .collective import run_rank
from .workload import DTYPES, Workload

HELP = "Time dispatch and combine next to the bare collectives that move the same bytes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["collective"], default="collective")
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start here (not under torchrun)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda with a GPU for each rank, else cpu"
    )
    parser.add_argument("--num-tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--num-topk", type=int, default=2)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--layout", choices=["expert", "rank"], default="expert")
    parser.add_argument(
        "--unbalanced-ratio", type=float, default=1.0, metavar="X", help="load of rank 0 over the mean load"
    )
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the results here")


def run(args: argparse.Namespace) -> int:
    workload = Workload(
        num_tokens=args.num_tokens,
        hidden=args.hidden,
        num_topk=args.num_topk,
        num_experts=args.num_experts,
        dtype=args.dtype,
        layout=args.layout,
        unbalanced_ratio=args.unbalanced_ratio,
    )
    if inside_launch():
        results = run_rank(workload, args.iterations, args.device)
    else:
        workload.check(args.nproc)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.json")
            spawn(_run_spawned, args.nproc, workload, args.iterations, args.device, path)
            results = json.loads(path.read_text())
    if results is not None:
        report.print_table(results)
        if args.json is not None:
            report.write_json(results, args.json)
        if args.png is not None:
            report.write_picture(results, args.png)
    return 0


def _run_spawned(workload: Workload, iterations: int, device: str | None, path: Path) -> None:
    results = run_rank(workload, iterations, device)
    if results is not None:
        report.write_json(results, path)
