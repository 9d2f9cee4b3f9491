"""Megatron's routing maps as moe_ep's expert ids."""

from __future__ import annotations

import torch

TOO_MANY = -2
"""In place of a token's first id: the token has more experts than columns. No dispatch takes it for an expert."""


def topk_indices(routing_map: torch.Tensor, num_topk: int) -> torch.Tensor:
    """The experts of each token in ascending order, then -1: int64 ``[T, num_topk]`` from bool ``[T, E]``.

    A token with more than ``num_topk`` experts gets TOO_MANY, so that the dispatch refuses it where it checks ids
    anyway, without a wait of the host here.

    >>> topk_indices(torch.tensor([[True, False, True], [False, True, False]]), 2)
    tensor([[ 0,  2],
            [ 1, -1]])
    """
    num_experts = routing_map.shape[1]
    columns = min(num_topk + 1, num_experts)
    descending = torch.arange(num_experts, 0, -1, dtype=torch.int32, device=routing_map.device)
    found = torch.where(routing_map, descending, 0).topk(columns, dim=1).values
    ids = torch.where(found > 0, num_experts - found, -1)
    topk_idx = ids[:, :num_topk].to(torch.int64, copy=True)
    if columns > num_topk:
        topk_idx[:, 0].masked_fill_(found[:, num_topk] > 0, TOO_MANY)
    return topk_idx


def fold_tensor_parallel(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_local_experts: int, tp_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``[T, K]`` for a group of (EP rank, TP rank), each of whose ranks has its own expert ids.

    The ``tp_size`` ranks that share an expert each hold a slice of it and need every row of it: ``[T, K * tp_size]``.

    >>> ids, _ = fold_tensor_parallel(torch.tensor([[1, 2]]), torch.ones(1, 2), num_local_experts=2, tp_size=2)
    >>> ids  # EP rank 0 has experts 0 and 1, as ids 0, 1 of TP rank 0 and 2, 3 of TP rank 1
    tensor([[1, 3, 4, 6]])
    """
    ids = topk_idx.unsqueeze(-1)
    slices = torch.arange(tp_size, device=topk_idx.device)
    folded = (ids // num_local_experts * tp_size + slices) * num_local_experts + ids % num_local_experts
    folded = torch.where(ids < 0, ids, folded)
    weights = topk_weights.unsqueeze(-1).expand(-1, -1, tp_size)
    return folded.flatten(1), weights.flatten(1)


def block_order(rows_per_expert: torch.Tensor) -> torch.Tensor:
    """Which expert each block of rows belongs to, when experts without rows have their (empty) block at the end.

    int64 ``[L]`` from the rows of each expert ``[L]``.

    >>> block_order(torch.tensor([0, 4, 0, 4]))
    tensor([1, 3, 0, 2])
    """
    return (rows_per_expert == 0).int().argsort(stable=True)
