"""Low-latency calls by the kernels of csrc/low_latency, on GPUs that reach each other's memory."""

from __future__ import annotations

import torch

from ...backends.low_latency import LowLatency, Sent, Shape
from ...backends.nvlink import NvlinkBackend
from .low_latency_tables import Dispatched, Hook
from .transport import Communicators

_FORMATS = {None: "bfloat16", "exact": "fp8", "rounded": "fp8_rounded", "ue8m0": "fp8_exponents"}


class KernelCalls:
    """As `low_latency_operators.OperatorCalls`. Masks are on the device, where kernels set them, too."""

    def __init__(self, nvlink: NvlinkBackend, enable_shrink: bool, timeout_s: float) -> None:
        self._calls = LowLatency(nvlink, timeout_s)
        self._enable_shrink = enable_shrink

    @staticmethod
    def make(communicators: Communicators, enable_shrink: bool, timeout_s: float) -> KernelCalls | None:
        """None where ranks' GPUs don't reach each other."""
        nvlink = communicators.nvlink()
        return None if nvlink is None else KernelCalls(nvlink, enable_shrink, timeout_s)

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
        self._check_health()
        shape = Shape(x.shape[1], max_tokens, num_experts)
        received, sent, receive = self._calls.dispatch(x, topk_idx, shape, _FORMATS[fp8], statistics, apart)
        rows = (received.rows,) if received.scales is None else (received.rows, received.scales)
        return Dispatched(rows, received.counts, received.source_token, received.ranges, sent), receive

    def combine(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent,
        out: torch.Tensor | None,
        apart: bool,
    ) -> tuple[torch.Tensor, Hook | None]:
        self._check_health()
        return self._calls.combine(rows, topk_idx, topk_weights, sent, out, apart)

    def mask(self, rank: int, masked: bool) -> None:
        self._calls.mask(rank, masked)

    def mask_status(self) -> torch.Tensor:
        """int32 ``[R]`` on the device."""
        return self._calls.masked

    def clear_masks(self) -> None:
        self._calls.clear_masks()

    def close(self) -> None:
        self._calls.close()

    def _check_health(self) -> None:
        if not self._enable_shrink:
            self._calls.check_health()
