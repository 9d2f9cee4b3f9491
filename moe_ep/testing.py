"""Virtual ranks: an expert-parallel group in one process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from .backends.virtual import GroupFailed, VirtualGroup
from .communicator import Communicator
from .errors import InvalidInput

Result = TypeVar("Result")

_log = logging.getLogger("moe_ep")
_CUDA_SETTINGS = {
    "CUDA_MODULE_LOADING": "EAGER",  # a kernel's first launch would wait for kernels that wait for it
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # streams that share a hardware queue take turns
}


def run_ranks(
    world_size: int,
    fn: Callable[[Communicator], Result],
    *,
    device: str = "cpu",
    **communicator_arguments: Any,
) -> list[Result]:
    """Run ``fn(comm)`` as ``world_size`` ranks, threads of this process, and return the results by rank.

    ``communicator_arguments`` are those of `Communicator`. An exception in one rank ends the others' waiting and is
    raised here, at once. With ``device="cuda"`` the ranks share a GPU: each thread has a stream of its own, and its
    kernels a share of the multiprocessors. Kernels of ranks wait for each other, so what makes a thread wait for the
    whole device, before it has launched what the others wait for, ends in a PeerTimeoutError: a library that loads a
    kernel at its first use (run the same on one rank before), or a thousand launches on a stream that nothing has
    waited for.

    >>> def fn(comm):
    ...     x = torch.full((1, 4), float(comm.rank))
    ...     out = dispatch(x, torch.tensor([[1 - comm.rank]]), torch.ones(1, 1), comm)
    ...     return out.tokens
    >>> run_ranks(2, fn, hidden=4, max_tokens_per_rank=1, num_experts=2, num_topk=1)
    [tensor([[1., 1., 1., 1.]]), tensor([[0., 0., 0., 0.]])]
    """
    on = torch.device(device)
    if on.type == "cuda":
        _prepare_cuda(world_size)
        on = torch.device("cuda", torch.cuda.current_device() if on.index is None else on.index)
    elif on.type != "cpu":
        raise InvalidInput(f"device is {device!r}; virtual ranks run on 'cpu' or 'cuda'")
    groups = VirtualGroup.create(world_size, on)
    office = groups[0].post_office
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    grad_mode = torch.is_grad_enabled()  # a property of threads, which new ones don't inherit

    def run(group: VirtualGroup) -> None:
        try:
            with _own_stream(on), torch.set_grad_enabled(grad_mode):
                _set_up_libraries(on)
                with Communicator(group, **communicator_arguments) as comm:  # waits for all ranks
                    results[group.rank] = fn(comm)
        except GroupFailed:
            pass  # the rank that failed reports
        except BaseException as error:
            errors.append(error)
            office.fail(error)

    threads = [
        threading.Thread(target=run, args=(group,), name=f"rank {group.rank}", daemon=True)
        for group in groups
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.05)
    if errors:
        raise errors[0]
    if on.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # torch keeps one for each handle and stream, both of which were new
    return results


def _prepare_cuda(world_size: int) -> None:
    """Kernels of all ranks must run at the same time, which CUDA has to be told before it starts."""
    if world_size == 1:
        return
    if not torch.cuda.is_initialized():
        for name, value in _CUDA_SETTINGS.items():
            os.environ.setdefault(name, value)
    elif missing := [name for name, value in _CUDA_SETTINGS.items() if os.environ.get(name) != value]:
        settings = " ".join(f"{name}={_CUDA_SETTINGS[name]}" for name in missing)
        _log.warning(
            "CUDA has begun without %s: virtual ranks on it may wait for each other for ever", settings
        )


def _set_up_libraries(device: torch.device) -> None:
    """cuBLAS makes a handle in a thread's first matrix product, and in that of autograd's thread, and waits for the
    device then: for kernels of other ranks, that is, which may wait for this one.
    """
    if device.type != "cuda":
        return
    with torch.enable_grad():
        ones = torch.ones(16, 16, device=device, requires_grad=True)
        (ones @ ones).sum().backward()
    torch.cuda.current_stream(device).synchronize()


def _own_stream(device: torch.device) -> AbstractContextManager:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
