"""Numbers, FP8 by blocks, and tensors' fingerprints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ....errors import InvalidInput

BLOCK = 128
E4M3_MAX = 448.0
LEAST_AMAX = 1e-4


def ceil_div(x: int, y: int) -> int:
    """``x / y`` rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """``x`` rounded up to a multiple of ``y``."""
    return ceil_div(x, y) * y


def safe_div(a: float, b: float) -> float:
    """``a / b``, where 0 / 0 is 0."""
    return 0 if a == 0 and b == 0 else a / b


def count_bytes(*tensors: torch.Tensor | Iterable | None) -> int:
    """Bytes of tensors, and of those in tuples and lists; None counts nothing."""
    total = 0
    for item in tensors:
        if isinstance(item, (tuple, list)):
            total += count_bytes(*item)
        elif item is not None:
            total += item.nbytes
    return total


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How much two tensors differ: ``1 - 2 <x', y'> / (<x', x'> + <y', y'>)`` in float64, with x' = x + 1."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x.square() + y.square()).sum()).item()


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [m, n]`` -> float8_e4m3fn ``[m, n]`` and float32 scales ``[m, ceil(n / 128)]``.

    By blocks of 128: scale = amax / 448, with amax at least 1e-4.
    """
    if x.dim() != 2:
        raise InvalidInput(f"x has shape {tuple(x.shape)}; it must be [m, n]")
    rows, columns = x.shape
    tiles = _tiles(x)
    amax = tiles.abs().float().amax(dim=2).clamp(min=LEAST_AMAX)
    scaled = (tiles * (torch.full_like(amax, E4M3_MAX) / amax).unsqueeze(2)).clamp(-E4M3_MAX, E4M3_MAX)
    data = scaled.to(torch.float8_e4m3fn).flatten(1)[:, :columns].contiguous()
    return data.view(rows, columns), amax / torch.full_like(amax, E4M3_MAX)


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """The inverse: bfloat16 ``[m, n]``. int32 scales are four UE8M0 exponents each."""
    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    if x_scales.dtype == torch.int32:
        x_scales = unpack_ue8m0(x_scales)
    columns = x_fp8.shape[1]
    tiles = _tiles(x_fp8.float())
    scaled = tiles * x_scales[:, : tiles.shape[1]].unsqueeze(2)
    return scaled.to(torch.bfloat16).flatten(1)[:, :columns].contiguous()


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32 ``[..., 4 n]`` -> their exponent bytes, int32 ``[..., n]``; the first is the lowest."""
    exponents = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return exponents.view(torch.int32)


def unpack_ue8m0(packed: torch.Tensor) -> torch.Tensor:
    """int32 ``[..., n]`` -> float32 ``[..., 4 n]``."""
    exponents = packed.contiguous().view(torch.uint8)
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Each row of ``x [m, n]`` becomes its distinct ids in ``[0, num_slots)``, descending, then -1."""
    present = torch.zeros((x.shape[0], num_slots + 1), dtype=torch.bool, device=x.device)
    present.scatter_(1, torch.where(x < 0, num_slots, x).long(), True)
    ids = torch.arange(num_slots, device=x.device)
    distinct = torch.where(present[:, :num_slots], ids, -1).sort(dim=1, descending=True).values
    kept = min(num_slots, x.shape[1])
    x.fill_(-1)
    x[:, :kept] = distinct[:, :kept].to(x.dtype)


def create_grouped_scores(scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """``scores [n, E]`` with 0 for the experts outside a token's groups ``group_idx [n, G]``."""
    num_tokens, num_experts = scores.shape
    chosen = torch.zeros((num_tokens, num_groups), dtype=torch.bool, device=scores.device)
    chosen.scatter_(1, group_idx, True)
    return scores * chosen.repeat_interleave(num_experts // num_groups, dim=1)


def hash_tensor(t: torch.Tensor) -> int:
    """The sum of a tensor's 4-byte words (of its bytes, if it is not made of words)."""
    t = t.contiguous()
    return t.view(torch.int32 if t.element_size() == 4 else torch.uint8).sum().item()


def hash_tensors(*tensors: torch.Tensor | Iterable | None) -> int:
    """`hash_tensor` of all, exclusive or; tuples and lists are entered, None counts nothing."""
    value = 0
    for item in tensors:
        if isinstance(item, (tuple, list)):
            value ^= hash_tensors(*item)
        elif item is not None:
            value ^= hash_tensor(item)
    return value


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """``[m, n]`` -> ``[m, ceil(n / 128), 128]``, with zeros at the end."""
    rows, columns = x.shape
    return F.pad(x, (0, align(columns, BLOCK) - columns)).view(rows, -1, BLOCK)
