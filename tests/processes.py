"""Runs a function on the ranks of a gloo group, one process each, and returns what it returned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_ep import launch


def run_gloo(world_size: int, fn: Callable, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``fn(*args)`` in ``world_size`` processes with a default process group; its results by rank.

    ``fn`` is a function of a module (it is pickled by name); its result is anything torch.save takes.
    Starting processes costs seconds: give one call many cases.
    """
    with tempfile.TemporaryDirectory() as directory:
        launch.spawn(_run_and_save, world_size, directory, fn, args, timeout_s=timeout_s)
        paths = [Path(directory) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]


def _run_and_save(directory: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    rank, _ = launch.init_process_group("cpu")
    result = fn(*args)
    torch.save(result, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
