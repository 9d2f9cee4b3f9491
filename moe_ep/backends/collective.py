"""Any torch.distributed group: gloo on CPU, NCCL on CUDA, any network.

Messages are the group's point-to-point operations, so that segments travel from and to where they lie and rows that
stay on a rank cost nothing.
"""

from __future__ import annotations

import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import InvalidInput, PeerTimeoutError
from .alltoall import AllToAllBackend, Message
from .faults import find_silent_ranks


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
        self.transport = dist.get_backend_config(group) if group is not None else "nothing: one rank"
        on_cpu = group is None or "cpu:" in self.transport
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self._global_ranks = dist.get_process_group_ranks(group) if group is not None else [0]

    def group(self) -> dist.ProcessGroup:
        group = self._group() if self._group is not None else None
        if group is None:
            raise InvalidInput("the torch.distributed group of this communicator has been destroyed")
        return group

    def start(self, sends: list[Message], receives: list[Message], phase: str) -> _Transfer:
        return _Transfer(self, sends, receives, phase)

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
            ranks, account = find_silent_ranks(
                dist.PrefixStore(prefix, store), self.rank, self.size, suspects, phase
            )
        return PeerTimeoutError(ranks, phase, "; ".join(filter(None, [cause, account])))


def _default_store() -> dist.Store | None:
    # NOTE: torch has no public way to the default group's store; without it the suspects themselves are named.
    get_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get_store() if get_store is not None else None


class _Transfer:
    def __init__(
        self, backend: CollectiveBackend, sends: list[Message], receives: list[Message], phase: str
    ) -> None:
        self._backend, self._phase = backend, phase
        self._peers: list[int] = []
        self._works: list[dist.Work] = []
        self._on_device = False
        self._tensors = sends, receives  # alive until the messages are through
        ops = [(dist.irecv, m) for m in receives] + [(dist.isend, m) for m in sends]
        if not ops:
            return
        group, tag = backend.group(), backend.channel
        self._on_device = ops[0][1].tensor.is_cuda
        if self._on_device:
            p2p = [dist.P2POp(op, _as_bytes(m.tensor), group=group, group_peer=m.peer) for op, m in ops]
            self._works = dist.batch_isend_irecv(p2p)
            return
        for op, message in ops:
            self._peers.append(message.peer)
            try:
                where = {"group_src" if op is dist.irecv else "group_dst": message.peer}
                self._works.append(op(_as_bytes(message.tensor), group=group, tag=tag, **where))
            except RuntimeError as error:
                self._fail({message.peer}, error)

    def wait(self) -> None:
        if self._on_device:
            for work in self._works:
                work.wait()  # the current stream waits, the host does not
            return
        deadline = time.monotonic() + self._backend.timeout_s
        failed: dict[int, RuntimeError] = {}
        for peer, work in zip(self._peers, self._works, strict=True):
            left = max(0.001, deadline - time.monotonic())
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                failed[peer] = error
        if failed:
            self._fail(set(failed), next(iter(failed.values())))

    def _fail(self, suspects: set[int], error: RuntimeError) -> None:
        cause = f"waited at most {self._backend.timeout_s:g} s; {_brief(error)}"
        raise self._backend.give_up(suspects, self._phase, cause) from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Every dtype travels as bytes; not every group knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def _brief(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].split(" This is typically")[0]
