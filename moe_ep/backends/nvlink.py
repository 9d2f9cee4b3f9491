"""GPUs that reach each other's memory: the kernels of csrc/nvlink.

Every rank has a *window*, memory that all ranks can write. A rank's kernels write rows straight into the windows of
the ranks that want them, and signals behind them; nothing of it is copied by, or waits for, the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from .. import sm_model
from ..errors import InvalidInput, MoeEpError, PeerTimeoutError
from ..fp8 import BLOCK
from ..ids import check_ids
from .base import Backend, Part, Routing, RoutingSpec
from .nvlink_shape import Shape, window_bytes
from .windows import Members

_PHASES = (  # of csrc/nvlink/sync.cuh
    "dispatch routing (until it may be sent)",
    "dispatch routing",
    "dispatch planning",
    "dispatch rows (until they may be sent)",
    "dispatch rows",
    "combine rows (until they may be sent)",
    "combine rows",
)
_TABLES = Routing.TOKENS + 1  # the kernels' own tensor of the routing state
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_BIASES = 2
_NOWHERE = 16

ChooseNumSms = Callable[[str, str, int, int], int]
"""From operation, layout, bytes of an element on the wire and tokens."""


class NvlinkBackend(Backend):
    """``windows``: this process's addresses of all ranks' windows; ``memory`` keeps this rank's alive; zero on all.

    ``cpu``: the backend for tensors on the CPU, if there may be any.
    """

    checks_ids = True

    def __init__(
        self,
        *,
        name: str,
        members: Members,
        kernels: ModuleType,
        shape: Shape,
        device: torch.device,
        memory: torch.Tensor,
        windows: list[int],
        timeout_s: float,
        choose_num_sms: ChooseNumSms,
        cpu: Backend | None = None,
    ) -> None:
        self.name = name
        self._cpu = cpu
        self._choose_num_sms = choose_num_sms
        self.members = members
        self.group = getattr(members, "group", None)
        self.rank, self.size = members.rank, members.size
        self.shape = shape
        self.device = device
        self.timeout_s = timeout_s
        self.transport = "NVLink" if name == "nvlink" else "GPU memory"
        self.window_bytes = window_bytes(shape, self.size, kernels)
        self._memory = memory
        limits = kernels.nvlink
        self._workspace = torch.zeros(
            limits.workspace_bytes(self.size, shape.max_tokens_per_rank, shape.num_experts),
            dtype=torch.uint8,
            device=device,
        )
        self._host = torch.zeros(limits.HOST_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._kernel_dtypes = {
            dtype: getattr(kernels.DType, str(dtype).removeprefix("torch.")) for dtype in _KERNEL_DTYPES
        }
        self._communicator = limits.Communicator(
            device=device.index,
            rank=self.rank,
            size=self.size,
            max_tokens=shape.max_tokens_per_rank,
            num_topk=shape.num_topk,
            num_experts=shape.num_experts,
            ring_bytes=shape.ring_bytes(kernels),
            timeout_s=timeout_s,
            windows=windows,
            workspace=self._workspace.data_ptr(),
            host=self._host.data_ptr(),
        )
        self._tickets = 0
        self._num_sms: dict[tuple, tuple[int, int]] = {}
        self._last_stream: torch.cuda.Stream | None = None
        self._beside_computation = False
        torch.cuda.current_stream(device).synchronize()
        members.all_gather(torch.zeros(1, dtype=torch.int64, device="cpu"))  # all memory is there and zero

    def plan(
        self,
        topk_idx: torch.Tensor,
        spec: RoutingSpec,
        num_sms: int | None = None,
        meanwhile: Callable[[], object] | None = None,
        notes: object | None = None,
    ) -> list[torch.Tensor]:
        """``notes``: a `Notes` of `moe_ep._C.nvlink`, which travel along."""
        if self._cpu is not None and not topk_idx.is_cuda:
            return self._cpu.plan(topk_idx, spec, num_sms, meanwhile)
        exact = spec.max_recv_rows is None
        expert_layout = spec.layout == "expert"
        num_tokens, num_topk = topk_idx.shape
        num_local = spec.num_local_experts
        self.check_health(bad_ids=exact)
        device = self.check_device(topk_idx)
        per_token = min(num_topk, num_local) if expert_layout else 1
        most_rows = self.size * spec.max_tokens_per_rank * per_token + num_local * (spec.expert_alignment - 1)
        max_rows = most_rows if exact else spec.max_recv_rows
        counts = torch.empty(2 * num_local + 1, dtype=torch.int64, device=device)
        first_count, count_bytes = counts.data_ptr(), num_local * counts.element_size()
        tables = torch.empty(self._communicator.table_words(num_tokens), dtype=torch.int32, device=device)
        ids = None if expert_layout else torch.empty((max_rows, num_topk), dtype=torch.int64, device=device)
        if exact:
            self._tickets += 1
        self._communicator.plan(
            topk_idx=topk_idx.data_ptr(),
            is_int64=topk_idx.dtype == torch.int64,
            num_tokens=num_tokens,
            expert_layout=expert_layout,
            alignment=spec.expert_alignment,
            max_rows=max_rows,
            fixed_rows=not exact,
            tables=tables.data_ptr(),
            tokens_per_expert=first_count,
            padded_tokens_per_expert=first_count + count_bytes,
            rows_needed=first_count + 2 * count_bytes,
            ids=0 if ids is None else ids.data_ptr(),
            ticket=self._tickets if exact else 0,
            num_sms=self.num_sms("dispatch", spec.layout, 2, num_tokens, num_sms)[0],
            **self._place(),
            notes=notes,
        )
        # Before the wait, since dispatch is waited for from the plan's end on.
        tokens_per_expert, padded, needed = counts.split((num_local, num_local, 1))
        tokens = topk_idx.new_empty((num_tokens, 0))
        if meanwhile is not None:
            meanwhile()
        if exact:
            num_rows, splits = self._wait_for_plan(topk_idx, spec)
        else:
            num_rows, splits = max_rows, torch.empty(0, dtype=torch.int64, device="cpu")
        rows = counts.new_empty(num_rows) if ids is None else ids[:num_rows]
        return [tokens_per_expert, padded, rows, needed, splits, tokens, tables]

    def _wait_for_plan(self, topk_idx: torch.Tensor, spec: RoutingSpec) -> tuple[int, torch.Tensor]:
        """Rows of the exact result, and of each local expert."""
        communicator = self._communicator
        splits = torch.empty(spec.num_local_experts, dtype=torch.int64, device="cpu")
        # The kernels give up by themselves after timeout_s.
        if not communicator.wait_for_plan(self._tickets, 2 * self.timeout_s + 10):
            self.check_health()
            raise MoeEpError(
                f"planning did not end within {2 * self.timeout_s + 10:g} s: is the GPU busy with other kernels that "
                "never end?"
            )
        if bad := communicator.bad_ranks():
            if self.rank in bad:
                check_ids(topk_idx, spec.num_experts)
            ranks = ", ".join(map(str, bad))
            raise InvalidInput(
                f"topk_idx of rank {ranks} has expert ids outside [-1, {spec.num_experts}), or a token that names an "
                "expert twice; nothing was sent"
            )
        return communicator.read_plan(spec.expert_alignment, splits.data_ptr()), splits

    def dispatch(
        self,
        parts: Sequence[Part],
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        rows = parts[0].rows
        if self._cpu is not None and not rows.is_cuda:
            return self._cpu.dispatch(parts, weights, state, spec)
        self.check_rows("x", rows)
        num_rows = state[Routing.ROWS].shape[0]
        out = [part.rows.new_empty((num_rows, part.rows.shape[1])) for part in parts]
        scales, out_scales, padding = None, None, 0.0
        if len(parts) > 1:
            scales, out_scales, padding = parts[1].rows, out[1], parts[1].padding
        blocks = self.num_sms("dispatch", spec.layout, rows.element_size(), rows.shape[0], num_sms)
        row_weights = self._launch_dispatch(
            rows,
            out[0],
            weights,
            state,
            spec,
            blocks=blocks,
            out_scales=out_scales,
            scales=scales,
            padding=padding,
        )
        return out, row_weights

    def dispatch_fp8(
        self,
        data: torch.Tensor,
        scale_inv: torch.Tensor,
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self._cpu is not None and not data.is_cuda:
            return self._cpu.dispatch_fp8(data, scale_inv, weights, state, spec)
        self.check_device(data)
        num_rows = state[Routing.ROWS].shape[0]
        out = data.new_empty((num_rows, data.shape[1]))
        out_scales = scale_inv.new_empty((num_rows, scale_inv.shape[1]))
        blocks = self.num_sms("dispatch", spec.layout, 1, data.shape[0], num_sms)
        row_weights = self._launch_dispatch(
            data, out, weights, state, spec, blocks=blocks, out_scales=out_scales, scales=scale_inv
        )
        return out, out_scales, row_weights

    def dispatch_quantised(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        blocks = self.num_sms("dispatch", spec.layout, 1, x.shape[0], num_sms, quantises=True)
        if blocks[0] < sm_model.QUANTISING_SMS or (self._cpu is not None and not x.is_cuda):
            return super().dispatch_quantised(x, weights, state, spec, num_sms)
        self.check_rows("x", x)
        num_rows = state[Routing.ROWS].shape[0]
        data = x.new_empty((num_rows, x.shape[1]), dtype=torch.float8_e4m3fn)
        scale_inv = x.new_empty((num_rows, -(-x.shape[1] // BLOCK)), dtype=torch.float32)
        dtype = self._kernel_dtypes[x.dtype]
        row_weights = self._launch_dispatch(
            x, data, weights, state, spec, blocks=blocks, out_scales=scale_inv, quantised_from=dtype
        )
        return data, scale_inv, row_weights

    def _launch_dispatch(
        self,
        rows: torch.Tensor,
        out: torch.Tensor,
        weights: torch.Tensor | None,
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        *,
        blocks: tuple[int, int],
        out_scales: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        padding: float = 1.0,
        quantised_from: object | None = None,
    ) -> torch.Tensor | None:
        """The row weights. ``padding``: of scales."""
        self.check_health(bad_ids=False)
        meta = state[Routing.ROWS]
        row_weights = None if weights is None else weights.new_empty(meta.shape)
        self._communicator.dispatch(
            rows=_aligned(rows).data_ptr(),
            row_bytes=out.shape[1] * out.element_size(),
            quantised_from=quantised_from,
            scales=0 if scales is None else scales.data_ptr(),
            scale_words=0 if out_scales is None else out_scales.shape[1],
            scale_padding=padding,
            weights=_address(weights),
            tables=state[_TABLES].data_ptr(),
            out_rows=out.data_ptr(),
            out_scales=0 if out_scales is None else out_scales.data_ptr(),
            out_weights=0 if row_weights is None else row_weights.data_ptr(),
            num_rows=meta.shape[0],
            expert_layout=spec.layout == "expert",
            has_padding=spec.expert_alignment > 1 or spec.max_recv_rows is not None,
            num_blocks=blocks[0],
            send_blocks=blocks[1],
            **self._place(),
        )
        return row_weights

    def combine(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        spec: RoutingSpec,
        num_sms: int | None = None,
        adds_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``adds_weights``: ``row_weights [N, n]``, n up to 32, are added up over ranks, ``[T, n]``."""
        if self._cpu is not None and not rows.is_cuda:
            return self._cpu.combine(rows, row_weights, biases, state, spec)
        self.check_health(bad_ids=False)
        self.check_rows("expert_rows", rows)
        if len(biases) > _MAX_BIASES:
            raise InvalidInput(f"{len(biases)} biases are given; the NVLink kernels add up to {_MAX_BIASES}")
        num_tokens = state[Routing.TOKENS].shape[0]
        out = rows.new_empty((num_tokens, rows.shape[1]))
        topk_weights = None
        if row_weights is not None:
            width = row_weights.shape[1] if adds_weights else spec.num_topk
            topk_weights = row_weights.new_empty((num_tokens, width))
        biases = [_aligned(bias.contiguous()) for bias in biases]
        addresses = [bias.data_ptr() for bias in biases] + [0] * (_MAX_BIASES - len(biases))
        num_blocks, send_blocks = self.num_sms(
            "combine", spec.layout, rows.element_size(), num_tokens, num_sms
        )
        self._communicator.combine(
            rows=_aligned(rows).data_ptr(),
            dtype=self._kernel_dtypes[rows.dtype],
            row_bytes=rows.shape[1] * rows.element_size(),
            row_weights=_address(row_weights),
            bias_0=addresses[0],
            bias_1=addresses[1],
            tables=state[_TABLES].data_ptr(),
            num_tokens=num_tokens,
            out=out.data_ptr(),
            out_weights=0 if topk_weights is None else topk_weights.data_ptr(),
            expert_layout=spec.layout == "expert",
            num_blocks=num_blocks,
            send_blocks=send_blocks,
            **self._place(),
            num_added=row_weights.shape[1] if adds_weights else 0,
        )
        return out, topk_weights

    def table(self, name: str, state: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        """The first numbers of one of a plan's tables, by its name in csrc/nvlink/plan_tables.h; int32."""
        begin = self._communicator.table_offsets()[name]
        return state[_TABLES][begin : begin + length]

    def state_devices(self, device: torch.device) -> list[torch.device]:
        on_host = torch.device("cpu")
        return [on_host if i == Routing.SPLITS else device for i in range(_TABLES + 1)]

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        self.check_health()
        return self.members.all_gather(values)

    def barrier(self) -> None:
        """A routing of no tokens, exchanged by the kernels: a wait of the hosts for one that is late would cost them
        their connections (gloo's don't survive a time-out), and with these the next communicator.
        """
        if self._last_stream is not None:
            self._last_stream.synchronize()
        self.check_health()  # what earlier calls have found is theirs
        nothing = torch.empty((0, self.shape.num_topk), dtype=torch.int64, device=self.device)
        try:
            self.plan(nothing, self.shape.spec(self.size))
        except PeerTimeoutError as error:
            raise PeerTimeoutError(error.ranks, "a barrier", error.detail) from None

    def num_sms(
        self,
        op: str,
        layout: str,
        element_size: int,
        num_tokens: int,
        asked: int | None = None,
        quantises: bool = False,
    ) -> tuple[int, int]:
        """Blocks of the kernel of a call, and how many of them send."""
        key = op, layout, element_size, num_tokens, asked, quantises
        chosen = self._num_sms.get(key)
        if chosen is None:
            if asked is not None and not 0 < asked <= self.available_sms:
                raise InvalidInput(
                    f"num_sms is {asked}; a rank of this group can have 1 to {self.available_sms} multiprocessors"
                )
            call = op, layout, element_size, num_tokens
            num_sms = self._choose_num_sms(*call) if asked is None else asked
            chosen = sm_model.split(self.shape.work(*call, self.size), num_sms, quantises)
            self._num_sms[key] = chosen
        return chosen

    @property
    def available_sms(self) -> int:
        """Multiprocessors that this rank's kernels may take: ranks that share a GPU share them."""
        return _count_sms(self.device) // (self.size if self.name == "virtual" else 1)

    def check_rows(self, name: str, rows: torch.Tensor) -> None:
        if self._cpu is not None and not rows.is_cuda:
            return
        self.check_device(rows)
        if rows.dtype not in self._kernel_dtypes and rows.dtype != torch.uint8:
            raise InvalidInput(
                f"{name} is {rows.dtype}; the NVLink kernels take float32, bfloat16, float16 and Fp8Tokens: "
                "use backend='collective' for others"
            )

    def check_health(self, bad_ids: bool = True) -> None:
        """Raise what kernels have reported. Without ``bad_ids``, only what keeps them from working on."""
        communicator = self._communicator
        if communicator is None:
            raise InvalidInput("this communicator is closed; make a new one")
        if communicator.failed:
            phase, peer, expected, seen = communicator.failure()
            cause = f"its kernel waited {self.timeout_s:g} s for signal {expected:#x} and saw {seen:#x}"
            raise self.members.give_up({peer}, _PHASES[phase], cause)
        if bad_ids and communicator.bad_ids:
            communicator.forget_bad_ids()
            raise InvalidInput(
                f"an earlier topk_idx had expert ids outside [-1, {self.shape.num_experts}), or a token that names an "
                "expert twice; they counted as -1. MOE_EP_CHECK=1 finds the call"
            )

    def close(self) -> None:
        if self._communicator is None:
            return
        if self._last_stream is not None:
            self._last_stream.synchronize()  # ends within timeout_s
        self._communicator = None
        self._last_stream = None
        self._memory = self._workspace = self._host = None
        self.members.close()

    def stream(self) -> int:
        """The current stream, after this communicator's earlier calls."""
        # NOTE: as Triton and inductor ask for it; torch.cuda.current_stream makes an object, which takes longer.
        address = torch._C._cuda_getCurrentRawStream(self.device.index)
        last = self._last_stream
        if last is None or last.cuda_stream != address:
            stream = torch.cuda.current_stream(self.device)
            if last is not None and _same_capture(last, stream):
                stream.wait_stream(last)
            self._last_stream = stream
            self._beside_computation = stream.priority < 0
        return address

    def _place(self) -> dict[str, int | bool]:
        """Where a kernel is launched. On a stream with priority it is beside computation, and ranks come to it at
        different times: one that is early waits on one multiprocessor, and leaves the others to what it computes.
        """
        return {"stream": self.stream(), "meets": self._beside_computation}

    def check_device(self, tensor: torch.Tensor) -> torch.device:
        device = tensor.device
        if device != self.device:
            raise InvalidInput(
                f"tensors are on {device}; this communicator is on {self.device}, the current device when it was made"
            )
        return device


@functools.cache
def _count_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _address(tensor: torch.Tensor | None) -> int:
    """0 for None alone: an empty tensor, whose address is 0 too, says that others may have rows."""
    return 0 if tensor is None else tensor.data_ptr() or _NOWHERE


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows where kernels can read 16 bytes at a time."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _same_capture(one: torch.cuda.Stream, other: torch.cuda.Stream) -> bool:
    """Whether a stream may wait for another: nothing inside a graph capture can wait for what is outside."""
    return _is_capturing(one) == _is_capturing(other)


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
