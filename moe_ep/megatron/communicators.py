"""One communicator for all layers that move tokens of one width among one group."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

import moe_ep

from .options import DispatcherOptions

# NOTE: communicators live as long as their group. Freed with the layers that use them, they could be found by the next
# model on one rank and be gone on another, as garbage is collected at different times; making one is collective.
_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple, moe_ep.Communicator]] = (
    weakref.WeakKeyDictionary()
)


def shared_communicator(
    group: dist.ProcessGroup,
    x: torch.Tensor,
    num_experts: int,
    num_topk: int,
    options: DispatcherOptions,
) -> moe_ep.Communicator:
    """A communicator with room for every rank's ``x [T, H]``, made if there is none; collective among ``group``."""
    room = options.max_tokens_per_rank or _most_tokens(x, group)
    comms = _of_group.setdefault(group, {})
    key = x.shape[1], num_experts, num_topk, options.backend, options.num_sms, options.timeout_s
    comm = comms.get(key)
    if comm is None or comm.closed or comm.max_tokens_per_rank < room:
        comm = comms[key] = moe_ep.Communicator(
            group,
            hidden=x.shape[1],
            max_tokens_per_rank=room,
            num_experts=num_experts,
            num_topk=num_topk,
            backend=options.backend,
            num_sms=options.num_sms,
            timeout_s=options.timeout_s,
        )
    return comm


def _most_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> int:
    """The largest number of tokens of a rank; at least 1, the least that a communicator takes."""
    number = torch.tensor(max(1, x.shape[0]), device=x.device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
    return int(number)
