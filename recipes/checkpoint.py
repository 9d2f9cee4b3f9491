"""Checkpoints of a run: complete or absent, found by a `latest` file, loadable onto another number of ranks.

    checkpoints/
      step-00000500/     torch.distributed.checkpoint's files and run.json (step, settings, ranks)
      latest             the name of the newest complete one

A checkpoint is written into `step-00000500.tmp` and renamed when every rank is done, so a folder without `.tmp` is
always whole. On several nodes the folder must be on a file system they share.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from moe_ep.layers import ParallelGroups, sharded_model_state, sharded_optimizer_state

from .errors import RecipeError

LATEST = "latest"
RUN_FILE = "run.json"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer,
    groups: ParallelGroups,
    run: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write the state after `step` and drop all but the newest `keep` checkpoints; collective. Returns its path.

    run: what else to remember (JSON); `step` is added.
    """
    final = folder / f"step-{step:08d}"
    draft = final.with_suffix(".tmp")
    if groups.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    _barrier(groups)
    with _one_process_is_fine():
        dcp.save(_state(model, optimizer, groups), checkpoint_id=str(draft))
    if groups.rank == 0:
        (draft / RUN_FILE).write_text(json.dumps({**run, "step": step}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        _write_latest(folder, final.name)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(groups)
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer, groups: ParallelGroups) -> None:
    """Fill model and optimiser in place from `path`, saved on any number of ranks; collective."""
    with _one_process_is_fine():
        dcp.load(_state(model, optimizer, groups), checkpoint_id=str(path))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest complete one, else None."""
    pointer = folder / LATEST
    if pointer.is_file():
        path = folder / pointer.read_text().strip()
        if (path / RUN_FILE).is_file():
            return path
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def read_run(path: Path) -> dict[str, Any]:
    """What was remembered beside the state, with `step`. Raises RecipeError where it can't be read."""
    try:
        return json.loads((path / RUN_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} is no checkpoint of moe-ep train: {error}") from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-????????") if (path / RUN_FILE).is_file())


def _state(model: nn.Module, optimizer, groups: ParallelGroups) -> dict[str, Any]:
    return {
        "model": sharded_model_state(model, groups),
        "optimizer": sharded_optimizer_state(model, optimizer, groups),
    }


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without torch.distributed's warning that it is not initialised, and so assumes one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _write_latest(folder: Path, name: str) -> None:
    draft = folder / f"{LATEST}.tmp"
    draft.write_text(name + "\n")
    os.replace(draft, folder / LATEST)


def _barrier(groups: ParallelGroups) -> None:
    if groups.world_size > 1:
        dist.barrier()
