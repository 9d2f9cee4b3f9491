"""Where deep_ep's calls run: on the current stream, or asynchronously on a communication stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from ...errors import InvalidInput
from .utils.event import EventHandle, EventOverlap

Result = TypeVar("Result")


class CommStream:
    """The communication stream of a buffer; made when it is first needed."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def get(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """On a machine without GPU, torch's stand-in."""
        if not torch.cuda.is_available():
            return torch.cpu.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)
        return self._stream

    def run(
        self,
        call: Callable[[], Result],
        device: torch.device,
        *,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        inputs: Iterable[object] = (),
    ) -> tuple[Result, EventOverlap]:
        """``call()`` by deep_ep V1's rules; tensors in the result belong to the current stream as well.

        ``inputs``: tensors, and handles, that the call reads.

        Synchronous: behind ``previous_event`` and the current stream's work, which goes on behind the call. It runs
        on the current stream itself, which orders the same and costs no events. Asynchronous: on the communication
        stream, behind ``previous_event`` or else the current stream.
        """
        event = previous_event if isinstance(previous_event, EventHandle) else None
        if isinstance(previous_event, EventOverlap):
            event = previous_event.event
        if allocate_on_comm_stream and (event is None or not async_finish):
            raise InvalidInput(
                "allocate_on_comm_stream is set; it needs previous_event (with an event in it) and async_finish"
            )
        with torch.inference_mode(False), torch.no_grad():
            if device.type != "cuda":
                result = call()
                return result, EventOverlap(EventHandle() if async_finish else None)
            if not async_finish:
                if event is not None:
                    event.current_stream_wait()
                return call(), EventOverlap()
            return self._run_async(call, device, event, list(tensors_of(list(inputs))))

    def _run_async(
        self,
        call: Callable[[], Result],
        device: torch.device,
        event: EventHandle | None,
        inputs: list[torch.Tensor],
    ) -> tuple[Result, EventOverlap]:
        current, stream = torch.cuda.current_stream(device), self.get()
        if current == stream:
            raise InvalidInput("the current stream is the communication stream; call from another one")
        if event is None:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if event is not None:
                event.current_stream_wait()
            result = call()
        # NOTE: with these the caller may drop inputs, results and event at any time.
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(stream)
        for tensor in tensors_of(result):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return result, EventOverlap(EventHandle(stream))


def tensors_of(result: object) -> Iterable[torch.Tensor]:
    """All in a result or in inputs; also those that a handle holds, which has a method ``tensors`` for it."""
    if isinstance(result, torch.Tensor):
        yield result
    elif hasattr(result, "tensors"):
        yield from result.tensors()
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from tensors_of(item)
