"""Dispatch and combine of few tokens in fixed shapes: the kernels of csrc/low_latency.

They need what `nvlink` needs, and windows of their own. A call is one launch, or two: one that sends, and one that
receives; no multiprocessor is busy between them. The host never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import _extension
from ..errors import InvalidInput
from . import windows
from .nvlink import NvlinkBackend
from .virtual import VirtualBackend

"""Of received rows: of csrc/low_latency/dispatch.h."""

WINDOW_FORMULA = "8 x ranks x max_tokens x hidden bytes, and a little for signals"

_PHASES = (  # of csrc/low_latency/signals.cuh
    "low-latency dispatch (until rows may be sent)",
    "low-latency dispatch",
    "low-latency combine (weights)",
    "low-latency combine",
)
_SCALE_BLOCK = 128
_SCALES_IN_WORD = 4
_MAX_SLOTS = 2**31 - 1

Receive = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """H; T, the most tokens of a rank; E. Windows are made for them; the number of top-k may vary."""

    hidden: int
    max_tokens: int
    num_experts: int


class Sent(NamedTuple):
    """A dispatch, as combine needs it."""

    shape: Shape
    topk_idx: torch.Tensor
    tables: torch.Tensor
    stream: int


class Received(NamedTuple):
    """What a dispatch gives on this rank, by its L experts with room for R * T rows each.

    ``rows [L, R * T, H]`` bfloat16 or float8_e4m3fn; ``scales`` of FP8 rows: float32 ``[L, R * T, S]`` or, as
    exponents, int32 ``[L, R * T, S / 4]``, column-major in the last two dimensions. ``counts [L]`` int32;
    ``source_token [L, R * T]`` int32; ``ranges [L, R]`` int64: the first row from a rank in the upper 32 bits, their
    number in the lower.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    source_token: torch.Tensor
    ranges: torch.Tensor


class LowLatency:
    """The low-latency calls of the ranks of ``nvlink``, whose device, stream order and hosts' connection they share.

    ``masked [R]`` int32 on the device: not 0 for ranks that take no part. Kernels set it for a rank that does not
    answer in time, and go on without it.
    """

    def __init__(self, nvlink: NvlinkBackend, timeout_s: float) -> None:
        self.rank, self.size, self.device = nvlink.rank, nvlink.size, nvlink.device
        self.timeout_s = timeout_s
        self._nvlink = nvlink
        self._kernels = _extension.load().low_latency
        on_device = {"dtype": torch.int32, "device": self.device}
        self.masked = torch.zeros(self.size, **on_device)
        self._failed = torch.zeros(1, **on_device)
        self._host = torch.zeros(self._kernels.HOST_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._by_shape: dict[Shape, _Calls] = {}

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        shape: Shape,
        format: str,
        statistics: torch.Tensor | None,
        apart: bool,
    ) -> tuple[Received, Sent, Receive | None]:
        """Send ``x [N, H]`` bfloat16 to the experts ``topk_idx [N, K]``. Collective, and makes windows for a new shape.

        statistics: int32 ``[L]`` to which the counts are added. apart: what is received is there only after a call of
        the third result; else that is None.
        """
        self._nvlink.check_device(x)
        self._check_topk(topk_idx)
        calls = self._calls(shape)
        receive_turn = calls.dispatches.begin(apart)
        num_local, capacity = shape.num_experts // self.size, self.size * shape.max_tokens
        rows_dtype = torch.bfloat16 if format == "bfloat16" else torch.float8_e4m3fn
        new = x.new_empty
        received = Received(
            new((num_local, capacity, shape.hidden), dtype=rows_dtype),
            self._new_scales(new, shape, num_local, capacity, format),
            new(num_local, dtype=torch.int32),
            new((num_local, capacity), dtype=torch.int32),
            new((num_local, self.size), dtype=torch.int64),
        )
        stream = self._nvlink.stream()
        tables = new(calls.kernels.table_words(topk_idx.shape[1]), dtype=torch.int32)
        x, topk_idx = _aligned(x), topk_idx.contiguous()
        arguments = dict(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            is_int64=topk_idx.dtype == torch.int64,
            num_tokens=x.shape[0],
            num_topk=topk_idx.shape[1],
            format=getattr(self._kernels.Format, format),
            tables=tables.data_ptr(),
            rows=received.rows.data_ptr(),
            scales=_address(received.scales),
            tokens_of_expert=received.counts.data_ptr(),
            source_token=received.source_token.data_ptr(),
            ranges=received.ranges.data_ptr(),
            statistics=_address(statistics),
        )
        calls.kernels.dispatch(send=True, receive=not apart, stream=stream, **arguments)
        sent = Sent(shape, topk_idx, tables, stream)
        if not apart:
            return received, sent, None
        written = [tables, *(part for part in (*received, statistics) if part is not None)]
        return (
            received,
            sent,
            self._second_half(calls.kernels.dispatch, arguments, written, stream, receive_turn),
        )

    def combine(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        sent: Sent,
        out: torch.Tensor | None,
        apart: bool,
    ) -> tuple[torch.Tensor, Receive | None]:
        """Bring the experts' ``rows [L, R * T, H]`` bfloat16 back to where the dispatch ``sent`` came from.

        Weighted sums in float32, of a rank's rows by ascending k and rounded, then of ranks; written to ``out [N, H]``
        if given. An id of -1 leaves its row out. apart: as in `dispatch`.
        """
        calls = self._calls(sent.shape)
        receive_turn = calls.combines.begin(apart)
        stream = self._nvlink.stream()
        _record_use([sent.tables], sent.stream, stream)
        wanted = out if out is not None else rows.new_empty((topk_idx.shape[0], sent.shape.hidden))
        target = (
            wanted if _is_aligned(wanted) else torch.empty_like(wanted, memory_format=torch.contiguous_format)
        )
        peers = rows.new_empty(self._kernels.PEER_WORDS * self.size, dtype=torch.int32)
        rows, topk_idx, topk_weights = _aligned(rows), topk_idx.contiguous(), topk_weights.contiguous()
        arguments = dict(
            rows=rows.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            is_int64=topk_idx.dtype == torch.int64,
            topk_weights=topk_weights.data_ptr(),
            num_tokens=topk_idx.shape[0],
            num_topk=topk_idx.shape[1],
            tables=sent.tables.data_ptr(),
            peers=peers.data_ptr(),
            out=target.data_ptr(),
        )
        calls.kernels.combine(send=True, receive=not apart, stream=stream, **arguments)
        if not apart:
            return _deliver(target, wanted), None
        used = [sent.tables, peers, target]
        receive = self._second_half(calls.kernels.combine, arguments, used, stream, receive_turn)

        def receive_and_deliver() -> None:
            receive()
            _deliver(target, wanted)

        return wanted, receive_and_deliver

    def mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out of later calls, or take it back."""
        self._nvlink.stream()
        self.masked[rank].fill_(int(masked))

    def clear_masks(self) -> None:
        self._nvlink.stream()
        self.masked.zero_()

    def check_health(self) -> None:
        """Raise PeerTimeoutError if a kernel has waited in vain."""
        failure = self._kernels.failure(self._host.data_ptr())
        if failure is not None:
            phase, peer, expected, seen = failure
            cause = f"its kernel waited for turn {expected} and saw {seen}; the limit is {self.timeout_s:g} s"
            raise self._nvlink.members.give_up({peer}, _PHASES[phase], cause)

    def close(self) -> None:
        """Free all memory, once what was launched has ended."""
        if self._by_shape:
            torch.cuda.synchronize(self.device)
            self._by_shape.clear()

    def _calls(self, shape: Shape) -> _Calls:
        calls = self._by_shape.get(shape)
        if calls is None:
            calls = self._by_shape[shape] = self._make_calls(shape)
        return calls

    def _make_calls(self, shape: Shape) -> _Calls:
        self._check_limits(shape)
        kernels, members = self._kernels, self._nvlink.members
        num_bytes = kernels.window_bytes(
            size=self.size,
            max_tokens=shape.max_tokens,
            num_local=shape.num_experts // self.size,
            hidden=shape.hidden,
        )
        if isinstance(members, VirtualBackend):
            key = "low latency", members.channel, shape
            memory, addresses = windows.shared(members.group, key, num_bytes, self.device, WINDOW_FORMULA)
        else:
            group = members.group() if self.size > 1 else None
            memory, addresses = windows.symmetric(members, group, num_bytes, self.device, WINDOW_FORMULA)
        num_blocks = kernels.BLOCKS_PER_SM * self._nvlink.available_sms
        counters = torch.zeros(
            kernels.call_words(self.size, num_blocks), dtype=torch.int32, device=self.device
        )
        launches = kernels.Calls(
            device=self.device.index,
            rank=self.rank,
            size=self.size,
            hidden=shape.hidden,
            max_tokens=shape.max_tokens,
            num_experts=shape.num_experts,
            num_blocks=num_blocks,
            timeout_s=self.timeout_s,
            windows=addresses,
            masked=self.masked.data_ptr(),
            failed=self._failed.data_ptr(),
            calls=counters.data_ptr(),
            host=self._host.data_ptr(),
        )
        torch.cuda.current_stream(self.device).synchronize()
        members.all_gather(torch.zeros(1, dtype=torch.int64, device="cpu"))  # all memory is there and zero
        return _Calls(launches, (memory, counters))

    def _check_limits(self, shape: Shape) -> None:
        limits = self._kernels
        for name, value, limit in (
            ("the number of ranks", self.size, limits.MAX_RANKS),
            ("num_max_dispatch_tokens_per_rank", shape.max_tokens, limits.MAX_TOKENS),
            ("num_experts", shape.num_experts, limits.MAX_EXPERTS),
            ("num_experts times the tokens of a rank", shape.num_experts * shape.max_tokens, _MAX_SLOTS),
        ):
            if value > limit:
                raise InvalidInput(f"{name} is {value}; low-latency calls on GPUs take up to {limit}")

    def _check_topk(self, topk_idx: torch.Tensor) -> None:
        if topk_idx.shape[1] > self._kernels.MAX_TOPK:
            raise InvalidInput(
                f"topk_idx has {topk_idx.shape[1]} columns; low-latency calls on GPUs take up to "
                f"{self._kernels.MAX_TOPK}"
            )

    @staticmethod
    def _new_scales(
        new: Callable, shape: Shape, num_local: int, capacity: int, format: str
    ) -> torch.Tensor | None:
        if format == "bfloat16":
            return None
        columns, dtype = -(-shape.hidden // _SCALE_BLOCK), torch.float32
        if format == "fp8_exponents":
            columns, dtype = columns // _SCALES_IN_WORD, torch.int32
        return new((num_local, columns, capacity), dtype=dtype).transpose(1, 2)

    def _second_half(
        self,
        launch: Callable[..., None],
        arguments: dict[str, Any],
        written: list[torch.Tensor],
        made_on: int,
        turn: Receive,
    ) -> Receive:
        def receive() -> None:
            stream = self._nvlink.stream()
            _record_use(written, made_on, stream)
            launch(send=False, receive=True, stream=stream, **arguments)
            turn()

        return receive


class _Calls:
    """The kernels of one shape. ``memory`` is what they work on."""

    def __init__(self, kernels: Any, memory: tuple[torch.Tensor, ...]) -> None:
        self.kernels = kernels
        self.dispatches, self.combines = _Turns("dispatch"), _Turns("combine")
        self._memory = memory


class _Turns:
    """A call's place in the windows is that of the call but one before, which must have been received."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._under_way = [False, False]
        self._next = 0

    def begin(self, apart: bool) -> Receive:
        """What returns marks this call as received."""
        turn = self._next
        if self._under_way[turn]:
            raise InvalidInput(
                f"the low-latency {self._name} before the last one has not been received; call its hook first: two "
                "may be under way"
            )
        self._next = 1 - turn
        self._under_way[turn] = apart

        def end() -> None:
            self._under_way[turn] = False

        return end


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_aligned(rows: torch.Tensor) -> bool:
    """Whether kernels can read and write it 16 bytes at a time."""
    return rows.is_contiguous() and rows.data_ptr() % 16 == 0


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    return rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def _deliver(target: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if target is not wanted:
        # What was made under inference mode can be written only under it.
        with torch.inference_mode(wanted.is_inference()):
            wanted.copy_(target)
    return wanted


def _record_use(tensors: list[torch.Tensor], made_on: int, stream: int) -> None:
    """Tensors of one stream's memory are used on another."""
    if made_on != stream:
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
