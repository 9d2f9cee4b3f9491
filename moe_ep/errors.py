"""Everything that moe_ep raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable


class MoeEpError(RuntimeError):
    """Base class of all errors of this package."""


class InvalidInput(MoeEpError, ValueError):
    """An argument breaks the contract. Raised before anything is sent; the message says what was seen and allowed."""


class BackendUnavailable(MoeEpError):
    """A backend was asked for by name and can't run here; the message lists what is missing."""


class ReceiveOverflowError(MoeEpError):
    """More rows arrived than ``max_recv_rows`` has room for."""


class PeerTimeoutError(MoeEpError):
    """Other ranks are dead or late.

    Attributes: ``ranks``, the ranks that did not answer, as numbered in the communicator (a tuple of int);
    ``phase``, what this rank was doing (for example ``"dispatch rows"``).
    """

    def __init__(self, ranks: Iterable[int], phase: str, detail: str) -> None:
        self.ranks = tuple(sorted(ranks))
        self.phase = phase
        self.detail = detail
        names = ", ".join(map(str, self.ranks))
        subject = f"rank {names}" if len(self.ranks) == 1 else f"ranks {names}"
        super().__init__(f"{subject} did not answer during {phase}: {detail}")

    def __reduce__(self) -> tuple:
        return type(self), (self.ranks, self.phase, self.detail)
