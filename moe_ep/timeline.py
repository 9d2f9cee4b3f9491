"""Where named ranges lie in time, on each stream of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Moment = torch.cuda.Event | float


@dataclass(frozen=True)
class Span:
    """``stream``: 0, 1, ... in the order in which streams were first used; times in us since recording began."""

    name: str
    stream: int
    begin_us: float
    end_us: float


class Timeline:
    """Records every `moe_ep.streams.named_range` that is entered inside ``with timeline``, by any thread.

    On a GPU a range is the time between two events on the stream that is current where it begins: from when that stream
    has come to it until the stream has done what it was given inside. On a CPU it is the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._streams: dict[int, int] = {}
        self._marks: list[tuple[str, int, Moment, Moment]] = []
        self._begin: Moment | None = None

    def __enter__(self) -> Timeline:
        global _recording
        if self._begin is None:
            self._stream_number()
            self._begin = self._now()
        _recording = self
        return self

    def __exit__(self, *_exc) -> None:
        global _recording
        _recording = None

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        stream, begin = self._stream_number(), self._now()
        yield
        end = self._now()
        with self._lock:
            self._marks.append((name, stream, begin, end))

    def spans(self) -> list[Span]:
        """All ranges so far, by their beginning. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spans = [
            Span(name, stream, self._us(begin), self._us(end)) for name, stream, begin, end in self._marks
        ]
        return sorted(spans, key=lambda span: (span.begin_us, -span.end_us))

    def _stream_number(self) -> int:
        address = 0
        if self._device.type == "cuda":
            address = torch.cuda.current_stream(self._device).cuda_stream
        with self._lock:
            return self._streams.setdefault(address, len(self._streams))

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _us(self, moment: Moment) -> float:
        if isinstance(moment, float):
            return (moment - self._begin) * 1e6
        return self._begin.elapsed_time(moment) * 1e3


def own_us(outer: Span, spans: list[Span]) -> float:
    """The time of one of a timeline's ``spans``, less that of others on its stream inside it."""
    us, behind = outer.end_us - outer.begin_us, outer.begin_us
    for span in spans:  # by their beginning
        inside = span.stream == outer.stream and span.begin_us >= behind and span.end_us <= outer.end_us
        if inside and span is not outer:
            us, behind = us - (span.end_us - span.begin_us), span.end_us
    return us


_recording: Timeline | None = None


def recording() -> Timeline | None:
    """The timeline that is being recorded, if any."""
    return _recording
