"""V1's low-latency dispatch and combine: few tokens, fixed shapes, no wait of the host.

What is common to both ways of doing them: by kernels of their own (`low_latency_kernels`), and by moe_ep's operators
(`low_latency_operators`).
"""

from __future__ import annotations

import torch

from ...errors import InvalidInput
from . import transport
from .low_latency_kernels import KernelCalls
from .low_latency_operators import OperatorCalls
from .low_latency_tables import Dispatched, Hook
from .streams import CommStream, tensors_of
from .transport import Communicators

SCALES_IN_WORD = 4


class Handle(tuple):
    """``(src_info, layout_range, T, H, E)``.

    ``src_info [L, R * T]`` int32: the row's token on its source rank. ``layout_range [L, R]`` int64: the first row from
    rank r in the upper 32 bits, the number of rows in the lower.
    """

    dispatched: Dispatched

    @staticmethod
    def make(dispatched: Dispatched, max_tokens: int, hidden: int, num_experts: int) -> Handle:
        handle = Handle((dispatched.source_token, dispatched.ranges, max_tokens, hidden, num_experts))
        handle.dispatched = dispatched
        return handle

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return list(tensors_of((*self[:2], tuple(self.dispatched.sent))))


class LowLatencyMode:
    def __init__(self, communicators: Communicators, enable_shrink: bool, timeout_s: float) -> None:
        self.size = communicators.size
        self._communicators = communicators
        self._enable_shrink = enable_shrink
        self._timeout_s = timeout_s
        self._operators = OperatorCalls(communicators, enable_shrink, timeout_s)
        self._kernels: KernelCalls | None = None
        self._combine_buffers: dict[tuple, list[torch.Tensor]] = {}
        self._num_combines = 0

    def close(self) -> None:
        self._operators.close()
        if self._kernels is not None:
            self._kernels.close()
        self._combine_buffers.clear()

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
        hooks: list[Hook | None] = []

        def call() -> tuple:
            dispatched, receive = self._calls_on(x.device).dispatch(
                x, topk_idx, max_tokens, num_experts, fp8, stats, apart=return_recv_hook
            )
            hooks.append(receive)
            handle = Handle.make(dispatched, max_tokens, x.shape[1], num_experts)
            return dispatched.rows if fp8 else dispatched.rows[0], dispatched.counts, handle

        inputs = [x, topk_idx, stats]
        result, event = stream.run(call, x.device, async_finish=bool(async_finish), inputs=inputs)
        return *result, event, _as_hook(hooks[0])

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
        _check_combine(x, topk_idx, topk_weights, handle, out)
        rows = self._combine_buffer(handle) if zero_copy else x
        self._num_combines += 1
        hooks: list[Hook | None] = []

        def call() -> torch.Tensor:
            sums, receive = self._calls_on(x.device).combine(
                rows, topk_idx, topk_weights, handle.dispatched.sent, out, apart=return_recv_hook
            )
            hooks.append(receive)
            return sums

        inputs = [x, topk_idx, topk_weights, handle, out]
        result, event = stream.run(call, x.device, async_finish=bool(async_finish), inputs=inputs)
        return result, event, _as_hook(hooks[0])

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

    def _calls_on(self, device: torch.device) -> OperatorCalls | KernelCalls:
        return self._all_calls()[-1] if device.type == "cuda" else self._operators

    def _all_calls(self) -> list[OperatorCalls | KernelCalls]:
        """By operators and, where GPUs reach each other, by kernels, whose masks are then the ones that count."""
        if self._kernels is None:
            self._kernels = KernelCalls.make(self._communicators, self._enable_shrink, self._timeout_s)
        return [self._operators] if self._kernels is None else [self._operators, self._kernels]

    @transport.outside_autograd
    def update_mask(self, rank: int, mask: bool) -> None:
        self._check_shrink()
        for calls in self._all_calls():
            calls.mask(rank, bool(mask))

    @transport.outside_autograd
    def query_mask(self, mask_status: torch.Tensor) -> None:
        self._check_shrink()
        transport.check_numbers("mask_status", mask_status, (self.size,), torch.int32)
        mask_status.copy_(self._all_calls()[-1].mask_status())

    @transport.outside_autograd
    def clean_mask(self) -> None:
        self._check_shrink()
        for calls in self._all_calls():
            calls.clear_masks()

    def _check_shrink(self) -> None:
        if not self._enable_shrink:
            raise InvalidInput("ranks are masked in a Buffer made with enable_shrink=True; this one is not")

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
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    handle: Handle,
    out: torch.Tensor | None,
) -> None:
    _check_handle(handle)
    hidden = handle[3]
    dispatched = handle.dispatched.sent.topk_idx
    transport.check_numbers("x", x, (*handle[0].shape, hidden), torch.bfloat16)
    if topk_idx.shape != dispatched.shape:
        raise InvalidInput(
            f"topk_idx has shape {tuple(topk_idx.shape)}; this handle's dispatch had {tuple(dispatched.shape)}"
        )
    _check_ids(topk_idx, len(topk_idx))
    transport.check_numbers("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32)
    if out is not None:
        transport.check_numbers("out", out, (len(topk_idx), hidden), torch.bfloat16)


def _as_hook(receive: Hook | None) -> Hook | None:
    if receive is None:
        return None

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
