"""Dispatch and combine in plain torch, for backends that can only send messages.

Rows that stay on their rank are never sent: they are copied while the others travel.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .base import Backend, Part, RoutingSpec
from .routing import NUM_RANGES, plan_receives, plan_sends


class Message(NamedTuple):
    """A contiguous tensor that goes to (or comes from) rank ``peer``; both sides know its size beforehand."""

    peer: int
    tensor: torch.Tensor


class Transfer(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Return when all has arrived and what was sent may be overwritten. Raises PeerTimeoutError."""


class Segments:
    """A tensor's rows by rank: consecutive segments of the given lengths."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        self.starts = [0]
        for count in counts:
            self.starts.append(self.starts[-1] + count)
        self.total = self.starts[-1]

    def of(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        return rows[self.starts[rank] : self.starts[rank + 1]]


@dataclass(frozen=True)
class AllToAllState:
    """The routing state of these backends. Field names are explained in `routing`."""

    # These six are common to all backends (base.Routing).
    tokens_per_expert: torch.Tensor
    padded_tokens_per_expert: torch.Tensor
    rows: torch.Tensor
    rows_needed: torch.Tensor
    splits: torch.Tensor
    tokens: torch.Tensor
    host_sizes: torch.Tensor  # [4R + NUM_RANGES * K + K]: counts by rank and list sizes
    send_tokens: torch.Tensor
    send_entries: torch.Tensor
    entry_rows: torch.Tensor
    local_targets: torch.Tensor
    local_sources: torch.Tensor
    owner_targets: torch.Tensor
    owner_sources: torch.Tensor


class Sizes(NamedTuple):
    """AllToAllState.host_sizes by name."""

    send_pairs: Segments
    send_entries: Segments
    recv_pairs: Segments
    recv_entries: Segments
    local_passes: list[int]
    owner_passes: list[int]

    @staticmethod
    def unpack(host_sizes: torch.Tensor, num_ranks: int, num_topk: int, layout: str) -> Sizes:
        numbers = host_sizes.tolist()
        by_rank = [Segments(numbers[i * num_ranks : (i + 1) * num_ranks]) for i in range(4)]
        num_local = NUM_RANGES * num_topk if layout == "expert" else 0
        rest = numbers[4 * num_ranks :]
        return Sizes(*by_rank, rest[:num_local], rest[num_local:])


class AllToAllBackend(Backend):
    device: torch.device
    """Where messages can begin and end, if no tensor says so."""

    @abstractmethod
    def start(self, sends: list[Message], receives: list[Message], phase: str) -> Transfer:
        """Begin to move messages between this rank and others. ``phase`` is what an error will call it."""

    def __init__(self) -> None:
        self.communication_s = 0.0  # host time spent in messages so far
        self._scratch: dict[str, torch.Tensor] = {}

    def close(self) -> None:
        self._scratch.clear()

    def scratch(self, name: str, like: torch.Tensor, num_rows: int) -> torch.Tensor:
        """``[num_rows, ...]`` of uninitialised memory in the width of ``like``, valid until the call returns.

        On a CPU it is kept for the next call: fresh pages cost more than the copy that fills them.
        """
        shape = num_rows, *like.shape[1:]
        if like.device.type != "cpu":
            return like.new_empty(shape)
        num_bytes = math.prod(shape) * like.element_size()
        buffer = self._scratch.get(name)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._scratch[name] = self.allocate(name, num_bytes)
        return buffer[:num_bytes].view(like.dtype).view(shape)

    def allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        """Memory for scratch; what lay under ``name`` before is no longer needed."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    # --- planning ---

    def state_devices(self, device: torch.device) -> list[torch.device]:
        on_host = ("splits", "host_sizes")
        return [
            torch.device("cpu") if name in on_host else device for name in AllToAllState.__dataclass_fields__
        ]

    def host_values(self, values: torch.Tensor, phase: str) -> list:
        """``values.tolist()``; a backend whose messages complete on a device bounds the wait."""
        return values.tolist()

    def plan(self, topk_idx: torch.Tensor, spec: RoutingSpec) -> list[torch.Tensor]:
        sends = plan_sends(topk_idx.long(), spec)
        recv_counts = torch.empty_like(sends.counts)
        self._exchange_columns(sends.counts, recv_counts, "the exchange of counts")
        counts = self.host_values(torch.cat([sends.counts, recv_counts]), "the exchange of counts")
        _, send_entries, recv_pairs, recv_entries = (Segments(c) for c in counts)

        codes = topk_idx.new_empty(recv_entries.total, dtype=torch.int64)
        self._finish(
            [self._exchange(sends.codes, send_entries, codes, recv_entries, "the exchange of routing")]
        )
        own = recv_pairs.starts[self.rank], recv_pairs.starts[self.rank + 1]
        receives = plan_receives(codes, own, recv_pairs.total, spec)
        host_sizes = torch.cat(
            [torch.tensor(counts).flatten(), receives.sum_slots.sizes.cpu(), sends.sum_slots.sizes.cpu()]
        )
        state = AllToAllState(
            receives.tokens_per_expert,
            receives.padded_tokens_per_expert,
            receives.rows,
            receives.rows_needed,
            receives.splits,
            topk_idx.new_empty((len(topk_idx), 0), dtype=torch.int64),
            host_sizes,
            sends.tokens,
            sends.entries,
            receives.entry_rows,
            receives.sum_slots.targets,
            receives.sum_slots.sources,
            sends.sum_slots.targets,
            sends.sum_slots.sources,
        )
        return [getattr(state, name) for name in AllToAllState.__dataclass_fields__]

    def _exchange_columns(self, send: torch.Tensor, recv: torch.Tensor, phase: str) -> None:
        """Column r of ``send [n, R]`` goes to rank r."""
        columns = send.t().contiguous()
        received = torch.empty_like(columns)
        one_each = Segments([1] * self.size)
        self._finish([self._exchange(columns, one_each, received, one_each, phase)])
        recv.copy_(received.t())

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        columns = values.to(self.device).unsqueeze(1).expand(-1, self.size)
        recv = torch.empty_like(columns, memory_format=torch.contiguous_format)
        self._exchange_columns(columns, recv, "a barrier")
        return torch.tensor(self.host_values(recv, "a barrier")).t()

    def _exchange(
        self, send: torch.Tensor, send_to: Segments, recv: torch.Tensor, recv_from: Segments, phase: str
    ) -> Transfer:
        """Start the exchange of whole tensors; this rank's own segment is copied at once."""
        transfer = self._begin(*self._messages(send, send_to, recv, recv_from), phase)
        recv_from.of(recv, self.rank).copy_(send_to.of(send, self.rank))
        return transfer

    def _messages(
        self, send: torch.Tensor, send_to: Segments, recv: torch.Tensor, recv_from: Segments
    ) -> tuple[list[Message], list[Message]]:
        sends = [Message(r, send_to.of(send, r)) for r in self._peers() if send_to.counts[r]]
        receives = [Message(r, recv_from.of(recv, r)) for r in self._peers() if recv_from.counts[r]]
        return sends, receives

    def _begin(self, sends: list[Message], receives: list[Message], phase: str) -> Transfer:
        before = time.perf_counter()
        transfer = self.start(sends, receives, phase)
        self.communication_s += time.perf_counter() - before
        return transfer

    def _finish(self, transfers: Iterable[Transfer]) -> None:
        before = time.perf_counter()
        for transfer in transfers:
            transfer.wait()
        self.communication_s += time.perf_counter() - before

    def _peers(self) -> Iterable[int]:
        """The other ranks, beginning with the next one, so that not all send to the same rank first."""
        return ((self.rank + i) % self.size for i in range(1, self.size))

    # --- dispatch ---

    def dispatch(
        self,
        parts: Sequence[Part],
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        s = AllToAllState(*state)
        sizes = Sizes.unpack(s.host_sizes, self.size, spec.num_topk, spec.layout)
        pairs, arrivals = sizes.send_pairs, sizes.recv_pairs

        transfers, arrived = [], []
        for i, part in enumerate(parts):
            wire = self.scratch(f"dispatch send {i}", part.rows, pairs.total)
            for r in self._peers():
                torch.index_select(part.rows, 0, pairs.of(s.send_tokens, r), out=pairs.of(wire, r))
            if spec.layout == "rank":  # the arrivals are the result
                rows = part.rows.new_empty(arrivals.total, *part.rows.shape[1:])
            else:
                rows = self.scratch(f"dispatch receive {i}", part.rows, arrivals.total)
            transfers.append(
                self._begin(*self._messages(wire, pairs, rows, arrivals), "the dispatch of rows")
            )
            arrived.append(rows)
        row_weights = None
        if weights is not None:
            entries = weights.new_empty(sizes.recv_entries.total)
            flat = weights.flatten().index_select(0, s.send_entries)
            transfers.append(
                self._exchange(
                    flat, sizes.send_entries, entries, sizes.recv_entries, "the dispatch of weights"
                )
            )
        for part, rows in zip(parts, arrived, strict=True):
            own_tokens = pairs.of(s.send_tokens, self.rank)
            torch.index_select(part.rows, 0, own_tokens, out=arrivals.of(rows, self.rank))
        self._finish(transfers)

        if weights is not None:
            row_weights = weights.new_zeros(s.rows.numel() + 1)  # the last one takes what is dropped
            row_weights.index_copy_(0, s.entry_rows, entries)
            row_weights = row_weights[:-1].view(s.rows.shape).clone()
        place = _expand if spec.layout == "expert" else _fit
        return [
            place(rows, s.rows, part.padding) for part, rows in zip(parts, arrived, strict=True)
        ], row_weights

    # --- combine ---

    def combine(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        s = AllToAllState(*state)
        num_tokens = len(s.tokens)
        sizes = Sizes.unpack(s.host_sizes, self.size, spec.num_topk, spec.layout)
        pairs, arrivals = sizes.send_pairs, sizes.recv_pairs
        returned = self.scratch("combine receive", rows, pairs.total)
        own_returned = pairs.of(returned, self.rank)

        # The sums that travel come first, this rank's own while they are under way.
        if spec.layout == "rank":
            partial = _fit_length(rows, arrivals.total)

            def sum_own() -> None:
                own_returned.copy_(arrivals.of(partial, self.rank))
        else:
            partial = self.scratch("combine send", rows, arrivals.total)
            before, own, after = self._local_sums(s, sizes)
            first, last = arrivals.starts[self.rank], arrivals.starts[self.rank + 1]
            _sum_rows(rows, before, partial[:first])
            _sum_rows(rows, after, partial[last:])

            def sum_own() -> None:
                _sum_rows(rows, own, own_returned)

        transfers = [self._begin(*self._messages(partial, arrivals, returned, pairs), "the combine of rows")]
        topk_weights = None
        if row_weights is not None:
            # A dropped row has no weight, so its entry gives zero.
            padded = torch.cat([row_weights.flatten(), row_weights.new_zeros(1)])
            entries = row_weights.new_empty(sizes.send_entries.total)
            arrived = padded.index_select(0, s.entry_rows)
            transfers.append(
                self._exchange(
                    arrived, sizes.recv_entries, entries, sizes.send_entries, "the combine of weights"
                )
            )
        sum_own()
        self._finish(transfers)

        if row_weights is not None:
            topk_weights = row_weights.new_zeros(num_tokens * spec.num_topk)
            topk_weights.index_copy_(0, s.send_entries, entries)
            topk_weights = topk_weights.view(num_tokens, spec.num_topk)
        y = rows.new_empty(num_tokens, *rows.shape[1:])
        owner_sums = _Passes(s.owner_targets, s.owner_sources, sizes.owner_passes)
        _sum_rows(returned, owner_sums, y, biases)
        return y, topk_weights

    def _local_sums(self, s: AllToAllState, sizes: Sizes) -> list[_Passes]:
        """The sums inside this rank for the arrivals before its own, its own, and after."""
        num_topk = len(sizes.local_passes) // NUM_RANGES
        sums, start = [], 0
        for i in range(NUM_RANGES):
            passes = sizes.local_passes[i * num_topk : (i + 1) * num_topk]
            end = start + sum(passes)
            sums.append(_Passes(s.local_targets[start:end], s.local_sources[start:end], passes))
            start = end
        return sums


class _Passes(NamedTuple):
    """A SumLists whose sizes are on the host."""

    targets: torch.Tensor
    sources: torch.Tensor
    sizes: list[int]


def _expand(arrived: torch.Tensor, row_arrivals: torch.Tensor, padding: float) -> torch.Tensor:
    """The expert layout: a row for each entry."""
    if not len(arrived):
        return arrived.new_full((len(row_arrivals), *arrived.shape[1:]), padding)
    rows = arrived.index_select(0, row_arrivals.clamp(min=0))
    return _fill(rows, row_arrivals < 0, padding)


def _fill(rows: torch.Tensor, where: torch.Tensor, value: float) -> torch.Tensor:
    if rows.device.type == "cpu" and not where.any():
        return rows
    return rows.masked_fill_(where.view(-1, *[1] * (rows.dim() - 1)), value)


def _fit(arrived: torch.Tensor, ids: torch.Tensor, padding: float) -> torch.Tensor:
    """The rank layout: the arrivals, cut or padded to as many rows as ``ids`` has."""
    return _fit_length(arrived, len(ids), padding)


def _fit_length(rows: torch.Tensor, length: int, padding: float = 0.0) -> torch.Tensor:
    if len(rows) >= length:
        return rows[:length]
    tail = rows.new_full((length - len(rows), *rows.shape[1:]), padding)
    return torch.cat([rows, tail])


def _sum_rows(
    rows: torch.Tensor, sums: _Passes, out: torch.Tensor, biases: Sequence[torch.Tensor] = ()
) -> None:
    """``out[targets] += rows[sources]`` pass by pass, starting from the biases; rounded once to ``out``'s dtype.

    A sum starts from its first term; an empty one is +0. Sums of bfloat16 and float16 are kept in float32.
    """
    ends = list(itertools.accumulate(sums.sizes))
    passes = [
        (sums.targets[end - size : end], sums.sources[end - size : end])
        for size, end in zip(sums.sizes, ends, strict=True)
        if size
    ]
    exact = out.dtype in (torch.float32, torch.float64)
    nothing_to_add = len(passes) + len(biases) <= 1
    total = out if exact or nothing_to_add else out.new_empty(out.shape, dtype=torch.float32)
    if biases:
        total.copy_(biases[0])
        for bias in biases[1:]:
            total.add_(bias)
    elif not passes:
        total.zero_()
    else:
        targets, sources = passes.pop(0)
        if (
            len(targets) == len(total) and total.dtype == rows.dtype
        ):  # every sum has a first term: no need for zeros
            torch.index_select(rows, 0, sources, out=total)
        else:
            total.zero_()
            total.index_copy_(0, targets, rows.index_select(0, sources).to(total.dtype))
    for targets, sources in passes:
        total.index_add_(0, targets, rows.index_select(0, sources).to(total.dtype))
    if total is not out:
        out.copy_(total)
