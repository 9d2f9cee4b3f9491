"""The command `moe-ep plan`: what a model asks of each rank, in memory and on the wire, before anyone starts it."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from .errors import RecipeError
from .fit import STATE_BYTES, estimate_memory, gib
from .model_settings import add_model_settings, with_model_settings
from .presets import PRESETS
from .summary import number
from .wire import layer_traffic

HELP = """Say what a model needs on given ranks, without building it: parameters, memory, and for each MoE layer the
bytes that dispatch and combine send, with the time these take at a given link rate."""

EXIT_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the ranks, the link."""
    parser.add_argument("--preset", choices=list(PRESETS), default="deepseek-v3", help="default: deepseek-v3")
    parser.add_argument("--nproc", type=int, default=64, metavar="N", help="ranks altogether (default: 64)")
    parser.add_argument(
        "--ep", type=int, metavar="EP", help="ranks that share one set of experts (default: all)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="T", help="tokens of a rank's micro-batch (default: 4096)"
    )
    parser.add_argument(
        "--link-gbps",
        type=float,
        default=366.0,
        metavar="GB/S",
        help="rate of a rank's link to the others, in 10^9 bytes a second each way (default: 366, NVLink of an H200)",
    )
    add_model_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 for arguments that can't work."""
    try:
        title, sections = make_plan(args)
    except RecipeError as error:
        print(f"moe-ep: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    _show(title, sections)
    return 0


def make_plan(args: argparse.Namespace) -> tuple[str, list[tuple[str, list[tuple[str, str, str]]]]]:
    """(title, sections); a section is (heading, rows of (what, value, remark)). Raises RecipeError."""
    for name, value in (("--nproc", args.nproc), ("--tokens", args.tokens), ("--link-gbps", args.link_gbps)):
        if not value > 0:
            raise RecipeError(f"{name} is {value}; it must be above 0")
    config = with_model_settings(PRESETS[args.preset](), args.model_settings)
    if args.ep is not None:
        config = dataclasses.replace(config, ep=args.ep)
    ep = config.ep_size(args.nproc)
    model, counts = config.model, config.model.parameter_counts()
    title = f"{args.preset} on {args.nproc} ranks, expert-parallel size {ep}, {args.tokens:,} tokens a rank"

    per_rank = model.parameters_per_rank(ep)
    parameters = [
        ("total", number(counts.total), f"of which MTP {number(counts.mtp)}" if counts.mtp else ""),
        (
            "in routed experts",
            number(counts.routed + counts.mtp_routed),
            f"{model.num_experts} in each MoE layer",
        ),
        ("active per token", number(counts.active), "without the embedding and MTP"),
        (
            "on each rank",
            number(per_rank),
            f"{model.num_experts // ep} experts a layer, all else whole",
        ),
    ]

    dtype = torch.bfloat16
    need = estimate_memory(model, ep_size=ep, tokens=args.tokens, dtype=dtype)
    memory = [
        ("weights, bfloat16", gib(2 * per_rank), ""),
        ("gradients, float32", gib(4 * per_rank), ""),
        ("AdamW, float32", gib(12 * per_rank), "master weights and two moments"),
        ("activations, about", gib(need.activations), "tensors kept for backward, none recomputed"),
        ("together, about", gib(need.total), f"{STATE_BYTES[dtype]} bytes a parameter + activations"),
    ]

    traffic = layer_traffic(model, ep_size=ep, tokens=args.tokens)
    moe_layers = model.num_moe_layers + model.mtp_layers

    def wire(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"

    def floor(num_bytes: float) -> str:
        return f"{num_bytes / (args.link_gbps * 1e9) * 1e6:,.0f} us at {args.link_gbps:g} GB/s"

    # A step: dispatch and combine forward, and each other's backward.
    layer_bf16 = 2 * (traffic.dispatch_bf16 + traffic.combine_bf16)
    layer_fp8 = layer_bf16 - traffic.dispatch_bf16 + traffic.dispatch_fp8
    links = [
        ("rows to other ranks", f"{traffic.rows:,.0f}", f"{traffic.rows / args.tokens:.2f} per token"),
        ("dispatch, bfloat16", wire(traffic.dispatch_bf16), floor(traffic.dispatch_bf16)),
        ("dispatch, FP8", wire(traffic.dispatch_fp8), floor(traffic.dispatch_fp8)),
        ("combine, bfloat16", wire(traffic.combine_bf16), floor(traffic.combine_bf16)),
        ("step, bfloat16", wire(layer_bf16), floor(layer_bf16)),
        ("step, FP8 dispatch", wire(layer_fp8), floor(layer_fp8)),
        (f"bfloat16, {moe_layers} MoE layers", wire(moe_layers * layer_bf16), floor(moe_layers * layer_bf16)),
    ]
    return title, [
        ("parameters", parameters),
        ("memory of a rank", memory),
        ("one MoE layer, sent by a rank (uniform routing)", links),
    ]


def _show(title: str, sections: list[tuple[str, list[tuple[str, str, str]]]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for heading, rows in sections:
            print(f"\n{heading}")
            for what, value, remark in rows:
                print(f"  {what:<24}{value:>14}   {remark}")
        return
    console = Console()
    console.print(title, style="bold", highlight=False)
    for heading, rows in sections:
        console.print(f"\n{heading}", style="cyan", highlight=False)
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(min_width=24, no_wrap=True)
        table.add_column(min_width=12, justify="right", no_wrap=True)
        table.add_column(style="dim")
        for what, value, remark in rows:
            table.add_row("  " + what, value, remark)
        console.print(table)
