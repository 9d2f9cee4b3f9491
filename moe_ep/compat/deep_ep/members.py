"""The ranks that take part in low-latency calls: all of a group, less those that are masked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ...backends.virtual import PostOffice, VirtualGroup
from ...errors import InvalidInput
from .transport import Communicators


@dataclass(frozen=True)
class Members:
    """Ranks of the whole group, ascending, and communicators of theirs, which number them 0, 1, ..."""

    ranks: tuple[int, ...]
    communicators: Communicators
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, compare=False)

    def ranks_on(self, device: torch.device) -> torch.Tensor:
        """``ranks`` as int64, copied there once: a copy from the host can't be part of a CUDA graph."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.ranks, device=device)
        return self._on_device[device]


class Roll:
    """Who is masked. Ranks that go on must mask alike: what one does alone would keep the others waiting."""

    def __init__(self, whole: Communicators, timeout_s: float) -> None:
        self.rank, self.size = whole.rank, whole.size
        self._group = whole.group
        self._timeout_s = timeout_s
        self._masked: set[int] = set()
        everyone = tuple(range(whole.size))
        self._known: dict[tuple[int, ...], Members] = {everyone: Members(everyone, whole)}
        self._groups_made = 0

    def members(self) -> Members:
        """Those who are not masked. Collective among them where they are new."""
        ranks = tuple(r for r in range(self.size) if r not in self._masked)
        members = self._known.get(ranks)
        if members is None:
            group = self._group if len(ranks) == self.size else self._smaller_group(ranks)
            members = self._known[ranks] = Members(ranks, Communicators(group, self._timeout_s))
        return members

    def mask(self, rank: int, masked: bool) -> None:
        if not 0 <= rank < self.size:
            raise InvalidInput(f"rank_to_mask is {rank}; ranks are 0 to {self.size - 1}")
        if masked and rank == self.rank:
            raise InvalidInput(
                f"rank_to_mask is {rank}, this rank itself; a rank that is out just stops calling"
            )
        (self._masked.add if masked else self._masked.discard)(rank)

    def give_up(self, members: Members, silent: tuple[int, ...]) -> None:
        """Mask those who did not answer, as ``members`` number them. Their communicators are out of step for good."""
        self._known.pop(members.ranks, None)
        self._masked.update(members.ranks[number] for number in silent)

    def status(self) -> list[int]:
        """1 for each masked rank, else 0."""
        return [int(rank in self._masked) for rank in range(self.size)]

    def clear(self) -> None:
        self._masked.clear()

    def close(self) -> None:
        for members in self._known.values():
            members.communicators.close()
        self._known.clear()

    def _smaller_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | VirtualGroup:
        self._groups_made += 1
        if isinstance(self._group, VirtualGroup):
            key = "members", ranks, self._groups_made
            office = self._group.share(key, lambda: PostOffice(len(ranks)))
            return VirtualGroup(ranks.index(self.rank), office, self._group.device)
        whole = self._group or dist.group.WORLD
        # Local synchronisation: the masked ranks are not there to take part.
        return dist.new_group(
            [dist.get_global_rank(whole, rank) for rank in ranks], use_local_synchronization=True
        )
