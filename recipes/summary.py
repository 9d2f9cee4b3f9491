"""The sentences around a run: what starts, what came out, where the pictures are, how to go on."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from .bigram import bits
from .config import TrainConfig
from .data import Corpus
from .plots import draw_plots


def describe_run(
    config: TrainConfig,
    corpus: Corpus,
    out: Path,
    world_size: int,
    ep_size: int,
    device: torch.device,
    dtype: torch.dtype,
    first_step: int,
) -> list[str]:
    """What is about to be trained, on what, with what."""
    counts, c = config.model.parameter_counts(), config.model
    where = f"{device.type.upper()}, {str(dtype).removeprefix('torch.')}"
    lines = [
        f"{config.preset}: {number(counts.total)} parameters, {number(counts.active)} active per token; "
        f"{c.num_layers} layers ({c.num_moe_layers} MoE), hidden {c.hidden}, "
        f"{c.num_experts} experts, top-{c.num_topk}, {c.mtp_layers} MTP",
        f"{world_size} rank{'s' if world_size > 1 else ''} ({where}), {c.num_experts // ep_size} experts on each: "
        f"expert-parallel size {ep_size}"
        + (f", FP8 {c.fp8} on the wire" if c.fp8 else "")
        + (f", FP8 {c.fp8_experts} in the experts" if c.fp8_experts else "")
        + (f", {config.num_micro_batches} micro-batches side by side" if config.micro_batch_overlap else ""),
        corpus.describe(),
        f"writing to {out}",
    ]
    if first_step:
        lines.append(f"going on after step {first_step}")
    return lines


def describe_result(
    valid_loss: float, bigram_loss: float | None, starts: Sequence[int], config: TrainConfig
) -> list[str]:
    """The last lines of a finished run: validation loss and, for bytes, the bigram's on the same bytes."""
    unit = "byte" if config.token_dtype == "uint8" else "token"
    lines = [f"on {len(starts) * config.seq_len:,} held-out {unit}s:"]
    if bigram_loss is not None:
        lines.append(f"  byte-bigram      {_three_ways(bigram_loss, unit)}")
    lines.append(f"  validation loss  {_three_ways(valid_loss, unit)}")
    return lines


def draw_and_describe_plots(out: Path) -> list[str]:
    """Draw the pictures; one line naming them, or saying what is missing."""
    try:
        paths = draw_plots(out)
    except ImportError:
        return [f"no pictures: matplotlib is not installed (pip install matplotlib); numbers are in {out}"]
    return [f"pictures: {', '.join(map(str, paths))}"] if paths else []


def resume_command(out: Path, world_size: int) -> str:
    """The command line that goes on with the run in `out` on as many ranks as now."""
    rest = f"train --resume {shlex.quote(str(out))}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"moe-ep {rest} --nproc {world_size}"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = f"--nnodes {world_size // local} " if world_size > local else ""
    return f"torchrun {nodes}--nproc-per-node {local} -m moe_ep.cli {rest}"


def number(value: float) -> str:
    """Example: 1662848 -> '1.66 M'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _three_ways(nats: float, unit: str) -> str:
    perplexity = math.exp(min(nats, 700.0))
    return f"{nats:.4f} nats per {unit} = {bits(nats):.3f} bits per {unit}, perplexity {perplexity:.2f}"
