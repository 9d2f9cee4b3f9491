"""What a dispatch gives back: the rows, and the handle that combine and later calls need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backends.base import Routing, RoutingSpec
from .communicator import find
from .errors import ReceiveOverflowError
from .fp8 import Fp8Tokens


@dataclass(frozen=True)
class DispatchHandle:
    """Where the rows of one dispatch came from: tensors and numbers, owned by whoever holds it.

    Handles share nothing with each other or with later calls, so any number may be alive at once, and one may be used
    any number of times, in any order.
    """

    communicator_id: int
    spec: RoutingSpec
    state: tuple[torch.Tensor, ...]
    """The backend's routing state (`moe_ep.backends.base.Routing`)."""

    @property
    def layout(self) -> str:
        return self.spec.layout

    @property
    def num_tokens(self) -> int:
        """T, the tokens that this rank sent."""
        return self.state[Routing.TOKENS].shape[0]

    @property
    def num_rows(self) -> int:
        """N, the rows of the dispatched tokens, padding included."""
        return self.state[Routing.ROWS].shape[0]

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """Rows that hold a token, for each local expert: int64 ``[L]``."""
        return self.state[Routing.TOKENS_PER_EXPERT]

    @property
    def padded_tokens_per_expert(self) -> torch.Tensor:
        """`tokens_per_expert`, each rounded up to a multiple of ``expert_alignment``: int64 ``[L]``."""
        return self.state[Routing.PADDED_TOKENS_PER_EXPERT]

    @property
    def splits(self) -> list[int] | None:
        """Rows of each local expert in the output, as numbers on the host.

        The same as `padded_tokens_per_expert`, less what ``max_recv_rows`` cut off. None where only the device knows.
        """
        splits = self.state[Routing.SPLITS]
        return splits.tolist() if len(splits) else None

    @property
    def rows_needed(self) -> torch.Tensor:
        """Rows of the exact result, which ``max_recv_rows`` may not have room for: int64 ``[1]``."""
        return self.state[Routing.ROWS_NEEDED]

    def raise_if_overflow(self) -> None:
        """Raise ReceiveOverflowError if ``max_recv_rows`` was too small. Waits for the device."""
        limit = self.spec.max_recv_rows
        if limit is None:
            return
        needed = int(self.rows_needed)
        find(self.communicator_id)._impl.check_health()
        if needed > limit:
            raise ReceiveOverflowError(
                f"this rank was sent {needed} rows, max_recv_rows has room for {limit}; rows past it were dropped. "
                f"Raise max_recv_rows to at least {needed}, or leave it out for exact sizes"
            )


@dataclass(frozen=True)
class DispatchOutput:
    """What `moe_ep.dispatch` returns.

    - ``tokens``: ``[N, H]``, or Fp8Tokens of that shape
    - ``weights``: float32 ``[N]`` (expert layout) or ``[N, K]`` (rank layout); None if no topk_weights were given
    - ``topk_idx``: rank layout: local expert ids ``[N, K]`` int64, -1 for none; expert layout: None
    - ``handle``: for `moe_ep.combine`, and for dispatching again by the same routing
    """

    tokens: torch.Tensor | Fp8Tokens
    weights: torch.Tensor | None
    topk_idx: torch.Tensor | None
    handle: DispatchHandle

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        return self.handle.tokens_per_expert

    @property
    def padded_tokens_per_expert(self) -> torch.Tensor:
        return self.handle.padded_tokens_per_expert

    @property
    def splits(self) -> list[int] | None:
        return self.handle.splits
