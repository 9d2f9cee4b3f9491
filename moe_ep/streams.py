"""Asynchronous calls: the side stream of a communicator, and events to wait on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .communicator import Communicator


class Event:
    """The end of an asynchronous call. On a CPU the call has already ended."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._results: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []

    def record(
        self, stream: torch.cuda.Stream, inputs: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        """Mark the end of what ``stream`` has been given. ``inputs`` stay alive until somebody waits."""
        self._event = torch.cuda.Event()
        self._event.record(stream)
        self._inputs, self._results = inputs, results

    def wait(self) -> None:
        """Make the current stream wait for the call. Does not block the host."""
        if self._event is None:
            return
        current = torch.cuda.current_stream()
        current.wait_event(self._event)
        for result in self._results:
            result.record_stream(current)
        self._inputs, self._results = [], []

    def query(self) -> bool:
        """Whether the call has ended."""
        return self._event is None or self._event.query()


def named_range(name: str) -> AbstractContextManager:
    """A range in profiles; torch.compile knows none."""
    return nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(name)


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
        event.record(stream, [t for t in inputs if t is not None], [t for t in results if t is not None])
    return event
