"""Rows sorted by expert: which belong to which."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ep.errors import InvalidInput


class RowGroups:
    """Expert ``e`` owns ``tokens_per_expert[e]`` consecutive rows of ``num_rows``, in order of ``e``.

    ``tokens_per_expert``: int64 ``[L]``, on the device of the rows. ``splits``: the same on the host, if known there.
    What goes past ``num_rows`` is cut off.
    """

    def __init__(self, tokens_per_expert: torch.Tensor, splits: Sequence[int] | None, num_rows: int) -> None:
        if splits is not None and len(splits) != len(tokens_per_expert):
            raise InvalidInput(
                f"splits has {len(splits)} experts, tokens_per_expert has {len(tokens_per_expert)}; they must agree"
            )
        self.tokens_per_expert = tokens_per_expert
        self.num_rows = num_rows
        self._splits = None if splits is None else self._cut(splits)
        self._ends: torch.Tensor | None = None

    @property
    def are_known(self) -> bool:
        """Whether `splits` waits for nothing."""
        return self._splits is not None

    @property
    def splits(self) -> list[int]:
        """Rows of each expert. Waits for the device if the host was not told."""
        if self._splits is None:
            self._splits = self._cut(self.tokens_per_expert.tolist())
        return self._splits

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First row and end of each expert; waits as `splits` does."""
        bounds, start = [], 0
        for size in self.splits:
            bounds.append((start, start + size))
            start += size
        return bounds

    @property
    def ends(self) -> torch.Tensor:
        """The end of each expert's rows, int32 ``[L]``, on the device."""
        if self._ends is None:
            ends = self.tokens_per_expert.cumsum(0).clamp(max=self.num_rows)
            self._ends = ends.to(torch.int32)
        return self._ends

    def part(self, first: int, end: int) -> tuple[RowGroups, slice]:
        """Of the experts from ``first`` up to ``end`` alone, and where their rows are; waits as `splits` does."""
        if (first, end) == (0, len(self.tokens_per_expert)):
            return self, slice(0, self.num_rows)
        start = sum(self.splits[:first])
        splits = self.splits[first:end]
        rows = slice(start, start + sum(splits))
        return RowGroups(self.tokens_per_expert[first:end], splits, rows.stop - start), rows

    def _cut(self, splits: Sequence[int]) -> list[int]:
        left, cut = self.num_rows, []
        for size in splits:
            cut.append(min(size, left))
            left -= cut[-1]
        return cut
