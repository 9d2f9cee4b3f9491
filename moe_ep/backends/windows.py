"""Windows: memory of each rank that all ranks' kernels can write, and the addresses where a process sees it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from .. import _extension
from ..errors import BackendUnavailable, MoeEpError, PeerTimeoutError
from .virtual import VirtualGroup

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class Members(Protocol):
    """How the hosts of a group talk to each other; the kernels need them only to begin and to end."""

    rank: int
    size: int

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """``[R, n]`` from every rank's int64 CPU tensor ``values [n]``; also a barrier."""

    def give_up(self, suspects: set[int], phase: str, cause: str) -> PeerTimeoutError:
        """The error to raise when nothing comes from ``suspects``."""

    def close(self) -> None: ...


def why_unavailable(members: Members, device: torch.device | None) -> str | None:
    """Why the ranks of a group can't use each other's memory, in words; None if they can. Collective."""
    missing = why_not_here(device)
    index = device.index if device is not None else -1
    mine = [missing is None, _host_number(), _device_number(device), index]
    ranks = members.all_gather(torch.tensor(mine, dtype=torch.int64, device="cpu")).tolist()
    if missing is not None:
        return missing
    for rank, (ready, host, number, index) in enumerate(ranks):
        if not ready:
            return f"rank {rank} can't (its own log says why)"
        if host != mine[1]:
            return f"rank {rank} is on another machine"
        if rank == members.rank:
            continue
        if number == mine[2]:
            if os.environ.get(OVERLAPPING) != "1":
                return f"ranks {members.rank} and {rank} share a GPU, which needs {OVERLAPPING}=1 and a gloo group"
        elif index < torch.cuda.device_count() and not torch.cuda.can_device_access_peer(device.index, index):
            return f"GPU {device.index} has no access to the memory of GPU {index}, rank {rank}'s"
    return None


def why_not_here(device: torch.device | None) -> str | None:
    """Why the kernels can't run on a device, in words; None if they can."""
    if device is None or device.type != "cuda":
        return "there is no CUDA GPU"
    if _extension.load() is None:
        return f"moe_ep._C is missing: {_extension.why_missing()}"
    if _extension.load_for(device) is None:
        archs = _extension.load().ARCHS
        return f"moe_ep._C was built for sm_{archs}, not for {torch.cuda.get_device_name(device)}"
    return None


def _host_number() -> int:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return zlib.crc32(boot_id.read_bytes() if boot_id.exists() else os.uname().nodename.encode())


def _device_number(device: torch.device | None) -> int:
    if device is None or device.type != "cuda":
        return -1
    return zlib.crc32(str(torch.cuda.get_device_properties(device).uuid).encode())


def symmetric(
    members: Members, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device, formula: str
) -> tuple[torch.Tensor, list[int]]:
    """This rank's window, zeroed, and the addresses of all. Collective.

    Raises MoeEpError on all ranks if it does not fit on one, BackendUnavailable if symmetric memory does not work.
    """
    if members.size == 1:
        memory = _allocate(lambda: torch.zeros(num_bytes, dtype=torch.uint8, device=device))
        if memory is None:
            raise _too_large(num_bytes, device, formula)
        return memory, [memory.data_ptr()]
    # NOTE: torch.distributed has symmetric memory under no public name; these functions have kept theirs since 2.5.
    from torch.distributed import _symmetric_memory

    memory = _allocate(lambda: _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device))
    fits = (
        members.all_gather(torch.tensor([memory is not None], dtype=torch.int64, device="cpu"))
        .flatten()
        .tolist()
    )
    if memory is None:
        raise _too_large(num_bytes, device, formula)
    if not all(fits):
        raise MoeEpError(
            f"the window of {num_bytes / 2**20:.0f} MiB does not fit on rank {fits.index(0)}'s GPU"
        )
    memory.zero_()
    try:
        handle = _symmetric_memory.rendezvous(memory, group)
    except RuntimeError as error:
        raise BackendUnavailable(f"torch symmetric memory does not work here: {error}") from error
    return memory, [int(address) for address in handle.buffer_ptrs]


def shared(
    group: VirtualGroup, key: object, num_bytes: int, device: torch.device, formula: str
) -> tuple[torch.Tensor, list[int]]:
    """The same for virtual ranks: slices of one allocation."""
    memory = group.share(
        key,
        lambda: _allocate(lambda: torch.zeros((group.size, num_bytes), dtype=torch.uint8, device=device)),
    )
    if memory is None:
        raise _too_large(num_bytes * group.size, device, formula)
    return memory, [memory[rank].data_ptr() for rank in range(group.size)]


def _allocate(allocation) -> torch.Tensor | None:
    try:
        return allocation()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; symmetric memory raises a plain one
        if "out of memory" not in str(error).lower():
            raise
        return None


def _too_large(num_bytes: int, device: torch.device, formula: str) -> MoeEpError:
    free, total = torch.cuda.mem_get_info(device)
    return MoeEpError(
        f"the window of {num_bytes / 2**20:.0f} MiB does not fit on {device} ({free / 2**20:.0f} of "
        f"{total / 2**20:.0f} MiB are free). It is {formula}: lower max_tokens_per_rank, or free memory"
    )
