"""Dispatch and combine in plain torch, for backends that can only send messages.

Rows that stay on their rank are never sent: they are moved while the others travel.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .base import Backend, Part, RoutingSpec
from .routing import NUM_RANGES, Segments, SendPlan, plan_receives, plan_sends
from .rows import Terms, add_rows, expand, expand_blocks, fit, gather_rows

ONE_MESSAGE_BYTES = 1 << 16
"""Counts and routing travel together if no rank can have more than this to say to another."""


class Message(NamedTuple):
    """A contiguous tensor that goes to (or comes from) rank ``peer``; both sides know its size beforehand."""

    peer: int
    tensor: torch.Tensor


class Transfer(Protocol):
    """Messages under way: `wait`, read what came, `release`."""

    def wait(self) -> list[torch.Tensor]:
        """The messages received, in the order asked for: in the tensors given, or where they lie in a peer's memory.

        Raises PeerTimeoutError.
        """

    def release(self) -> None:
        """End the use of a peer's memory, and wait until peers have read what was sent from this rank's."""


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
    host_sizes: torch.Tensor  # counts by rank [4, R], sizes of the local sums' lists, of the owner's
    blocks: torch.Tensor
    row_places: torch.Tensor
    send_tokens: torch.Tensor
    send_entries: torch.Tensor
    entry_rows: torch.Tensor
    local_targets: torch.Tensor
    local_sources: torch.Tensor
    owner_targets: torch.Tensor
    owner_sources: torch.Tensor


_ON_HOST = ("splits", "host_sizes", "blocks")


class Sizes(NamedTuple):
    """AllToAllState.host_sizes by name."""

    send_pairs: Segments
    send_entries: Segments
    recv_pairs: Segments
    recv_entries: Segments
    local_sums: list[int]
    owner_sums: list[int]

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

    def __init__(self) -> None:
        self.communication_s = 0.0
        """Host time spent in messages so far."""
        self._scratch: dict[str, torch.Tensor] = {}

    @abstractmethod
    def start(self, sends: list[Message], receives: list[Message], phase: str) -> Transfer:
        """Begin to move messages between this rank and others. ``phase`` is what an error will call it."""

    def host_values(self, values: torch.Tensor, phase: str) -> list:
        """``values.tolist()``; a backend whose messages complete on a device bounds the wait."""
        return values.tolist()

    def allocate(self, name: str, num_bytes: int) -> torch.Tensor:
        """Memory for scratch; what lay under ``name`` before is no longer needed."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

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
            # With room for more, so that slowly growing needs don't allocate at every call.
            buffer = self._scratch[name] = self.allocate(name, num_bytes + num_bytes // 4)
        return buffer[:num_bytes].view(like.dtype).view(shape)

    def peers(self) -> Iterable[int]:
        """The other ranks, beginning with the next one, so that not all send to the same rank first."""
        return ((self.rank + i) % self.size for i in range(1, self.size))

    # --- planning ---

    def state_devices(self, device: torch.device) -> list[torch.device]:
        names = AllToAllState.__dataclass_fields__
        return [torch.device("cpu") if name in _ON_HOST else device for name in names]

    def plan(
        self,
        topk_idx: torch.Tensor,
        spec: RoutingSpec,
        num_sms: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> list[torch.Tensor]:
        if meanwhile is not None:
            meanwhile()
        sends = plan_sends(topk_idx.long(), spec)
        capacity = spec.max_tokens_per_rank * spec.num_topk
        if capacity * sends.codes.element_size() <= ONE_MESSAGE_BYTES:
            counts, codes = self._exchange_routing_at_once(sends, capacity)
        else:
            counts, codes = self._exchange_routing(sends)
        receives = plan_receives(codes, Segments(counts[2]), self.rank, spec)
        list_sizes = [receives.sums.sizes.cpu(), sends.sums.sizes.cpu()]
        state = AllToAllState(
            tokens_per_expert=receives.tokens_per_expert,
            padded_tokens_per_expert=receives.padded_tokens_per_expert,
            rows=receives.rows,
            rows_needed=receives.rows_needed,
            splits=receives.splits,
            tokens=topk_idx.new_empty((len(topk_idx), 0), dtype=torch.int64),
            host_sizes=torch.cat([torch.tensor(counts, device="cpu").flatten(), *list_sizes]),
            blocks=receives.blocks,
            row_places=receives.row_places,
            send_tokens=sends.tokens,
            send_entries=sends.entries,
            entry_rows=receives.entry_rows,
            local_targets=receives.sums.targets,
            local_sources=receives.sums.sources,
            owner_targets=sends.sums.targets,
            owner_sources=sends.sums.sources,
        )
        return [getattr(state, name) for name in AllToAllState.__dataclass_fields__]

    def _exchange_routing(self, sends: SendPlan) -> tuple[list[list[int]], torch.Tensor]:
        """Pairs and entries to and from each rank ``[4, R]``, and the codes of the arriving entries."""
        recv_counts = self._exchange_columns(sends.counts, "the exchange of counts")
        counts = self.host_values(torch.cat([sends.counts, recv_counts]), "the exchange of counts")
        recv_entries = Segments(counts[3])
        codes = sends.codes.new_empty(recv_entries.total)
        phase = "the exchange of routing"
        Exchange(self, sends.codes, Segments(counts[1]), codes, recv_entries, phase).finish()
        return counts, codes

    def _exchange_routing_at_once(
        self, sends: SendPlan, capacity: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """The same in one message of fixed size to each rank: counts, then codes."""
        messages = sends.codes.new_zeros(self.size, 2 + capacity)
        messages[:, :2] = sends.counts.t()
        first = sends.counts[1].cumsum(0) - sends.counts[1]
        place = torch.arange(len(sends.codes), device=first.device) - first[sends.entry_ranks]
        messages[sends.entry_ranks, 2 + place] = sends.codes
        received = torch.empty_like(messages)
        one_each = Segments([1] * self.size)
        phase = "the exchange of routing"
        Exchange(self, messages, one_each, received, one_each, phase).finish()
        counts = self.host_values(torch.cat([sends.counts, received[:, :2].t()]), phase)
        codes = torch.cat([row[2 : 2 + count] for row, count in zip(received, counts[3], strict=True)])
        return counts, codes

    def _exchange_columns(self, send: torch.Tensor, phase: str) -> torch.Tensor:
        """Column r of ``send [n, R]`` goes to rank r."""
        columns = send.t().contiguous()
        received = torch.empty_like(columns)
        one_each = Segments([1] * self.size)
        Exchange(self, columns, one_each, received, one_each, phase).finish()
        return received.t()

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        columns = values.to(self.device).unsqueeze(1).expand(-1, self.size)
        received = self._exchange_columns(columns, "a barrier")
        return torch.tensor(self.host_values(received, "a barrier"), device="cpu").t()

    # --- dispatch ---

    def dispatch(
        self,
        parts: Sequence[Part],
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        s = AllToAllState(*state)
        sizes = Sizes.unpack(s.host_sizes, self.size, spec.num_topk, spec.layout)
        exchanges = [self._start_dispatch(i, part, s, sizes, spec) for i, part in enumerate(parts)]
        if weights is not None:
            entries = weights.new_empty(sizes.recv_entries.total)
            flat = weights.flatten().index_select(0, s.send_entries)
            weights_exchange = Exchange(
                self, flat, sizes.send_entries, entries, sizes.recv_entries, "the dispatch of weights"
            )
        outputs = [
            self._place_rows(part, exchange, s, sizes, spec)
            for part, exchange in zip(parts, exchanges, strict=True)
        ]
        if weights is None:
            return outputs, None
        weights_exchange.finish()
        row_weights = weights.new_zeros(s.rows.numel() + 1)  # the last one takes what is dropped
        row_weights.index_copy_(0, s.entry_rows, entries)
        return outputs, row_weights[:-1].view(s.rows.shape).clone()

    def _start_dispatch(
        self, number: int, part: Part, s: AllToAllState, sizes: Sizes, spec: RoutingSpec
    ) -> Exchange:
        wire = self.scratch(f"dispatch send {number}", part.rows, sizes.send_pairs.total)
        for r in self.peers():
            tokens = sizes.send_pairs.of(s.send_tokens, r)
            gather_rows(part.rows, tokens, sizes.send_pairs.of(wire, r), part_of=wire)
        if spec.layout == "rank":  # the arrivals are the result
            arrived = part.rows.new_empty(sizes.recv_pairs.total, *part.rows.shape[1:])
        else:
            arrived = self.scratch(f"dispatch receive {number}", part.rows, sizes.recv_pairs.total)
        phase = "the dispatch of rows"
        return Exchange(self, wire, sizes.send_pairs, arrived, sizes.recv_pairs, phase, own=False)

    def _place_rows(
        self, part: Part, exchange: Exchange, s: AllToAllState, sizes: Sizes, spec: RoutingSpec
    ) -> torch.Tensor:
        own_tokens = sizes.send_pairs.of(s.send_tokens, self.rank)
        if len(s.blocks):
            arrived = exchange.wait()
            sources = [(arrived.get(r, part.rows), None) for r in range(self.size)]
            sources[self.rank] = part.rows, own_tokens
            rows = expand_blocks(sources, s.row_places, s.blocks.tolist(), s.splits.tolist(), part.padding)
            exchange.release()
            return rows
        gather_rows(part.rows, own_tokens, sizes.recv_pairs.of(exchange.recv, self.rank))
        exchange.finish()
        if spec.layout == "rank":
            return fit(exchange.recv, len(s.rows), part.padding)
        return expand(exchange.recv, s.rows, part.padding)

    # --- combine ---

    def combine(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        s = AllToAllState(*state)
        sizes = Sizes.unpack(s.host_sizes, self.size, spec.num_topk, spec.layout)
        arrivals = sizes.recv_pairs

        # The sums that travel come first, this rank's own while they are under way.
        if spec.layout == "rank":
            partial = fit(rows, arrivals.total)
        else:
            partial = self.scratch("combine send", rows, arrivals.total)
            before, own, after = _local_sums(rows, s, sizes)
            first, last = arrivals.starts[self.rank], arrivals.starts[self.rank + 1]
            add_rows(before[:1], before[1:], partial[:first])
            add_rows(after[:1], after[1:], partial[last:])
        returned = self.scratch("combine receive", rows, sizes.send_pairs.total)
        exchange = Exchange(
            self, partial, arrivals, returned, sizes.send_pairs, "the combine of rows", own=False
        )
        if row_weights is not None:
            weights_exchange = self._start_combining_weights(row_weights, s, sizes)
        if spec.layout == "expert":
            add_rows(own[:1], own[1:], partial[first:last])
        sources = {**exchange.wait(), self.rank: arrivals.of(partial, self.rank)}

        y = rows.new_empty(len(s.tokens), *rows.shape[1:])
        terms = _owner_sums(sources, s, sizes)
        add_rows(terms[: self.size], terms[self.size :], y, biases)
        exchange.release()
        if row_weights is None:
            return y, None
        weights_exchange.finish()
        topk_weights = row_weights.new_zeros(len(s.tokens) * spec.num_topk)
        topk_weights.index_copy_(0, s.send_entries, weights_exchange.recv)
        return y, topk_weights.view(len(s.tokens), spec.num_topk)

    def _start_combining_weights(self, row_weights: torch.Tensor, s: AllToAllState, sizes: Sizes) -> Exchange:
        with_dropped = torch.cat([row_weights.flatten(), row_weights.new_zeros(1)])
        arrived = with_dropped.index_select(0, s.entry_rows)
        entries = row_weights.new_empty(sizes.send_entries.total)
        phase = "the combine of weights"
        return Exchange(self, arrived, sizes.recv_entries, entries, sizes.send_entries, phase)


class Exchange:
    """Segments of ``send`` on their way to their ranks, and of ``recv`` from theirs.

    Exchanges end (`finish`, or `wait` and `release`) in the order in which they began.
    ``own``: this rank's own segment is copied at once; otherwise the caller sees to it.
    """

    def __init__(
        self,
        backend: AllToAllBackend,
        send: torch.Tensor,
        send_to: Segments,
        recv: torch.Tensor,
        recv_from: Segments,
        phase: str,
        own: bool = True,
    ) -> None:
        self.recv = recv
        self._backend = backend
        sends = [Message(r, send_to.of(send, r)) for r in backend.peers() if send_to.counts[r]]
        self._receives = [Message(r, recv_from.of(recv, r)) for r in backend.peers() if recv_from.counts[r]]
        with _Clock(backend):
            self._transfer = backend.start(sends, self._receives, phase)
        if own:
            recv_from.of(recv, backend.rank).copy_(send_to.of(send, backend.rank))

    def wait(self) -> dict[int, torch.Tensor]:
        """What came from each peer, where it lies; valid until `release`."""
        with _Clock(self._backend):
            arrived = self._transfer.wait()
        return {message.peer: data for message, data in zip(self._receives, arrived, strict=True)}

    def release(self) -> None:
        with _Clock(self._backend):
            self._transfer.release()

    def finish(self) -> None:
        """Have everything in ``recv``."""
        with _Clock(self._backend):
            arrived = self._transfer.wait()
            for message, data in zip(self._receives, arrived, strict=True):
                if data is not message.tensor:
                    message.tensor.copy_(data)
            self._transfer.release()


class _Clock:
    """Adds what passes within it to the backend's communication_s."""

    def __init__(self, backend: AllToAllBackend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._backend.communication_s += time.perf_counter() - self._start


def _local_sums(rows: torch.Tensor, s: AllToAllState, sizes: Sizes) -> list[list[Terms]]:
    """The sums inside this rank for the arrivals before its own, its own, and after; each a list by slot."""
    terms = _split_terms([rows] * len(sizes.local_sums), s.local_targets, s.local_sources, sizes.local_sums)
    num_slots = len(terms) // NUM_RANGES
    return [terms[i * num_slots : (i + 1) * num_slots] for i in range(NUM_RANGES)]


def _owner_sums(sources: dict[int, torch.Tensor], s: AllToAllState, sizes: Sizes) -> list[Terms]:
    """The sums over ranks, by (slot, rank)."""
    num_ranks = len(sizes.send_pairs.counts)
    anything = next(iter(sources.values()))  # for ranks that got and return nothing
    by_list = [sources.get(i % num_ranks, anything) for i in range(len(sizes.owner_sums))]
    return _split_terms(by_list, s.owner_targets, s.owner_sources, sizes.owner_sums)


def _split_terms(
    rows: list[torch.Tensor], targets: torch.Tensor, sources: torch.Tensor, sizes: list[int]
) -> list[Terms]:
    return [Terms(*parts) for parts in zip(rows, targets.split(sizes), sources.split(sizes), strict=True)]
