"""Shared memory between ranks of one machine, so that rows need not pass through sockets.

A rank allocates anonymous files (memfd) and tells its peers where a message lies; they map the file through
/proc/PID/fd and copy. The kernel frees the files when the last process that has them ends, however it ends. Where this
does not work (another machine, another user, not Linux) it is found out beforehand, by a number that peers must be able
to read in each other's memory.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable

import torch

_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
_NOTICE_FIELDS = 4


class SharedBuffer:
    """``num_bytes`` of memory that other processes can map."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number = number
        self.fd = os.memfd_create("moe_ep")
        os.posix_fallocate(self.fd, 0, num_bytes)  # an error now rather than a bus error later
        memory = mmap.mmap(self.fd, num_bytes, flags=mmap.MAP_SHARED | _POPULATE)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where ``tensor`` begins in this buffer; None if it is elsewhere."""
        offset = tensor.data_ptr() - self.bytes.data_ptr()
        return offset if 0 <= offset < len(self.bytes) else None

    def close(self) -> None:
        """Let go of the file; its memory lives until the last tensor in it, here and elsewhere, is gone."""
        os.close(self.fd)


class Neighbours:
    """The ranks with which this one shares memory, and the buffers on this side.

    ``all_gather`` gives every rank's int64 vector, ``[R, n]``. Making this object is collective.
    """

    def __init__(self, rank: int, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._count = 0
        self._named: dict[str, SharedBuffer] = {}
        self._free: list[SharedBuffer] = []
        self._mapped: dict[int, dict[int, torch.Tensor]] = {}

        number = secrets.randbits(62)
        beacon = self._allocate_beacon(number)
        fd = beacon.fd if beacon is not None else -1
        addresses = all_gather(torch.tensor([os.getpid(), fd, number], device="cpu"))
        mine = torch.tensor([_can_read(address) for address in addresses], dtype=torch.int64, device="cpu")
        readable = all_gather(mine).bool()
        mutual = readable[rank] & readable[:, rank]
        self._pids = {r: int(addresses[r, 0]) for r in mutual.nonzero().flatten().tolist() if r != rank}
        if beacon is not None:
            beacon.close()

    @property
    def ranks(self) -> set[int]:
        return set(self._pids)

    def allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        """Memory that stays until ``name`` is allocated again, which forgets what it held."""
        old = self._named.pop(name, None)
        if old is not None:
            old.close()
        self._named[name] = self._new_buffer(num_bytes)
        return self._named[name].bytes

    def borrow(self, num_bytes: int) -> SharedBuffer:
        """A buffer of at least this size until `give_back`."""
        fitting = [b for b in self._free if len(b.bytes) >= num_bytes]
        if not fitting:
            return self._new_buffer(num_bytes)
        best = min(fitting, key=lambda b: len(b.bytes))
        self._free.remove(best)
        return best

    def give_back(self, buffer: SharedBuffer) -> None:
        self._free.append(buffer)

    def find(self, tensor: torch.Tensor) -> SharedBuffer | None:
        """The allocated buffer that holds ``tensor``."""
        return next((b for b in self._named.values() if b.offset_of(tensor) is not None), None)

    @staticmethod
    def notice(buffer: SharedBuffer, tensor: torch.Tensor) -> torch.Tensor:
        """The word that ``tensor`` lies in ``buffer``; int64."""
        return torch.tensor(
            [buffer.number, buffer.fd, len(buffer.bytes), buffer.offset_of(tensor)], device="cpu"
        )

    @staticmethod
    def empty_notice() -> torch.Tensor:
        return torch.empty(_NOTICE_FIELDS, dtype=torch.int64, device="cpu")

    def read(self, peer: int, notice: torch.Tensor, num_bytes: int) -> torch.Tensor:
        """The bytes that ``peer`` has given notice of, in its own memory."""
        number, fd, size, offset = notice.tolist()
        mapped = self._mapped.setdefault(peer, {})
        if number not in mapped:
            if len(mapped) >= _MAX_MAPPED:  # the oldest is likely one that has since been replaced
                mapped.pop(next(iter(mapped)))
            mapped[number] = _map_peer(self._pids[peer], fd, size)
        return mapped[number][offset : offset + num_bytes]

    def close(self) -> None:
        for buffer in [*self._named.values(), *self._free]:
            buffer.close()
        self._named.clear()
        self._free.clear()
        self._mapped.clear()

    def _new_buffer(self, num_bytes: int) -> SharedBuffer:
        self._count += 1
        return SharedBuffer(self._count, max(num_bytes, mmap.PAGESIZE))

    def _allocate_beacon(self, number: int) -> SharedBuffer | None:
        if not hasattr(os, "memfd_create"):
            return None
        try:
            beacon = self._new_buffer(mmap.PAGESIZE)
        except OSError:
            return None
        beacon.bytes[:8].view(torch.int64).fill_(number)
        return beacon


_MAX_MAPPED = 16


def _can_read(address: torch.Tensor) -> bool:
    """Whether the number that a rank says it has written is there."""
    pid, fd, number = address.tolist()
    if fd < 0:
        return False
    try:
        return int(_map_peer(pid, fd, mmap.PAGESIZE)[:8].view(torch.int64)) == number
    except (OSError, ValueError):
        return False


def _map_peer(pid: int, fd: int, num_bytes: int) -> torch.Tensor:
    own_fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(own_fd, num_bytes, flags=mmap.MAP_SHARED), dtype=torch.uint8)
    finally:
        os.close(own_fd)
