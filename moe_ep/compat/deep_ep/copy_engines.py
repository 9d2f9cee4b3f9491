"""All-gathers by copy engines, between processes whose GPUs reach each other's memory.

Every rank copies its part into the memory of all others, where it lies as it does here. That it has arrived is a value
that the copying stream writes behind it and the receiving stream waits for, so no multiprocessor does anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import _extension
from ...backends import windows
from ...backends.nvlink import NvlinkBackend
from ...errors import InvalidInput
from .elastic_sizes import align

_WINDOW_FORMULA = "the bytes of a session, and a little for signals"
_WINDOW_ALIGNMENT = 256
_WORD_BYTES = 4
_VALUES = 1 << 32


class CopyEngines:
    """Memory of ``num_bytes`` on each rank, and gathers into it. Collective, as all calls but waits are.

    NOTE: a stream's wait has no time limit: a rank that died leaves the others' streams waiting.
    """

    def __init__(self, nvlink: NvlinkBackend, num_bytes: int) -> None:
        self.rank, self.size, self.device = nvlink.rank, nvlink.size, nvlink.device
        self._do = _extension.load().on_stream
        members = nvlink.members
        # Behind the data, a word from each rank: gathers that have arrived from it; sessions that it has ended.
        self._arrived = align(num_bytes, _WORD_BYTES)
        self._ended = self._arrived + self.size * _WORD_BYTES
        window_bytes = align(self._ended + self.size * _WORD_BYTES, _WINDOW_ALIGNMENT)
        group = members.group() if self.size > 1 else None
        self._window, self._windows_of = windows.symmetric(
            members, group, window_bytes, self.device, _WINDOW_FORMULA
        )
        self.memory = self._window[:num_bytes]
        self._stream = torch.cuda.Stream(self.device, priority=-1)
        self._others = [(self.rank + i) % self.size for i in range(1, self.size)]
        self._num_gathers = self._num_sessions = 0
        torch.cuda.current_stream(self.device).synchronize()
        members.all_gather(torch.zeros(1, dtype=torch.int64, device="cpu"))  # all memory is there and zero

    def begin(self) -> None:
        """A session, whose gathers wait until every rank has ended the one before."""
        self._refuse_capture()
        self._wait_for(self._ended, self._num_sessions, self._stream)

    def end(self) -> None:
        """The session, for what the current stream did so far."""
        self._refuse_capture()
        self._num_sessions += 1
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for peer in self._others:
            self._tell(peer, self._ended, self._num_sessions, current)

    def gather(self, everyone: torch.Tensor) -> Callable[[], None]:
        """Of ``everyone [R, ...]``, a part of `memory`, send this rank's. What returns lets the current stream wait."""
        self._refuse_capture()
        self._num_gathers += 1
        number, stream = self._num_gathers, self._stream
        mine = everyone[self.rank]
        offset = mine.data_ptr() - self.memory.data_ptr()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for peer in self._others:
            self._do.copy(
                to=self._windows_of[peer] + offset,
                source=mine.data_ptr(),
                num_bytes=mine.nbytes,
                stream=stream.cuda_stream,
            )
            self._tell(peer, self._arrived, number, stream)
        sent = stream.record_event()

        def wait() -> None:
            self._refuse_capture()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            self._wait_for(self._arrived, number, current)

        return wait

    def synchronize(self) -> None:
        """Until the current stream and what was copied here are done."""
        torch.cuda.current_stream(self.device).synchronize()
        self._stream.synchronize()

    def _tell(self, peer: int, words: int, value: int, stream: torch.cuda.Stream) -> None:
        at = self._windows_of[peer] + words + self.rank * _WORD_BYTES
        self._do.write_value(to=at, value=value % _VALUES, stream=stream.cuda_stream)

    def _wait_for(self, words: int, value: int, stream: torch.cuda.Stream) -> None:
        """Until all others have told it."""
        for peer in self._others:
            at = self._windows_of[self.rank] + words + peer * _WORD_BYTES
            self._do.wait_value(at=at, value=value % _VALUES, stream=stream.cuda_stream)

    def _refuse_capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise InvalidInput(
                "an all-gather session is used while a CUDA graph is captured; its signals are numbers that a replay "
                "would repeat: gather outside of graphs"
            )
