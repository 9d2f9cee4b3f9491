"""FP8 tokens: 1x128 blocks of float8_e4m3fn with power-of-two scales.

The formulas are those of Transformer Engine's block scaling recipe (``Float8BlockScaling``: 1x128 tiles, e4m3,
power-of-two scales, no amax floor), so that the bytes equal its kernels' bit for bit:

    amax      = max |x| over the tile; NaN ignored, Inf kept
    scale     = 1 where amax is 0 or Inf, else 448 / amax rounded once to float32; an infinite quotient becomes
                the largest finite value of the input dtype; then rounded down to a power of two
    scale_inv = 1 / scale
    q         = x * scale in float32, rounded to nearest even, saturated to +-448; NaN becomes 0x7F
    x'        = q * scale_inv in float32, rounded once to the output dtype
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from . import _extension
from .autograd import Function
from .errors import InvalidInput

BLOCK = 128
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
MODES = ("blockwise",)
"""The values of every ``fp8=`` argument besides None."""

QUANTISABLE = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT32_EXPONENT_AND_SIGN = -(1 << 23)  # 0xFF800000 as int32


@dataclass(frozen=True)
class Fp8Tokens:
    """Quantised tokens: ``data [M, H]`` float8_e4m3fn and ``scale_inv [M, ceil(H / 128)]`` float32.

    Element ``[m, h]`` stands for ``data[m, h] * scale_inv[m, h // 128]``.

    ``carrier``, if there is one, is an ``[M, H]`` tensor in the dtype before quantisation that has no memory of its
    own (all strides are 0). Only its place in the autograd graph matters: the gradient of the tokens flows through it
    unchanged (*straight-through*), in full precision.
    """

    data: torch.Tensor
    scale_inv: torch.Tensor
    carrier: torch.Tensor | None = None

    def __post_init__(self) -> None:
        data, scale_inv, carrier = self.data, self.scale_inv, self.carrier
        shape = data.shape
        if data.dtype != torch.float8_e4m3fn or len(shape) != 2:
            raise InvalidInput(
                f"Fp8Tokens.data is {data.dtype} of shape {tuple(shape)}; it must be torch.float8_e4m3fn [M, H]"
            )
        scales = shape[0], -(-shape[1] // BLOCK)
        if scale_inv.dtype != torch.float32 or scale_inv.shape != scales:
            raise InvalidInput(
                f"Fp8Tokens.scale_inv is {scale_inv.dtype} of shape {tuple(scale_inv.shape)}; it must be torch.float32 "
                f"of shape {scales}: one scale for each {BLOCK} elements of a row of data"
            )
        if carrier is not None and carrier.shape != shape:
            raise InvalidInput(
                f"Fp8Tokens.carrier has shape {tuple(carrier.shape)}; it must be data's, {tuple(shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The tokens as an ``[M, H]`` tensor of ``dtype``; its gradient goes to ``carrier`` unchanged."""
        if self.carrier is None:
            return dequantize(self.data, self.scale_inv, dtype)
        return _Dequantize.call(self.carrier, self.data, self.scale_inv, dtype)


def quantize(x: torch.Tensor) -> Fp8Tokens:
    """Quantise rows of ``x [M, H]`` (bfloat16, float16 or float32) in 1x128 blocks.

    Differentiable straight-through: the gradient of the result's ``carrier`` is the gradient of ``x``.
    Raises InvalidInput for another dtype or shape.
    """
    check_quantisable(x)
    return Fp8Tokens(*_Quantize.call(x))


def check_quantisable(x: torch.Tensor) -> None:
    if x.dim() != 2 or x.dtype not in QUANTISABLE:
        raise InvalidInput(
            f"quantize takes a [M, H] tensor of bfloat16, float16 or float32, not {x.dtype} of shape {tuple(x.shape)}"
        )


def dequantize(data: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``data * scale_inv`` by blocks in float32, rounded once to ``dtype``; ``[M, H]``. Not differentiable."""
    kernels = _kernels(data) if dtype in QUANTISABLE else None
    if kernels is None:
        return dequantize_torch(data, scale_inv, dtype)
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    with torch.cuda.device(data.device):
        kernels.dequantize_rowwise(
            data=data.data_ptr(),
            scale_inv=scale_inv.data_ptr(),
            rows=data.shape[0],
            cols=data.shape[1],
            out=out.data_ptr(),
            dtype=_kernel_dtype(kernels, dtype),
            stream=torch.cuda.current_stream(data.device).cuda_stream,
        )
    return out


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(data, scale_inv)`` of `quantize`, outside autograd."""
    kernels = _kernels(x)
    if kernels is None:
        return quantize_torch(x)
    num_rows, hidden = x.shape
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale_inv = torch.empty(num_rows, -(-hidden // BLOCK), dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        kernels.quantize_rowwise(
            x=x.data_ptr(),
            dtype=_kernel_dtype(kernels, x.dtype),
            rows=num_rows,
            cols=hidden,
            data=data.data_ptr(),
            scale_inv=scale_inv.data_ptr(),
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
    return data, scale_inv


def _kernels(tensor: torch.Tensor) -> ModuleType | None:
    """The compiled kernels, where they apply: not on a CPU, and not while torch.compile, which fuses these, traces."""
    if not tensor.is_cuda or torch.compiler.is_compiling() or not tensor.is_contiguous():
        return None
    return _extension.load_for(tensor.device)


def _kernel_dtype(kernels: ModuleType, dtype: torch.dtype) -> object:
    return getattr(kernels.DType, str(dtype).removeprefix("torch."))


def quantize_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas of this module's docstring in plain torch: ``x [M, H]`` -> ``(data, scale_inv)``."""
    num_rows, hidden = x.shape
    blocks = -(-hidden // BLOCK)
    tiles = F.pad(x, (0, blocks * BLOCK - hidden)).view(num_rows, blocks, BLOCK)
    data, scale_inv = quantize_tiles_torch(tiles)
    return data.view(num_rows, blocks * BLOCK)[:, :hidden].contiguous(), scale_inv


def quantize_tiles_torch(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for blocks of any size: ``tiles [..., n]``, each with one scale -> ``data [..., n]``, ``scale_inv
    [...]``.
    """
    largest = torch.finfo(tiles.dtype).max
    tiles = tiles.float()
    magnitude = tiles.abs()
    amax = torch.where(magnitude.isnan(), 0.0, magnitude).amax(dim=-1)
    scale = _scale_from_amax(amax, largest)

    scaled = tiles * scale.unsqueeze(-1)
    # NOTE: torch's own cast neither saturates nor drops the sign of a NaN, CUDA's does both.
    data = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    data = data.masked_fill(scaled.isnan(), E4M3_NAN).view(torch.float8_e4m3fn)
    return data, torch.ones_like(scale) / scale


def _scale_from_amax(amax: torch.Tensor, largest: float) -> torch.Tensor:
    unscaled = (amax == 0) | amax.isinf()
    # NOTE: number / tensor would be reciprocal() * number in torch, which rounds twice; tensor / tensor rounds once.
    scale = torch.full_like(amax, E4M3_MAX) / amax
    scale = torch.where(scale.isinf(), largest, scale)
    power_of_two = (scale.view(torch.int32) & _FLOAT32_EXPONENT_AND_SIGN).view(torch.float32)
    return torch.where(unscaled, 1.0, power_of_two)


def dequantize_torch(data: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``dequantize`` in plain torch."""
    num_rows, hidden = data.shape
    blocks = scale_inv.shape[1]
    tiles = F.pad(data.float(), (0, blocks * BLOCK - hidden)).view(num_rows, blocks, BLOCK)
    return (tiles * scale_inv.unsqueeze(-1)).view(num_rows, blocks * BLOCK)[:, :hidden].to(dtype)


@dataclass(frozen=True)
class _Carried:
    tokens: Fp8Tokens
    stream: torch.cuda.Stream | None


# By storage, so that a tensor that shares it, such as a detached one, carries the same.
_carried: weakref.WeakKeyDictionary[torch.UntypedStorage, _Carried] = weakref.WeakKeyDictionary()
_takes_carried: weakref.WeakKeyDictionary[torch.UntypedStorage, torch.Size] = weakref.WeakKeyDictionary()


def carry(tokens: Fp8Tokens, dtype: torch.dtype) -> torch.Tensor:
    """A tensor ``[M, H]`` of ``dtype`` to stand for ``tokens`` where only tensors pass, as in autograd.

    It has no memory of its own. Whoever knows asks `carried`; for everybody else its elements are NaN.
    """
    data = tokens.data
    carrier = torch.full((), float("nan"), dtype=dtype, device=data.device).expand(data.shape)
    _remember(carrier, tokens)
    return carrier


def carry_differentiable(tokens: Fp8Tokens, dtype: torch.dtype) -> torch.Tensor:
    """`carry`, by the tokens' own carrier if they have one: the gradient of the result is theirs."""
    if tokens.carrier is None:
        return carry(tokens, dtype)
    _remember(tokens.carrier, tokens)
    return tokens.carrier


def _remember(carrier: torch.Tensor, tokens: Fp8Tokens) -> None:
    data = tokens.data
    stream = torch.cuda.current_stream(data.device) if data.is_cuda else None
    # NOTE: without the tokens' own carrier, which may be this one: the entry would keep itself alive.
    _carried[carrier.untyped_storage()] = _Carried(Fp8Tokens(data, tokens.scale_inv), stream)


def carried(carrier: torch.Tensor) -> Fp8Tokens | None:
    """The tokens for which `carry` made this tensor, to be used on the current stream; None for any other tensor."""
    entry = _carried.get(carrier.untyped_storage()) if carrier.stride() == (0, 0) else None
    if entry is None or entry.tokens.shape != carrier.shape:
        return None
    tokens = entry.tokens
    if entry.stream is not None:
        stream = torch.cuda.current_stream(tokens.device)
        if stream != entry.stream:
            tokens.data.record_stream(stream)
            tokens.scale_inv.record_stream(stream)
    return tokens


def take_carried_gradient(rows: torch.Tensor) -> None:
    """Say of ``rows``, an autograd Function's output, that its backward understands a gradient made by `carry`."""
    _takes_carried[rows.untyped_storage()] = rows.shape


def takes_carried_gradient(rows: torch.Tensor) -> bool:
    """Whether the gradient of ``rows`` may be a tensor made by `carry`.

    Not that of a leaf, such as a detached tensor: autograd would copy it into ``.grad``, as numbers.
    """
    return _takes_carried.get(rows.untyped_storage()) == rows.shape and not rows.is_leaf


def make_carrier(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor whose elements are all the same unset one: no memory to speak of, and no kernel to fill it."""
    return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=device)


class _Quantize(Function):
    @staticmethod
    def compute(x):
        return *quantize_rows(x), make_carrier(x.shape, x.dtype, x.device)

    @staticmethod
    def forward(ctx, x):
        data, scale_inv, carrier = _Quantize.compute(x)
        ctx.mark_non_differentiable(data, scale_inv)
        return data, scale_inv, carrier

    @staticmethod
    def backward(ctx, _grad_data, _grad_scale_inv, grad_carrier):
        return grad_carrier


class _Dequantize(Function):
    @staticmethod
    def compute(_carrier, data, scale_inv, dtype):
        return dequantize(data, scale_inv, dtype)

    @staticmethod
    def forward(ctx, carrier, data, scale_inv, dtype):
        ctx.dtype = carrier.dtype
        return dequantize(data, scale_inv, dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None, None, None
