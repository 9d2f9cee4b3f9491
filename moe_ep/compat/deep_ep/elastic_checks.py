"""Arguments of V2's calls, checked before anything is sent."""

from __future__ import annotations

import torch

from ...errors import InvalidInput
from .elastic_calls import Shape
from .elastic_handle import EPHandle
from .transport import check_numbers, check_rows
from .utils.event import EventHandle, EventOverlap

Event = EventHandle | EventOverlap | None


def check_new(
    shape: Shape,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    stats: torch.Tensor | None,
    num_ranks: int,
) -> None:
    """A dispatch without a handle."""
    if topk_idx is None or shape.num_experts is None:
        missing = "topk_idx" if topk_idx is None else "num_experts"
        raise InvalidInput(f"{missing} is None; dispatch needs it, or the handle of an earlier dispatch")
    check_rows("x", x)
    if shape.max_tokens <= 0:
        raise InvalidInput("num_max_tokens_per_rank is not set; give it here or to the constructor")
    if x.shape[0] > shape.max_tokens:
        raise InvalidInput(f"x has {x.shape[0]} tokens, more than num_max_tokens_per_rank={shape.max_tokens}")
    if shape.num_experts % num_ranks:
        raise InvalidInput(
            f"num_experts is {shape.num_experts}, which {num_ranks} ranks can't share equally; "
            f"use a multiple of {num_ranks}"
        )
    if shape.alignment < 1:
        raise InvalidInput(f"expert_alignment is {shape.alignment}; it must be at least 1")
    idx_dtype = torch.int32 if topk_idx.dtype == torch.int32 else torch.int64
    check_numbers("topk_idx", topk_idx, (x.shape[0], None), idx_dtype)
    if stats is not None:
        num_local = shape.num_experts // num_ranks
        check_numbers("cumulative_local_expert_recv_stats", stats, (num_local,), torch.int32)


def check_again(
    handle: EPHandle,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    do_cpu_sync: bool | None,
    stats: torch.Tensor | None,
    **given: int | bool | None,
) -> None:
    """A dispatch with a handle; ``given``, unless None, must be what the handle's dispatch had."""
    check_rows("x", x, handle.routing().num_tokens)
    if topk_idx is not None:
        raise InvalidInput("topk_idx and handle are both given; a handle holds its routing")
    if do_cpu_sync:
        raise InvalidInput("do_cpu_sync=True is given with a handle, whose numbers of rows are known already")
    if stats is not None:
        raise InvalidInput(
            "cumulative_local_expert_recv_stats is given with a handle, whose tokens have been counted already"
        )
    for name, value in given.items():
        if value is not None and value != getattr(handle, name):
            raise InvalidInput(f"{name} is {value}; this handle's dispatch had {getattr(handle, name)}")


def check_beside(
    x: torch.Tensor, scales: torch.Tensor | None, topk_weights: torch.Tensor | None, num_topk: int
) -> None:
    """What travels with the rows."""
    if scales is not None and (
        scales.dim() != 2 or scales.shape[0] != x.shape[0] or scales.element_size() != 4
    ):
        raise InvalidInput(
            f"the scales are {scales.dtype} of shape {tuple(scales.shape)}; they must be of a dtype of 4 bytes and "
            f"of shape [{x.shape[0]}, packs]"
        )
    if topk_weights is not None:
        check_numbers("topk_weights", topk_weights, (x.shape[0], num_topk), torch.float32)


def check_combine(
    x: torch.Tensor, topk_weights: torch.Tensor | None, biases: list[torch.Tensor], handle: EPHandle
) -> None:
    check_rows("x", x)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise InvalidInput(f"x is {x.dtype}; combine adds bfloat16, float16 and float32")
    for i, bias in enumerate(biases):
        check_numbers(f"bias {i}", bias, (handle.routing().num_tokens, x.shape[1]), x.dtype)
    if topk_weights is not None:
        of_a_row = () if handle.do_expand else (handle.topk_idx.shape[1],)
        check_numbers("topk_weights", topk_weights, (x.shape[0], *of_a_row), torch.float32)


def check_events(previous_event: Event, allocate_on_comm_stream: bool) -> None:
    if previous_event is not None and not allocate_on_comm_stream:
        raise InvalidInput("previous_event is given; it needs allocate_on_comm_stream=True")
