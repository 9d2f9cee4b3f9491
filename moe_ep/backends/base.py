"""What a backend does for the layers above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..fp8 import quantize_rows

LAYOUTS = ("expert", "rank")


@dataclass(frozen=True)
class RoutingSpec:
    """What the rows of a dispatch shall look like; the same on every rank."""

    num_experts: int
    num_local_experts: int
    num_topk: int
    max_tokens_per_rank: int
    layout: str
    expert_alignment: int
    max_recv_rows: int | None


@dataclass(frozen=True)
class Part:
    """One ``[T, ...]`` tensor of a dispatch, with the value of rows that hold no token."""

    rows: torch.Tensor
    padding: float = 0.0


class Routing:
    """Names for the first tensors of every backend's routing state. What follows them is the backend's own.

    The state is a flat list of tensors so that it can be the output of one operator and the input of others, under
    torch.compile too.
    """

    TOKENS_PER_EXPERT = 0  # [L] int64
    PADDED_TOKENS_PER_EXPERT = 1  # [L] int64
    ROWS = 2  # rank layout: local expert ids [N, K] int64; expert layout: [N] int64, whose values are the backend's own
    ROWS_NEEDED = 3  # [1] int64: rows of the exact result
    SPLITS = 4  # on the host, int64: rows of each local expert in the output [L], or [0] where only the device knows
    TOKENS = 5  # [T, 0] int64: no numbers, but T as a shape, where torch.compile can follow it


class Backend(ABC):
    """Moves rows between the ranks of one communicator. Every method is called by all ranks in the same order.

    ``num_sms``: multiprocessors for the kernels of a call; None: as the communicator has it. It may differ between
    ranks and calls, and backends without kernels ignore it.
    """

    name: str
    rank: int
    size: int
    window_bytes = 0
    """Memory of this rank that other ranks' kernels write to."""
    available_sms: int | None = None
    """Multiprocessors that a call's kernels can have; None without kernels."""
    checks_ids = False
    """Whether `plan` finds bad expert ids itself; otherwise they must have been checked before."""

    @abstractmethod
    def plan(
        self,
        topk_idx: torch.Tensor,
        spec: RoutingSpec,
        num_sms: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> list[torch.Tensor]:
        """Exchange the routing ``topk_idx [T, K]`` and return the routing state (see `Routing`).

        ``meanwhile`` is called once: on a GPU behind the exchange's launch, before the host waits for its end.
        """

    @abstractmethod
    def dispatch(
        self,
        parts: Sequence[Part],
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Rows of every part, and of ``weights [T, K]`` the weights ``[N]`` or ``[N, K]``."""

    def dispatch_fp8(
        self,
        data: torch.Tensor,
        scale_inv: torch.Tensor,
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`dispatch` of quantised tokens: rows, their scales, row weights."""
        parts = [Part(data.view(torch.uint8)), Part(scale_inv, padding=1.0)]
        (data, scale_inv), row_weights = self.dispatch(parts, weights, state, spec, num_sms)
        return data.view(torch.float8_e4m3fn), scale_inv, row_weights

    def dispatch_quantised(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same of ``x [T, H]``, before it is sent or on the way."""
        return self.dispatch_fp8(*quantize_rows(x), weights, state, spec, num_sms)

    @abstractmethod
    def combine(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The transpose of dispatch: sums ``[T, H]``, and of the row weights ``[T, K]``."""

    @abstractmethod
    def state_devices(self, device: torch.device) -> list[torch.device]:
        """Where each tensor of the routing state lives, for tokens on ``device``."""

    @abstractmethod
    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """``[R, n]`` from every rank's int64 CPU tensor ``values [n]``; also a barrier."""

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_gather(torch.zeros(1, dtype=torch.int64, device="cpu"))

    def check_rows(self, name: str, rows: torch.Tensor) -> None:
        """Raise InvalidInput for rows that this backend can't move, before anything is sent."""

    def check_health(self) -> None:
        """Raise what has gone wrong since in calls that did not wait for the device."""

    def close(self) -> None:
        """Free what the backend holds. Not collective, safe to call twice."""
