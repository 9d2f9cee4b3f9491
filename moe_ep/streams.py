"""Asynchronous calls: the side stream of a communicator, and events to wait on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from . import timeline
from .communicator import Communicator


class Event:
    """The end of an asynchronous call. On a CPU the call has already ended."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._caller: torch.cuda.Stream | None = None
        self._inputs: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []

    def record(
        self, stream: torch.cuda.Stream, inputs: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        """Mark the end of what ``stream`` has been given. Called on the caller's stream.

        ``inputs`` stay alive until that stream has been made to wait, so that it can't reuse their memory before.
        """
        self._event = torch.cuda.Event()
        self._event.record(stream)
        self._caller = torch.cuda.current_stream(stream.device)
        self._inputs, self._results = inputs, results

    def wait(self) -> None:
        """Make the current stream wait for the call; any number of times, on any stream. Does not block the host."""
        if self._event is None:
            return
        current = torch.cuda.current_stream(self._caller.device)
        current.wait_event(self._event)
        for result in self._results:
            result.record_stream(current)
        if current == self._caller:
            self._inputs = []

    def query(self) -> bool:
        """Whether the call has ended."""
        return self._event is None or self._event.query()


def named_range(name: str) -> AbstractContextManager:
    """A range in profiles and in a `Timeline`. Where nobody makes one it costs microseconds for nothing, and
    torch.compile knows none.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    recording = timeline.recording()
    if recording is not None:
        return recording.range(name)
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(name)
    return nullcontext()


@contextmanager
def side_stream(comm: Communicator, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Run on the communicator's stream, after what the current stream has been given. On a CPU, None."""
    if device.type != "cuda":
        yield None
        return
    stream = comm.stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


def finish(
    stream: torch.cuda.Stream | None,
    inputs: Iterable[torch.Tensor | None],
    results: Iterable[torch.Tensor | None],
) -> Event:
    """The event of a call that ran on ``stream``."""
    event = Event()
    if stream is not None:
        on_device = ([t for t in tensors if t is not None and t.is_cuda] for tensors in (inputs, results))
        event.record(stream, *on_device)
    return event
