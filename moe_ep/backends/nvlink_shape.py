"""What a communicator over the kernels of csrc/nvlink is made for: how much memory that takes, and what is too much."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from .. import sm_model
from ..errors import InvalidInput
from .base import RoutingSpec

_LEAST_RING_BYTES = 16 << 10
"""So that what goes with the rows of few tokens fits, too: a chunk of 4 rows of 4 KiB."""


@dataclass(frozen=True)
class Shape:
    """What a communicator is made for."""

    hidden: int
    max_tokens_per_rank: int
    num_experts: int
    num_topk: int

    def work(self, op: str, layout: str, element_size: int, num_tokens: int, num_ranks: int) -> sm_model.Work:
        return sm_model.Work(
            op, layout, element_size * self.hidden, num_tokens, self.num_topk, self.num_experts, num_ranks
        )

    def spec(self, num_ranks: int) -> RoutingSpec:
        """Of a dispatch into the expert layout, of exact sizes."""
        num_local = self.num_experts // num_ranks
        numbers = self.num_experts, num_local, self.num_topk, self.max_tokens_per_rank
        return RoutingSpec(*numbers, layout="expert", expert_alignment=1, max_recv_rows=None)

    def ring_bytes(self, kernels: ModuleType) -> int:
        """Of the rows that one rank may have under way to another: max_tokens_per_rank rows of 2 * hidden bytes with
        their weights, 16 KiB at least. Wider rows take turns."""
        chunk = kernels.nvlink.CHUNK
        rows = -(-self.max_tokens_per_rank // chunk) * chunk
        narrow, wide = (-(-(size * self.hidden + 4 * self.num_topk) // 16) * 16 for size in (2, 4))
        return max(rows * narrow, chunk * wide, _LEAST_RING_BYTES)


WINDOW_FORMULA = (
    "(ranks - 1) x max_tokens_per_rank x (2 x hidden + 4 x num_topk) bytes, and a little for signals"
)


def window_bytes(shape: Shape, num_ranks: int, kernels: ModuleType) -> int:
    """Bytes of the window of one rank: (R - 1) rings, and a little for routing and signals."""
    return kernels.nvlink.window_bytes(
        num_ranks, shape.max_tokens_per_rank, shape.num_topk, shape.ring_bytes(kernels)
    )


def check_limits(shape: Shape, num_ranks: int, kernels: ModuleType) -> None:
    """Raise InvalidInput for what the kernels can't do."""
    limits = kernels.nvlink
    for name, value, limit in (
        ("the number of ranks", num_ranks, limits.MAX_RANKS),
        ("max_tokens_per_rank", shape.max_tokens_per_rank, limits.MAX_TOKENS),
        ("num_topk", shape.num_topk, limits.MAX_TOPK),
        ("num_experts", shape.num_experts, limits.MAX_EXPERTS),
        (
            "the rows that one rank can receive",
            num_ranks * shape.max_tokens_per_rank * min(shape.num_topk, shape.num_experts // num_ranks),
            limits.MAX_ROWS,
        ),
    ):
        if value > limit:
            raise InvalidInput(
                f"{name} is {value}; the NVLink kernels take up to {limit}: use backend='collective'"
            )
