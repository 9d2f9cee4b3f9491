"""Multiprocessors (SMs) that matrix products leave free for communication beside them.

Matrix products for Hopper are persistent: they put a block on every SM and keep it to the end. What is launched
meanwhile waits, whatever its stream's priority. torch has one setting for it, of the whole process and read at each
launch, which its grouped matmul and cuBLASLt honour (`torch._C._set_sm_carveout_experimental`); this module is the only
place that sets it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import InvalidInput

MOST_SMS = 64
"""More would be a mistake: communication is bound by its link long before."""

_lock = threading.Lock()
_wanted: list[int] = []
_before: list[int | None] = []


@contextmanager
def leave_free(num_sms: int) -> Iterator[None]:
    """Matrix products launched inside leave ``num_sms`` SMs (0 to 64) of their GPU free; 0 changes nothing.

    Where several are open, in one thread or in several, the largest counts; when the last one ends, torch's setting is
    again what it was. Only launches matter: what has been launched inside may run later. Another number of SMs
    can mean another kernel, and so other rounding.

    Raises InvalidInput.
    """
    if not 0 <= num_sms <= MOST_SMS:
        raise InvalidInput(f"num_sms is {num_sms}; matrix products can leave 0 to {MOST_SMS} SMs free")
    if num_sms == 0 or not torch.cuda.is_available():
        yield
        return
    with _lock:
        if not _wanted:
            _before.append(torch._C._get_sm_carveout_experimental())
        _wanted.append(num_sms)
        torch._C._set_sm_carveout_experimental(max(_wanted))
    try:
        yield
    finally:
        with _lock:
            _wanted.remove(num_sms)
            torch._C._set_sm_carveout_experimental(max(_wanted) if _wanted else _before.pop())
