"""Any torch.distributed group: gloo on CPU, NCCL on CUDA, any network.

Messages are the group's point-to-point operations, so that segments travel from and to where they lie and rows that
stay on a rank cost nothing. Between CPU ranks of one machine, large messages are handed over in shared memory and the
group carries only the word that they are there.
"""

from __future__ import annotations

import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import InvalidInput, PeerTimeoutError
from .alltoall import AllToAllBackend, Message, Transfer
from .faults import find_silent_ranks
from .shared_memory import Neighbours, SharedBuffer

SHARED_MEMORY_MIN_BYTES = 1 << 16
"""Smaller messages are faster through the group itself."""


class CollectiveBackend(AllToAllBackend):
    """``group`` None is a group of one rank, for which torch.distributed need not be initialised."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup | None, channel: int, timeout_s: float) -> None:
        super().__init__()
        # NOTE: weak, since a group that outlives destroy_process_group() aborts the process at its exit.
        self._group = weakref.ref(group) if group is not None else None
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.channel = channel
        self.timeout_s = timeout_s
        # Like "cpu:gloo,cuda:nccl".
        config = dist.get_backend_config(group) if group is not None else "cpu:nothing"
        on_cpu = "cpu:" in config
        self.carries_cuda = "nccl" in config or (group is None and torch.cuda.is_available())
        self.transport = " and ".join(sorted({part.split(":")[-1] for part in config.split(",")}))
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self._global_ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        self.neighbours = None
        if on_cpu and self.size > 1:
            self.neighbours = Neighbours(self.rank, self.all_gather)
            if near := len(self.neighbours.ranks):
                self.transport += f", shared memory with {near} of {self.size - 1} others"

    def close(self) -> None:
        super().close()
        if self.neighbours is not None:
            self.neighbours.close()
            self.neighbours = None

    def group(self) -> dist.ProcessGroup:
        group = self._group() if self._group is not None else None
        if group is None:
            raise InvalidInput("the torch.distributed group of this communicator has been destroyed")
        return group

    def start(self, sends: list[Message], receives: list[Message], phase: str) -> Transfer:
        if not sends and not receives:
            return _NOTHING
        on_device = (sends or receives)[0].tensor.is_cuda
        return (_DeviceTransfer if on_device else _HostTransfer)(self, sends, receives, phase)

    def shares_memory(self, message: Message) -> bool:
        """Both ends must come to the same answer from what both know: who they are and the size."""
        if self.neighbours is None or message.peer not in self.neighbours.ranks:
            return False
        return message.tensor.nbytes >= SHARED_MEMORY_MIN_BYTES

    def allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        if self.neighbours is None or not self.neighbours.ranks:
            return super().allocate(name, num_bytes)
        return self.neighbours.allocate(name, num_bytes)

    def host_values(self, values: torch.Tensor, phase: str) -> list:
        if values.is_cuda:
            self._wait_on_host(phase)
        return values.tolist()

    def _wait_on_host(self, phase: str) -> None:
        """Wait for the current stream, but not for ever: a dead peer's messages never complete."""
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self.timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                others = set(range(self.size)) - {self.rank}
                raise self.give_up(others, phase, f"waited {self.timeout_s:g} s")
            time.sleep(20e-6)

    def give_up(self, suspects: set[int], phase: str, cause: str) -> PeerTimeoutError:
        """The error to raise when the messages of ``suspects`` don't come."""
        ranks, account = suspects, ""
        store = _default_store()
        if store is not None:
            prefix = f"moe_ep/{'-'.join(map(str, self._global_ranks))}/{self.channel}"
            store = dist.PrefixStore(prefix, store)
            ranks, account = find_silent_ranks(store, self.rank, self.size, suspects, phase)
        return PeerTimeoutError(ranks, phase, "; ".join(filter(None, [cause, account])))


def _default_store() -> dist.Store | None:
    # NOTE: torch has no public way to the default group's store; without it the suspects themselves are named.
    get_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get_store() if get_store is not None else None


class _NoTransfer:
    """Nothing was sent and nothing will come."""

    def wait(self) -> list[torch.Tensor]:
        return []

    def release(self) -> None:
        pass


_NOTHING = _NoTransfer()


class _DeviceTransfer:
    """NCCL: the current stream waits for the messages, the host does not."""

    def __init__(
        self, backend: CollectiveBackend, sends: list[Message], receives: list[Message], phase: str
    ) -> None:
        ops = [(dist.irecv, m) for m in receives] + [(dist.isend, m) for m in sends]
        group = backend.group()
        p2p = [dist.P2POp(op, _as_bytes(m.tensor), group=group, group_peer=m.peer) for op, m in ops]
        self._works = dist.batch_isend_irecv(p2p)
        self._received = [m.tensor for m in receives]

    def wait(self) -> list[torch.Tensor]:
        for work in self._works:
            work.wait()
        return self._received

    def release(self) -> None:
        pass


class _HostTransfer:
    """gloo. A message in shared memory is a notice there and an acknowledgement back when it has been read."""

    def __init__(
        self, backend: CollectiveBackend, sends: list[Message], receives: list[Message], phase: str
    ) -> None:
        self._backend, self._phase = backend, phase
        self._deadline = 0.0
        self._failed: dict[int, RuntimeError] = {}
        self._arriving: list[tuple[Message, dist.Work, torch.Tensor]] = []
        self._leaving: list[tuple[int, dist.Work, torch.Tensor]] = []
        self._to_acknowledge: list[int] = []
        self._borrowed: list[SharedBuffer] = []
        for message in receives:
            shared = backend.shares_memory(message)
            data = Neighbours.empty_notice() if shared else _as_bytes(message.tensor)
            self._arriving.append((message, self._post(dist.irecv, message.peer, data), data))
        for message in sends:
            shared = backend.shares_memory(message)
            self._send(message.peer, self._notice_of(message.tensor) if shared else _as_bytes(message.tensor))
            if shared:
                byte = torch.empty(1, dtype=torch.uint8, device="cpu")
                work = self._post(dist.irecv, message.peer, byte, acknowledgement=True)
                self._leaving.append((message.peer, work, byte))

    def wait(self) -> list[torch.Tensor]:
        self._deadline = time.monotonic() + self._backend.timeout_s
        received = []
        for message, work, data in self._arriving:
            self._end(message.peer, work)
            if self._backend.shares_memory(message) and message.peer not in self._failed:
                data = self._backend.neighbours.read(message.peer, data, message.tensor.nbytes)
                received.append(data.view(message.tensor.dtype).view(message.tensor.shape))
                self._to_acknowledge.append(message.peer)
            else:
                received.append(message.tensor)
        self._raise_if_failed()
        return received

    def release(self) -> None:
        self._deadline = time.monotonic() + self._backend.timeout_s
        for peer in self._to_acknowledge:
            self._send(peer, torch.zeros(1, dtype=torch.uint8, device="cpu"), acknowledgement=True)
        for peer, work, _ in self._leaving:
            self._end(peer, work)
        self._raise_if_failed()
        for buffer in self._borrowed:
            self._backend.neighbours.give_back(buffer)

    def _notice_of(self, tensor: torch.Tensor) -> torch.Tensor:
        neighbours = self._backend.neighbours
        buffer = neighbours.find(tensor)
        if buffer is None:
            buffer = neighbours.borrow(tensor.nbytes)
            self._borrowed.append(buffer)
            copy = buffer.bytes[: tensor.nbytes]
            copy.copy_(_as_bytes(tensor))
            tensor = copy
        return neighbours.notice(buffer, tensor)

    def _send(self, peer: int, data: torch.Tensor, acknowledgement: bool = False) -> None:
        self._leaving.append((peer, self._post(dist.isend, peer, data, acknowledgement), data))

    def _post(self, op, peer: int, data: torch.Tensor, acknowledgement: bool = False) -> dist.Work:
        where = {"group_src" if op is dist.irecv else "group_dst": peer}
        group = self._backend.group()
        try:
            return op(data, group=group, tag=2 * self._backend.channel + acknowledgement, **where)
        except RuntimeError as error:
            self._failed[peer] = error
            self._raise_if_failed()
            raise

    def _end(self, peer: int, work: dist.Work) -> None:
        left = max(0.001, self._deadline - time.monotonic())
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            self._failed[peer] = error

    def _raise_if_failed(self) -> None:
        if not self._failed:
            return
        error = next(iter(self._failed.values()))
        brief = str(error).strip().splitlines()[0].split(" This is typically")[0]
        cause = f"waited at most {self._backend.timeout_s:g} s; {brief}"
        raise self._backend.give_up(set(self._failed), self._phase, cause) from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Every dtype travels as bytes; not every group knows every dtype."""
    return tensor.view(-1).view(torch.uint8)
