"""What comes before the rows of a V1 dispatch: ranks learn how many rows come, and of how many tokens at most."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ... import _extension
from ...communicator import find
from ...errors import InvalidInput
from . import layout, transport
from .elastic_sizes import align
from .numbers import Column, Ids, pack
from .routing import ROW_WORDS_MULTIPLE, AllGather, RankRouting, communicator_for_ranks
from .transport import Communicators

_LEAST_ROOM = 64
_LEAST_HOST = 1025  # for 1024 experts of a rank


class Later(NamedTuple):
    """``sources`` int32 ``[n]``: the token of each row on its rank, -1 for none; None if tokens' numbers travel behind
    the others. ``per_expert``: tokens of each expert here, empty in fixed size."""

    sources: torch.Tensor | None
    per_expert: list[int]


class Planned(NamedTuple):
    """``before`` int32 ``[R + 1, R]``: tokens of all ranks before a rank, for each rank. ``places`` int32 ``[T, R]``:
    the token's place among those for a rank, or -1. ``later()``: what need not hold up the rows, which a GPU waits for.
    """

    routing: RankRouting
    before: torch.Tensor
    places: torch.Tensor
    later: Callable[[], Later]


class Room:
    """For how many tokens of a rank communicators are made; equal on all ranks.

    limit: the most tokens of any rank in any call, if that is known beforehand.
    """

    def __init__(self, communicators: Communicators, limit: int | None) -> None:
        self._communicators = communicators
        self._limit = limit
        self.tokens = limit or 0
        self._bounds_seen: set[int] = set()

    def is_known(self, num_worst_tokens: int) -> bool:
        """Whether a call for that many rows, 0 for exact sizes, need not ask the other ranks."""
        return self._limit is not None or num_worst_tokens in self._bounds_seen

    def check(self, num_tokens: int, num_worst_tokens: int) -> None:
        """Raise InvalidInput for more tokens than all ranks know to be possible."""
        limit = self._limit
        if limit is None and num_worst_tokens in self._bounds_seen:
            limit = self.tokens
        if limit is not None and num_tokens > limit:
            raise InvalidInput(
                f"x has {num_tokens} tokens; this Buffer has room for {limit} of a rank"
                + (
                    ""
                    if self._limit
                    else f", as found at the first call with num_worst_tokens={num_worst_tokens}"
                )
                + ": make it with a larger max_tokens_per_rank"
            )

    def ask(self, num_tokens: int, num_worst_tokens: int) -> None:
        """Make room for all ranks' tokens. Collective; the host waits."""
        check_not_captured(num_worst_tokens)
        self.grow(self._communicators.largest(num_tokens)[0], num_worst_tokens)

    def grow(self, most_tokens: int, num_worst_tokens: int) -> None:
        """Room for that many tokens of a rank, and for ``num_worst_tokens`` rows."""
        if self._limit is None:
            needed = max(most_tokens, -(-num_worst_tokens // self._communicators.size))
            self.tokens = max(self.tokens, _rounded(needed))
        if num_worst_tokens:
            self._bounds_seen.add(num_worst_tokens)


class PlanByMessages:
    """Ranks tell each other their counts in a dispatch of its own, for which the host waits."""

    sends_sources = True

    def __init__(self, communicators: Communicators, room: Room) -> None:
        self._communicators = communicators
        self._room = room
        self._all_gather = AllGather(communicators)

    def __call__(
        self,
        data: torch.Tensor,
        sent: layout.Layout,
        numbers: Sequence[torch.Tensor | Ids],
        num_worst_tokens: int,
        num_sms: int,
    ) -> tuple[Planned, torch.Tensor | None]:
        """The plan, and the packed ``numbers``, and behind them the tokens'."""
        size, rank = self._communicators.size, self._communicators.rank
        counts = self._exchange_counts(len(data), sent)
        on_host: list[list[int]] = []
        if not num_worst_tokens or not self._room.is_known(num_worst_tokens):
            if counts.is_cuda:
                check_not_captured(num_worst_tokens)
            on_host = counts.tolist()
            self._room.grow(max(row[0] for row in on_host), num_worst_tokens)
        per_rank = counts[:, 1 : 1 + size]
        before = torch.cat([torch.zeros_like(per_rank[:1]), per_rank.cumsum(0, dtype=torch.int32)])
        num_rows = num_worst_tokens or sum(row[1 + rank] for row in on_host)
        local = len(sent.num_tokens_per_expert) // size
        first = 1 + size + rank * local
        per_expert = (
            [] if num_worst_tokens else [sum(row[first + e] for row in on_host) for e in range(local)]
        )
        routing = RankRouting(self._communicators, sent.is_token_in_rank, self._room.tokens, num_rows)
        places = layout.positions(sent.is_token_in_rank)
        words = pack([*numbers, layout.token_numbers(len(data), data.device)])
        return Planned(routing, before, places, lambda: Later(None, per_expert)), words

    def _exchange_counts(self, num_tokens: int, sent: layout.Layout) -> torch.Tensor:
        """int32 ``[R, 1 + R + E + n]`` by source rank: tokens; those to each rank, to each expert; what fills a row."""
        per_rank, per_expert = sent.num_tokens_per_rank, sent.num_tokens_per_expert
        behind_ranks = 1 + len(per_rank)
        end = behind_ranks + len(per_expert)
        words = per_rank.new_full((align(end, ROW_WORDS_MULTIPLE),), num_tokens)
        words[1:behind_ranks] = per_rank
        words[behind_ranks:end] = per_expert
        return self._all_gather(words.unsqueeze(0)).squeeze(1)


class PlanByKernels:
    """Counts travel with the routing, as notes (csrc/nvlink/plan.h), so that the host waits once, or not at all."""

    sends_sources = False

    def __init__(self, communicators: Communicators, room: Room) -> None:
        self._communicators = communicators
        self._room = room
        self._host: torch.Tensor | None = None
        self._host_numbers: ctypes.Array | None = None

    def __call__(
        self,
        data: torch.Tensor,
        sent: layout.Layout,
        numbers: Sequence[torch.Tensor | Ids],
        num_worst_tokens: int,
        num_sms: int,
    ) -> tuple[Planned, torch.Tensor | None]:
        """The plan, and the packed ``numbers``."""
        room = self._room
        num_tokens, size = sent.is_token_in_rank.shape
        new_bound = num_worst_tokens and not room.is_known(num_worst_tokens)
        if new_bound or not room.tokens:
            room.ask(num_tokens, num_worst_tokens)
        ids = sent.num_tokens_per_rank.new_empty((num_tokens, size))
        words = pack(numbers, also=[Column(sent.is_token_in_rank, ids, "place")])
        local = len(sent.num_tokens_per_expert) // size
        host = self._host_memory(1 + local)
        while True:
            routing, before, places = self._plan(data, sent, ids, num_worst_tokens, num_sms)
            if num_worst_tokens or host[0] <= room.tokens:
                break
            room.grow(host[0], 0)  # as all ranks do

        def later() -> Later:
            return Later(_sources(routing), [] if num_worst_tokens else host[1 : 1 + local])

        return Planned(routing, before, places, later), words

    def _plan(
        self,
        data: torch.Tensor,
        sent: layout.Layout,
        ids: torch.Tensor,
        num_worst_tokens: int,
        num_sms: int,
    ) -> tuple[RankRouting, torch.Tensor, torch.Tensor]:
        size = self._communicators.size
        per_rank, per_expert = sent.num_tokens_per_rank.contiguous(), sent.num_tokens_per_expert.contiguous()
        max_tokens = self._room.tokens + _tokens_of_notes(size, len(per_expert))
        comm = communicator_for_ranks(self._communicators, data.shape[1], max_tokens)
        before = ids.new_empty((size + 1, size))
        places = torch.empty_like(ids)
        notes = _extension.load().nvlink.Notes(
            per_rank=per_rank.data_ptr(),
            per_expert=per_expert.data_ptr(),
            num_experts=len(per_expert),
            max_tokens=self._room.tokens,
            before=before.data_ptr(),
            places=places.data_ptr(),
            host=self._host.data_ptr(),
        )
        handle = transport.plan(
            comm, ids, "rank", max_recv_rows=num_worst_tokens or None, num_sms=num_sms or None, notes=notes
        )
        mask = sent.is_token_in_rank
        routing = RankRouting(self._communicators, mask, max_tokens, handle.num_rows, handle)
        return routing, before, places

    def _host_memory(self, length: int) -> ctypes.Array:
        """Pinned int64 numbers, at least ``length``, which kernels write.

        Allocating it waits for the device, so that ranks which share one must not have launched anything: they make a
        communicator after the first call comes here, and later calls seldom need more.
        """
        if self._host is None or len(self._host) < length:
            self._host = _pinned(max(length, _LEAST_HOST))
            # Quicker to read than tensors are.
            self._host_numbers = (ctypes.c_int64 * len(self._host)).from_address(self._host.data_ptr())
        return self._host_numbers


def _pinned(length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.int64, device="cpu", pin_memory=True)


def _sources(routing: RankRouting) -> torch.Tensor:
    """See `Later`: from the tables of the plan."""
    planned = routing.planned
    backend = find(planned.communicator_id)._impl
    most_rows = routing.max_tokens * backend.size
    sources = backend.table("sources", planned.state, min(routing.num_rows, most_rows))
    missing = routing.num_rows - len(sources)
    return torch.nn.functional.pad(sources, (0, missing), value=-1) if missing else sources


def check_not_captured(num_worst_tokens: int) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise InvalidInput(
            f"num_worst_tokens={num_worst_tokens} is new while a CUDA graph is captured; dispatch once before with "
            "the same number, or make the Buffer with max_tokens_per_rank"
        )


def _tokens_of_notes(num_ranks: int, num_experts: int) -> int:
    """Tokens whose ids, one of 16 bits for each rank, take the place of notes."""
    note_bytes = align(4 * (num_ranks + num_experts // num_ranks), 16) + 16  # ids end at any 16 bytes
    return -(-note_bytes // (2 * num_ranks))


def _rounded(num_tokens: int) -> int:
    """With some to spare, so that slowly growing numbers don't make a communicator each; 4096 stays 4096."""
    step = max(_LEAST_ROOM, (1 << max(0, num_tokens - 1).bit_length()) // 16)
    return max(step, -(-num_tokens // step) * step)
