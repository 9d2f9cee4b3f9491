"""Ranks as threads of one process: for tests, for laptops, for debugging with one debugger."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from ..errors import PeerTimeoutError
from .alltoall import AllToAllBackend, Message

Shared = TypeVar("Shared")


class VirtualGroup:
    """One rank's membership in a group of threads; made for all ranks at once by `create`."""

    def __init__(self, rank: int, post_office: PostOffice, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self.size = post_office.size
        self.post_office = post_office
        self._channels = itertools.count()

    def next_channel(self) -> int:
        """A number for the messages of one communicator; equal on all ranks, which make them in the same order."""
        return next(self._channels)

    def share(self, key: object, make: Callable[[], Shared]) -> Shared:
        """What ``make`` gave the first rank that came with this key."""
        return self.post_office.share(key, make)

    @staticmethod
    def create(world_size: int, device: torch.device | str = "cpu") -> list[VirtualGroup]:
        post_office = PostOffice(world_size)
        return [VirtualGroup(rank, post_office, torch.device(device)) for rank in range(world_size)]


class PostOffice:
    """Mailboxes between the ranks of a group: one queue of tensors for each (source, destination, channel)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._boxes: dict[tuple[int, int, int], deque[_Parcel]] = {}
        self._failure: BaseException | None = None
        # Kept alive by those who use it: the last rank to drop it frees it.
        self._shared: weakref.WeakValueDictionary[object, Any] = weakref.WeakValueDictionary()

    def share(self, key: object, make: Callable[[], Shared]) -> Shared:
        with self._changed:
            shared = self._shared.get(key)
            if shared is None:
                shared = make()
                if shared is not None:
                    self._shared[key] = shared
            return shared

    def fail(self, error: BaseException) -> None:
        """Wake every rank that waits; it raises `GroupFailed`. The first failure stands."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def post(self, source: int, destination: int, channel: int, tensor: torch.Tensor) -> _Parcel:
        parcel = _Parcel(tensor)
        with self._changed:
            self._boxes.setdefault((source, destination, channel), deque()).append(parcel)
            self._changed.notify_all()
        return parcel

    def collect(
        self, sources: Iterable[int], destination: int, channel: int, deadline: float
    ) -> tuple[int, _Parcel] | None:
        """The oldest parcel of whichever source has one, or None when the deadline (of time.monotonic()) passes."""
        with self._changed:
            boxes = {s: self._boxes.setdefault((s, destination, channel), deque()) for s in sources}
            if not self._wait_for(lambda: any(boxes.values()), deadline):
                return None
            source = next(s for s, box in boxes.items() if box)
            return source, boxes[source].popleft()

    def mark_read(self, parcel: _Parcel) -> None:
        with self._changed:
            parcel.read = True
            self._changed.notify_all()

    def wait_read(self, parcel: _Parcel, deadline: float) -> bool:
        with self._changed:
            return self._wait_for(lambda: parcel.read, deadline)

    def _wait_for(self, ready, deadline: float) -> bool:
        self._changed.wait_for(
            lambda: ready() or self._failure is not None, max(0.0, deadline - time.monotonic())
        )
        if not ready() and self._failure is not None:
            raise GroupFailed("another rank of this group has failed") from self._failure
        return ready()


class GroupFailed(RuntimeError):
    """Raised in a rank that waits for others after one of them has failed."""


class _Parcel:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.read = False


class _Transfer:
    def __init__(
        self, backend: VirtualBackend, sent: list[tuple[int, _Parcel]], receives: list[Message], phase: str
    ) -> None:
        self._backend, self._sent, self._receives, self._phase = backend, sent, receives, phase
        self._received: dict[int, _Parcel] = {}

    def wait(self) -> list[torch.Tensor]:
        backend = self._backend
        office = backend.group.post_office
        deadline = time.monotonic() + backend.timeout_s
        awaited = {source for source, _ in self._receives}
        while awaited:
            # Whichever comes first: a peer that this rank keeps waiting for nothing would be blamed by others.
            arrived = office.collect(awaited, backend.rank, backend.channel, deadline)
            if arrived is None:
                raise PeerTimeoutError(awaited, self._phase, f"waited {backend.timeout_s:g} s")
            source, parcel = arrived
            awaited.remove(source)
            self._received[source] = parcel
        return [self._received[source].tensor for source, _ in self._receives]

    def release(self) -> None:
        backend = self._backend
        office = backend.group.post_office
        for parcel in self._received.values():
            office.mark_read(parcel)
        deadline = time.monotonic() + backend.timeout_s
        unread = {peer for peer, parcel in self._sent if not office.wait_read(parcel, deadline)}
        if unread:
            raise PeerTimeoutError(unread, self._phase, f"waited {backend.timeout_s:g} s")


class VirtualBackend(AllToAllBackend):
    name = "virtual"
    device = torch.device("cpu")

    def __init__(self, group: VirtualGroup, channel: int, timeout_s: float) -> None:
        super().__init__()
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.channel = channel
        self.timeout_s = timeout_s

    def give_up(self, suspects: set[int], phase: str, cause: str) -> PeerTimeoutError:
        return PeerTimeoutError(suspects, phase, cause)

    def start(self, sends: Iterable[Message], receives: list[Message], phase: str) -> _Transfer:
        office = self.group.post_office
        sent = [(peer, office.post(self.rank, peer, self.channel, tensor)) for peer, tensor in sends]
        return _Transfer(self, sent, receives, phase)
