"""Multiprocessors (SMs) that matrix products leave free for communication beside them.

Matrix products for Hopper are persistent: they put a block on every SM and keep it to the end. What is launched
meanwhile waits, whatever its stream's priority. torch has one setting for it, of the whole process and read at each
launch (`torch._C._set_sm_carveout_experimental`). Its grouped matmul and cuBLASLt honour it, cuBLAS does not; so as
long as SMs are to be left free, torch's products are cuBLASLt's. This module is the only place that sets either.
Another number of SMs, and another library, can mean another kernel, and so other rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .errors import InvalidInput

MOST_SMS = 64
"""More would be a mistake: communication is bound by its link long before."""


class Carveout:
    """A wish for ``num_sms`` free SMs (0 to 64), from `open` to `close`; both may be called twice, by any thread.

    Of those open at a time the largest counts; when the last is closed, torch's settings are again what they were. Only
    launches matter: what was launched meanwhile may run later. Raises InvalidInput.
    """

    def __init__(self, num_sms: int) -> None:
        if not 0 <= num_sms <= MOST_SMS:
            raise InvalidInput(f"num_sms is {num_sms}; matrix products can leave 0 to {MOST_SMS} SMs free")
        self.num_sms = num_sms
        self._is_open = False

    def open(self) -> None:
        with _lock:
            if self._is_open or self.num_sms == 0:
                return
            self._is_open = True
            if not _open:
                _before.append(_Settings.now())
            _open.append(self.num_sms)
            _Settings(max(_open), _LIBRARY or _before[0].library).set()

    def close(self) -> None:
        with _lock:
            if not self._is_open:
                return
            self._is_open = False
            _open.remove(self.num_sms)
            (_Settings(max(_open), _LIBRARY or _before[0].library) if _open else _before.pop()).set()


class _Settings(NamedTuple):
    """Of torch."""

    num_sms: int | None
    library: Any

    @classmethod
    def now(cls) -> _Settings:
        return cls(torch._C._get_sm_carveout_experimental(), torch.backends.cuda.preferred_blas_library())

    def set(self) -> None:
        torch._C._set_sm_carveout_experimental(self.num_sms)
        if self.library != torch.backends.cuda.preferred_blas_library():
            torch.backends.cuda.preferred_blas_library(self.library)


_LIBRARY = torch._C._BlasBackend.Cublaslt if torch.version.cuda is not None else None
"""Whose products honour the setting; None where torch has no choice."""
_lock = threading.Lock()
_open: list[int] = []
_before: list[_Settings] = []


def sms_left(device: torch.device) -> int:
    """How many SMs of a GPU a product launched now may take; 0: all of them."""
    left_free = torch._C._get_sm_carveout_experimental()
    return torch.cuda.get_device_properties(device).multi_processor_count - left_free if left_free else 0


@contextmanager
def leave_free(num_sms: int) -> Iterator[None]:
    """A `Carveout` for what is launched inside."""
    carveout = Carveout(num_sms)
    carveout.open()
    try:
        yield
    finally:
        carveout.close()


def leave_free_in_both_directions(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_sms: int
) -> torch.Tensor:
    """``function(x)`` with a `Carveout` for its launches in the forward and, by autograd, in the backward."""
    if num_sms == 0:
        return function(x)
    carveout = Carveout(num_sms)

    def open_in_backward() -> None:
        carveout.open()
        # A backward that needs no gradient of x never gets to the other end.
        torch.autograd.Variable._execution_engine.queue_callback(carveout.close)

    if torch.is_grad_enabled() and x.requires_grad:
        x = _InBackward.apply(x, carveout.close)
    with leave_free(num_sms):
        y = function(x)
    return _InBackward.apply(y, open_in_backward) if y.requires_grad else y


class _InBackward(torch.autograd.Function):
    """Does nothing to a tensor, and calls a function when its gradient comes by."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None
