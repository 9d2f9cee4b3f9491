"""Sessions of all-gathers into one buffer, as V2's agrs_* calls have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ...errors import InvalidInput
from .copy_engines import CopyEngines
from .elastic_sizes import ALIGNMENT, align
from .transport import Communicators

MOST_TENSORS = 32
_TENSOR_ALIGNMENT = 32

Shape = Sequence[int]

# Newer torch has another name for it, and warns of the old one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def session_bytes(num_ranks: int, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """Bytes of a session that gathers tensors of these shapes: each one's R copies in whole 32 bytes."""
    return sum(align(num_ranks * math.prod(shape) * dtype.itemsize, _TENSOR_ALIGNMENT) for shape in shapes)


def buffer_bytes(num_bytes: int) -> int:
    return align(num_bytes, ALIGNMENT)


class AllGatherSessions:
    """One buffer, taken from front to back by the all-gathers of a session; the next session begins anew.

    Gathers run by copy engines where the ranks' GPUs reach each other's memory; else as the group's own collective,
    with NCCL on its stream.
    """

    def __init__(self, ranks: Communicators) -> None:
        self._ranks = ranks
        self._num_bytes = 0
        self._most_tensors = MOST_TENSORS
        self._buffer: torch.Tensor | None = None
        self._engines: CopyEngines | None = None
        self._used: int | None = None  # bytes of the open session
        self._in_place: dict[int, torch.Tensor] = {}  # address of this rank's part -> all ranks' parts
        self._num_tensors = 0

    def configure(self, num_bytes: int, num_tensors: int) -> None:
        """Sizes of the sessions that follow. Collective: waits until every rank has ended its last session."""
        if self._used is not None:
            raise InvalidInput("a session is open; call destroy_agrs_session() before agrs_set_config")
        if not 0 < num_tensors <= MOST_TENSORS:
            raise InvalidInput(f"the number of tensors is {num_tensors}; allowed are 1 to {MOST_TENSORS}")
        if num_bytes < 0:
            raise InvalidInput(f"num_bytes is {num_bytes}; it must be at least 0")
        self._ranks.barrier()
        if num_bytes > self._num_bytes:
            self._make_room(num_bytes)
        self._num_bytes, self._most_tensors = num_bytes, num_tensors

    def open(self) -> None:
        if self._used is not None:
            raise InvalidInput("a session is open already; call destroy_agrs_session() first")
        if self._num_bytes == 0:
            raise InvalidInput("no session size is set; call agrs_set_config(num_bytes, num_tensors) first")
        if self._engines is not None:
            self._engines.begin()
        elif not isinstance(self._ranks.group, dist.ProcessGroup):
            raise NotImplementedError("all-gather sessions need a torch.distributed group")
        self._used = 0
        self._num_tensors = 0
        self._in_place.clear()

    def close(self) -> None:
        self._open_bytes()
        if self._engines is not None:
            self._engines.end()
        self._used = None
        self._in_place.clear()

    def destroy(self) -> None:
        """Free the memory. The sessions are at an end."""
        if self._engines is not None:
            self._engines.synchronize()
        self._engines = self._buffer = self._used = None
        self._in_place.clear()
        self._num_bytes = 0

    @contextmanager
    def session(self, enabled: bool = True) -> Iterator[None]:
        if not enabled:
            yield
            return
        self.open()
        try:
            yield
        finally:
            self.close()

    def in_place(
        self, shapes: Shape | Sequence[Shape], dtype: torch.dtype
    ) -> torch.Tensor | list[torch.Tensor]:
        """Tensors to fill, which are this rank's parts of what `gather` of them gives."""
        if shapes and not isinstance(shapes[0], int):
            return [self.in_place(shape, dtype) for shape in shapes]
        everyone = self._take(tuple(shapes), dtype)
        mine = everyone[self._ranks.rank]
        self._in_place[mine.data_ptr()] = everyone
        return mine

    def gather(self, tensors: torch.Tensor | Sequence[torch.Tensor]) -> tuple:
        """``(gathered [R, *shape], ..., wait)``: call ``wait()`` before the results are used."""
        if isinstance(tensors, torch.Tensor):
            tensors = [tensors]
        self._open_bytes()
        results, waits = [], []
        for tensor in tensors:
            result, wait = self._gather_one(tensor)
            results.append(result)
            waits.append(wait)

        def wait_for_all() -> None:
            for wait in waits:
                wait()

        return *results, wait_for_all

    def _gather_one(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        if not tensor.numel():
            return tensor.new_empty(self._ranks.size, *tensor.shape), lambda: None
        everyone = self._in_place.get(tensor.data_ptr())
        if everyone is None or everyone[0].shape != tensor.shape:
            everyone = self._take(tuple(tensor.shape), tensor.dtype, tensor.device)
            everyone[self._ranks.rank].copy_(tensor)
        if self._ranks.size == 1:
            return everyone, lambda: None
        if self._engines is not None:
            return everyone, self._engines.gather(everyone)
        flat = everyone.flatten().view(torch.uint8)  # a group need not know every dtype
        mine = flat.view(self._ranks.size, -1)[self._ranks.rank]
        work = _all_gather_single(flat, mine, group=self._ranks.group, async_op=True)
        return everyone, work.wait

    def _take(self, shape: Shape, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """``[R, *shape]`` from the session's buffer."""
        used = self._open_bytes()
        num_ranks = self._ranks.size
        num_bytes = num_ranks * math.prod(shape) * dtype.itemsize
        end = used + align(num_bytes, _TENSOR_ALIGNMENT)
        if end > self._num_bytes or self._num_tensors == self._most_tensors:
            raise InvalidInput(
                f"this session has {self._num_bytes} bytes for {self._most_tensors} tensors; {self._num_tensors} take "
                f"{used} bytes and one more would take {end - used}: call agrs_set_config with larger numbers"
            )
        if self._buffer is None:
            device = device or self._ranks.device
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, device=device)
        self._used, self._num_tensors = end, self._num_tensors + 1
        return self._buffer[used : used + num_bytes].view(dtype).view(num_ranks, *shape)

    def _make_room(self, num_bytes: int) -> None:
        self._buffer = None
        nvlink = self._ranks.nvlink()
        if nvlink is None or not isinstance(self._ranks.group, dist.ProcessGroup):
            return
        if self._engines is not None:
            self._engines.synchronize()
        self._engines = CopyEngines(nvlink, num_bytes)
        self._buffer = self._engines.memory

    def _open_bytes(self) -> int:
        if self._used is None:
            raise InvalidInput("no session is open; call create_agrs_session() or use agrs_new_session()")
        return self._used
