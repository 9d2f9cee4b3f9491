"""What expert ids must be."""

from __future__ import annotations

import torch

from .errors import InvalidInput

_MAX_TOPK_FOR_PAIRS = 8


def check_ids(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Expert ids lie in [-1, E) and no token names an expert twice. Waits for the device."""
    outside = (topk_idx < -1) | (topk_idx >= num_experts)
    twice = _tokens_naming_one_twice(topk_idx)
    if not (outside.any() | twice.any()):  # one wait where all is well
        return
    if outside.any():
        token, k = outside.nonzero()[0].tolist()
        raise InvalidInput(
            f"topk_idx[{token}, {k}] is {int(topk_idx[token, k])}; expert ids must lie in [0, {num_experts}), or be -1 "
            f"for none ({int(outside.sum())} entries are outside)"
        )
    token = int(twice.nonzero()[0])
    ids = topk_idx[token].tolist()
    expert = next(e for e in ids if e >= 0 and ids.count(e) > 1)
    raise InvalidInput(
        f"topk_idx[{token}] names expert {expert} twice ({ids}); the experts of a token must be distinct"
    )


def _tokens_naming_one_twice(topk_idx: torch.Tensor) -> torch.Tensor:
    """bool ``[T]``."""
    if (
        topk_idx.shape[1] <= _MAX_TOPK_FOR_PAIRS
    ):  # every pair of columns; faster than sorting when there are few
        equal = topk_idx.unsqueeze(2) == topk_idx.unsqueeze(1)
        return (equal.tril(diagonal=-1).any(2) & (topk_idx >= 0)).any(1)
    ids = topk_idx.sort(dim=1).values
    return ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(1)
