"""dispatch and combine, differentiable.

Both are linear and each is the other's transpose, so the backward of either is the other with the same handle: no
routing is exchanged and the host waits for nothing. They are differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import ops
from .autograd import Function
from .backends.base import Part, Routing, RoutingSpec
from .communicator import Communicator, find
from .errors import InvalidInput
from .fp8 import Fp8Tokens, carry, check_quantisable, make_carrier, takes_carried_gradient
from .handle import DispatchHandle, DispatchOutput
from .streams import Event, finish, named_range, side_stream
from .validate import (
    check_biases,
    check_fp8_hidden,
    check_fp8_mode,
    check_fp8_tokens,
    check_handle,
    check_layout,
    check_num_tokens,
    check_tokens,
    check_topk_idx,
    check_topk_weights,
)


def dispatch(
    x: torch.Tensor | Fp8Tokens,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    comm: Communicator,
    *,
    layout: str = "expert",
    expert_alignment: int = 1,
    fp8: str | None = None,
    max_recv_rows: int | None = None,
    handle: DispatchHandle | None = None,
    num_sms: int | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> DispatchOutput:
    """Send every token to the ranks that hold its experts. Collective: all ranks of ``comm`` call it.

    Args:
        x: tokens ``[T, H]``, float64, float32, bfloat16 or float16, contiguous; or Fp8Tokens. T may differ by rank
            and may be 0.
        topk_idx: the experts of each token, int64 or int32 ``[T, K]``, -1 for none; distinct within a token. None
            with ``handle``.
        topk_weights: float32 ``[T, K]`` (or float64 beside a float64 x); travels with the tokens. May be None.
        layout: "expert": one row for each (token, local expert), grouped by expert, inside an expert by
            (source rank, source token), ready for a grouped matmul. "rank": one row for each token that has any
            expert here, by (source rank, source token), with local expert ids.
        expert_alignment: every expert's rows begin at a multiple of this; the gaps are zeros with weight 0.
        fp8: "blockwise": quantise x first, so that FP8 travels; the result's tokens are Fp8Tokens.
        max_recv_rows: None: exactly as many rows as arrive, for which the host waits. A number: always that many
            rows, the tail zero; rows that don't fit are dropped and ``handle.raise_if_overflow()`` says so.
        handle: of an earlier dispatch on this communicator: the same routing again, without exchanging it.
        num_sms: multiprocessors for this call's kernels and those of its backward; None: the communicator's.
        meanwhile: called once, without arguments, before rows are sent; in exact sizes on a GPU while the host would
            wait. What it launches on the current stream, a shared expert say, keeps the GPU busy until the host knows
            the sizes and has launched what comes next. It must not use this communicator.

    Returns: DispatchOutput. The gradient of x is the `combine` of the tokens' gradient; the gradient of
    ``topk_weights[t, k]`` is that of the one row weight made from it, 0 where there is none.

    Raises InvalidInput before anything is sent, PeerTimeoutError when a rank does not answer.
    """
    comm.check_open()
    check_fp8_mode("fp8", fp8)
    if isinstance(x, Fp8Tokens):
        check_fp8_tokens("x", x, comm)
        weights_beside = torch.float32 if x.carrier is None else x.carrier.dtype
    else:
        check_tokens("x", x, comm)
        weights_beside = x.dtype
    num_tokens = x.shape[0]
    check_num_tokens(num_tokens, comm)
    if topk_weights is not None:
        check_topk_weights(topk_weights, num_tokens, weights_beside, x.device, comm)
    if handle is None:
        check_layout(layout, expert_alignment, max_recv_rows)
        if topk_idx is None:
            raise InvalidInput(
                "topk_idx is None; give the experts of each token, or the handle of an earlier dispatch"
            )
        check_topk_idx(topk_idx, num_tokens, x.device, comm)
        if not isinstance(x, Fp8Tokens):
            comm._impl.check_rows("x", x)
    else:
        _check_reuse(handle, comm, topk_idx, num_tokens)
    quantises = fp8 is not None and not isinstance(x, Fp8Tokens)
    if quantises:
        check_quantisable(x)
        check_fp8_hidden(comm)

    with named_range("moe_ep.dispatch"):
        if handle is None:
            spec = RoutingSpec(
                comm.num_experts,
                comm.num_local_experts,
                comm.num_topk,
                comm.max_tokens_per_rank,
                layout,
                expert_alignment,
                max_recv_rows,
            )
            handle = DispatchHandle(comm.id, spec, ops.plan(topk_idx, comm.id, spec, num_sms, meanwhile))
        elif meanwhile is not None:
            meanwhile()
        if isinstance(x, Fp8Tokens):
            data, scale_inv, carrier, weights = _DispatchFp8.call(
                x.data, x.scale_inv, x.carrier, topk_weights, handle, num_sms
            )
            tokens = Fp8Tokens(data, scale_inv, carrier)
        elif quantises:
            data, scale_inv, carrier, weights = _DispatchQuantised.call(x, topk_weights, handle, num_sms)
            tokens = Fp8Tokens(data, scale_inv, carrier)
        else:
            tokens, weights = _Dispatch.call(x, topk_weights, handle, None, num_sms)
    ids = handle.state[Routing.ROWS] if handle.layout == "rank" else None
    return DispatchOutput(tokens, weights, ids, handle)


def combine(
    expert_rows: torch.Tensor,
    handle: DispatchHandle,
    *,
    bias: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    fp8_backward: str | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """Bring rows back to the ranks of their tokens and add them up, unweighted. Collective.

    Args:
        expert_rows: ``[N, H]``, row for row what the dispatch gave; contiguous. Padding rows are never read.
        handle: of that dispatch.
        bias: one or more ``[T, H]`` tensors of expert_rows' dtype, which the sums start from.
        fp8_backward: "blockwise": the gradient travels as FP8, and stays FP8 for experts that take it so
            (`moe_ep.layers.GroupedExperts` with ``fp8``).
        num_sms: multiprocessors for this call's kernels and those of its backward; None: the communicator's.

    Returns: ``[T, H]`` in expert_rows' dtype; zeros (or the bias) for a token without experts. Sums are taken in
    float32 (float64 for float64): inside a rank by ascending k and rounded to the dtype, then over ranks by the
    highest k each served, and rounded once. The gradient of expert_rows is the `dispatch` of the result's.

    Raises InvalidInput before anything is sent, PeerTimeoutError when a rank does not answer.
    """
    if not isinstance(handle, DispatchHandle):
        raise InvalidInput(f"handle is a {type(handle).__name__}; it must be the handle of a dispatch")
    comm = find(handle.communicator_id)
    check_tokens("expert_rows", expert_rows, comm, handle.num_rows)
    check_fp8_mode("fp8_backward", fp8_backward, expert_rows.dtype)
    biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    check_biases(biases, expert_rows, handle.num_tokens)
    with named_range("moe_ep.combine"):
        y, _ = _Combine.call(expert_rows, None, handle, fp8_backward, num_sms, *biases)
    return y


def dispatch_backward(
    grad_tokens: torch.Tensor,
    grad_weights: torch.Tensor | None,
    handle: DispatchHandle,
    *,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What autograd runs as the backward of a `dispatch`, for schedules that run it themselves. Collective.

    Args:
        grad_tokens: gradient of the dispatched tokens, ``[N, H]``, contiguous.
        grad_weights: of their weights, ``[N]`` or ``[N, K]``; None if the dispatch had none.
        handle, num_sms: as in `combine`.

    Returns: the gradients of x ``[T, H]`` and of topk_weights ``[T, K]``.
    """
    with named_range("moe_ep.dispatch.backward"):
        return _Combine.call(grad_tokens, grad_weights, handle, None, num_sms)


def combine_backward(
    grad_y: torch.Tensor | Fp8Tokens, handle: DispatchHandle, *, num_sms: int | None = None
) -> torch.Tensor | Fp8Tokens:
    """What autograd runs as the backward of a `combine`, for schedules that run it themselves. Collective.

    ``grad_y [T, H]``: of the combine's result; Fp8Tokens travel, and come out, as such. Returns the gradient of
    expert_rows, ``[N, H]``.
    """
    comm = find(handle.communicator_id)
    with named_range("moe_ep.combine.backward"):
        if isinstance(grad_y, Fp8Tokens):
            data, scale_inv, _ = _move_fp8(grad_y.data, grad_y.scale_inv, None, handle, num_sms)
            return Fp8Tokens(data, scale_inv)
        check_tokens("grad_y", grad_y, comm, handle.num_tokens)
        return _Dispatch.call(grad_y, None, handle, None, num_sms)[0]


def dispatch_async(
    x: torch.Tensor | Fp8Tokens,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    comm: Communicator,
    **options,
) -> tuple[DispatchOutput, Event]:
    """`dispatch` on the communicator's own stream; use the output after ``event.wait()``.

    On a CPU the call has ended when it returns. It takes few multiprocessors, unless told otherwise with ``num_sms``.
    """
    if options.get("num_sms") is None:
        handle = options.get("handle")
        layout = options.get("layout", "expert") if handle is None else handle.layout
        quantised = isinstance(x, Fp8Tokens) or options.get("fp8") is not None
        options["num_sms"] = _overlapped_num_sms(
            "dispatch", comm, layout, torch.float8_e4m3fn if quantised else x.dtype, x.shape[0]
        )
    with side_stream(comm, x.device) as stream:
        out = dispatch(x, topk_idx, topk_weights, comm, **options)
    inputs = [*_tensors(x), topk_idx, topk_weights]
    results = [*_tensors(out.tokens), out.weights, *out.handle.state]
    return out, finish(stream, inputs, results)


def combine_async(expert_rows: torch.Tensor, handle: DispatchHandle, **options) -> tuple[torch.Tensor, Event]:
    """`combine` on the communicator's own stream; use the output after ``event.wait()``."""
    comm = find(handle.communicator_id)
    if options.get("num_sms") is None:
        options["num_sms"] = _overlapped_num_sms(
            "combine", comm, handle.layout, expert_rows.dtype, handle.num_tokens
        )
    with side_stream(comm, expert_rows.device) as stream:
        y = combine(expert_rows, handle, **options)
    return y, finish(stream, [expert_rows], [y])


def _overlapped_num_sms(op: str, comm: Communicator, layout: str, dtype: torch.dtype, num_tokens: int) -> int:
    return comm.choose_num_sms(op, layout=layout, dtype=dtype, num_tokens=num_tokens, overlapped=True)


class _Dispatch(Function):
    """x [T, H], weights [T, K] or None -> rows [N, H], row weights or None."""

    @staticmethod
    def compute(x, weights, handle, wire_fp8, num_sms):
        if wire_fp8 is None:
            rows, row_weights = _move([Part(x)], weights, handle, num_sms)
            return rows[0], row_weights
        data, scale_inv, row_weights = _move_quantised(x, weights, handle, num_sms)
        return Fp8Tokens(data, scale_inv).dequantize(x.dtype), row_weights

    @staticmethod
    def forward(ctx, x, weights, handle, wire_fp8, num_sms):
        ctx.handle, ctx.num_sms = handle, num_sms
        ctx.set_materialize_grads(False)
        ctx.rows_dtype, ctx.hidden = x.dtype, x.shape[1]
        ctx.weights_dtype = weights.dtype if ctx.needs_input_grad[1] else None
        return _Dispatch.compute(x, weights, handle, wire_fp8, num_sms)

    @staticmethod
    def backward(ctx, grad_rows, grad_row_weights):
        with named_range("moe_ep.dispatch.backward"):
            return *_transpose(ctx, grad_rows, grad_row_weights, ctx.weights_dtype), None, None, None


class _DispatchFp8(Function):
    """Quantised tokens; the gradient takes the carriers' way, which is _Dispatch's."""

    @staticmethod
    def compute(data, scale_inv, carrier, weights, handle, num_sms):
        data, scale_inv, row_weights = _move_fp8(data, scale_inv, weights, handle, num_sms)
        return data, scale_inv, make_carrier(data.shape, _carried_dtype(carrier), data.device), row_weights

    @staticmethod
    def forward(ctx, data, scale_inv, carrier, weights, handle, num_sms):
        ctx.handle, ctx.num_sms = handle, num_sms
        ctx.set_materialize_grads(False)
        ctx.rows_dtype, ctx.hidden = _carried_dtype(carrier), data.shape[1]
        ctx.weights_dtype = weights.dtype if ctx.needs_input_grad[3] else None
        out = _DispatchFp8.compute(data, scale_inv, carrier, weights, handle, num_sms)
        ctx.mark_non_differentiable(*out[:2])
        return out

    @staticmethod
    def backward(ctx, _grad_data, _grad_scale_inv, grad_rows, grad_row_weights):
        with named_range("moe_ep.dispatch.backward"):
            grad_x, grad_weights = _transpose(ctx, grad_rows, grad_row_weights, ctx.weights_dtype)
        return None, None, grad_x, grad_weights, None, None


class _DispatchQuantised(Function):
    """x [T, H], quantised on the way; straight-through, so the gradient is _Dispatch's."""

    @staticmethod
    def compute(x, weights, handle, num_sms):
        data, scale_inv, row_weights = _move_quantised(x, weights, handle, num_sms)
        return data, scale_inv, make_carrier(data.shape, x.dtype, x.device), row_weights

    @staticmethod
    def forward(ctx, x, weights, handle, num_sms):
        ctx.handle, ctx.num_sms = handle, num_sms
        ctx.set_materialize_grads(False)
        ctx.rows_dtype, ctx.hidden = x.dtype, x.shape[1]
        ctx.weights_dtype = weights.dtype if ctx.needs_input_grad[1] else None
        out = _DispatchQuantised.compute(x, weights, handle, num_sms)
        ctx.mark_non_differentiable(*out[:2])
        return out

    @staticmethod
    def backward(ctx, _grad_data, _grad_scale_inv, grad_rows, grad_row_weights):
        with named_range("moe_ep.dispatch.backward"):
            return *_transpose(ctx, grad_rows, grad_row_weights, ctx.weights_dtype), None, None


def _carried_dtype(carrier: torch.Tensor | None) -> torch.dtype:
    return torch.bfloat16 if carrier is None else carrier.dtype


def _move_fp8(data, scale_inv, weights, handle, num_sms):
    return ops.dispatch_fp8(
        data, scale_inv, weights, handle.communicator_id, handle.spec, handle.state, num_sms
    )


def _move_quantised(x, weights, handle, num_sms):
    return ops.dispatch_quantised(x, weights, handle.communicator_id, handle.spec, handle.state, num_sms)


def _move(parts, weights, handle, num_sms):
    return ops.dispatch(parts, weights, handle.communicator_id, handle.spec, handle.state, num_sms)


def _transpose(ctx, grad_rows, grad_row_weights, weights_dtype):
    """The combine that is the backward of a dispatch.

    It is collective, so what it sends may not depend on which gradients happen to exist on this rank.
    """
    meta = ctx.handle.state[Routing.ROWS]
    if grad_rows is None:
        grad_rows = meta.new_zeros((meta.shape[0], ctx.hidden), dtype=ctx.rows_dtype)
    if weights_dtype is None:
        grad_row_weights = None
    elif grad_row_weights is None:
        grad_row_weights = meta.new_zeros(meta.shape, dtype=weights_dtype)
    else:
        grad_row_weights = grad_row_weights.contiguous()
    return _Combine.call(grad_rows.contiguous(), grad_row_weights, ctx.handle, None, ctx.num_sms)


class _Combine(Function):
    """rows [N, H], row weights or None -> sums [T, H], weights [T, K] or None."""

    @staticmethod
    def compute(rows, row_weights, handle, _wire_fp8, num_sms, *biases):
        return ops.combine(
            rows, row_weights, biases, handle.communicator_id, handle.spec, handle.state, num_sms
        )

    @staticmethod
    def forward(ctx, rows, row_weights, handle, wire_fp8, num_sms, *biases):
        ctx.handle, ctx.num_sms = handle, num_sms
        ctx.wire_fp8 = wire_fp8
        ctx.carries_grad = wire_fp8 is not None and takes_carried_gradient(rows)
        ctx.num_biases = len(biases)
        ctx.weights_dtype = row_weights.dtype if ctx.needs_input_grad[1] else None
        ctx.sums_dtype, ctx.hidden = rows.dtype, rows.shape[1]
        ctx.set_materialize_grads(False)
        return _Combine.compute(rows, row_weights, handle, wire_fp8, num_sms, *biases)

    @staticmethod
    def backward(ctx, grad_y, grad_weights):
        meta = ctx.handle.state[Routing.TOKENS]
        if grad_y is None:
            grad_y = meta.new_zeros((meta.shape[0], ctx.hidden), dtype=ctx.sums_dtype)
        if ctx.weights_dtype is None:
            grad_weights = None
        elif grad_weights is None:
            shape = meta.shape[0], ctx.handle.spec.num_topk
            grad_weights = meta.new_zeros(shape, dtype=ctx.weights_dtype)
        else:
            grad_weights = grad_weights.contiguous()
        with named_range("moe_ep.combine.backward"):
            if ctx.carries_grad:  # into FP8 matrix products: rows stay as they arrive
                data, scale_inv, grad_weights = _move_quantised(
                    grad_y.contiguous(), grad_weights, ctx.handle, ctx.num_sms
                )
                grads = carry(Fp8Tokens(data, scale_inv), ctx.sums_dtype), grad_weights
            else:
                grads = _Dispatch.call(
                    grad_y.contiguous(), grad_weights, ctx.handle, ctx.wire_fp8, ctx.num_sms
                )
        return *grads, None, None, None, *[grad_y] * ctx.num_biases


def _check_reuse(
    handle: DispatchHandle, comm: Communicator, topk_idx: torch.Tensor | None, num_tokens: int
) -> None:
    check_handle(handle, comm)
    if topk_idx is not None:
        raise InvalidInput(
            "topk_idx and handle are both given; a handle already holds its routing, so pass topk_idx=None"
        )
    if num_tokens != handle.num_tokens:
        raise InvalidInput(f"x has {num_tokens} tokens; this handle's dispatch had {handle.num_tokens}")


def _tensors(tokens: torch.Tensor | Fp8Tokens) -> list[torch.Tensor]:
    return [tokens.data, tokens.scale_inv] if isinstance(tokens, Fp8Tokens) else [tokens]
