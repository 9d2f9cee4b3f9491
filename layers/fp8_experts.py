"""Routed experts in FP8, forward and backward: quantised tokens in, quantised numbers between the products.

    x [N, H] ──> gate and up ──> SwiGLU times router weight ──> down ──> y [N, H]
    FP8 rows     FP8 product     bfloat16 in, FP8 rows out      FP8 product, bfloat16 out

Backward likewise: the gradient of y comes as FP8 rows from where it travelled, is multiplied as it is, and the
gradient of the activation is quantised where it is made. Weight gradients are products of columns, which are made of
rows when they are needed; what is kept from forward to backward is x and gate and up.

Quantisation is straight-through in both directions (see docs/fp8.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from moe_ep import Fp8Tokens, fp8
from moe_ep.streams import named_range

from .fp8_matmul import columns_by_columns, rows_by_weights
from .fp8_quantize import (
    quantize_swiglu,
    quantize_swiglu_gradient,
    requantize_columns,
    requantize_tiles,
)
from .fp8_weights import AnyWeight, Fp8Weights, SharedWeights
from .row_groups import RowGroups
from .weight_gradients import Gradients, Weights, give, put_or_return


def fp8_experts(
    tokens: Fp8Tokens,
    weights_N: torch.Tensor | None,
    w_gate_up: torch.Tensor | Sequence[torch.Tensor],
    w_down: torch.Tensor | Sequence[torch.Tensor],
    groups: RowGroups,
    quantized: Fp8Weights | SharedWeights,
) -> torch.Tensor:
    """``w_down[e] (silu(gate) * up * router_weight)``, ``[gate; up] = w_gate_up[e] x``: ``[N, H]`` in w_down's dtype.

    tokens: Fp8Tokens ``[N, H]``; weights: float32 ``[N]`` or None; w_gate_up ``[L, 2F, H]``, w_down ``[L, H, F]``, or
    a matrix for each expert.
    """
    gate_up_NG = fp8_matmul(tokens, w_gate_up, groups, quantized.gate_up)
    return fp8_matmul(fp8_swiglu(gate_up_NG, weights_N), w_down, groups, quantized.down)


def fp8_matmul(
    tokens: Fp8Tokens,
    weight: torch.Tensor | Sequence[torch.Tensor],
    groups: RowGroups,
    quantized: AnyWeight,
) -> torch.Tensor:
    """``out[rows of e] = rows of e @ weight[e].T`` in weight's dtype: ``[N, O]``; differentiable.

    ``weight [L, O, I]``, or ``[O, I]`` for each expert. Backward takes a gradient in any form: FP8 rows for which a
    tensor of `moe_ep.fp8.carry` stands, or numbers, which it quantises. A `Keeper` may take the weights' gradients.
    """
    weights: Weights = (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)
    carrier, put = tokens.carrier, None
    if carrier is not None:
        weights, put = give(carrier, *weights)
    out_NO = _Matmul.apply(carrier, tokens.data, tokens.scale_inv, groups, quantized, put, *weights)
    fp8.take_carried_gradient(out_NO)
    return out_NO


def fp8_swiglu(gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None) -> Fp8Tokens:
    """``silu(gate) * up * weight`` of ``gate_up [N, 2F]``, quantised: Fp8Tokens ``[N, F]``; differentiable."""
    quantized_gradient = fp8.takes_carried_gradient(gate_up_NG)
    return Fp8Tokens(*_Swiglu.apply(gate_up_NG, weights_N, quantized_gradient))


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, data, scale_inv, groups, quantized, put, *weights):
        ctx.save_for_backward(data, scale_inv, *weights)
        ctx.groups, ctx.quantized, ctx.put = groups, quantized, put
        dtype = weights[0].dtype
        ctx.rows_dtype = dtype if carrier is None else carrier.dtype
        weight = quantized.for_forward(*weights, trained=ctx.needs_input_grad[0])
        out_NO = torch.empty(data.shape[0], weights[0].shape[-2], dtype=dtype, device=data.device)
        with named_range("moe_ep.experts.matmul"):
            rows_by_weights(Fp8Tokens(data, scale_inv), weight, groups, out_NO)
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        data, scale_inv, *weights = ctx.saved_tensors
        groups, dtype = ctx.groups, weights[0].dtype
        stacked = weights[0].dim() == 3
        grad = fp8.carried(grad_NO) or fp8.quantize(grad_NO.contiguous())

        def weight_gradients(into: Gradients | None) -> Gradients:
            if not stacked and isinstance(into, torch.Tensor):
                into = (into,)
            with named_range("moe_ep.experts.requantize_columns"):
                grad_columns = requantize_columns(grad, groups)
                columns = requantize_tiles(Fp8Tokens(data, scale_inv), groups)
            with named_range("moe_ep.experts.matmul.wgrad"):
                grads = columns_by_columns(grad_columns, columns, groups, dtype, into)
            if stacked:
                return grads
            return grads[0] if len(weights) == 1 else tuple(grads)

        # Unless they are put off, before the other gradient, which takes more memory and stays.
        wanted = any(ctx.needs_input_grad[6:])
        grad_weights = put_or_return(weight_gradients, ctx.put, wanted)
        if not isinstance(grad_weights, tuple):
            grad_weights = (grad_weights,) * len(weights)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty(data.shape, dtype=ctx.rows_dtype, device=data.device)
            for first, weight in ctx.quantized.for_backward(*weights):
                part, where = groups.part(first, first + len(weight.data))
                with named_range("moe_ep.experts.matmul.dgrad"):
                    grads = Fp8Tokens(grad.data[where], grad.scale_inv[where])
                    rows_by_weights(grads, weight, part, grad_rows[where])
                del weight  # memory first
        return grad_rows, None, None, None, None, None, *grad_weights


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_NG, weights_N, quantized_gradient):
        ctx.save_for_backward(gate_up_NG, weights_N)
        ctx.quantized_gradient = quantized_gradient
        with named_range("moe_ep.experts.swiglu"):
            tokens = quantize_swiglu(gate_up_NG, weights_N)
        ctx.mark_non_differentiable(tokens.data, tokens.scale_inv)
        carrier = fp8.make_carrier(tokens.shape, gate_up_NG.dtype, tokens.device)
        return tokens.data, tokens.scale_inv, carrier

    @staticmethod
    @once_differentiable
    def backward(ctx, _grad_data, _grad_scale_inv, grad_NF):
        gate_up_NG, weights_N = ctx.saved_tensors
        with named_range("moe_ep.experts.swiglu.backward"):
            grad, grad_weights_N = quantize_swiglu_gradient(gate_up_NG, weights_N, grad_NF.contiguous())
            if ctx.quantized_gradient:
                grad_NG = fp8.carry(grad, gate_up_NG.dtype)
            else:
                grad_NG = grad.dequantize(gate_up_NG.dtype)
        return grad_NG, grad_weights_N, None
