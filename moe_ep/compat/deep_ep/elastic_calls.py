"""What V2's dispatch and combine do on whatever stream they run, once their arguments are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...backends.base import Routing
from ...backends.nvlink import NvlinkBackend
from ...communicator import find
from ...handle import DispatchHandle
from .elastic_handle import EPHandle, slots_at_destination
from .elastic_sizes import align
from .elastic_sources import PlannedSources, Sources, TravelledSources
from .numbers import Column, fill, pack, part
from .transport import Communicators, bring_back, plan, send_words

_SCALE_ROWS = 4  # what DeepGEMM's bulk loads of scales want

How = tuple[int | None, bool]
"""Multiprocessors, None for moe_ep's choice; whether computation runs beside the call."""


@dataclass(frozen=True)
class Shape:
    """What a dispatch without a handle is asked for, beside its tensors."""

    num_experts: int
    max_tokens: int
    """T of this call: what source tokens are numbered by."""
    room: int
    """T of the communicator, at least as large."""
    alignment: int
    expand: bool
    exact: bool
    """The host waits for the number of rows."""
    one_by_one: bool
    """Rows are to go back one by one, see `add_in_order`."""


class Received(NamedTuple):
    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    weights: torch.Tensor | None


def dispatch(
    ranks: Communicators,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    topk_idx: torch.Tensor,
    weights: torch.Tensor | None,
    shape: Shape,
    copies_topk_idx: bool,
    columns: bool,
    how: How,
) -> tuple[Received, EPHandle]:
    """By a new routing. ``columns``: the received scales shall lie by columns, as bulk loads want them."""
    num_topk = topk_idx.shape[1]
    num_local = shape.num_experts // ranks.size
    most_pairs = ranks.size * shape.max_tokens
    most_rows = align(
        most_pairs * min(num_topk, num_local) + (shape.alignment - 1) * num_local, shape.alignment
    )
    layout = "expert" if shape.expand else "rank"
    options = {
        "alignment": shape.alignment if shape.expand else 1,
        "max_recv_rows": None if shape.exact else most_rows if shape.expand else most_pairs,
        "num_sms": how[0],
    }
    comm = ranks.get(x.shape[1], shape.room, shape.num_experts, num_topk)
    by_tables = x.is_cuda and isinstance(comm._impl, NvlinkBackend)
    numbers = _numbers(scales, weights, shape.expand)
    if not by_tables:
        first = ranks.rank * shape.max_tokens + 1
        number = torch.arange(first, first + len(x), dtype=torch.int32, device=x.device).unsqueeze(1)
        numbers += [number, topk_idx.int()] if shape.expand else [number]
    words, kept_idx = None, topk_idx

    def prepare() -> None:
        nonlocal words, kept_idx
        words = pack(numbers)
        if copies_topk_idx:
            kept_idx = topk_idx.clone()

    routing = plan(comm, topk_idx, layout, **options, meanwhile=prepare)
    row_routing = None
    if shape.one_by_one:
        # A token for each (token, k). Their rows lie as the others do: by expert, source rank and token.
        one_comm = ranks.get(x.shape[1], shape.room * num_topk, shape.num_experts, 1)
        row_routing = plan(one_comm, topk_idx.reshape(-1, 1), layout, **options)

    received, words = _send(x, words, scales, weights, routing, topk_idx.dtype, columns, how)
    make_sources = _planned_sources if by_tables else _travelled_sources
    sources = make_sources(ranks, shape, routing, words)
    handle = _make_handle(ranks, shape, routing, sources, kept_idx, how[0] or 0, most_rows)
    handle._row_routing = row_routing
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        handle.work_out_everything()
    return received, handle


def dispatch_again(
    ranks: Communicators,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    weights: torch.Tensor | None,
    handle: EPHandle,
    columns: bool,
    how: How,
) -> Received:
    """By the routing of a handle."""
    routing = ranks.at_width(handle.routing(), x.shape[1])
    words = pack(_numbers(scales, weights, routing.layout == "expert"))
    return _send(x, words, scales, weights, routing, handle.topk_idx.dtype, columns, how)[0]


def combine(
    ranks: Communicators,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    biases: Sequence[torch.Tensor],
    handle: EPHandle,
    how: How,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums ``[N, H]``, and each weight back at its token and k ``[N, K]``."""
    rows = handle.as_dispatched(rows)
    if weights is not None:
        weights = handle.as_dispatched(weights).contiguous()
    one_by_one = handle._row_routing is not None
    routing = ranks.at_width(handle._row_routing if one_by_one else handle.routing(), rows.shape[1])
    num_sms = _choose_num_sms("combine", routing, rows.dtype, how)
    sums, topk_weights = bring_back(rows, weights, () if one_by_one else biases, routing, num_sms)
    if one_by_one:
        num_tokens, num_topk = handle.topk_idx.shape
        sums = add_in_order(biases, sums.view(num_tokens, num_topk, rows.shape[1]), handle.topk_idx >= 0)
        topk_weights = None if topk_weights is None else topk_weights.view(num_tokens, num_topk)
    return sums, topk_weights


def add_in_order(biases: Sequence[torch.Tensor], terms: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
    """``[N, H]``: the biases, then a token's ``terms [N, K, H]`` where ``is_there [N, K]``, in ascending k.

    In float32 (float64 for float64), rounded once; a sum starts from its first term, one without terms is +0.
    """
    exact = torch.float64 if terms.dtype == torch.float64 else torch.float32
    total = torch.full_like(terms[:, 0], -0.0, dtype=exact)  # adding to -0 changes nothing
    for bias in biases:
        total += bias
    for k in range(terms.shape[1]):
        total += torch.where(is_there[:, k, None], terms[:, k].to(exact), -0.0)
    if not biases:
        total = torch.where(is_there.any(1, keepdim=True), total, 0.0)
    return total.to(terms.dtype)


def _numbers(scales: torch.Tensor | None, weights: torch.Tensor | None, expands: bool) -> list[torch.Tensor]:
    """What of them travels as words. A row by expert has the weight of that expert, which `moe_ep.dispatch` brings; a
    plain row those of all its token's experts, here or not."""
    return [each for each in (scales, None if expands else weights) if each is not None]


def _send(
    x: torch.Tensor,
    words: torch.Tensor | None,
    scales: torch.Tensor | None,
    weights: torch.Tensor | None,
    routing: DispatchHandle,
    idx_dtype: torch.dtype,
    columns: bool,
    how: How,
) -> tuple[Received, torch.Tensor | None]:
    """``words``: the packed `_numbers`, and others behind them, which are the second result as they arrived."""
    expands = routing.layout == "expert"
    row_weights = weights.contiguous() if expands and weights is not None else None
    num_sms = _choose_num_sms("dispatch", routing, x.dtype, how)
    rows, words, row_weights = send_words(x, words, row_weights, routing, num_sms)
    to_fill = []
    begin = 0
    recv_scales = None
    if scales is not None:
        begin = scales.shape[1]
        recv_scales = part(words, 0, begin, scales.dtype)
        if columns or begin < words.shape[1]:
            travelled = recv_scales
            recv_scales, target = _empty_scales(travelled, columns)
            to_fill.append(Column(travelled, target))
    if not expands and weights is not None:
        travelled = part(words, begin, weights.shape[1], weights.dtype)
        begin += weights.shape[1]
        row_weights = travelled
        if begin < words.shape[1] or scales is not None:
            row_weights = travelled.new_empty(travelled.shape)
            to_fill.append(Column(travelled, row_weights))
    ids = None
    if not expands:
        local = routing.state[Routing.ROWS]
        ids = torch.empty_like(local, dtype=idx_dtype)  # callers write into theirs
        to_fill.append(Column(local, ids))
    fill(to_fill)
    return Received(rows, recv_scales, ids, row_weights), None if words is None else words[:, begin:]


def _empty_scales(like: torch.Tensor, columns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, packs]``, by columns with strides (1, rows rounded up to 4); and the same with what is behind it."""
    if not columns:
        scales = like.new_empty(like.shape)
        return scales, scales
    num_rows, packs = like.shape
    whole = like.new_empty(packs, align(num_rows, _SCALE_ROWS)).t()
    return whole[:num_rows], whole


def _travelled_sources(
    ranks: Communicators, shape: Shape, routing: DispatchHandle, words: torch.Tensor
) -> Sources:
    num_local = routing.spec.num_local_experts
    return TravelledSources(
        numbers=words[:, 0].contiguous(),
        ids=words[:, 1 : 1 + routing.spec.num_topk] if shape.expand else routing.state[Routing.ROWS],
        first_expert=ranks.rank * num_local if shape.expand else 0,
        num_local=num_local,
        segments=routing.padded_tokens_per_expert if shape.expand else None,
        num_ranks=ranks.size,
        max_tokens=shape.max_tokens,
        static=not shape.exact,
    )


def _planned_sources(ranks: Communicators, shape: Shape, routing: DispatchHandle, _words: object) -> Sources:
    table = find(routing.communicator_id)._impl.table
    pairs = ranks.size * shape.room
    num_topk = routing.spec.num_topk
    rows = table("arrival_rows", routing.state, pairs * num_topk)
    return PlannedSources(
        starts=table("recv_start", routing.state, ranks.size + 1),
        tokens=table("sources", routing.state, pairs),
        rows=rows.view(ranks.size, shape.room, num_topk),
        num_pairs=routing.num_rows if shape.exact and not shape.expand else None,
        num_ranks=ranks.size,
        max_tokens=shape.max_tokens,
        expands=shape.expand,
        static=not shape.exact,
    )


def _choose_num_sms(op: str, routing: DispatchHandle, dtype: torch.dtype, how: How) -> int | None:
    num_sms, overlapped = how
    if num_sms is not None or not overlapped:
        return num_sms
    return find(routing.communicator_id).choose_num_sms(
        op, layout=routing.layout, dtype=dtype, num_tokens=routing.num_tokens, overlapped=True
    )


def _make_handle(
    ranks: Communicators,
    shape: Shape,
    routing: DispatchHandle,
    sources: Sources,
    topk_idx: torch.Tensor,
    num_sms: int,
    most_rows: int,
) -> EPHandle:
    splits = routing.splits
    counts = routing.tokens_per_expert
    per_expert = [align(count, shape.alignment) for count in splits] if shape.exact else []
    known = {
        "do_expand": shape.expand,
        "num_experts": shape.num_experts,
        "expert_alignment": shape.alignment,
        "num_max_tokens_per_rank": shape.max_tokens,
        "num_sms": num_sms,
        "topk_idx": topk_idx,
        "num_expanded_tokens": sum(per_expert) if shape.exact else most_rows,
        "num_recv_tokens_per_expert_list": per_expert,
    }

    def ends_by_expert() -> torch.Tensor:
        aligned = (counts + shape.alignment - 1) // shape.alignment * shape.alignment
        ends = aligned.cumsum(0)
        return (ends - aligned + counts if shape.expand else ends).int()

    derive = {
        "num_recv_tokens": sources.num_tokens,
        "psum_num_recv_tokens_per_scaleup_rank": sources.ends_by_rank,
        "psum_num_recv_tokens_per_expert": ends_by_expert,
        "num_unaligned_recv_tokens_per_expert": counts.int,
        "recv_src_metadata": sources.metadata,
        "dst_buffer_slot_idx": lambda: slots_at_destination(
            topk_idx, ranks.rank, ranks.size, len(counts), shape.max_tokens
        ),
    }
    return EPHandle.of_dispatch(routing, sources, known, derive)
