"""Virtual ranks: an expert-parallel group in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .backends.virtual import GroupFailed, VirtualGroup
from .communicator import Communicator
from .errors import InvalidInput

Result = TypeVar("Result")


def run_ranks(
    world_size: int,
    fn: Callable[[Communicator], Result],
    *,
    device: str = "cpu",
    **communicator_arguments: Any,
) -> list[Result]:
    """Run ``fn(comm)`` as ``world_size`` ranks, threads of this process, and return the results by rank.

    ``communicator_arguments`` are those of `Communicator`. An exception in one rank ends the others' waiting and is
    raised here, at once.

    >>> def fn(comm):
    ...     x = torch.full((1, 4), float(comm.rank))
    ...     out = dispatch(x, torch.tensor([[1 - comm.rank]]), torch.ones(1, 1), comm)
    ...     return out.tokens
    >>> run_ranks(2, fn, hidden=4, max_tokens_per_rank=1, num_experts=2, num_topk=1)
    [tensor([[1., 1., 1., 1.]]), tensor([[0., 0., 0., 0.]])]
    """
    if torch.device(device).type != "cpu":
        raise InvalidInput(f"device is {device!r}; virtual ranks run on 'cpu'")
    groups = VirtualGroup.create(world_size)
    office = groups[0].post_office
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    grad_mode = torch.is_grad_enabled()  # a property of threads, which new ones don't inherit

    def run(group: VirtualGroup) -> None:
        try:
            with torch.set_grad_enabled(grad_mode), Communicator(group, **communicator_arguments) as comm:
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
    return results
