"""V1's dispatch and combine of many tokens, apart from streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import InvalidInput
from . import layout, transport
from .config import topk_idx_t
from .elastic_sizes import align
from .routing import ROW_WORDS_MULTIPLE, AllGather, RankRouting
from .transport import Communicators

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_LEAST_ROOM = 64


class Handle(tuple):
    """What V1's dispatch returns as handle: six tensors, and the routing that they describe.

    0. ``rank_prefix_matrix [R, R]``: [i][r], the row behind the last one from rank i, on rank r
    1. ``channel_prefix_matrix [R, 1]``: tokens to rank r up to the end of a channel, of which there is one
    2. ``recv_channel_prefix_matrix [R, 1]``: tokens from rank r before the beginning of a channel
    3. ``recv_src_idx [n]``: the row's token on its source rank; -1 for rows that hold none
    4. ``is_token_in_rank [T, R]``, bool
    5. ``send_head [T, R]``: the token's place among those that go to rank r, or -1

    All but the fifth are int32.
    """

    routing: RankRouting

    @staticmethod
    def make(tensors: tuple[torch.Tensor, ...], routing: RankRouting) -> Handle:
        handle = Handle(tensors)
        handle.routing = routing
        return handle


class Received(NamedTuple):
    """``topk_idx`` (local) and ``topk_weights`` are None, if none were sent; ``counts`` is empty in fixed size."""

    x: Tokens
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    counts: list[int]
    handle: Handle


class NormalMode:
    """``max_tokens``: the most tokens of any rank in any call, if that is known beforehand."""

    def __init__(self, communicators: Communicators, max_tokens: int | None) -> None:
        self.communicators = communicators
        self._all_gather = AllGather(communicators)
        self._max_tokens = max_tokens
        self._room = max_tokens or 0
        self._bounds_seen: set[int] = set()

    def dispatch(
        self,
        x: Tokens,
        sent: layout.Layout,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> Received:
        rank = self.communicators.rank
        num_tokens, num_experts = len(sent.is_token_in_rank), len(sent.num_tokens_per_expert)
        self._check_room(num_tokens, num_worst_tokens)
        counts = self._exchange_counts(num_tokens, sent)
        sizes = self._sizes(counts, num_worst_tokens)
        num_rows = num_worst_tokens or sizes.rows_for(rank)
        routing = RankRouting(self.communicators, sent.is_token_in_rank, self._room, num_rows)

        numbers = [layout.token_numbers(num_tokens, tokens_of(x).device)]
        if topk_idx is not None:
            numbers += [layout.pack_ids(topk_idx), topk_weights]
        rows, (sources, *topk) = _send(routing, x, numbers, num_sms)
        recv_idx = recv_weights = None
        if topk_idx is not None:
            local_experts = num_experts // self.communicators.size
            recv_idx, is_elsewhere = layout.local_ids(topk[0], rank, local_experts, topk_idx.dtype)
            recv_weights = topk[1].masked_fill_(is_elsewhere, 0.0)
        tensors = (
            counts[:, 1 : 1 + self.communicators.size].cumsum(0, dtype=torch.int32),
            sent.num_tokens_per_rank.unsqueeze(1),
            torch.zeros_like(sent.num_tokens_per_rank).unsqueeze(1),
            sources.flatten() - 1,
            sent.is_token_in_rank,
            layout.positions(sent.is_token_in_rank),
        )
        per_expert = [] if num_worst_tokens else sizes.experts_of(rank, num_experts, expert_alignment)
        return Received(rows, recv_idx, recv_weights, per_expert, Handle.make(tensors, routing))

    def repeat(self, x: Tokens, handle: Handle, num_sms: int) -> Tokens:
        """Dispatch by the routing of an earlier one."""
        routing = self._routing(handle)
        _check_count("x", tokens_of(x), routing.num_tokens, "tokens")
        return _send(routing, x, [], num_sms)[0]

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        biases: tuple[torch.Tensor, ...],
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        routing = self._routing(handle)
        _check_count("x", x, routing.num_rows, "rows")
        if topk_weights is not None:
            transport.check_numbers("topk_weights", topk_weights, (routing.num_rows, None), torch.float32)
        for i, bias in enumerate(biases):
            transport.check_numbers(f"bias {i}", bias, (routing.num_tokens, x.shape[1]), x.dtype)
        y = routing.bring_back(x, biases, routing.num_sms(x, num_sms))
        return y, None if topk_weights is None else routing.bring_back_floats(topk_weights)

    def _routing(self, handle: Handle) -> RankRouting:
        if not isinstance(handle, Handle):
            raise InvalidInput(f"handle is a {type(handle).__name__}; it must be what dispatch returned")
        return handle.routing

    def _exchange_counts(self, num_tokens: int, sent: layout.Layout) -> torch.Tensor:
        """int32 ``[R, 1 + R + E + n]`` by source rank: tokens; those to each rank, to each expert; what fills a row."""
        per_rank, per_expert = sent.num_tokens_per_rank, sent.num_tokens_per_expert
        behind_ranks = 1 + len(per_rank)
        end = behind_ranks + len(per_expert)
        words = per_rank.new_full((align(end, ROW_WORDS_MULTIPLE),), num_tokens)
        words[1:behind_ranks] = per_rank
        words[behind_ranks:end] = per_expert
        return self._all_gather(words.unsqueeze(0)).squeeze(1)

    def _sizes(self, counts: torch.Tensor, num_worst_tokens: int) -> _Sizes:
        """What the host has to know. It waits for the device, unless the number of rows is given and the room known.

        Every rank comes to the same room, from the same numbers.
        """
        if num_worst_tokens and (self._max_tokens or num_worst_tokens in self._bounds_seen):
            return _Sizes([], self.communicators.size)
        if counts.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidInput(
                f"num_worst_tokens={num_worst_tokens} is new while a CUDA graph is captured; dispatch once before with "
                "the same number, or make the Buffer with max_tokens_per_rank"
            )
        sizes = _Sizes(counts.tolist(), self.communicators.size)
        if self._max_tokens is None:
            needed = max(sizes.most_tokens, -(-num_worst_tokens // self.communicators.size))
            self._room = max(self._room, _rounded_room(needed))
        if num_worst_tokens:
            self._bounds_seen.add(num_worst_tokens)
        return sizes

    def _check_room(self, num_tokens: int, num_worst_tokens: int) -> None:
        limit = self._max_tokens
        if limit is None and num_worst_tokens in self._bounds_seen:
            limit = self._room
        if limit is not None and num_tokens > limit:
            raise InvalidInput(
                f"x has {num_tokens} tokens; this Buffer has room for {limit} of a rank"
                + (
                    ""
                    if self._max_tokens
                    else f", as found at the first call with num_worst_tokens={num_worst_tokens}"
                )
                + ": make it with a larger max_tokens_per_rank"
            )


@dataclass(frozen=True)
class _Sizes:
    """Counts of tokens on the host; see `NormalMode._exchange_counts`."""

    counts: list[list[int]]
    num_ranks: int

    @property
    def most_tokens(self) -> int:
        return max(row[0] for row in self.counts)

    def rows_for(self, rank: int) -> int:
        return sum(row[1 + rank] for row in self.counts)

    def experts_of(self, rank: int, num_experts: int, alignment: int) -> list[int]:
        """Tokens of each of the rank's experts, rounded up."""
        local = num_experts // self.num_ranks
        first = 1 + self.num_ranks + rank * local
        totals = [sum(row[e] for row in self.counts) for e in range(first, first + local)]
        return [-(-total // alignment) * alignment for total in totals]


def tokens_of(x: Tokens) -> torch.Tensor:
    """The tokens without their scales."""
    return x[0] if isinstance(x, tuple) else x


def check_dispatch(
    x: Tokens,
    sent: layout.Layout,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_ranks: int,
) -> None:
    """Raise InvalidInput for what can be seen without waiting for the device."""
    check_tokens(x)
    num_tokens = tokens_of(x).shape[0]
    transport.check_numbers("is_token_in_rank", sent.is_token_in_rank, (num_tokens, num_ranks), torch.bool)
    transport.check_numbers("num_tokens_per_rank", sent.num_tokens_per_rank, (num_ranks,), torch.int32)
    transport.check_numbers("num_tokens_per_expert", sent.num_tokens_per_expert, (None,), torch.int32)
    num_experts = len(sent.num_tokens_per_expert)
    if num_experts % num_ranks or not num_experts:
        raise InvalidInput(
            f"num_tokens_per_expert has {num_experts} entries, which {num_ranks} ranks can't share"
        )
    if (topk_idx is None) != (topk_weights is None):
        raise InvalidInput("topk_idx and topk_weights come together, or not at all")
    if topk_idx is not None:
        dtype = torch.int32 if topk_idx.dtype == torch.int32 else topk_idx_t
        transport.check_numbers("topk_idx", topk_idx, (num_tokens, None), dtype)
        transport.check_numbers("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32)


def check_tokens(x: Tokens) -> None:
    if isinstance(x, tuple):
        if len(x) != 2:
            raise InvalidInput(f"x is a tuple of {len(x)}; it must be a tensor, or tokens and their scales")
        data, scales = x
        transport.check_rows("x", data)
        if data.element_size() != 1:
            raise InvalidInput(f"x is {data.dtype} with scales; scales go with float8_e4m3fn")
        dtype = torch.int32 if scales.dtype == torch.int32 else torch.float32
        transport.check_numbers("the scales of x", scales, (data.shape[0], None), dtype)
    else:
        transport.check_rows("x", x)


def _send(
    routing: RankRouting, x: Tokens, numbers: list[torch.Tensor], num_sms: int
) -> tuple[Tokens, list[torch.Tensor]]:
    """Scales travel as the first of the numbers."""
    if not isinstance(x, tuple):
        return routing.send(x, numbers, routing.num_sms(x, num_sms))
    data, scales = x
    rows, (recv_scales, *received) = routing.send(data, [scales, *numbers], routing.num_sms(data, num_sms))
    return (rows, recv_scales), received


def _check_count(name: str, x: torch.Tensor, count: int, what: str) -> None:
    transport.check_rows(name, x)
    if x.shape[0] != count:
        raise InvalidInput(f"{name} has {x.shape[0]} {what}; the dispatch of this handle had {count}")


def _rounded_room(num_tokens: int) -> int:
    """With some to spare, so that slowly growing numbers don't make a communicator each; 4096 stays 4096."""
    step = max(_LEAST_ROOM, (1 << max(0, num_tokens - 1).bit_length()) // 16)
    return max(step, -(-num_tokens // step) * step)
