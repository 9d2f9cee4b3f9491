"""V1's dispatch and combine of many tokens, apart from streams."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...errors import InvalidInput
from . import layout, transport
from .config import topk_idx_t
from .normal_plan import PlanByKernels, PlanByMessages, Room
from .numbers import Column, Ids, fill, part
from .routing import RankRouting
from .transport import Communicators

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


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

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [*self, *self.routing.tensors()]


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
        self._room = Room(communicators, max_tokens)
        self._by_messages = PlanByMessages(communicators, self._room)
        self._by_kernels = PlanByKernels(communicators, self._room)

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
        data, scales = x if isinstance(x, tuple) else (x, None)
        self._room.check(len(data), num_worst_tokens)
        numbers = [] if scales is None else [scales]
        if topk_idx is not None:
            numbers += [Ids(topk_idx), topk_weights]
        plan = self._by_kernels if self._has_kernels(data) else self._by_messages
        planned, words = plan(data, sent, numbers, num_worst_tokens, num_sms)
        routing = planned.routing
        rows, words = routing.send_packed(data, words, num_sms or None)
        local_experts = len(sent.num_tokens_per_expert) // self.communicators.size
        arrived = unpack_received(
            words,
            scales,
            topk_idx,
            first_expert=self.communicators.rank * local_experts,
            num_local=local_experts,
            with_sources=plan.sends_sources,
        )
        sources, per_expert = planned.later()
        tensors = (
            planned.before[1:],
            sent.num_tokens_per_rank.unsqueeze(1),
            planned.before[0].unsqueeze(1),
            arrived.sources if sources is None else sources,
            sent.is_token_in_rank,
            planned.places,
        )
        aligned = [-(-count // expert_alignment) * expert_alignment for count in per_expert]
        return Received(
            rows if scales is None else (rows, arrived.scales),
            arrived.topk_idx,
            arrived.topk_weights,
            aligned,
            Handle.make(tensors, routing),
        )

    def repeat(self, x: Tokens, handle: Handle, num_sms: int) -> Tokens:
        """Dispatch by the routing of an earlier one."""
        routing = self._routing(handle)
        _check_count("x", tokens_of(x), routing.num_tokens, "tokens")
        data, scales = x if isinstance(x, tuple) else (x, None)
        rows, numbers = routing.send(data, [] if scales is None else [scales], num_sms or None)
        return rows if scales is None else (rows, numbers[0])

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
        if topk_weights is None:
            return routing.bring_back(x, biases, num_sms or None), None
        return routing.bring_back_with(x, topk_weights, biases, num_sms or None)

    def _has_kernels(self, x: torch.Tensor) -> bool:
        return x.is_cuda and self.communicators.nvlink() is not None

    def _routing(self, handle: Handle) -> RankRouting:
        if not isinstance(handle, Handle):
            raise InvalidInput(f"handle is a {type(handle).__name__}; it must be what dispatch returned")
        return handle.routing


class Arrived(NamedTuple):
    """Numbers that have travelled with rows; None for those that were not sent."""

    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    sources: torch.Tensor | None


def unpack_received(
    words: torch.Tensor | None,
    scales: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    *,
    first_expert: int,
    num_local: int,
    with_sources: bool,
) -> Arrived:
    """From the ``words`` of rows: like ``scales``, like ``topk_idx``, and their weights; tokens' numbers."""
    recv_scales = recv_idx = recv_weights = sources = None
    columns = []
    begin = 0

    def take(width: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal begin
        begin += width
        return part(words, begin - width, width, dtype)

    if scales is not None:
        travelled = take(scales.shape[1], scales.dtype)
        if travelled.shape == words.shape:
            recv_scales = travelled
        else:
            recv_scales = travelled.new_empty(travelled.shape)
            columns.append(Column(travelled, recv_scales))
    if topk_idx is not None:
        num_topk = topk_idx.shape[1]
        ids = take(num_topk, torch.int32)
        weights = take(num_topk, torch.float32)
        recv_idx = topk_idx.new_empty(ids.shape)
        recv_weights = weights.new_empty(weights.shape)
        here = {"first": first_expert, "count": num_local}
        columns.append(Column(ids, recv_idx, "local", **here))
        columns.append(Column(weights, recv_weights, "masked", ids=ids, **here))
    fill(columns)
    if with_sources:
        sources = take(1, torch.int32).flatten() - 1
    return Arrived(recv_scales, recv_idx, recv_weights, sources)


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


def _check_count(name: str, x: torch.Tensor, count: int, what: str) -> None:
    transport.check_rows(name, x)
    if x.shape[0] != count:
        raise InvalidInput(f"{name} has {x.shape[0]} {what}; the dispatch of this handle had {count}")
