"""What the buffers of deep_ep's V2 and HybridEP stand on: communicators for the shapes of their calls, and rows that
carry numbers.

These calls return more about a row than `moe_ep.dispatch` has a place for: the weights of all of a token's experts, the
token's number on its rank, scales of any kind. Such numbers travel as 32-bit words behind the row, where FP8 scales
do. Of moe_ep's layers `moe_ep.ops` is the one that takes them. Nothing here looks into a backend's routing state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ... import env, ops
from ...backends.base import Part, RoutingSpec
from ...backends.nvlink import NvlinkBackend
from ...backends.virtual import VirtualGroup
from ...communicator import Communicator, find
from ...errors import InvalidInput
from ...functional import dispatch
from ...handle import DispatchHandle
from .numbers import pack, unpack

Group = dist.ProcessGroup | VirtualGroup | None
Result = TypeVar("Result")

ROW_BYTES_MULTIPLE = 16


def outside_autograd(method: Callable[..., Result]) -> Callable[..., Result]:
    """deep_ep's calls are not differentiable; tensors made under inference mode are good outside of it too."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call


class Communicators:
    """The communicators of one group, one for each shape of calls.

    deep_ep's buffers learn the number of experts and of top-k from their calls. All ranks make the same calls, so the
    communicators that a call needs are made on all ranks at once.
    """

    def __init__(self, group: Group, timeout_s: float) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and not isinstance(group, dist.ProcessGroup | VirtualGroup):
            raise InvalidInput(
                f"group is a {type(group).__name__}; it must be a torch.distributed ProcessGroup (or a VirtualGroup)"
            )
        self.group = group
        self.rank, self.size = group_rank(group), group_size(group)
        self._timeout_s = timeout_s
        self._by_shape: dict[tuple[int, int, int, int], Communicator] = {}
        self._meeting: tuple[torch.Tensor, DispatchHandle] | None = None

    def get(self, hidden: int, max_tokens: int, num_experts: int, num_topk: int) -> Communicator:
        """For rows of ``hidden`` elements. Collective where there is none yet."""
        shape = hidden, max(1, max_tokens), num_experts, num_topk
        comm = self._by_shape.get(shape)
        if comm is None:
            comm = self._by_shape[shape] = Communicator(
                self.group,
                hidden=hidden,
                max_tokens_per_rank=shape[1],
                num_experts=num_experts,
                num_topk=num_topk,
                timeout_s=self._timeout_s,
            )
        return comm

    def at_width(self, routing: DispatchHandle, hidden: int) -> DispatchHandle:
        """`for_width`, for rows of ``hidden`` elements. Collective where there is no communicator yet."""
        spec = routing.spec
        comm = self.get(hidden, spec.max_tokens_per_rank, spec.num_experts, spec.num_topk)
        return for_width(routing, comm)

    @property
    def device(self) -> torch.device:
        """Where the group's tensors live."""
        if isinstance(self.group, VirtualGroup):
            return self.group.device
        over_nccl = self.group is not None and "nccl" in dist.get_backend_config(self.group)
        return torch.device("cuda" if over_nccl or env.backend() == "nvlink" else "cpu")

    def nvlink(self) -> NvlinkBackend | None:
        """The backend of calls on GPUs that reach each other's memory; None where they don't. Collective at first."""
        backend = self._of_meeting()._impl
        return backend if isinstance(backend, NvlinkBackend) else None

    def barrier(self) -> None:
        """A row from every rank to every rank: on a GPU, a barrier of the streams that does not hold up the host."""
        self._meet()

    def largest(self, *numbers: int | torch.Tensor) -> list[int]:
        """The largest of all ranks' first numbers, second numbers, ...: up to 4, each from 0 to 2^24.

        Collective; the host waits once, also where numbers are on a GPU.
        """
        most = self._meet(*numbers).amax(0)[: len(numbers)].int()
        if most.is_cuda:
            # NOTE: a copy that waits inside the driver would hold up launches of virtual ranks, which this waits for.
            torch.cuda.current_stream(most.device).synchronize()
        return most.tolist()

    def close(self) -> None:
        for comm in self._by_shape.values():
            comm.close()
        self._by_shape.clear()
        self._meeting = None

    def _of_meeting(self) -> Communicator:
        return self.get(ROW_BYTES_MULTIPLE // 4, self.size, self.size, 1)

    @outside_autograd
    def _meet(self, *numbers: int | torch.Tensor) -> torch.Tensor:
        """``[R, 4]`` numbers of all ranks."""
        comm = self._of_meeting()
        if self._meeting is None:
            rows = torch.zeros(self.size, comm.hidden, device=self.device)
            to_each = torch.arange(self.size, device=rows.device).unsqueeze(1)
            handle = dispatch(rows, to_each, None, comm, layout="rank").handle
            self._meeting = rows, handle
        rows, handle = self._meeting
        if numbers:
            rows = rows.clone()
            for column, number in enumerate(numbers):
                rows[:, column] = number
        return dispatch(rows, None, None, comm, handle=handle).tokens


def group_rank(group: Group) -> int:
    if group is None:
        return 0
    return group.rank if isinstance(group, VirtualGroup) else dist.get_rank(group)


def group_size(group: Group) -> int:
    if group is None:
        return 1
    return group.size if isinstance(group, VirtualGroup) else dist.get_world_size(group)


def plan(
    comm: Communicator,
    topk_idx: torch.Tensor,
    layout: str,
    *,
    alignment: int = 1,
    max_recv_rows: int | None = None,
    num_sms: int | None = None,
    meanwhile: Callable[[], object] | None = None,
    notes: object | None = None,
) -> DispatchHandle:
    """Exchange the routing ``topk_idx [T, K]``, without sending a row.

    meanwhile: called once, before the host waits. notes: of `NvlinkBackend.plan`.
    """
    spec = RoutingSpec(
        comm.num_experts,
        comm.num_local_experts,
        comm.num_topk,
        comm.max_tokens_per_rank,
        layout,
        alignment,
        max_recv_rows,
    )
    num_sms = _available(num_sms, comm.id)
    if notes is None:
        state = ops.plan(topk_idx.contiguous(), comm.id, spec, num_sms, meanwhile)
    else:
        state = comm._impl.plan(topk_idx.contiguous(), spec, num_sms, meanwhile, notes)
    return DispatchHandle(comm.id, spec, tuple(state))


def for_width(routing: DispatchHandle, comm: Communicator) -> DispatchHandle:
    """The same routing for rows of another width: which row goes where has nothing to do with its size."""
    if comm.id == routing.communicator_id:
        return routing
    return DispatchHandle(comm.id, routing.spec, routing.state)


def send(
    x: torch.Tensor,
    numbers: Sequence[torch.Tensor],
    weights: torch.Tensor | None,
    routing: DispatchHandle,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """Send rows and what belongs to them.

    x: ``[T, H]`` of any dtype. numbers: tensors ``[T, n]`` of 32-bit dtypes and any strides, which travel with the
    rows as they are. weights: float32 ``[T, K]`` or None; as `moe_ep.dispatch` has them.

    Returns rows ``[N, H]``, numbers ``[N, n]``, row weights. Rows without a token are zeros, also in the numbers.
    """
    rows, words, row_weights = send_words(x, pack(numbers), weights, routing, num_sms)
    return rows, [] if words is None else unpack(words, numbers), row_weights


def send_words(
    x: torch.Tensor,
    words: torch.Tensor | None,
    weights: torch.Tensor | None,
    routing: DispatchHandle,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`send` of numbers that have been packed, if any; they come packed."""
    parts = [Part(x.view(torch.uint8) if x.element_size() == 1 else x)]
    if words is not None:
        parts.append(Part(words, padding=0))
    comm_id = routing.communicator_id
    out, row_weights = ops.dispatch(
        parts, weights, comm_id, routing.spec, routing.state, _available(num_sms, comm_id)
    )
    return out[0].view(x.dtype), None if words is None else out[1], row_weights


def bring_back(
    rows: torch.Tensor,
    row_weights: torch.Tensor | None,
    biases: Sequence[torch.Tensor],
    routing: DispatchHandle,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`moe_ep.combine` with the row weights' way back ``[T, K]`` beside it."""
    comm_id = routing.communicator_id
    return ops.combine(
        rows, row_weights, biases, comm_id, routing.spec, routing.state, _available(num_sms, comm_id)
    )


def _available(num_sms: int | None, communicator_id: int) -> int | None:
    """``num_sms``, or as many multiprocessors as there are: deep_ep's callers ask for what suits another machine."""
    if num_sms is None:
        return None
    return min(num_sms, find(communicator_id).available_sms or num_sms)


def check_rows(name: str, x: torch.Tensor, num_rows: int | None = None) -> None:
    """``x`` is ``[num_rows, H]`` and its rows can travel."""
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        seen = f"of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise InvalidInput(f"{name} is {seen}; it must be a tensor [tokens, hidden]")
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes % ROW_BYTES_MULTIPLE or row_bytes == 0:
        raise InvalidInput(
            f"a row of {name} has {row_bytes} bytes ({x.shape[1]} of {x.dtype}); "
            f"it must be a multiple of {ROW_BYTES_MULTIPLE} bytes"
        )
    if not x.is_contiguous():
        raise InvalidInput(f"{name} is not contiguous (strides {x.stride()}); call .contiguous() on it")
    if num_rows is not None and x.shape[0] != num_rows:
        raise InvalidInput(f"{name} has {x.shape[0]} rows; it must have {num_rows}")


def check_numbers(
    name: str, numbers: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    """A tensor of this dtype and shape, in which None stands for any size."""
    fits = isinstance(numbers, torch.Tensor) and numbers.dim() == len(shape) and numbers.dtype == dtype
    if not fits or any(want not in (None, have) for want, have in zip(shape, numbers.shape, strict=True)):
        seen = (
            f"{numbers.dtype} of shape {tuple(numbers.shape)}"
            if isinstance(numbers, torch.Tensor)
            else f"a {type(numbers).__name__}"
        )
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidInput(f"{name} is {seen}; it must be {dtype} of shape ({wanted})")
