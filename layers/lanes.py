"""Two streams side by side: the current one computes, the communicator's own moves rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

import moe_ep
from moe_ep.streams import finish

from .config import ModelConfig

Result = TypeVar("Result")
Mark = torch.cuda.Event | None
"""A place on the computing stream; None where there is one stream."""


@dataclass
class Transfer(Generic[Result]):
    """The result of a call on the communicating stream."""

    _result: Result
    _event: moe_ep.Event = field(default_factory=moe_ep.Event)

    def wait(self) -> Result:
        """The result, which what the current stream is given from now on may use."""
        self._event.wait()
        return self._result


class Lanes:
    """``overlap=False``, and a CPU: both lanes are the current stream, and calls run in the order they are made in.

    Communication beside computation takes ``config.overlap_num_sms`` multiprocessors (None: as many as the communicator
    chooses).
    """

    def __init__(
        self,
        comm: moe_ep.Communicator,
        device: torch.device,
        config: ModelConfig,
        *,
        overlap: bool = True,
    ) -> None:
        self._comm, self._config = comm, config
        self._stream = comm.stream(device) if overlap and device.type == "cuda" else None

    def num_sms(self, op: str, *, dtype: torch.dtype, num_tokens: int) -> int:
        """Of a call ("dispatch" or "combine") beside computation."""
        if self._config.overlap_num_sms is not None:
            return self._config.overlap_num_sms
        options = {"dtype": dtype, "num_tokens": num_tokens, "overlapped": True}
        return self._comm.choose_num_sms(op, layout=self._config.layout, **options)

    def mark(self) -> Mark:
        """What the current stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def communicate(
        self,
        call: Callable[[], tuple[Result, Sequence[torch.Tensor | None]]],
        *,
        after: Mark,
        reads: Sequence[torch.Tensor],
    ) -> Transfer[Result]:
        """Run ``call`` on the communicating lane behind ``after``, without autograd.

        It returns its result, and the tensors in it that were made there; ``reads`` are those of the other lane.
        """
        with torch.no_grad():
            if self._stream is None:
                return Transfer(call()[0])
            self._stream.wait_event(after)
            with torch.cuda.stream(self._stream):
                result, tensors = call()
            return Transfer(result, finish(self._stream, reads, tensors))
