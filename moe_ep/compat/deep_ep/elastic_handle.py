"""EPHandle: what a V2 dispatch leaves behind, with deep_ep's attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import InvalidInput
from ...handle import DispatchHandle
from .elastic_sources import Sources
from .transport import outside_autograd
from .utils.event import EventHandle


class EPHandle:
    """The routing of one dispatch, for `ElasticBuffer.combine` and for dispatching again by it.

    A handle owns its tensors, and any number may be alive. Its attributes may be replaced; ``combine`` reads
    ``recv_src_metadata`` and ``num_sms`` again. R ranks, T = ``num_max_tokens_per_rank``, N tokens of this rank, n
    received (token, rank) pairs, K top-k, L local experts; tensors are int32 unless said otherwise.

    - ``do_expand``, ``num_experts``, ``expert_alignment``, ``num_max_tokens_per_rank``: as dispatched.
      ``num_sms``: as asked for, 0 = automatic. ``topk_idx [N, K]``: a clone, or with ``do_handle_copy=False`` the
      caller's own
    - ``num_recv_tokens``: n; ``num_expanded_tokens``: rows by expert, with alignment;
      ``num_recv_tokens_per_expert_list``: L numbers, each rounded up to the alignment. Without CPU sync the most there
      can be, and an empty list
    - ``psum_num_recv_tokens_per_scaleup_rank [R]``: end of each source rank's pairs; the last is n
    - ``psum_num_recv_tokens_per_expert [L]``: plain: the aligned counts' sums up to and with each expert; expanded: the
      row behind each expert's last token
    - ``num_unaligned_recv_tokens_per_expert [L]``
    - ``recv_src_metadata [n, 2 + K]``: source rank * T + token; source rank * K + the token's highest k here; with
      expansion, the row of each k, or -1
    - ``dst_buffer_slot_idx [N, K]``: own rank * T + the token's place among those for the destination, at the highest k
      of each destination; else -1
    - ``token_metadata_at_forward``, ``channel_linked_list``, ``cached_recv_src_metadata_before_sort``: None, as deep_ep
      has it within one NVLink domain and where rows need no sorting

    What is not at hand is worked out when it is first read, so that calls do not pay for it. The current stream then
    waits for ``ready``, the end of an asynchronous dispatch.
    """

    ready: EventHandle | None = None

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor,
        token_metadata_at_forward: torch.Tensor | None = None,
        channel_linked_list: torch.Tensor | None = None,
        cached_recv_src_metadata_before_sort: torch.Tensor | None = None,
    ) -> None:
        given = dict(locals())
        for name in ("self", "__class__"):
            given.pop(name, None)
        self.__dict__.update(given)

    @classmethod
    def of_dispatch(
        cls, routing: DispatchHandle, sources: Sources, known: dict[str, Any], derive: dict[str, Callable]
    ) -> EPHandle:
        """``known`` attributes by value, the rest by the functions that work them out."""
        handle = cls.__new__(cls)
        handle.__dict__.update(
            token_metadata_at_forward=None,
            channel_linked_list=None,
            cached_recv_src_metadata_before_sort=None,
            **known,
            ready=None,
            _routing=routing,
            _row_routing=None,
            _sources=sources,
            _derive=derive,
        )
        return handle

    @outside_autograd
    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet."""
        make = self.__dict__.get("_derive", {}).get(name)
        if make is None:
            raise AttributeError(f"EPHandle has no attribute {name!r}")
        if self.ready is not None:
            self.ready.current_stream_wait()
        value = make()
        setattr(self, name, value)
        return value

    def work_out_everything(self) -> None:
        """Before the end of a graph capture: what is worked out later would not change with the graph's replays."""
        for name in self._derive:
            getattr(self, name)

    def routing(self) -> DispatchHandle:
        routing = self.__dict__.get("_routing")
        if routing is None:
            raise InvalidInput(
                "this EPHandle was made by hand; combine and dispatch need one that a dispatch returned (its "
                "attributes may be replaced)"
            )
        return routing

    def tensors(self) -> list[torch.Tensor]:
        """All that the dispatch left in it."""
        routings = [each for each in (self.routing(), self._row_routing) if each is not None]
        states = [tensor for routing in routings for tensor in routing.state]
        return [*states, *self._sources.tensors()]

    def as_dispatched(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows [m, ...]`` in the places that the dispatch gave them, for all its rows.

        Fewer rows than the dispatch had are the first ones. Where the caller has replaced ``recv_src_metadata``, it
        says which row is whose.
        """
        num_rows = self.routing().num_rows
        replaced = self.__dict__.get("recv_src_metadata")
        own = self._sources.metadata() if replaced is not None else None
        if replaced is None or replaced.data_ptr() == own.data_ptr():
            if rows.shape[0] == num_rows:
                return rows
            as_it_was = replaced is None or len(replaced) == len(own)
            if rows.shape[0] > num_rows or (self.num_recv_tokens_per_expert_list and as_it_was):
                raise InvalidInput(f"there are {rows.shape[0]} rows; this handle's dispatch gave {num_rows}")
            full = rows.new_zeros(num_rows, *rows.shape[1:])
            full[: rows.shape[0]] = rows
            return full
        places, given = self._sources.match(replaced)
        full = rows.new_zeros(num_rows + 1, *rows.shape[1:])  # one more for what is nobody's
        if len(rows):
            full[torch.where(places < 0, num_rows, places)] = rows[given.clamp(min=0)]
        return full[:num_rows]


def slots_at_destination(
    topk_idx: torch.Tensor, rank: int, num_ranks: int, num_local: int, max_tokens: int
) -> torch.Tensor:
    """dst_buffer_slot_idx from ``topk_idx [N, K]``.

    >>> topk_idx = torch.tensor([[0, 3], [1, 0], [2, -1]])
    >>> slots_at_destination(topk_idx, rank=1, num_ranks=2, num_local=2, max_tokens=8)
    tensor([[ 8,  8],
            [-1,  9],
            [ 9, -1]], dtype=torch.int32)
    """
    ranks = torch.where(topk_idx < 0, num_ranks, topk_idx // num_local).long()
    later = (ranks.unsqueeze(2) == ranks.unsqueeze(1)).triu(diagonal=1).any(2)
    goes_to = torch.zeros(len(ranks), num_ranks + 1, dtype=torch.int32, device=ranks.device)
    goes_to.scatter_(1, ranks, 1)
    places = (goes_to.cumsum(0) - 1).gather(1, ranks)
    return torch.where((ranks < num_ranks) & ~later, rank * max_tokens + places, -1).int()
