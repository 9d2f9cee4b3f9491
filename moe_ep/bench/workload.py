"""What is benchmarked: sizes, routings, and the bytes they put on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InvalidInput
from ..fp8 import BLOCK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8"
_NUM_INPUTS = 3  # rotated, so that no call finds its input in a cache


@dataclass(frozen=True)
class Workload:
    """``num_tokens`` tokens per rank; ``unbalanced_ratio`` is the load of rank 0 over the mean of all ranks."""

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    layout: str
    unbalanced_ratio: float

    def check(self, num_ranks: int) -> None:
        if self.num_topk > self.num_experts:
            raise InvalidInput(f"--num-topk {self.num_topk} is more than --num-experts {self.num_experts}")
        if self.num_experts % num_ranks:
            raise InvalidInput(f"--num-experts {self.num_experts} is no multiple of the {num_ranks} ranks")
        largest = min(float(num_ranks), self.num_experts / self.num_topk)
        if not 1.0 <= self.unbalanced_ratio <= largest:
            raise InvalidInput(
                f"--unbalanced-ratio {self.unbalanced_ratio:g} must lie between 1 and {largest:g} here: "
                "at most all entries go to one rank"
            )

    def topk_idx(self, rank: int, num_ranks: int, variant: int = 0) -> torch.Tensor:
        """Random distinct experts, ``[T, K]`` int64; every ``variant`` is another routing of the same kind."""
        generator = torch.Generator().manual_seed(1 + rank + 1000 * variant)
        noise = torch.rand(self.num_tokens, self.num_experts, generator=generator).log().neg().log().neg()
        per_rank = self.num_experts // num_ranks

        def route(bias: float) -> torch.Tensor:
            scores = noise.clone()
            scores[:, :per_rank] += bias
            return scores.topk(self.num_topk, dim=1).indices

        low, high = 0.0, 40.0
        while self.unbalanced_ratio > 1 and high - low > 1e-3:
            bias = (low + high) / 2
            ratio = (route(bias) < per_rank).float().mean().item() * num_ranks
            low, high = (bias, high) if ratio < self.unbalanced_ratio else (low, bias)
        return route(low)

    def inputs(self, rank: int, device: torch.device, count: int = _NUM_INPUTS) -> list[torch.Tensor]:
        """``count`` random ``[T, H]`` tensors; for FP8, of bfloat16 that is yet to be quantised."""
        torch.manual_seed(100 + rank)
        dtype = DTYPES.get(self.dtype, torch.bfloat16)
        shape = self.num_tokens, self.hidden
        return [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]

    def pairs_by_rank(self, topk_idx: torch.Tensor, num_ranks: int) -> list[int]:
        """How many tokens go to each rank."""
        ranks = topk_idx // (self.num_experts // num_ranks)
        return [int((ranks == r).any(1).sum()) for r in range(num_ranks)]

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.dtype, self.hidden)


def row_bytes(dtype: str, hidden: int) -> int:
    """Bytes of one token on the wire; those of its scales included for "fp8"."""
    if dtype == FP8:
        return hidden + 4 * -(-hidden // BLOCK)
    return hidden * DTYPES[dtype].itemsize


def busiest_rows(pairs: list[list[int]]) -> int:
    """The most rows that one rank sends to others or gets from others, from ``pairs[source][destination]``."""
    ranks = range(len(pairs))
    sent = [sum(pairs[r]) - pairs[r][r] for r in ranks]
    received = [sum(row[r] for row in pairs) - pairs[r][r] for r in ranks]
    return max(sent + received)
