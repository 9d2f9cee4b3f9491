"""Routing as deep_ep's V1 has it: which token goes to which *rank*.

Ranks take the place of experts: E = K = R, and column r of the ids is r or -1. So one routing serves calls with and
without top-k, rows arrive by (source rank, source token), and combine adds them in ascending order of ranks, which is
V1's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backends.nvlink import NvlinkBackend
from ...communicator import Communicator
from ...handle import DispatchHandle
from . import transport
from .transport import Communicators

ROW_WORDS_MULTIPLE = 4  # rows are made of 16 bytes
_WORDS_BEHIND_ROWS = 64  # of ids and weights, for top-32
_MOST_VALUES = 32  # that the kernels add up beside a row


class RankRouting:
    """Where ``is_token_in_rank [T, R]`` (bool) sends this rank's tokens.

    max_tokens: the largest T of all ranks, or more. num_rows: rows that arrive here, or room for them. Planned, which
    is collective, when rows first move, unless it is given as ``planned``.
    """

    def __init__(
        self,
        communicators: Communicators,
        is_token_in_rank: torch.Tensor,
        max_tokens: int,
        num_rows: int,
        planned: DispatchHandle | None = None,
    ) -> None:
        self._communicators = communicators
        self._is_token_in_rank = is_token_in_rank
        self.max_tokens = max_tokens
        self.num_tokens = is_token_in_rank.shape[0]
        self.num_rows = num_rows
        self.planned = planned

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [self._is_token_in_rank, *(self.planned.state if self.planned is not None else ())]

    def send(
        self, x: torch.Tensor, numbers: Sequence[torch.Tensor] = (), num_sms: int | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``x [T, H]`` and the 32-bit ``numbers [T, n]`` of its tokens, as rows ``[num_rows, ...]``; the tail is 0."""
        handle = self._for(self._communicator(x), num_sms)
        rows, numbers, _ = transport.send(x, numbers, None, handle, num_sms)
        return rows, numbers

    def send_packed(
        self, x: torch.Tensor, words: torch.Tensor | None, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`send` of numbers that have been packed, if any; they come packed."""
        handle = self._for(self._communicator(x), num_sms)
        return transport.send_words(x, words, None, handle, num_sms)[:2]

    def bring_back(
        self, rows: torch.Tensor, biases: Sequence[torch.Tensor] = (), num_sms: int | None = None
    ) -> torch.Tensor:
        """Sums ``[T, H]`` of ``rows [num_rows, H]``: the biases, then ranks in ascending order."""
        handle = self._for(self._communicator(rows), num_sms)
        return transport.bring_back(rows, None, biases, handle, num_sms)[0]

    def bring_back_with(
        self,
        rows: torch.Tensor,
        values: torch.Tensor,
        biases: Sequence[torch.Tensor] = (),
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`bring_back` of rows, and `bring_back_floats` of ``values``; by the kernels in one."""
        comm = self._communicator(rows)
        backend = comm._impl
        fits = 0 < values.shape[1] <= _MOST_VALUES
        if not (rows.is_cuda and isinstance(backend, NvlinkBackend) and fits):
            return self.bring_back(rows, biases, num_sms), self.bring_back_floats(values)
        handle = self._for(comm, num_sms)
        num_sms = min(num_sms, backend.available_sms) if num_sms else None
        return backend.combine(
            rows, values.contiguous(), biases, handle.state, handle.spec, num_sms, adds_weights=True
        )

    def send_words(self, words: torch.Tensor) -> torch.Tensor:
        """`send` of 32-bit ``words [T, n]`` alone."""
        return self.send(_as_rows(words))[0][:, : words.shape[1]].contiguous().view(words.dtype)

    def bring_back_floats(self, values: torch.Tensor) -> torch.Tensor:
        """`bring_back` of float32 ``values [num_rows, n]``, unrounded."""
        return self.bring_back(_as_rows(values))[:, : values.shape[1]].contiguous()

    def _communicator(self, x: torch.Tensor) -> Communicator:
        return communicator_for_ranks(self._communicators, x.shape[1], self.max_tokens)

    def _for(self, comm: Communicator, num_sms: int | None) -> DispatchHandle:
        if self.planned is None:
            mask = self._is_token_in_rank
            ranks = torch.arange(mask.shape[1], device=mask.device)
            ids = torch.where(mask, ranks, -1)
            self.planned = transport.plan(comm, ids, "rank", max_recv_rows=self.num_rows, num_sms=num_sms)
        return transport.for_width(self.planned, comm)


def communicator_for_ranks(communicators: Communicators, hidden: int, max_tokens: int) -> Communicator:
    """Of a `RankRouting`, for rows of ``hidden`` elements. Collective where there is none yet.

    It is made for somewhat wider ones: with 16-bit elements, rows and the words behind them then fit into the kernels'
    rings at once. What does not goes in rounds, which take longer.
    """
    size = communicators.size
    return communicators.get(hidden + 2 * _WORDS_BEHIND_ROWS, max_tokens, size, size)


class AllGather:
    """``[T, n]`` words of every rank on every rank, without the host: a dispatch of every token to all ranks."""

    def __init__(self, communicators: Communicators) -> None:
        self._communicators = communicators
        self._routings: dict[tuple[int, int, torch.device], RankRouting] = {}

    def __call__(self, words: torch.Tensor) -> torch.Tensor:
        """``[R, T, n]``. T and n must be equal on all ranks."""
        num_tokens, width = words.shape
        size = self._communicators.size
        key = num_tokens, width, words.device
        routing = self._routings.get(key)
        if routing is None:
            everywhere = torch.ones((num_tokens, size), dtype=torch.bool, device=words.device)
            routing = RankRouting(self._communicators, everywhere, num_tokens, size * num_tokens)
            self._routings[key] = routing
        return routing.send_words(words).view(size, num_tokens, width)


def _as_rows(words: torch.Tensor) -> torch.Tensor:
    """``[m, n]`` of a 32-bit dtype as float32 rows that can travel."""
    missing = -words.shape[1] % ROW_WORDS_MULTIPLE
    padded = torch.nn.functional.pad(words, (0, missing)) if missing or words.shape[1] == 0 else words
    return padded.contiguous().view(torch.float32)
