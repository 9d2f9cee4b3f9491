"""Low-latency calls by moe_ep's operators: on CPUs, and on GPUs that don't reach each other's memory.

One row travels for each (token, rank), as in the normal calls; a table then tells where each of a token's experts here
has its row (`low_latency_tables`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch

from ...errors import PeerTimeoutError
from .fp8 import quantize
from .layout import local_ids, pack_ids, token_numbers
from .low_latency_tables import (
    Dispatched,
    Hook,
    Tables,
    add_up,
    expand,
    make_tables,
    row_ranges,
    scattered,
)
from .members import Members, Roll
from .routing import RankRouting
from .transport import Communicators

Result = TypeVar("Result")


class Sent(NamedTuple):
    """A dispatch, as combine needs it."""

    members: Members
    routing: RankRouting
    tables: Tables
    topk_idx: torch.Tensor
    max_tokens: int
    num_experts: int


class OperatorCalls:
    """The second result of `dispatch` and `combine` is what receives, if that is to come ``apart``, or None."""

    def __init__(self, communicators: Communicators, enable_shrink: bool, timeout_s: float) -> None:
        self.rank, self.size = communicators.rank, communicators.size
        self._enable_shrink = enable_shrink
        self._roll = Roll(communicators, timeout_s)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        fp8: str | None,
        statistics: torch.Tensor | None,
        apart: bool,
    ) -> tuple[Dispatched, Hook | None]:
        payload = quantize(x, rounded=fp8 != "exact") if fp8 else (x,)
        sent, arrived = self._send(payload, topk_idx, max_tokens, num_experts)
        shape = num_experts // self.size, self.size * max_tokens
        rows, fill = expand(arrived, sent.tables, shape, as_exponents=fp8 == "ue8m0")
        source_token, fill_tokens = scattered(sent.tables.source_token.unsqueeze(1), sent.tables.slots, shape)
        fill_tokens()
        counts = sent.tables.per_expert_and_rank.sum(1, dtype=torch.int32)
        dispatched = Dispatched(rows, counts, source_token.squeeze(2), row_ranges(sent.tables), sent)

        def receive() -> None:
            fill()
            if statistics is not None:
                with _able_to_write(statistics):
                    statistics.add_(counts)

        return dispatched, _now_or_later(receive, apart)

    def combine(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent,
        out: torch.Tensor | None,
        apart: bool,
    ) -> tuple[torch.Tensor, Hook | None]:
        sums = self._bring_back(rows.flatten(0, 1), topk_idx, topk_weights, sent)
        if out is None and not apart:
            return sums, None
        target = torch.empty_like(sums) if out is None else out

        def receive() -> None:
            with _able_to_write(target):
                target.copy_(sums)

        return target, _now_or_later(receive, apart)

    def mask(self, rank: int, masked: bool) -> None:
        self._roll.mask(rank, masked)

    def mask_status(self) -> torch.Tensor:
        """int32 ``[R]``: 1 for each masked rank."""
        return torch.tensor(self._roll.status(), dtype=torch.int32, device="cpu")

    def clear_masks(self) -> None:
        self._roll.clear()

    def close(self) -> None:
        self._roll.close()

    def _send(
        self, payload: tuple[torch.Tensor, ...], topk_idx: torch.Tensor, max_tokens: int, num_experts: int
    ) -> tuple[Sent, tuple[torch.Tensor, ...]]:
        """Rows ``[M, H]`` and, if there are any, scales ``[M, S]``."""
        per_rank = num_experts // self.size
        me = torch.full((len(topk_idx), 1), self.rank + 1, dtype=torch.int32, device=topk_idx.device)
        numbers = [pack_ids(topk_idx), token_numbers(len(topk_idx), topk_idx.device), me, *payload[1:]]

        def send(members: Members) -> tuple[Sent, tuple[torch.Tensor, ...]]:
            routing = self._routing(members, topk_idx, max_tokens, per_rank)
            rows, (ids, tokens, sources, *scales) = routing.send(payload[0], numbers)
            ids, _ = local_ids(ids, self.rank, per_rank, torch.int64)
            sources, tokens = sources.flatten() - 1, tokens.flatten() - 1
            tables = make_tables(ids, sources, tokens, per_rank, self.size, self.size * max_tokens)
            return Sent(members, routing, tables, topk_idx, max_tokens, num_experts), (rows, *scales)

        return self._among_members(send)

    def _routing(
        self, members: Members, topk_idx: torch.Tensor, max_tokens: int, per_rank: int
    ) -> RankRouting:
        """To those members that hold an expert of the token."""
        holders = torch.where(topk_idx < 0, -1, topk_idx // per_rank)
        in_rank = (holders.unsqueeze(2) == members.ranks_on(topk_idx.device)).any(1)
        return RankRouting(members.communicators, in_rank, max_tokens, len(members.ranks) * max_tokens)

    def _bring_back(
        self, rows: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, sent: Sent
    ) -> torch.Tensor:
        words = torch.cat([topk_weights, pack_ids(topk_idx).view(torch.float32)], dim=1)

        def bring_back(members: Members) -> torch.Tensor:
            routing, slots = sent.routing, sent.tables.slots
            if members != sent.members:  # someone was masked or taken back since the dispatch
                per_rank = sent.num_experts // self.size
                routing = self._routing(members, sent.topk_idx, sent.max_tokens, per_rank)
                slots = _slots_among(members, sent, routing.num_rows)
            weights, ids = routing.send_words(words).chunk(2, dim=1)
            asked = ids.contiguous().view(torch.int32) > 0
            return routing.bring_back(add_up(rows, torch.where(asked, slots, -1), weights))

        return self._among_members(bring_back)

    def _among_members(self, call: Callable[[Members], Result]) -> Result:
        """With enable_shrink, once more whenever some did not answer, without them."""
        while True:
            members = self._roll.members()
            try:
                return call(members)
            except PeerTimeoutError as error:
                if not self._enable_shrink or not error.ranks:
                    raise
                self._roll.give_up(members, error.ranks)


def _slots_among(members: Members, sent: Sent, num_rows: int) -> torch.Tensor:
    """`Tables.slots` of the rows that other members would have had here: those of ranks now gone are left out.

    Nothing arrived from ranks that were masked at the dispatch: their rows have no slots.
    """
    sources = sent.tables.source_rank
    stays = (sources.unsqueeze(1) == members.ranks_on(sources.device)).any(1)
    order = stays.logical_not().sort(stable=True).indices
    slots = torch.where(stays.unsqueeze(1), sent.tables.slots, -1)[order]
    missing = max(0, num_rows - len(slots))
    return torch.nn.functional.pad(slots, (0, 0, 0, missing), value=-1)[:num_rows]


def _now_or_later(receive: Hook, later: bool) -> Hook | None:
    if later:
        return receive
    receive()
    return None


def _able_to_write(tensor: torch.Tensor) -> AbstractContextManager:
    """What was made under inference mode can be written only under it."""
    return torch.inference_mode(tensor.is_inference())
