"""Numbers that V2's callers ask for: bytes of a buffer, multiprocessors, queue pairs."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 2 << 20
"""Buffers are sized in steps of this many bytes."""
MOST_TOPK = 32
LINK_EFFICIENCY = 0.9
H200_LINK_GBS = 18 * 26.5625
"""One direction of 18 NVLink 4 links."""
H200_SMS = 132
_SCALE_BLOCK = 128
_SM_MARGIN = 1.25
_SMS_WITHOUT_OVERLAP = 64


def align(value: int, multiple: int) -> int:
    """``value`` rounded up."""
    return -(-value // multiple) * multiple


def buffer_bytes(
    num_ranks: int,
    max_tokens: int,
    hidden: int,
    num_topk: int = 0,
    use_fp8_dispatch: bool = False,
    allow_multiple_reduction: bool = True,
) -> int:
    """Bytes of deep_ep's V2 buffer within one NVLink domain.

    A slot holds a row, its scales, and its top-k, each in whole 32 bytes. Dispatch has a slot for each rank and token,
    combine one for each of a token's ranks, or of its experts without multiple reduction. ``num_topk`` 0 is 32.

    moe_ep has no such buffer: its windows are smaller and made with the first call (`Communicator.window_bytes`).
    """
    num_topk = num_topk or MOST_TOPK
    if use_fp8_dispatch:
        row = align(hidden, 32) + align(4 * math.ceil(hidden / _SCALE_BLOCK), 32)
    else:
        row = align(2 * hidden, 32)
    dispatch = num_ranks * max_tokens * (row + align(8 * num_topk + 4 * (1 + num_topk), 32))
    copies = min(num_ranks, num_topk) if allow_multiple_reduction else num_topk
    combine = copies * max_tokens * (align(2 * hidden, 32) + align(8 * num_topk, 32))
    return align(max(dispatch, combine), ALIGNMENT)


def theoretical_num_sms(
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    link_gbs: float,
    sm_read_gbs: float,
    sm_write_gbs: float,
    overlapped: bool,
    available: int,
) -> int:
    """Multiprocessors that keep a link of ``link_gbs`` busy, by deep_ep's model of uniform routing.

    For a byte of a token that comes in, an SM reads it once and writes it to each of the token's ranks; all but the own
    share of these bytes cross the link. Even, with a quarter to spare; at least 4, or 64 where nothing else runs.

    >>> [theoretical_num_sms(r, 256, 8, 0.9 * H200_LINK_GBS, 200, 50, True, 132) for r in (2, 4, 8)]
    [22, 16, 14]
    """
    if num_ranks == 1:
        return available
    elsewhere = num_experts - num_experts // num_ranks
    missed = math.comb(elsewhere, num_topk) / math.comb(num_experts, num_topk)
    ranks_per_token = num_ranks * (1 - missed)
    link_time = ranks_per_token * (1 - 1 / num_ranks) / link_gbs
    sm_time = max(1 / sm_read_gbs, ranks_per_token / sm_write_gbs)
    wanted = align(math.ceil(_SM_MARGIN * sm_time / link_time), 2)
    return min(available, max(wanted, 4 if overlapped else _SMS_WITHOUT_OVERLAP))


def available_sms(device: torch.device) -> int:
    """Of this GPU; of an H200 where there is none."""
    if device.type != "cuda":
        return H200_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
