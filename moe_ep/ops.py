"""The three operators under torch.ops.moe_ep, opaque to torch.compile.

They are linear in their differentiable inputs and know nothing of autograd; `functional` pairs them. In eager mode
the backend is called directly, which spares the dispatcher's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import env
from .backends.base import Part, Routing, RoutingSpec
from .communicator import find
from .fp8 import quantize_rows
from .ids import check_ids


def plan(
    topk_idx: torch.Tensor,
    communicator_id: int,
    spec: RoutingSpec,
    num_sms: int | None,
    meanwhile: Callable[[], object] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Exchange the routing; the state of a handle."""
    if torch.compiler.is_compiling():
        if meanwhile is not None:
            meanwhile()
        return tuple(torch.ops.moe_ep.plan(topk_idx, communicator_id, num_sms, *_numbers(spec)))
    return tuple(_plan(topk_idx, communicator_id, spec, num_sms, meanwhile))


def dispatch(
    parts: Sequence[Part],
    weights: torch.Tensor | None,
    communicator_id: int,
    spec: RoutingSpec,
    state: Sequence[torch.Tensor],
    num_sms: int | None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    if torch.compiler.is_compiling():
        out = torch.ops.moe_ep.dispatch(
            [p.rows for p in parts],
            [p.padding for p in parts],
            weights,
            list(state),
            communicator_id,
            num_sms,
            *_numbers(spec),
        )
        return out[: len(parts)], out[-1] if weights is not None else None
    return find(communicator_id)._impl.dispatch(parts, weights, state, spec, num_sms)


def dispatch_fp8(
    data: torch.Tensor,
    scale_inv: torch.Tensor,
    weights: torch.Tensor | None,
    communicator_id: int,
    spec: RoutingSpec,
    state: Sequence[torch.Tensor],
    num_sms: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`dispatch` of quantised tokens: rows, their scales, row weights."""
    if not torch.compiler.is_compiling():
        return find(communicator_id)._impl.dispatch_fp8(data, scale_inv, weights, state, spec, num_sms)
    parts = [Part(data.view(torch.uint8)), Part(scale_inv, padding=1.0)]
    (data, scale_inv), row_weights = dispatch(parts, weights, communicator_id, spec, state, num_sms)
    return data.view(torch.float8_e4m3fn), scale_inv, row_weights


def dispatch_quantised(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    communicator_id: int,
    spec: RoutingSpec,
    state: Sequence[torch.Tensor],
    num_sms: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same of ``x [T, H]``, before it is sent or on the way."""
    if not torch.compiler.is_compiling():
        return find(communicator_id)._impl.dispatch_quantised(x, weights, state, spec, num_sms)
    return dispatch_fp8(*quantize_rows(x), weights, communicator_id, spec, state, num_sms)


def combine(
    rows: torch.Tensor,
    row_weights: torch.Tensor | None,
    biases: Sequence[torch.Tensor],
    communicator_id: int,
    spec: RoutingSpec,
    state: Sequence[torch.Tensor],
    num_sms: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if torch.compiler.is_compiling():
        y, topk_weights = torch.ops.moe_ep.combine(
            rows, row_weights, list(biases), list(state), communicator_id, num_sms, *_numbers(spec)
        )
        return y, topk_weights if row_weights is not None else None
    return find(communicator_id)._impl.combine(rows, row_weights, biases, state, spec, num_sms)


def _numbers(spec: RoutingSpec) -> tuple[int, int, int, int, str, int, int | None]:
    """A RoutingSpec as an operator's arguments, in the order of its fields."""
    return (
        spec.num_experts,
        spec.num_local_experts,
        spec.num_topk,
        spec.max_tokens_per_rank,
        spec.layout,
        spec.expert_alignment,
        spec.max_recv_rows,
    )


_CALL = (
    "int communicator_id, int? num_sms, int num_experts, int num_local_experts, int num_topk, "
    "int max_tokens_per_rank, str layout, int expert_alignment, int? max_recv_rows"
)
_library = torch.library.Library("moe_ep", "DEF")
_library.define(f"plan(Tensor topk_idx, {_CALL}) -> Tensor[]")
_library.define(
    f"dispatch(Tensor[] rows, float[] padding, Tensor? weights, Tensor[] state, {_CALL}) -> Tensor[]"
)
_library.define(
    f"combine(Tensor rows, Tensor? row_weights, Tensor[] biases, Tensor[] state, {_CALL}) -> (Tensor, Tensor)"
)


def _plan(
    topk_idx: torch.Tensor,
    communicator_id: int,
    spec: RoutingSpec,
    num_sms: int | None,
    meanwhile: Callable[[], object] | None = None,
) -> list[torch.Tensor]:
    impl = find(communicator_id)._impl
    if env.check() or not impl.checks_ids:
        check_ids(topk_idx, spec.num_experts)  # waits for the device, as planning does
    return impl.plan(topk_idx, spec, num_sms, meanwhile)


def _plan_op(topk_idx, communicator_id, num_sms, *numbers):
    return _plan(topk_idx, communicator_id, RoutingSpec(*numbers), num_sms)


def _dispatch_op(rows, padding, weights, state, communicator_id, num_sms, *numbers):
    parts = [Part(r, p) for r, p in zip(rows, padding, strict=True)]
    out, row_weights = find(communicator_id)._impl.dispatch(
        parts, weights, state, RoutingSpec(*numbers), num_sms
    )
    return [*out, rows[0].new_empty(0) if row_weights is None else row_weights]


def _combine_op(rows, row_weights, biases, state, communicator_id, num_sms, *numbers):
    y, topk_weights = find(communicator_id)._impl.combine(
        rows, row_weights, biases, state, RoutingSpec(*numbers), num_sms
    )
    return y, rows.new_empty(0) if topk_weights is None else topk_weights


_library.impl("plan", _plan_op, "CompositeExplicitAutograd")
_library.impl("dispatch", _dispatch_op, "CompositeExplicitAutograd")
_library.impl("combine", _combine_op, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_ep::plan", lib=_library)
def _plan_fake(topk_idx, communicator_id, num_sms, *numbers):
    spec = RoutingSpec(*numbers)
    context = torch.library.get_ctx()
    per_expert = [topk_idx.new_empty(spec.num_local_experts, dtype=torch.int64) for _ in range(2)]
    num_rows = context.new_dynamic_size() if spec.max_recv_rows is None else spec.max_recv_rows
    shape = (num_rows, spec.num_topk) if spec.layout == "rank" else (num_rows,)
    rows = topk_idx.new_empty(shape, dtype=torch.int64)
    needed = topk_idx.new_empty(1, dtype=torch.int64)
    splits = torch.empty(spec.num_local_experts, dtype=torch.int64, device="cpu")
    tokens = topk_idx.new_empty((topk_idx.shape[0], 0), dtype=torch.int64)
    known = [*per_expert, rows, needed, splits, tokens]
    impl = find(communicator_id)._impl
    rest = []
    for device in impl.state_devices(topk_idx.device)[len(known) :]:
        rest.append(torch.empty(context.new_dynamic_size(), dtype=torch.int64, device=device))
    return known + rest


@torch.library.register_fake("moe_ep::dispatch", lib=_library)
def _dispatch_fake(rows, padding, weights, state, communicator_id, num_sms, *numbers):
    meta = state[Routing.ROWS]
    out = [r.new_empty(meta.shape[0], *r.shape[1:]) for r in rows]
    return [*out, rows[0].new_empty(0) if weights is None else weights.new_empty(meta.shape)]


@torch.library.register_fake("moe_ep::combine", lib=_library)
def _combine_fake(rows, row_weights, biases, state, communicator_id, num_sms, *numbers):
    num_tokens = state[Routing.TOKENS].shape[0]
    y = rows.new_empty(num_tokens, *rows.shape[1:])
    if row_weights is None:
        return y, rows.new_empty(0)
    return y, row_weights.new_empty(num_tokens, RoutingSpec(*numbers).num_topk)
