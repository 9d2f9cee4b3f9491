"""The command `moe-ep train`: from arguments to a TrainConfig, and from there to ranks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from moe_ep import launch
from moe_ep.errors import MoeEpError

from .checkpoint import latest_checkpoint, read_run
from .config import TrainConfig, with_fp8, with_seq_len
from .data import load_corpus
from .errors import RecipeError
from .interrupt import ForwardedStop, catch_signals
from .metrics import METRICS_FILE
from .model_settings import add_model_settings, with_model_settings
from .presets import PRESETS, get_preset
from .train import train

HELP = """Train a DeepSeek-V3-style model on text, its experts spread over several ranks.

Starts its own ranks on this machine (--nproc), or uses those of torchrun. Without --data it learns from the bytes of
Python's own standard library. Ctrl-C saves and prints how to go on."""

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_SETTINGS = {
    "seq_len": "tokens of a sequence",
    "batch": "sequences of an optimiser step, over all ranks",
    "steps": "optimiser steps",
    "accumulate": "micro-batches of a step",
    "lr": "peak learning rate",
    "min_lr_ratio": "last learning rate over the peak",
    "warmup": "steps of linear warm-up",
    "weight_decay": "AdamW's, for matrices",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "adam_eps": "AdamW's",
    "grad_clip": "largest norm of the gradient",
    "device": "auto, cpu or cuda",
    "dtype": "auto (bfloat16 on a GPU, else float32), bfloat16 (with float32 master weights), float32 or float64",
    "threads": "of a rank on the CPU; default: its share of the cores",
    "seed": "of the weights and the order of the data",
    "ep": "ranks that share one set of experts; default: as many as divide ranks and experts",
    "backend": "of the communicator; auto takes the best that runs here",
    "timeout_s": "seconds until a silent rank is an error",
    "token_dtype": "of --data: uint8 (bytes), or token ids as raw uint16 or int32",
    "held_out": "share of the text kept for validation",
    "eval_every": "steps between evaluations; 0: only at the end",
    "eval_windows": "held-out windows of an evaluation, the same in each",
    "checkpoint_every": "steps between checkpoints; 0: only when interrupted",
    "keep_checkpoints": "newest ones that are kept",
}
_TYPES = {
    field.name: {"int | None": int, "int": int, "float": float, "str": str}.get(field.type)
    for field in dataclasses.fields(TrainConfig)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting of a run; those left out come from the preset, or from the resumed run."""
    run = parser.add_argument_group("run")
    run.add_argument("--preset", choices=list(PRESETS), help="named settings to start from (default: tiny)")
    run.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks to start here (default: one per GPU, or 1); not with torchrun",
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/PRESET, numbered)"
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="DIR",
        help="go on from the latest checkpoint in DIR (default: --out), with its settings where none are given",
    )
    run.add_argument(
        "--data", nargs="+", metavar="FILE", help="text files or folders (default: Python's own sources)"
    )
    run.add_argument(
        "--fp8",
        action=argparse.BooleanOptionalAction,
        help="experts compute with 8-bit floats with a scale per 128; so travel tokens, and gradients to the experts",
    )
    run.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="choose torch kernels that repeat bit for bit on a GPU, slower (on a CPU they do anyway)",
    )
    run.add_argument(
        "--micro-batch-overlap",
        action=argparse.BooleanOptionalAction,
        help="the communication of each micro-batch (of at least two) beside another's computation",
    )
    settings = parser.add_argument_group("settings")
    for name, text in _SETTINGS.items():
        settings.add_argument(
            "--" + name.replace("_", "-"), type=_TYPES[name], metavar=name.upper(), help=text
        )
    add_model_settings(settings)


def run(args: argparse.Namespace) -> int:
    """Train as `args` say; returns 0, 2 for an error a person can mend, 130 after Ctrl-C."""
    try:
        config, out, resume = settings_from(args)
        if launch.inside_launch():
            if args.nproc is not None:
                raise RecipeError(
                    "--nproc is for ranks that moe-ep starts itself; torchrun has started these"
                )
            return _run_rank(config, out, resume)
        nproc = args.nproc if args.nproc is not None else max(1, _num_gpus(config))
        _check_before_starting(config, nproc)
        return _start_ranks(config, out, resume, nproc)
    except RecipeError as error:
        print(f"moe-ep: error: {error}", file=sys.stderr)
        return EXIT_ERROR


def settings_from(args: argparse.Namespace) -> tuple[TrainConfig, Path, bool]:
    """(settings, folder of the run, whether to resume). Raises RecipeError for what can't work."""
    resume = args.resume is not None
    if resume:
        named = args.resume if args.resume is not True else args.out
        out = Path(named) if named is not None else _newest_run(args.preset or "tiny")
        if args.out is not None and Path(args.out) != out:
            raise RecipeError(f"--resume {out} goes on in that folder; leave out --out {args.out}")
        checkpoint = latest_checkpoint(out / "checkpoints")
        if checkpoint is None:
            raise RecipeError(f"--resume: {out} has no complete checkpoint")
        config = TrainConfig.from_json(read_run(checkpoint)["config"])
        if args.preset is not None and args.preset != config.preset:
            raise RecipeError(f"--preset is {args.preset}, but the run in {out} is of {config.preset}")
    else:
        config = get_preset(args.preset or "tiny")
        out = Path(args.out) if args.out is not None else _unused_folder(config.preset)
        if (out / METRICS_FILE).exists() or (out / "checkpoints").exists():
            raise RecipeError(f"--out {out} holds a run: go on with --resume {out}, or choose another folder")
    return _override(config, args), out, resume


def _override(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    if args.fp8 is not None:
        config = with_fp8(config, args.fp8)
    config = with_model_settings(config, args.model_settings)
    if args.seq_len is not None:
        config = with_seq_len(config, args.seq_len)
    changes = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    for name in ("deterministic", "micro_batch_overlap"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.data:
        # Absolute, so that a resumed run finds them from anywhere.
        changes["data"] = tuple(str(Path(path).resolve()) for path in args.data)
    return dataclasses.replace(config, **changes)


def _check_before_starting(config: TrainConfig, nproc: int) -> None:
    """What can be known without ranks, so that a mistake costs a second and not the start of all."""
    if nproc < 1:
        raise RecipeError(f"--nproc is {nproc}; it must be at least 1")
    config.ep_size(nproc)
    config.micro_batch(nproc)
    if config.data:
        load_corpus(
            config.data,
            token_dtype=config.token_dtype,
            held_out_fraction=config.held_out,
            window=config.window,
        )


def _start_ranks(config: TrainConfig, out: Path, resume: bool, nproc: int) -> int:
    if nproc == 1:
        return _run_rank(config, out, resume)
    # A rank that fails says why itself; torch's word on ending the others would only hide it.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with catch_signals(ForwardedStop()) as stop:
        try:
            launch.spawn(_run_spawned, nproc, config, out, resume)
        except ProcessExitedException as error:
            if stop.requested:
                print("moe-ep: stopped before the first step; nothing was saved", file=sys.stderr)
                return EXIT_INTERRUPTED
            if error.exit_code == EXIT_ERROR:  # the rank has said why
                return EXIT_ERROR
            raise
        except ProcessRaisedException:
            if stop.requested:
                return EXIT_INTERRUPTED
            raise
    return EXIT_INTERRUPTED if stop.requested else 0


def _run_spawned(config: TrainConfig, out: Path, resume: bool) -> None:
    # An interrupted rank ends with 0 as well: another exit code would make the launcher end the others at once.
    if _run_rank(config, out, resume) == EXIT_ERROR:
        sys.exit(EXIT_ERROR)


def _run_rank(config: TrainConfig, out: Path, resume: bool) -> int:
    try:
        result = train(config, out, resume=resume)
    except MoeEpError as error:
        _say_error(error)
        return EXIT_ERROR
    return EXIT_INTERRUPTED if result.interrupted else 0


def _say_error(error: MoeEpError) -> None:
    """Most errors come on all ranks at once: rank 0 says them, the others only if it doesn't end the run."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(10.0)
    who = f"rank {rank}: " if rank else ""
    print(f"moe-ep: error: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _num_gpus(config: TrainConfig) -> int:
    return 0 if config.device == "cpu" else torch.cuda.device_count()


def _unused_folder(preset: str) -> Path:
    """runs/PRESET, or runs/PRESET-2, ... if that holds a run."""
    number = 1
    while True:
        folder = Path("runs") / (preset if number == 1 else f"{preset}-{number}")
        if not folder.exists():
            return folder
        number += 1


def _newest_run(preset: str) -> Path:
    """The run of `preset` below runs/ whose checkpoint is the newest."""
    found = []
    for folder in Path("runs").glob(f"{preset}*"):
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is not None:
            with contextlib.suppress(OSError):
                found.append((checkpoint.stat().st_mtime, folder))
    if not found:
        raise RecipeError(
            f"--resume: no run of {preset} with a checkpoint below runs/; name its folder: --resume DIR"
        )
    return max(found)[1]
