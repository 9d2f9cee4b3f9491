"""Runs a function on ranks that are processes, and returns what it returned on each."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import Case
from exercise import Results, run_case

import moe_ep
from moe_ep import launch

FAILURES_THAT_END_A_RUN = 3


def run_gloo(world_size: int, fn: Callable, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``fn(*args)`` in ``world_size`` processes with a default process group; its results by rank.

    ``fn`` is a function of a module (it is pickled by name); its result is anything torch.save takes.
    Starting processes costs seconds: give one call many cases.
    """
    return _run("cpu", world_size, fn, args, timeout_s)


def run_cuda(
    world_size: int, fn: Callable, *args: Any, one_gpu: bool = False, timeout_s: float = 280.0
) -> list[Any]:
    """As ``run_gloo``, with a GPU for each rank and NCCL; ``one_gpu``: all on the first GPU, with gloo."""
    # NOTE: virtual ranks need eager loading in the parent; a process of its own does not, and starts sooner.
    variables = {"CUDA_MODULE_LOADING": "LAZY"}
    if one_gpu:
        variables["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with mock.patch.dict(os.environ, variables):
        return _run("one gpu" if one_gpu else "cuda", world_size, fn, args, timeout_s)


def join(where: str) -> int:
    """Join the default group as ``where`` says: "cpu", "cuda" or "one gpu"; this rank's number."""
    torch.set_num_threads(1)
    rank, _ = launch.init_process_group("cuda" if where == "cuda" else "cpu")
    if where == "one gpu":
        torch.cuda.set_device(0)
    return rank


def run_cases(
    cases: Sequence[Case], device: str = "cpu", **communicator_arguments: Any
) -> dict[str, Results | str]:
    """On each rank: every case on a communicator of its own, and its results by the case's name.

    In place of the results of a case that raised stands its traceback. After a few such cases the rest is left out,
    on all ranks alike, since each may have to wait for a time limit.
    """
    outcomes: dict[str, Results | str] = {}
    failed = 0
    for case in cases:
        try:
            with moe_ep.Communicator(**case.communicator_arguments, **communicator_arguments) as comm:
                assert comm.backend == communicator_arguments.get("backend", comm.backend)
                outcomes[str(case)] = run_case(case, comm, device)
        except Exception:
            outcomes[str(case)] = traceback.format_exc()
        failures: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(failures, isinstance(outcomes[str(case)], str))
        failed += any(failures)
        if failed == FAILURES_THAT_END_A_RUN:
            break
    return outcomes


def _run(where: str, world_size: int, fn: Callable, args: tuple, timeout_s: float) -> list[Any]:
    with tempfile.TemporaryDirectory() as directory:
        launch.spawn(_run_and_save, world_size, where, directory, fn, args, timeout_s=timeout_s)
        paths = [Path(directory) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]


def _run_and_save(where: str, directory: str, fn: Callable, args: tuple) -> None:
    rank = join(where)
    result = fn(*args)
    torch.save(result, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()
