"""The job of dispatch and combine by torch's own operators: all_to_all_single between permutations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..fp8 import Fp8Tokens
from .permutation import Permutation


class AllToAllJob:
    """Dispatch and combine of one routing. All index lists are ready: only rows are gathered, sent and added.

    Rows that stay on their rank are not sent. Buffers are reused, so a result lives until the next call.
    ``exchange`` is all_to_all_single, or something with its first four arguments.
    """

    def __init__(
        self,
        permutation: Permutation,
        device: torch.device,
        exchange: Callable[[torch.Tensor, torch.Tensor, list[int], list[int]], object] | None = None,
    ) -> None:
        self._exchange = _all_to_all_single if exchange is None else exchange
        self._p = dataclasses.replace(
            permutation,
            **{
                name: value.to(device)
                for name, value in vars(permutation).items()
                if isinstance(value, torch.Tensor)
            },
        )
        self._pools: dict[tuple, torch.Tensor] = {}

    def dispatch(self, x: torch.Tensor | Fp8Tokens) -> list[torch.Tensor]:
        """The rows of the output; for FP8 ``[data as uint8, scale_inv]``."""
        if isinstance(x, Fp8Tokens):
            return [self._dispatch(x.data.view(torch.uint8), 0.0), self._dispatch(x.scale_inv, 1.0)]
        return [self._dispatch(x, 0.0)]

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums ``[T, H]`` of ``rows [N, H]``."""
        p = self._p
        if p.entry_rows is not None:
            pool = F.embedding_bag(p.entry_rows, rows, p.entry_starts, mode="sum")
        elif p.order is None:
            pool = rows
        else:
            pool = torch.empty_like(rows).index_copy_(0, p.order, rows)
        own, others = self._split(pool)
        num_own = len(p.own_tokens)
        back = self._pool("back", num_own + len(p.sent_tokens), rows, 0.0)
        back[:num_own] = own
        self._exchange(back[num_own:], others, p.send_counts, p.receive_counts)
        return F.embedding_bag(p.pair_rows, back, p.pair_starts, mode="sum")

    def _dispatch(self, x: torch.Tensor, padding: float) -> torch.Tensor:
        p = self._p
        # One row more than arrives, which padding is taken from.
        pool = _in_words(self._pool("arrivals", p.num_arrivals + 1, x, padding))
        words = _in_words(x)
        own, others = self._split(pool[:-1])
        self._exchange(others, words.index_select(0, p.sent_tokens), p.receive_counts, p.send_counts)
        torch.index_select(words, 0, p.own_tokens, out=own)
        rows = pool[:-1] if p.order is None else pool.index_select(0, p.order)
        return rows.view(x.dtype)

    def _split(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_own = len(self._p.own_tokens)
        if self._p.own_first:
            return pool[:num_own], pool[num_own:]
        return pool[len(pool) - num_own :], pool[: len(pool) - num_own]

    def _pool(self, name: str, num_rows: int, like: torch.Tensor, last: float) -> torch.Tensor:
        key = name, num_rows, like.shape[1], like.dtype
        if key not in self._pools:
            self._pools[key] = torch.full(
                (num_rows, like.shape[1]), last, dtype=like.dtype, device=like.device
            )
        return self._pools[key]


def _all_to_all_single(
    out: torch.Tensor, rows: torch.Tensor, out_counts: list[int], counts: list[int]
) -> None:
    if dist.is_initialized():
        dist.all_to_all_single(out, rows, out_counts, counts)


def _in_words(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as int64: torch gathers element by element, so wide elements are faster."""
    return rows.view(torch.int64) if rows.shape[1] * rows.element_size() % 8 == 0 else rows
