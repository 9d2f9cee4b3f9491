"""Runs recipes/megatron_deepseek_v3.py in Megatron's training loop on a CPU."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import megatron_on_cpu
from megatron.core.transformer import transformer_config
from megatron.training.arguments import parse_args, validate_args
from megatron.training.training import destroy_global_state

from moe_ep.megatron import DispatcherOptions
from moe_ep.megatron.options import check_config
from moe_ep.recipes import megatron_deepseek_v3 as recipe

ON_CPU = """
    --transformer-impl local --use-cpu-initialization --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --clip-grad 0 --distributed-backend gloo --num-workers 0
"""
SHORT = """
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 4 --global-batch-size 8 --eval-iters 1
    --train-iters 6 --lr-warmup-iters 2
"""


def run_all() -> dict[str, Any]:
    """By dispatcher, the training and evaluation losses (on the last rank; Megatron's log); and what sizes mean."""
    megatron_on_cpu.allow_training()
    results: dict[str, Any] = {
        "printed": printed(),
        "sizes": {path.stem: describe(path.stem) for path in recipe.SIZES.glob("[!_]*.args")},
    }
    runs = {
        "alltoall": [],
        "moe_ep": [],
        "moe_ep in FP8": ["--dispatch-fp8"],
        "moe_ep with FP8 experts": ["--experts-fp8"],
    }
    for name, more in runs.items():
        results[name] = train("--dispatcher", name.split()[0], *more)
    return results


def printed() -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        recipe.main(["--size", "deepseek-v3", "--print-arguments", "--lr", "1e-6"])
    return text.getvalue()


def train(*arguments: str) -> tuple[list[float], list[float]]:
    text = str(Path(asyncio.__file__).parent)
    log = io.StringIO()
    with megatron_on_cpu.CudaIsCpu(), contextlib.redirect_stdout(log):
        recipe.main(["--size", "tiny", *ON_CPU.split(), *SHORT.split(), "--text", text, *arguments])
    destroy_global_state()
    lines = log.getvalue()
    training = re.findall(r"iteration .*lm loss: (\S+)", lines)
    evaluation = re.findall(r"lm loss value: (\S+)", lines)
    return [float(loss) for loss in training], [float(loss) for loss in evaluation]


def describe(size: str) -> dict[str, Any]:
    """The settings of Megatron's model for a size, as if its ranks and Transformer Engine were there."""
    ranks = {"deepseek-v3": 1024}.get(size, 2)
    arguments, world_size = sys.argv[1:], os.environ["WORLD_SIZE"]
    te_version = transformer_config.is_te_min_version
    os.environ.update(WORLD_SIZE=str(ranks), CUDA_DEVICE_MAX_CONNECTIONS="32")
    transformer_config.is_te_min_version = lambda *_args, **_kwargs: True
    try:
        own = recipe.add_arguments(argparse.ArgumentParser()).parse_args(["--size", size])
        sys.argv[1:] = recipe.expand([], own)
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(recipe.add_arguments)
            validate_args(args)
            config = recipe.model_config(args).transformer
    finally:
        sys.argv[1:] = arguments
        os.environ["WORLD_SIZE"] = world_size
        transformer_config.is_te_min_version = te_version
    check_config(config, DispatcherOptions())
    plain = (bool, int, float, str, list, type(None))
    settings = {name: value for name, value in vars(config).items() if isinstance(value, plain)}
    return {**settings, "vocab_size": args.vocab_size, "data_parallel_size": args.data_parallel_size}
