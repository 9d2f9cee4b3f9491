"""Ctrl-C and SIGTERM as a wish to stop after the current step, instead of an exception in the middle of one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

SECOND_PRESS_AFTER_S = 1.0


class StopRequest:
    """`requested` turns true at the first SIGINT or SIGTERM. A second SIGINT a second later is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def handle(self, signum: int, frame: object) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif signum == signal.SIGINT and now - self._since > SECOND_PRESS_AFTER_S:
            raise KeyboardInterrupt


class ForwardedStop(StopRequest):
    """The same in the process that has started the ranks: passes the wish on to them.

    A terminal's Ctrl-C reaches the ranks by itself, `kill PID` of this process doesn't.
    """

    def handle(self, signum: int, frame: object) -> None:
        first = not self.requested
        super().handle(signum, frame)
        if first:
            for child in multiprocessing.active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)


@contextlib.contextmanager
def catch_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Let `request` handle SIGINT and SIGTERM inside the block. Main thread only."""
    before = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
