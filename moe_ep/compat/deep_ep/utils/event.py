"""Events between streams, as deep_ep has them. Where there is no GPU, work has ended when a call returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ....errors import InvalidInput


class EventHandle:
    """What a stream has been given so far.

    Recorded when it is made, on ``stream`` or else on the current stream. May be waited on any number of times, from
    any stream. ``tensors`` live as long as the handle.

    On a CPU, and before this process has used CUDA, there is nothing to wait for.
    """

    def __init__(
        self, stream: torch.cuda.Stream | None = None, tensors: Iterable[torch.Tensor | None] = ()
    ) -> None:
        self.event: torch.cuda.Event | None = None
        self.tensors = tuple(tensors)
        if torch.cuda.is_initialized():
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream() if stream is None else stream)

    def current_stream_wait(self) -> None:
        """Make the current stream wait. The host goes on."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """The end of a call, to wait for where its results are used; the last value that deep_ep's calls return.

    ``event`` is None after a call that has made the current stream wait already. ``extra_tensors`` live as long as
    this object. As a context manager it waits at the end of the block, so that what the block computes overlaps with
    the call:

        with event:
            ...  # runs during the call
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: Iterable[torch.Tensor | None] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._hook: Callable[[], None] | None = None
        self._release_handle = False

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Have ``hook`` called once, behind the first `current_stream_wait`."""
        if self._hook is not None:
            raise InvalidInput(
                "this event has a hook already, which has not run yet; it can have one at a time"
            )
        self._hook = hook

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait, then run the hook. ``release_handle``: drop the event and what it holds."""
        if self.event is None:
            raise InvalidInput(
                "there is no event to wait for: the call was synchronous, or its event was released"
            )
        self.event.current_stream_wait()
        hook, self._hook = self._hook, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None
            self.extra_tensors = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """``with event(release_handle=True):`` releases the event when the block ends."""
        self._release_handle = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_exc) -> None:
        release, self._release_handle = self._release_handle, False
        if self.event is not None:
            self.current_stream_wait(release)
