"""silu(gate) * up * weight, the activation of experts, as one operation forward and one backward.

In float32 (float64 for float64), each operation rounded by itself and the result once:

    probability = 1 / (1 + exp(-gate))
    y           = ((gate * probability) * up) * weight
    grad_gate   = (grad * weight * up) * (probability * (1 + gate * (1 - probability)))
    grad_up     = (grad * weight) * (gate * probability)
    grad_weight = sum over the row of grad * (gate * probability * up)

`csrc/swiglu` does the same on a GPU; its results have the bits of the functions here run on that GPU, but for the order
of the sum. Gradients of gradients are plain torch's.
"""

from __future__ import annotations

import torch

from moe_ep import _extension
from moe_ep.streams import named_range

from .precision import at_least_float32

KERNEL_DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


def weighted_swiglu(gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """``silu(gate) * up * weight``: ``gate_up [N, 2F]`` (gate first), ``weights [N]`` or None for 1 -> ``[N, F]``
    in gate_up's dtype.
    """
    if kernels_for(gate_up_NG, weights_N, multiple=8) is None:
        return activate_torch(gate_up_NG, weights_N).to(gate_up_NG.dtype)
    return _WeightedSwiglu.apply(gate_up_NG.contiguous(), weights_N)


def kernels_for(gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None, multiple: int):
    """The compiled kernels where they take these tensors and F is a multiple of ``multiple``, else None."""
    if not gate_up_NG.is_cuda or gate_up_NG.dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():
        return None
    if gate_up_NG.shape[1] % (2 * multiple) or (weights_N is not None and weights_N.dtype != torch.float32):
        return None
    return _extension.load_for(gate_up_NG.device)


def activate_torch(gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """The activation before it is rounded, ``[N, F]`` float32 or float64."""
    wide = gate_up_NG.to(at_least_float32(gate_up_NG.dtype))
    gate, up = wide.chunk(2, dim=-1)
    y = gate * _sigmoid(gate) * up
    return y if weights_N is None else y * weights_N.to(wide.dtype).unsqueeze(-1)


def differentiate_torch(
    gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None, grad_NF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of gate and up ``[N, 2F]`` before they are rounded, and of the weights ``[N]``."""
    dtype = at_least_float32(gate_up_NG.dtype)
    gate, up = gate_up_NG.to(dtype).chunk(2, dim=-1)
    grad = grad_NF.to(dtype)
    weighted = grad if weights_N is None else grad * weights_N.to(dtype).unsqueeze(-1)
    probability = _sigmoid(gate)
    silu = gate * probability
    grad_gate = weighted * up * (probability * (1 + gate * (1 - probability)))
    grad_weights = None if weights_N is None else (grad * (silu * up)).sum(-1)
    return torch.cat([grad_gate, weighted * silu], dim=-1), grad_weights


def _sigmoid(gate: torch.Tensor) -> torch.Tensor:
    return (1 + (-gate).exp()).reciprocal()


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_NG, weights_N):
        ctx.save_for_backward(gate_up_NG, weights_N)
        num_rows, width = gate_up_NG.shape
        out_NF = gate_up_NG.new_empty(num_rows, width // 2)
        with named_range("moe_ep.experts.swiglu"):
            launch_forward(gate_up_NG, weights_N, out=out_NF)
        return out_NF

    @staticmethod
    def backward(ctx, grad_NF):
        gate_up_NG, weights_N = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            grad_NG, grad_weights_N = differentiate_torch(gate_up_NG, weights_N, grad_NF)
            return grad_NG.to(gate_up_NG.dtype), grad_weights_N
        grad_NG = torch.empty_like(gate_up_NG)
        with named_range("moe_ep.experts.swiglu.backward"):
            grad_weights_N = launch_backward(gate_up_NG, weights_N, grad_NF.contiguous(), grad=grad_NG)
        return grad_NG, grad_weights_N


def launch_forward(
    gate_up_NG: torch.Tensor,
    weights_N: torch.Tensor | None,
    *,
    out: torch.Tensor | None = None,
    data: torch.Tensor | None = None,
    scale_inv: torch.Tensor | None = None,
) -> None:
    """The kernel, for contiguous tensors: into ``out``, or quantised into ``data`` and ``scale_inv``."""
    kernels = _extension.load()
    num_rows, width = gate_up_NG.shape
    weights_N = None if weights_N is None else weights_N.contiguous()
    with torch.cuda.device(gate_up_NG.device):
        kernels.swiglu(
            gate_up=gate_up_NG.data_ptr(),
            weights=_address(weights_N),
            dtype=getattr(kernels.DType, KERNEL_DTYPES[gate_up_NG.dtype]),
            rows=num_rows,
            width=width // 2,
            out=_address(out),
            data=_address(data),
            scale_inv=_address(scale_inv),
            stream=torch.cuda.current_stream().cuda_stream,
        )


def launch_backward(
    gate_up_NG: torch.Tensor,
    weights_N: torch.Tensor | None,
    grad_NF: torch.Tensor,
    *,
    grad: torch.Tensor | None = None,
    data: torch.Tensor | None = None,
    scale_inv: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The kernel, likewise; returns the gradient of the weights."""
    kernels = _extension.load()
    num_rows, width = gate_up_NG.shape
    weights_N = None if weights_N is None else weights_N.contiguous()
    grad_weights_N = None if weights_N is None else torch.empty_like(weights_N)
    with torch.cuda.device(gate_up_NG.device):
        kernels.swiglu_backward(
            gate_up=gate_up_NG.data_ptr(),
            weights=_address(weights_N),
            grad_out=grad_NF.data_ptr(),
            dtype=getattr(kernels.DType, KERNEL_DTYPES[gate_up_NG.dtype]),
            rows=num_rows,
            width=width // 2,
            grad=_address(grad),
            data=_address(data),
            scale_inv=_address(scale_inv),
            grad_weights=_address(grad_weights_N),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return grad_weights_N


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
