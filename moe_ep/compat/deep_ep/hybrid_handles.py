"""What HybridEPBuffer's dispatches leave behind: tuples, whose callers count positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...backends.base import Routing
from ...errors import InvalidInput
from ...handle import DispatchHandle


@dataclass(frozen=True)
class HybridEpConfigInstance:
    """The call that a handle is of. (Upstream: the sizes that its kernels are compiled for.)

    padded_tokens_per_expert: what a permuting dispatch returned, int64 ``[L]``; None for a plain one.
    """

    routing: DispatchHandle
    topk_idx: torch.Tensor
    num_experts: int
    padded_tokens_per_expert: torch.Tensor | None = None


class PlainHandle(NamedTuple):
    """Of `HybridEPBuffer.dispatch`. The maps that only upstream's kernels read are None.

    - ``num_dispatched_tokens_tensor [1]`` int32: n, the tokens that came here
    - ``local_expert_routing_map [n, L]`` bool: the local experts that each chose
    - ``num_of_tokens_per_rank``: N, the tokens that this rank sent
    """

    sparse_to_dense_map: None
    rdma_to_attn_map: None
    attn_to_rdma_map: None
    num_dispatched_tokens_tensor: torch.Tensor
    local_expert_routing_map: torch.Tensor
    num_of_tokens_per_rank: int
    config: HybridEpConfigInstance


class PermutedHandle(NamedTuple):
    """Of `HybridEPBuffer.dispatch_with_permute`: as `PlainHandle`, but ``local_expert_routing_map`` has a row for each
    token that there may be, of which the first n count; and

    - ``tokens_per_expert [L]`` int32: tokens of each local expert, without gaps
    - ``overflow_flag [1]`` int32: 1 if rows were dropped for want of room
    """

    sparse_to_dense_map: None
    rdma_to_attn_map: None
    attn_to_rdma_map: None
    num_dispatched_tokens_tensor: torch.Tensor
    local_expert_routing_map: torch.Tensor
    dense_chunk_layout: None
    dense_to_expert_map: None
    tokens_per_expert: torch.Tensor
    num_of_tokens_per_rank: int
    config: HybridEpConfigInstance
    overflow_flag: torch.Tensor


def config_of(handle: tuple | None, permuted: bool) -> HybridEpConfigInstance:
    """Of a handle of `dispatch`, or ``permuted`` of `dispatch_with_permute`."""
    config = next((part for part in handle or () if isinstance(part, HybridEpConfigInstance)), None)
    if config is None or (config.padded_tokens_per_expert is not None) != permuted:
        wanted = "dispatch_with_permute" if permuted else "dispatch"
        seen = "the other dispatch's handle" if config is not None else f"a {type(handle).__name__}"
        raise InvalidInput(f"handle is {seen}; it must be what {wanted} returned as handle")
    return config


def plain_handle(config: HybridEpConfigInstance, num_local: int) -> PlainHandle:
    local = config.routing.state[Routing.ROWS]
    chosen = torch.zeros(len(local), num_local + 1, dtype=torch.bool, device=local.device)
    chosen.scatter_(1, torch.where(local < 0, num_local, local), True)
    count = torch.full((1,), len(local), dtype=torch.int32, device=local.device)
    num_tokens = config.routing.num_tokens
    return PlainHandle(None, None, None, count, chosen[:, :num_local], num_tokens, config)


def permuted_handle(
    config: HybridEpConfigInstance, numbers: torch.Tensor, most_tokens: int
) -> PermutedHandle:
    """``numbers [P]``: the token of each row, from 1 to ``most_tokens`` by source rank; 0 for gaps."""
    routing = config.routing
    padded = routing.padded_tokens_per_expert
    numbers = numbers.long()
    came = torch.zeros(most_tokens + 1, dtype=torch.int32, device=numbers.device)
    came[numbers] = 1
    came[0] = 0
    place = came.cumsum(0)
    rows = torch.arange(len(numbers), device=numbers.device)
    expert = torch.searchsorted(padded.cumsum(0), rows, right=True).clamp(max=len(padded) - 1)
    chosen = torch.zeros(most_tokens + 1, len(padded), dtype=torch.bool, device=numbers.device)
    chosen[torch.where(numbers == 0, 0, place[numbers]), expert] = True  # row 0 takes what is nobody's
    limit = routing.spec.max_recv_rows
    needed = routing.state[Routing.ROWS_NEEDED]
    overflow = torch.zeros_like(needed) if limit is None else needed > limit
    return PermutedHandle(
        None,
        None,
        None,
        place[-1:].int(),
        chosen[1:],
        None,
        None,
        routing.tokens_per_expert.int(),
        routing.num_tokens,
        config,
        overflow.int(),
    )


def padded_counts(routing: DispatchHandle, non_blocking: bool) -> torch.Tensor:
    """Rows of each local expert in the output, int64 ``[L]``: on the host, or ``non_blocking`` on the rows' device."""
    padded = routing.padded_tokens_per_expert
    limit = routing.spec.max_recv_rows
    if non_blocking or routing.splits is None:
        ends = padded.cumsum(0)
        kept = ends.clamp(max=limit) - (ends - padded).clamp(max=limit)
        return kept if non_blocking else kept.cpu()
    counts = torch.tensor(routing.splits, dtype=torch.int64, device="cpu")
    return counts.pin_memory() if padded.is_cuda else counts
