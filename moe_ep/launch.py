"""Starting ranks on this machine, and joining the group that torchrun or `spawn` has set up."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import InvalidInput, MoeEpError

_LOOPBACK = ("lo", "lo0")
# glibc returns large blocks to the system at every free, and the page faults of the next allocation cost more than the
# copy that fills it. It reads these at a process's start.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def spawn(fn: Callable[..., Any], nproc: int, *args: Any, timeout_s: float | None = None) -> None:
    """Run ``fn(*args)`` in ``nproc`` new processes, each a rank that may call `init_process_group`.

    ``fn`` and ``args`` must be picklable. Returns when all have ended. An exception in one ends the others and is
    raised here (torch.multiprocessing.ProcessRaisedException); so does a signal that kills one, and a ``timeout_s``
    that passes (MoeEpError). After a first Ctrl-C, which reaches the ranks as well, it waits for them to end; a second
    one ends them.
    """
    if nproc < 1:
        raise InvalidInput(f"nproc is {nproc}; it must be at least 1")
    # The store lives in this process, so that it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _environment(_MALLOC):
        context = torch.multiprocessing.start_processes(
            _run_rank, (nproc, store.port, fn, args), nprocs=nproc, join=False, start_method="spawn"
        )
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    interrupted = False
    try:
        while True:
            try:
                if context.join(timeout=0.5, grace_period=5.0):
                    break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
            if deadline is not None and time.monotonic() > deadline:
                raise MoeEpError(f"{nproc} ranks did not end within timeout_s={timeout_s:g}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    if interrupted:
        raise KeyboardInterrupt


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Variables for processes started meanwhile, unless the user has set them."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _run_rank(rank: int, nproc: int, port: int, fn: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # join the store at that port instead of serving one
    )
    loopback = [name for _, name in socket.if_nameindex() if name in _LOOPBACK]
    if loopback:  # a laptop's host name may resolve to nothing
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    fn(*args)


def inside_launch() -> bool:
    """Whether this process is a rank that torchrun or `spawn` has started."""
    return "RANK" in os.environ


def init_process_group(device: str | None = None, timeout_s: float = 1800.0) -> tuple[int, int]:
    """Join torch.distributed's default group and return ``(rank, world_size)``.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, as torchrun and `spawn` set them; without them this process is
    rank 0 of 1 and nothing is initialised. ``device``: "cpu" (gloo) or "cuda" (NCCL, and gloo for CPU tensors; sets
    this rank's current device); None: "cuda" if this machine has a GPU for each of its ranks, else "cpu".
    """
    if device not in (None, "cpu", "cuda"):
        raise InvalidInput(f"device is {device!r}; allowed are None, 'cpu' and 'cuda'")
    if not inside_launch():
        return 0, 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count()
    if device is None:
        device = "cuda" if num_gpus >= local_ranks else "cpu"
    timeout = timedelta(seconds=timeout_s)
    if device == "cpu":
        dist.init_process_group("gloo", timeout=timeout)
    elif local_rank >= num_gpus:
        raise InvalidInput(
            f"device is 'cuda', but this is local rank {local_rank} and the machine has {num_gpus} GPUs; "
            f"start at most {num_gpus} ranks or use device='cpu'"
        )
    else:
        torch.cuda.set_device(local_rank)
        device_id = torch.device("cuda", local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device_id)
    return dist.get_rank(), dist.get_world_size()
