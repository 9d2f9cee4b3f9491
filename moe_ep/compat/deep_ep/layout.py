"""The numbers around a V1 dispatch: who gets how many tokens, and what travels with a row."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from ... import _extension
from .config import NVL_PEERS


class Layout(NamedTuple):
    """What `Buffer.get_dispatch_layout` returns before the event."""

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
    """int32 counts ``[R]``, ``[R / 8]`` (None for one node), ``[E]``; bool ``[T, R]``. A token counts once a rank.

    Ids outside [0, E) name no expert.
    """
    num_nodes = -(-num_ranks // NVL_PEERS) if num_ranks > NVL_PEERS else 0
    if topk_idx.is_cuda and (kernels := _extension.load_for(topk_idx.device)) is not None:
        limits = kernels.deep_ep
        num_counts = num_ranks + num_nodes + num_experts
        if num_ranks <= limits.MAX_LAYOUT_RANKS and num_counts <= limits.MAX_LAYOUT_COUNTS:
            return _layout_by_kernel(topk_idx.contiguous(), num_experts, num_ranks, num_nodes, kernels)
    return layout_by_torch(topk_idx, num_experts, num_ranks)


def _layout_by_kernel(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int, num_nodes: int, kernels: ModuleType
) -> Layout:
    device = topk_idx.device
    num_tokens, num_topk = topk_idx.shape
    counts = torch.empty(num_ranks + num_nodes + num_experts, dtype=torch.int32, device=device)
    in_rank = torch.empty((num_tokens, num_ranks), dtype=torch.bool, device=device)
    with torch.cuda.device(device):
        kernels.deep_ep.dispatch_layout(
            topk_idx=topk_idx.data_ptr(),
            is_int64=topk_idx.dtype == torch.int64,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_ranks=num_ranks,
            num_experts=num_experts,
            num_nodes=num_nodes,
            counts=counts.data_ptr(),
            is_token_in_rank=in_rank.data_ptr(),
            stream=torch._C._cuda_getCurrentRawStream(device.index),
        )
    per_rank, per_node, per_expert = counts.split((num_ranks, num_nodes, num_experts))
    return Layout(per_rank, per_node if num_nodes else None, per_expert, in_rank)


def layout_by_torch(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
    """`dispatch_layout` by torch's operators."""
    is_none = (topk_idx < 0) | (topk_idx >= num_experts)
    ranks = torch.where(is_none, num_ranks, topk_idx // (num_experts // num_ranks)).long()
    in_rank = _marks(ranks, num_ranks)
    # Not bincount, which waits for the device.
    experts = torch.where(is_none, num_experts, topk_idx).long().flatten()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    per_expert.index_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
    per_rdma_rank = None
    if num_ranks > NVL_PEERS:
        nodes = -(-num_ranks // NVL_PEERS)
        in_node = _marks(torch.where(ranks == num_ranks, nodes, ranks // NVL_PEERS), nodes)
        per_rdma_rank = in_node.sum(0, dtype=torch.int32)
    return Layout(in_rank.sum(0, dtype=torch.int32), per_rdma_rank, per_expert[:-1], in_rank)


def positions(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """int32 ``[T, R]``: the token's place among those that go to a rank, or -1."""
    return is_token_in_rank.cumsum(0, dtype=torch.int32).mul_(is_token_in_rank).sub_(1)


def pack_ids(topk_idx: torch.Tensor) -> torch.Tensor:
    """Ids as they travel: int32, one higher, so that rows which hold no token name no expert."""
    return torch.add(topk_idx, 1, out=torch.empty_like(topk_idx, dtype=torch.int32))


def local_ids(
    packed: torch.Tensor, rank: int, num_local_experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What arrived, as ids of this rank's experts, -1 for others'; and whether they are others'."""
    ids = torch.sub(packed, 1 + rank * num_local_experts, out=torch.empty_like(packed, dtype=dtype))
    is_elsewhere = ids != ids.clamp(0, num_local_experts - 1)
    return ids.masked_fill_(is_elsewhere, -1), is_elsewhere


def token_numbers(num_tokens: int, device: torch.device) -> torch.Tensor:
    """int32 ``[T, 1]``, one higher, as `pack_ids`."""
    return torch.arange(1, num_tokens + 1, dtype=torch.int32, device=device).unsqueeze(1)


def _marks(columns: torch.Tensor, num_columns: int) -> torch.Tensor:
    """bool ``[T, num_columns]``, true where a token names the column; the one past the end is nobody's."""
    marks = torch.zeros((columns.shape[0], num_columns + 1), dtype=torch.bool, device=columns.device)
    return marks.scatter_(1, columns, True)[:, :num_columns]
