"""V1's low-latency dispatch and combine: few tokens, fixed shapes, no wait of the host.

One row travels for each (token, rank), as in the normal calls; a table then tells where each of a token's experts here
has its row (`low_latency_tables`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch

from ...errors import InvalidInput, PeerTimeoutError
from . import transport
from .fp8 import quantize
from .layout import local_ids, pack_ids, token_numbers
from .low_latency_tables import Hook, Tables, add_up, expand, make_tables, scattered
from .members import Members, Roll
from .routing import RankRouting
from .streams import CommStream
from .transport import Communicators

Result = TypeVar("Result")

SCALES_IN_WORD = 4


class Sent(NamedTuple):
    """A dispatch, as combine needs it."""

    members: Members
    routing: RankRouting
    tables: Tables
    topk_idx: torch.Tensor


class Handle(tuple):
    """``(src_info, layout_range, T, H, E)``.

    ``src_info [L, R * T]`` int32: the row's token on its source rank. ``layout_range [L, R]`` int64: the first row from
    rank r in the upper 32 bits, the number of rows in the lower.
    """

    sent: Sent

    @staticmethod
    def make(values: tuple, sent: Sent) -> Handle:
        handle = Handle(values)
        handle.sent = sent
        return handle


class LowLatencyMode:
    def __init__(self, communicators: Communicators, enable_shrink: bool, timeout_s: float) -> None:
        self.rank, self.size = communicators.rank, communicators.size
        self._enable_shrink = enable_shrink
        self._roll = Roll(communicators, timeout_s)
        self._combine_buffers: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._num_combines = 0

    def close(self) -> None:
        self._roll.close()
        self._combine_buffers.clear()

    # --- dispatch ---

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        stream: CommStream,
        *,
        stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        fp8: str | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple:
        _check_common(wait_stats, async_finish, return_recv_hook)
        self._check_dispatch(x, topk_idx, max_tokens, num_experts, stats, fp8)
        hooks: list[Hook] = []

        def call() -> tuple:
            payload = quantize(x, rounded=fp8 != "exact") if fp8 else (x,)
            sent, received = self._send(payload, topk_idx, max_tokens, num_experts)
            shape = num_experts // self.size, self.size * max_tokens
            expanded, fill = expand(received, sent.tables, shape, as_exponents=fp8 == "ue8m0")
            counts = sent.tables.per_expert_and_rank.sum(1, dtype=torch.int32)

            def receive() -> None:
                fill()
                if stats is not None:
                    with _able_to_write(stats):
                        stats.add_(counts)

            hooks.append(receive)
            if not return_recv_hook:
                receive()
            handle = self._handle(sent, shape, max_tokens, x.shape[1], num_experts)
            return expanded if fp8 else expanded[0], counts, handle

        result, event = stream.run(
            call, x.device, async_finish=bool(async_finish), inputs=[x, topk_idx, stats]
        )
        return *result, event, _as_hook(hooks[0]) if return_recv_hook else None

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
            ids = local_ids(ids, self.rank, per_rank, torch.int64)
            sources, tokens = sources.flatten() - 1, tokens.flatten() - 1
            tables = make_tables(ids, sources, tokens, per_rank, self.size, self.size * max_tokens)
            return Sent(members, routing, tables, topk_idx), (rows, *scales)

        return self._among_members(send)

    def _routing(
        self, members: Members, topk_idx: torch.Tensor, max_tokens: int, per_rank: int
    ) -> RankRouting:
        """To those members that hold an expert of the token."""
        holders = torch.where(topk_idx < 0, -1, topk_idx // per_rank)
        in_rank = (holders.unsqueeze(2) == members.ranks_on(topk_idx.device)).any(1)
        return RankRouting(members.communicators, in_rank, max_tokens, len(members.ranks) * max_tokens)

    def _handle(
        self, sent: Sent, shape: tuple[int, int], max_tokens: int, hidden: int, num_experts: int
    ) -> Handle:
        tables = sent.tables
        sources, fill = scattered(tables.source_token.unsqueeze(1), tables.slots, shape)
        fill()
        counts = tables.per_expert_and_rank
        begins = counts.cumsum(1) - counts
        layout_range = (begins << 32) | counts
        return Handle.make((sources.squeeze(2), layout_range, max_tokens, hidden, num_experts), sent)

    # --- combine ---

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        stream: CommStream,
        *,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
    ) -> tuple:
        _check_common(wait_stats, async_finish, return_recv_hook)
        sent = self._check_combine(x, topk_idx, topk_weights, handle, out)
        rows = self._combine_buffer(handle) if zero_copy else x
        self._num_combines += 1
        hooks: list[Hook] = []

        def call() -> torch.Tensor:
            sums = self._bring_back(rows.flatten(0, 1), topk_idx, topk_weights, handle, sent)
            if out is None and not return_recv_hook:
                return sums
            target = torch.empty_like(sums) if out is None else out

            def receive() -> None:
                with _able_to_write(target):
                    target.copy_(sums)

            hooks.append(receive)
            if not return_recv_hook:
                receive()
            return target

        inputs = [x, topk_idx, topk_weights, out]
        result, event = stream.run(call, x.device, async_finish=bool(async_finish), inputs=inputs)
        return result, event, _as_hook(hooks[0]) if return_recv_hook else None

    def _bring_back(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        sent: Sent,
    ) -> torch.Tensor:
        max_tokens, num_experts = handle[2], handle[4]
        words = torch.cat([topk_weights, pack_ids(topk_idx).view(torch.float32)], dim=1)

        def bring_back(members: Members) -> torch.Tensor:
            routing, slots = sent.routing, sent.tables.slots
            if members != sent.members:  # someone was masked or taken back since the dispatch
                routing = self._routing(members, sent.topk_idx, max_tokens, num_experts // self.size)
                slots = slots_among(members, sent, routing.num_rows)
            weights, ids = routing.send_words(words).chunk(2, dim=1)
            asked = ids.contiguous().view(torch.int32) > 0
            return routing.bring_back(add_up(rows, torch.where(asked, slots, -1), weights))

        return self._among_members(bring_back)

    def next_combine_buffer(self, handle: Handle) -> torch.Tensor:
        _check_handle(handle)
        return self._combine_buffer(handle)

    def _combine_buffer(self, handle: Handle) -> torch.Tensor:
        """One of two, in turns."""
        shape = *handle[0].shape, handle[3]
        device = handle[0].device
        buffers = self._combine_buffers.get((*shape, device))
        if buffers is None:
            buffers = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
            self._combine_buffers[(*shape, device)] = buffers
        return buffers[self._num_combines % 2]

    # --- masks ---

    def update_mask(self, rank: int, mask: bool) -> None:
        self._check_shrink()
        self._roll.mask(rank, bool(mask))

    def query_mask(self, mask_status: torch.Tensor) -> None:
        self._check_shrink()
        transport.check_numbers("mask_status", mask_status, (self.size,), torch.int32)
        mask_status.copy_(torch.tensor(self._roll.status(), dtype=torch.int32))

    def clean_mask(self) -> None:
        self._check_shrink()
        self._roll.clear()

    def _check_shrink(self) -> None:
        if not self._enable_shrink:
            raise InvalidInput("ranks are masked in a Buffer made with enable_shrink=True; this one is not")

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

    # --- checks ---

    def _check_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        stats: torch.Tensor | None,
        fp8: str | None,
    ) -> None:
        transport.check_rows("x", x)
        if x.dtype != torch.bfloat16:
            raise InvalidInput(f"x is {x.dtype}; low-latency calls take torch.bfloat16")
        if len(x) > max_tokens:
            raise InvalidInput(
                f"x has {len(x)} tokens, more than num_max_dispatch_tokens_per_rank={max_tokens}"
            )
        if num_experts < 1 or num_experts % self.size:
            raise InvalidInput(
                f"num_experts is {num_experts}; it must be a multiple of {self.size}, the ranks"
            )
        _check_ids(topk_idx, len(x))
        if stats is not None:
            shape = (num_experts // self.size,)
            transport.check_numbers("cumulative_local_expert_recv_stats", stats, shape, torch.int32)
        if fp8 and x.shape[1] % 16:
            raise InvalidInput(f"hidden is {x.shape[1]}; FP8 rows need a multiple of 16")
        if fp8 == "ue8m0" and -(-x.shape[1] // 128) % SCALES_IN_WORD:
            raise InvalidInput(
                f"hidden is {x.shape[1]}, which makes {-(-x.shape[1] // 128)} scales; use_ue8m0 packs four to a word: "
                "use a multiple of 512"
            )

    def _check_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        out: torch.Tensor | None,
    ) -> Sent:
        _check_handle(handle)
        hidden = handle[3]
        sent = handle.sent
        transport.check_numbers("x", x, (*handle[0].shape, hidden), torch.bfloat16)
        if topk_idx.shape != sent.topk_idx.shape:
            raise InvalidInput(
                f"topk_idx has shape {tuple(topk_idx.shape)}; this handle's dispatch had {tuple(sent.topk_idx.shape)}"
            )
        _check_ids(topk_idx, len(topk_idx))
        transport.check_numbers("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32)
        if out is not None:
            transport.check_numbers("out", out, (len(topk_idx), hidden), torch.bfloat16)
        return sent


def slots_among(members: Members, sent: Sent, num_rows: int) -> torch.Tensor:
    """`Tables.slots` of the rows that other members would have had here: those of ranks now gone are left out.

    Nothing arrived from ranks that were masked at the dispatch: their rows have no slots.
    """
    sources = sent.tables.source_rank
    stays = (sources.unsqueeze(1) == members.ranks_on(sources.device)).any(1)
    order = stays.logical_not().sort(stable=True).indices
    slots = torch.where(stays.unsqueeze(1), sent.tables.slots, -1)[order]
    missing = max(0, num_rows - len(slots))
    return torch.nn.functional.pad(slots, (0, 0, 0, missing), value=-1)[:num_rows]


def _able_to_write(tensor: torch.Tensor) -> AbstractContextManager:
    """What was made under inference mode can be written only under it."""
    return torch.inference_mode(tensor.is_inference())


def _as_hook(receive: Hook) -> Hook:
    def hook() -> None:
        with torch.inference_mode(False), torch.no_grad():
            receive()

    return hook


def _check_common(wait_stats: torch.Tensor | None, async_finish: bool, return_recv_hook: bool) -> None:
    if wait_stats is not None:
        raise NotImplementedError(
            "statistics of the time spent waiting for each rank are not there; pass None for *_wait_recv_cost_stats"
        )
    if async_finish and return_recv_hook:
        raise InvalidInput("async_finish and return_recv_hook are both set; they exclude each other")


def _check_handle(handle: Handle) -> None:
    if not isinstance(handle, Handle):
        raise InvalidInput(
            f"handle is a {type(handle).__name__}; it must be what low_latency_dispatch returned"
        )


def _check_ids(topk_idx: torch.Tensor, num_tokens: int) -> None:
    dtype = torch.int32 if topk_idx.dtype == torch.int32 else torch.int64
    transport.check_numbers("topk_idx", topk_idx, (num_tokens, None), dtype)
