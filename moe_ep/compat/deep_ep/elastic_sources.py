"""Where the rows of a V2 dispatch came from: what EPHandle's metadata says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

NO_TOKEN = 0
"""In place of a token's number plus one."""


class Sources(ABC):
    """Of the (token, rank) pairs of one rank, in the order (source rank, token).

    num_ranks: R. max_tokens: T, by which tokens are numbered. expands: there is a row for each of a pair's experts.
    static: the host does not know how many pairs have come.
    """

    num_ranks: int
    max_tokens: int
    expands: bool
    static: bool
    _metadata: torch.Tensor | None = None

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""

    @abstractmethod
    def ends_by_rank(self) -> torch.Tensor:
        """psum_num_recv_tokens_per_scaleup_rank."""

    @abstractmethod
    def num_tokens(self) -> int:
        """n, the most there can be without a CPU sync."""

    @abstractmethod
    def _work_out_metadata(self) -> torch.Tensor: ...

    def metadata(self) -> torch.Tensor:
        """recv_src_metadata; the same tensor each time."""
        if self._metadata is None:
            self._metadata = self._work_out_metadata()
        return self._metadata

    def match(self, replaced: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the dispatch, and those that the caller's metadata has for them; -1 in both for none."""
        own = self.metadata()
        size = self.num_ranks * self.max_tokens
        index = own.new_full((size + 1,), -1).long()
        numbers = own[:, 0].long()
        index[torch.where(numbers < 0, size, numbers)] = torch.arange(len(own), device=own.device)
        wanted = replaced[:, 0].long()
        pairs = index[torch.where(wanted < 0, size, wanted)]
        pairs = torch.where(wanted < 0, -1, pairs)
        if not self.expands:
            return pairs, torch.arange(len(replaced), device=own.device)
        rows = own[pairs.clamp(min=0), 2:].long()
        given = replaced[:, 2:].long()
        rows = torch.where((given < 0) | (pairs < 0).unsqueeze(1), -1, rows)
        return rows.flatten(), given.flatten()


@dataclass
class TravelledSources(Sources):
    """By what travelled with the rows.

    numbers: int32 ``[rows]``, source rank * T + token + 1, or NO_TOKEN. ids: ``[rows, K]``, of which ``first_expert``
    and the ``num_local - 1`` behind it are of this rank. segments: rows of each local expert in an expanded layout
    ``[L]``; None for a plain one.
    """

    numbers: torch.Tensor
    ids: torch.Tensor
    first_expert: int
    num_local: int
    segments: torch.Tensor | None
    num_ranks: int
    max_tokens: int
    static: bool

    @property
    def expands(self) -> bool:
        return self.segments is not None

    def tensors(self) -> list[torch.Tensor]:
        return [self.numbers, self.ids]

    def arrived(self) -> torch.Tensor:
        """Whether each number, beginning with NO_TOKEN, is a token that came: int32 ``[R * T + 1]``."""
        arrived = self.numbers.new_zeros(self.num_ranks * self.max_tokens + 1)
        arrived[self.numbers.long()] = 1
        arrived[NO_TOKEN] = 0
        return arrived

    def ends_by_rank(self) -> torch.Tensor:
        per_rank = self.arrived()[1:].view(self.num_ranks, self.max_tokens).sum(1)
        return per_rank.cumsum(0).int()

    def num_tokens(self) -> int:
        if self.static:
            return self.num_ranks * self.max_tokens
        return len(self.numbers) if self.segments is None else int(self.arrived().sum())

    def _work_out_metadata(self) -> torch.Tensor:
        num_topk = self.ids.shape[1]
        expert_here = self.ids - self.first_expert
        num_pairs = self.num_tokens()
        numbers = self.numbers.long()
        place = (self.arrived().cumsum(0) - 1)[numbers]
        place = torch.where(numbers == NO_TOKEN, num_pairs, place)  # the last row takes what is nobody's
        k = torch.arange(1, num_topk + 1, device=numbers.device)
        is_here = (expert_here >= 0) & (expert_here < self.num_local)
        highest_k = (is_here * k).amax(1) - 1
        metadata = self.numbers.new_full((num_pairs + 1, 2 + num_topk), -1)
        metadata[place, 0] = self.numbers - 1
        metadata[place, 1] = ((numbers - 1) // self.max_tokens * num_topk + highest_k).int()
        if self.segments is not None:
            rows = torch.arange(len(numbers), device=numbers.device)
            expert = torch.searchsorted(self.segments.cumsum(0), rows, right=True)
            k_of_row = (expert_here == expert.unsqueeze(1)).int().argmax(1)
            metadata[place, 2 + k_of_row] = rows.int()
        return metadata[:num_pairs]


@dataclass
class PlannedSources(Sources):
    """By the tables of the plan, which has seen the routing of all ranks; nothing travelled.

    starts: int32 ``[R + 1]``, pairs of all ranks before; the last is n. tokens: int32 ``[R * room]``, of each pair, on
    its rank. rows: int32 ``[R, room, K]``, by a rank's pairs: the row of each k, -1 for what is not here.
    num_pairs: n, None where only the device knows.
    """

    starts: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    num_pairs: int | None
    num_ranks: int
    max_tokens: int
    expands: bool
    static: bool

    def tensors(self) -> list[torch.Tensor]:
        return [self.starts, self.tokens, self.rows]

    def ends_by_rank(self) -> torch.Tensor:
        return self.starts[1:].clone()

    def num_tokens(self) -> int:
        if self.static:
            return self.num_ranks * self.max_tokens
        if self.num_pairs is None:
            self.num_pairs = int(self.starts[-1])
        return self.num_pairs

    def _work_out_metadata(self) -> torch.Tensor:
        num_topk = self.rows.shape[2]
        pair = torch.arange(self.num_tokens(), dtype=torch.int32, device=self.starts.device)
        is_there = pair < self.starts[-1]
        source = torch.searchsorted(self.starts[1:], pair, right=True).clamp(max=self.num_ranks - 1)
        place = (pair - self.starts[source]).clamp(max=self.rows.shape[1] - 1)
        rows = self.rows[source, place]
        k = torch.arange(1, num_topk + 1, device=rows.device)
        highest_k = ((rows >= 0) * k).amax(1) - 1
        number = source * self.max_tokens + self.tokens[: len(pair)]
        metadata = rows.new_full((len(pair), 2 + num_topk), -1)
        metadata[:, 0] = torch.where(is_there, number, -1)
        metadata[:, 1] = torch.where(is_there, source * num_topk + highest_k, -1)
        if self.expands:
            metadata[:, 2:] = torch.where(is_there.unsqueeze(1), rows, -1)
        return metadata
