"""Running a measurement on all ranks, and bringing home what rank 0 found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .. import machine
from ..launch import init_process_group, inside_launch, spawn
from .results import write

RunRank = Callable[..., str | None]
"""``run_rank(*arguments, command)``: on one of the ranks that were launched; a text on rank 0, None on the others.
``command`` is what started them all, None where it is this process's own."""


def run_on_ranks(nproc: int, run_rank: RunRank, *arguments: Any) -> str | None:
    """What ``run_rank`` gives: of this process if it was launched as a rank, else of rank 0 of ``nproc`` new ones."""
    if inside_launch():
        return run_rank(*arguments, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        spawn(_run_spawned, nproc, run_rank, arguments, machine.command_line(), path)
        return path.read_text()


@contextmanager
def process_group(device: str) -> Iterator[tuple[int, int]]:
    """This rank and the number of ranks, in a default group that lasts as long as the context."""
    try:
        yield init_process_group(device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run_spawned(run_rank: RunRank, arguments: tuple, command: str, path: Path) -> None:
    text = run_rank(*arguments, command)
    if text is not None:
        write(text, path)
