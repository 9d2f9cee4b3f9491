"""What moe-ep bench does with --layer."""

from __future__ import annotations

import argparse
import dataclasses

import torch
import torch.distributed as dist

from .. import machine
from ..errors import InvalidInput
from . import layer_megatron, layer_report
from .layer import LayerResults, Sizes, measure
from .layer_variants import own_variants
from .ranks import process_group, run_on_ranks
from .results import write

_SIZES = ("hidden", "num_experts", "num_topk")
_OTHERS = ("op", "layout", "dtype", "num_sms", "expert_alignment")  # choices of the other benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a whole layer")
    group.add_argument(
        "--layer",
        action="store_true",
        help="time a DeepSeek-V3 MoE layer instead, forward and backward, in bfloat16 and FP8, beside Megatron's",
    )
    group.add_argument(
        "--ffn-hidden", type=int, metavar="F", help="width of an expert, and of the shared one (2048)"
    )
    group.add_argument(
        "--overlap-chunks",
        type=int,
        default=0,
        metavar="N",
        help="as in ModelConfig, for moe_ep's layers (0)",
    )
    group.add_argument(
        "--only", metavar="TEXT", help="only layers whose name has this in it, such as 'moe_ep,'"
    )


def run(args: argparse.Namespace) -> int:
    sizes = sizes_of(args)
    text = run_on_ranks(args.nproc, run_rank, args, sizes)
    if text is not None:
        results = LayerResults.from_json(text)
        layer_report.print_results(results)
        if args.json is not None:
            write(text, args.json)
        if args.png is not None:
            layer_report.write_picture(results, args.png)
    return 0


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Raises InvalidInput for arguments that make no sense here."""
    for name in _OTHERS:
        if getattr(args, name) is not None:
            raise InvalidInput(
                f"--{name.replace('_', '-')} is a choice of the other benchmark, without --layer"
            )
    given = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if args.num_tokens is not None:
        if len(args.num_tokens) > 1:
            raise InvalidInput(f"--num-tokens {args.num_tokens}: --layer measures one number; give one")
        given["num_tokens"] = args.num_tokens[0]
    if args.ffn_hidden is not None:
        given.update(ffn_hidden=args.ffn_hidden, shared_ffn_hidden=args.ffn_hidden)
    sizes = dataclasses.replace(Sizes(), **given)
    if sizes.num_experts % sizes.num_groups or sizes.num_experts // 2 < sizes.num_topk:
        sizes = dataclasses.replace(sizes, num_groups=1, topk_groups=1)
    if sizes.num_experts % args.nproc:
        raise InvalidInput(
            f"--num-experts is {sizes.num_experts}; it must be a multiple of --nproc {args.nproc}"
        )
    return sizes


def run_rank(args: argparse.Namespace, sizes: Sizes, command: str | None) -> str | None:
    """Measure on this rank, one of those that were launched. Rank 0 returns the results as JSON, the others None."""
    with process_group(args.device) as (rank, size):
        on_gpu = dist.get_backend() != "gloo"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        variants, backend = own_variants(sizes, device, args.backend, args.overlap_chunks)
        missing = layer_megatron.why_missing(device)
        left_out = [] if missing is None else [missing]
        if missing is None:
            variants = layer_megatron.megatron_variants(sizes, device, size) + variants
        chosen = [variant for variant in variants if args.only is None or args.only in variant.name]
        if not chosen:
            names = ", ".join(variant.name for variant in variants)
            raise InvalidInput(f"--only {args.only!r} is in no layer's name; they are {names}")
        rows = [measure(variant, sizes, args.iterations, device) for variant in chosen]
        facts = machine.facts(device, command)
        results = LayerResults(facts, sizes, size, backend, args.iterations, rows, left_out)
        return results.to_json() if rank == 0 else None
