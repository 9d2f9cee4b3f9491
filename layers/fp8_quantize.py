"""What FP8 experts quantise: rows, columns of each expert's rows, and weights.

Numbers and scales are those of `moe_ep.fp8`; a block is

- 1x128 for rows (tokens and their gradients): `Fp8Tokens`
- 128x1 for columns, within the rows of one expert, its last block shorter: `Fp8Columns`
- 128x128 for weights: `Fp8Weight`; and for columns that are multiplied by others: `Fp8ColumnTiles`

Columns come from rows that are quantised already: ``columns = quantise(dequantise(rows))``. Scales are powers of two,
so nearly all values survive that unchanged (99.5 % where rows differ by orders of magnitude), and the tokens that
arrived are all that has to be kept for the backward pass. That also makes tiles as good as single columns: q keeps its
four significant bits, unless it is some 2^14 below the largest of its block. The matrix units multiply tiles by columns
a quarter faster than columns by columns.

`csrc/fp8` and `csrc/swiglu` do this on a GPU, with the bits of the functions ending in ``_torch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from moe_ep import Fp8Tokens, _extension, fp8
from moe_ep.fp8 import BLOCK

from . import swiglu
from .row_groups import RowGroups

COLUMN_ALIGNMENT = 16
"""Rows of every expert are a multiple of this, for the kernels and for cuBLASLt."""


@dataclass(frozen=True)
class Fp8Columns:
    """Columns of each expert's rows, in blocks of 128 rows.

    - ``data``: float8_e4m3fn: for each expert a matrix ``[C, M rounded up to a multiple of 128]``, one after the other;
      behind its M rows are zeros
    - ``scale_inv``: float32 ``[B, C]``: for each expert ``ceil(M / 128)`` rows
    """

    data: torch.Tensor
    scale_inv: torch.Tensor

    @property
    def num_columns(self) -> int:
        return self.scale_inv.shape[1]

    def by_expert(self, groups: RowGroups) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``data [C, M]`` and ``scale_inv [ceil(M / 128), C]`` of each expert's M rows, views."""
        block = 0
        for data in _data_by_expert(self.data, self.num_columns, groups):
            first, block = block, block + -(-data.shape[1] // BLOCK)
            yield data, self.scale_inv[first:block]

    def dequantize(self, groups: RowGroups, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """``[C, M]`` for each expert."""
        for data, scale_inv in self.by_expert(groups):
            scales = scale_inv.t().repeat_interleave(BLOCK, 1)[:, : data.shape[1]]
            yield (data.float() * scales).to(dtype)


@dataclass(frozen=True)
class Fp8ColumnTiles:
    """Columns of each expert's rows, in tiles of 128 rows and 128 columns.

    - ``data``: as in `Fp8Columns`
    - ``scale_inv``: float32, for each expert a matrix ``[ceil(C / 128), W]``, one after the other: W tiles of its rows,
      rounded up to a multiple of 4, as cuBLASLt wants it; what that adds counts for nothing
    """

    data: torch.Tensor
    scale_inv: torch.Tensor
    num_columns: int

    def by_expert(self, groups: RowGroups) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``data [C, M]`` and ``scale_inv [ceil(C / 128), ceil(M / 128)]`` of each expert's M rows, views."""
        height, first = -(-self.num_columns // BLOCK), 0
        for data in _data_by_expert(self.data, self.num_columns, groups):
            width = _tiles_width(data.shape[1])
            scale_inv = self.scale_inv[first : first + height * width].view(height, width)
            first += height * width
            yield data, scale_inv[:, : -(-data.shape[1] // BLOCK)]

    def dequantize(self, groups: RowGroups, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """``[C, M]`` for each expert."""
        for data, scale_inv in self.by_expert(groups):
            scales = scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            yield (data.float() * scales[: data.shape[0], : data.shape[1]]).to(dtype)


def _tiles_width(num_rows: int) -> int:
    return -(-num_rows // (4 * BLOCK)) * 4


def padded_splits(groups: RowGroups) -> list[int]:
    """Rows of each expert in the data of columns, zeros included."""
    return [-(-size // BLOCK) * BLOCK for size in groups.splits]


def _data_by_expert(data: torch.Tensor, num_columns: int, groups: RowGroups) -> Iterator[torch.Tensor]:
    padded = padded_splits(groups)
    parts = data.split([num_columns * size for size in padded])
    for part, size, used in zip(parts, padded, groups.splits, strict=True):
        yield part.view(num_columns, size)[:, :used]


def _pad_columns(columns_CM: torch.Tensor) -> torch.Tensor:
    padding = -columns_CM.shape[1] % BLOCK
    return F.pad(columns_CM.view(torch.uint8), (0, padding)).view(torch.float8_e4m3fn).flatten()


@dataclass(frozen=True)
class Fp8Weight:
    """Matrices in 128x128 blocks: ``data`` float8_e4m3fn ``[L, R, C]``, ``scale_inv`` float32 ``[L, ceil(R / 128),
    S]``, of whose last dimension the first ``ceil(C / 128)`` count (cuBLASLt wants a multiple of 4).
    """

    data: torch.Tensor
    scale_inv: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """``[L, R, C]``"""
        _, num_rows, num_columns = self.data.shape
        scales = self.scale_inv[:, :, : -(-num_columns // BLOCK)]
        scales = scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return (self.data.float() * scales[:, :num_rows, :num_columns]).to(dtype)


def requantize_columns(tokens: Fp8Tokens, groups: RowGroups) -> Fp8Columns:
    """Rows ``[N, C]`` by column, for a product over the rows of each expert."""
    kernels = _kernels_for_columns(tokens, groups)
    if kernels is None:
        return requantize_columns_torch(tokens, groups)
    num_blocks = sum(padded_splits(groups)) // BLOCK
    scale_inv = tokens.scale_inv.new_empty(num_blocks, tokens.shape[1])
    return Fp8Columns(_launch(kernels.requantize_columns, tokens, groups, scale_inv), scale_inv)


def requantize_columns_torch(tokens: Fp8Tokens, groups: RowGroups) -> Fp8Columns:
    wide = fp8.dequantize_torch(tokens.data, tokens.scale_inv, torch.float32)
    data, scale_inv = [], []
    for start, end in groups.segments:
        columns, scales = fp8.quantize_torch(wide[start:end].t())
        data.append(_pad_columns(columns))
        scale_inv.append(scales.t())
    return Fp8Columns(torch.cat(data), torch.cat(scale_inv).contiguous())


def requantize_tiles(tokens: Fp8Tokens, groups: RowGroups) -> Fp8ColumnTiles:
    """Rows ``[N, C]`` by column in tiles of 128x128, for a product over the rows of each expert.

    A tile's scale is the largest of its rows', rows of zeros aside.
    """
    kernels = _kernels_for_columns(tokens, groups)
    if kernels is None:
        return requantize_tiles_torch(tokens, groups)
    num_columns = tokens.shape[1]
    scale_inv = tokens.scale_inv.new_empty(num_columns // BLOCK * sum(map(_tiles_width, groups.splits)))
    data = _launch(kernels.requantize_tiles, tokens, groups, scale_inv)
    return Fp8ColumnTiles(data, scale_inv, num_columns)


def requantize_tiles_torch(tokens: Fp8Tokens, groups: RowGroups) -> Fp8ColumnTiles:
    data, scale_inv = [], []
    num_columns = tokens.shape[1]
    height = -(-num_columns // BLOCK)
    for start, end in groups.segments:
        width = -(-(end - start) // BLOCK)
        padding = (0, height * BLOCK - num_columns, 0, width * BLOCK - (end - start))
        tiles = F.pad(tokens.data[start:end].float(), padding).view(width, BLOCK, height, BLOCK)
        scales = F.pad(tokens.scale_inv[start:end], (0, 0, 0, padding[3])).view(width, BLOCK, height)
        is_zero = (tiles == 0).all(-1)
        largest = scales.masked_fill(is_zero, 0).amax(1) if width else scales.new_empty(0, height)
        largest = torch.where(largest == 0, 1.0, largest)
        factors = scales * largest.reciprocal().unsqueeze(1)
        scaled = (tiles * factors.unsqueeze(-1)).view(width * BLOCK, height * BLOCK)
        columns = scaled[: end - start, :num_columns].t().contiguous()
        data.append(_pad_columns(columns.to(torch.float8_e4m3fn)))
        scale_inv.append(F.pad(largest.t(), (0, _tiles_width(end - start) - width)).flatten())
    return Fp8ColumnTiles(torch.cat(data), torch.cat(scale_inv), num_columns)


def _kernels_for_columns(tokens: Fp8Tokens, groups: RowGroups) -> ModuleType | None:
    kernels = _kernels(tokens.data, tokens.shape[1])
    if kernels is None or any(size % COLUMN_ALIGNMENT for size in groups.splits):
        return None
    return kernels


def _launch(
    requantize: Callable[..., None], tokens: Fp8Tokens, groups: RowGroups, scale_inv: torch.Tensor
) -> torch.Tensor:
    """A kernel that turns rows into columns: their data, and their scales into ``scale_inv``."""
    num_rows, num_columns = tokens.shape
    data = tokens.data.new_empty(sum(padded_splits(groups)) * num_columns)
    with torch.cuda.device(tokens.device):
        requantize(
            data=tokens.data.data_ptr(),
            scale_inv=tokens.scale_inv.data_ptr(),
            rows=num_rows,
            cols=num_columns,
            counts=groups.tokens_per_expert.data_ptr(),
            num_experts=len(groups.tokens_per_expert),
            out=data.data_ptr(),
            out_scale_inv=scale_inv.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return data


def transpose_scales(scale_inv: torch.Tensor, groups: RowGroups) -> torch.Tensor:
    """``scale_inv [N, B]`` as matrices ``[B, rows of the expert]``, one after the other: ``[N * B]``."""
    kernels = _kernels(scale_inv, 0)
    if kernels is None:
        parts = [scale_inv[start:end].t().flatten() for start, end in groups.segments]
        rest = (scale_inv.shape[0] - groups.segments[-1][1]) * scale_inv.shape[1]
        return torch.cat([*parts, scale_inv.new_empty(rest)])
    out = torch.empty(scale_inv.numel(), dtype=torch.float32, device=scale_inv.device)
    with torch.cuda.device(scale_inv.device):
        kernels.transpose_scales(
            scale_inv=scale_inv.data_ptr(),
            rows=scale_inv.shape[0],
            blocks=scale_inv.shape[1],
            counts=groups.tokens_per_expert.data_ptr(),
            num_experts=len(groups.tokens_per_expert),
            out=out.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out


def quantize_weight(
    *weights: torch.Tensor, rows: bool = True, transposed: bool = False
) -> tuple[Fp8Weight | None, Fp8Weight | None]:
    """L matrices in 128x128 blocks: as they are, and transposed (``[L, C, R]``), whichever is wanted.

    ``weights``: one ``[L, R, C]``, or ``[R, C]`` for each of them.
    """
    stacks = [weight.contiguous().view(-1, *weight.shape[-2:]) for weight in weights]
    num_matrices, (num_rows, num_columns) = sum(map(len, stacks)), stacks[0].shape[1:]
    device, dtype = stacks[0].device, stacks[0].dtype
    kernels = _kernels(stacks[0], num_columns)
    if kernels is None or num_rows % BLOCK or dtype not in swiglu.KERNEL_DTYPES:
        plain = quantize_weight_torch(torch.cat(stacks))
        turned = Fp8Weight(
            plain.data.transpose(1, 2).contiguous(), plain.scale_inv.transpose(1, 2).contiguous()
        )
        return plain if rows else None, turned if transposed else None
    as_is = _empty_weight(num_matrices, num_rows, num_columns, device) if rows else None
    turned = _empty_weight(num_matrices, num_columns, num_rows, device) if transposed else None
    first = 0
    with torch.cuda.device(device):
        for stack in stacks:
            kernels.quantize_blocks(
                x=stack.data_ptr(),
                dtype=getattr(kernels.DType, swiglu.KERNEL_DTYPES[dtype]),
                matrices=len(stack),
                rows=num_rows,
                cols=num_columns,
                data=as_is.data[first:].data_ptr() if rows else 0,
                scale_inv=as_is.scale_inv[first:].data_ptr() if rows else 0,
                scale_stride=as_is.scale_inv.shape[2] if rows else 0,
                transposed=turned.data[first:].data_ptr() if transposed else 0,
                transposed_scale_inv=turned.scale_inv[first:].data_ptr() if transposed else 0,
                transposed_scale_stride=turned.scale_inv.shape[2] if transposed else 0,
                stream=torch.cuda.current_stream().cuda_stream,
            )
            first += len(stack)
    return as_is, turned


def quantize_weight_torch(weight_LRC: torch.Tensor) -> Fp8Weight:
    num_matrices, num_rows, num_columns = weight_LRC.shape
    row_blocks, column_blocks = -(-num_rows // BLOCK), -(-num_columns // BLOCK)
    padding = (0, column_blocks * BLOCK - num_columns, 0, row_blocks * BLOCK - num_rows)
    tiles = F.pad(weight_LRC, padding).view(num_matrices, row_blocks, BLOCK, column_blocks, BLOCK)
    tiles = tiles.transpose(2, 3)
    data, scale_inv = fp8.quantize_tiles_torch(tiles.flatten(-2))
    data = data.view(torch.uint8).view(tiles.shape).transpose(2, 3)
    data = data.reshape(num_matrices, row_blocks * BLOCK, column_blocks * BLOCK)[:, :num_rows, :num_columns]
    return Fp8Weight(data.contiguous().view(torch.float8_e4m3fn), scale_inv)


def quantize_swiglu(gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None) -> Fp8Tokens:
    """`weighted_swiglu`, quantised: Fp8Tokens ``[N, F]`` without a carrier."""
    if swiglu.kernels_for(gate_up_NG, weights_N, multiple=BLOCK) is None:
        return Fp8Tokens(*fp8.quantize_torch(swiglu.activate_torch(gate_up_NG, weights_N)))
    data, scale_inv = _empty_tokens(gate_up_NG.shape[0], gate_up_NG.shape[1] // 2, gate_up_NG.device)
    swiglu.launch_forward(gate_up_NG, weights_N, data=data, scale_inv=scale_inv)
    return Fp8Tokens(data, scale_inv)


def quantize_swiglu_gradient(
    gate_up_NG: torch.Tensor, weights_N: torch.Tensor | None, grad_NF: torch.Tensor
) -> tuple[Fp8Tokens, torch.Tensor | None]:
    """The gradients of gate and up, quantised: Fp8Tokens ``[N, 2F]``; and of the weights ``[N]``."""
    if swiglu.kernels_for(gate_up_NG, weights_N, multiple=BLOCK) is None:
        grad_NG, grad_weights_N = swiglu.differentiate_torch(gate_up_NG, weights_N, grad_NF)
        return Fp8Tokens(*fp8.quantize_torch(grad_NG)), grad_weights_N
    data, scale_inv = _empty_tokens(*gate_up_NG.shape, gate_up_NG.device)
    grad_weights_N = swiglu.launch_backward(gate_up_NG, weights_N, grad_NF, data=data, scale_inv=scale_inv)
    return Fp8Tokens(data, scale_inv), grad_weights_N


def _kernels(tensor: torch.Tensor, num_columns: int) -> ModuleType | None:
    if not tensor.is_cuda or num_columns % BLOCK or torch.compiler.is_compiling():
        return None
    return _extension.load_for(tensor.device)


def _empty_tokens(num_rows: int, num_columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=device)
    return data, torch.empty(num_rows, num_columns // BLOCK, dtype=torch.float32, device=device)


def _empty_weight(num_matrices: int, num_rows: int, num_columns: int, device: torch.device) -> Fp8Weight:
    data = torch.empty(num_matrices, num_rows, num_columns, dtype=torch.float8_e4m3fn, device=device)
    width = -(-num_columns // (4 * BLOCK)) * 4
    scale_inv = torch.empty(num_matrices, num_rows // BLOCK, width, dtype=torch.float32, device=device)
    return Fp8Weight(data, scale_inv)
