"""V2's semantics in plain torch over torch.distributed's default group."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from .envs import get_global_seed

_PRIME = 131071


def dispatch(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_max_tokens_per_rank: int,
    num_experts: int,
) -> tuple:
    """Tokens ``[T, H]`` (with scales ``[T, S]``) to the ranks of their experts, by (source rank, source token).

    Returns the rows; local ids ``[n, K]``, -1 for other ranks' experts; all weights of the row's token ``[n, K]``; its
    number, source rank * num_max_tokens_per_rank + token, int32 ``[n]``; int32 ``[R]`` on the CPU, rows from each rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    local_experts = num_experts // size
    holders = torch.where(topk_idx < 0, -1, topk_idx // local_experts)
    tokens_for = [(holders == r).any(1).nonzero().flatten() for r in range(size)]
    counts = torch.tensor([len(tokens) for tokens in tokens_for], dtype=torch.int32, device=topk_idx.device)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts)
    sends, receives = counts.tolist(), arriving.tolist()
    order = torch.cat(tokens_for)

    def exchange(values: torch.Tensor) -> torch.Tensor:
        chosen = values[order].contiguous()
        rows = chosen.new_empty((sum(receives), *chosen.shape[1:]))
        dist.all_to_all_single(rows.view(torch.uint8), chosen.view(torch.uint8), receives, sends)
        return rows

    tokens, scales = x if isinstance(x, tuple) else (x, None)
    received = exchange(tokens) if scales is None else (exchange(tokens), exchange(scales))
    ids = exchange(topk_idx) - rank * local_experts
    ids = torch.where((ids >= 0) & (ids < local_experts), ids, -1)
    weights = None if topk_weights is None else exchange(topk_weights)
    numbers = torch.arange(len(topk_idx), device=topk_idx.device) + rank * num_max_tokens_per_rank
    numbers = exchange(numbers.to(torch.int32).unsqueeze(1)).flatten()
    return received, ids, weights, numbers, torch.tensor(receives, dtype=torch.int32, device="cpu")


def combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    reduce_in_local: bool,
    reduce_in_scaleup: bool,
) -> torch.Tensor:
    """Sums ``[T, H]`` of the rows ``y [T, K, H]`` of each token's experts; ids of -1 count with whatever lies there.

    With ``reduce_in_local`` the rows of one rank are added first, in float32 by ascending k, and rounded, in the place
    of the last of them; with ``reduce_in_scaleup`` so are then those of one scale-out rank. The biases and what is left
    are added in float32 by ascending k and rounded once.
    """
    local_experts = num_experts // (num_scaleout_ranks * num_scaleup_ranks)
    if reduce_in_local:
        y = _reduce_groups(y, topk_idx // local_experts)
    if reduce_in_scaleup:
        y = _reduce_groups(y, topk_idx // (local_experts * num_scaleup_ranks))
    if bias is None:
        return ordered_accumulate(y)
    biases = bias if isinstance(bias, tuple) else (bias,)
    return ordered_accumulate(y, sum(each.float() for each in biases))


def ordered_accumulate(data: torch.Tensor, initial_value: torch.Tensor | None = None) -> torch.Tensor:
    """``[T, H]``: the sum of ``data [T, K, H]`` in float32 by ascending k, from ``initial_value`` on; rounded once."""
    total = torch.zeros_like(data[:, 0], dtype=torch.float32) if initial_value is None else initial_value
    for k in range(data.shape[1]):
        total = total + data[:, k].float()
    return total.to(data.dtype)


def generate_pre_combine_data(
    src_token_global_idx: torch.Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> torch.Tensor:
    """bfloat16 ``[n, K, H]`` that depends on the token's number alone, so that both ends of a combine can make it.

    Element h of expert k: ``sin((s * 131071 mod S + 1) / S * (h + 1) + sin(seed))`` with ``s = token * K + k``,
    ``S = R * num_max_tokens_per_rank * K`` and `get_global_seed`'s seed.
    """
    device = src_token_global_idx.device
    number = src_token_global_idx.unsqueeze(1) * num_topk + torch.arange(num_topk, device=device)
    most = dist.get_world_size() * num_max_tokens_per_rank * num_topk
    phase = ((number * _PRIME % most).float() + 1) / most
    columns = torch.arange(1, hidden + 1, dtype=torch.float32, device=device)
    return torch.sin(phase.unsqueeze(2) * columns + math.sin(get_global_seed())).to(torch.bfloat16)


def _reduce_groups(rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Rows of one group ``groups [T, K]`` added up in the place of the last; the others become zero."""
    reduced = torch.zeros_like(rows)
    for k in range(groups.shape[1]):
        mine = groups == groups[:, k : k + 1]
        is_last = ~mine[:, k + 1 :].any(1)
        total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
        for j in range(k + 1):
            total = torch.where(mine[:, j, None], total + rows[:, j].float(), total)
        reduced[:, k] = torch.where(is_last.unsqueeze(1), total.to(rows.dtype), reduced[:, k])
    return reduced
