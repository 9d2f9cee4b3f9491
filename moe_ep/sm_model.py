"""How many multiprocessors (SMs) a dispatch or combine should take, where nobody has said or measured it.

A call is bound by the link, which a few SMs saturate, or by what its SMs can load and store. From rates measured on an
H200 (docs/benchmarks), with routing taken as uniform:

    link_us = bytes that leave the rank / LINK
    sm_us   = (bytes stored / STORE + bytes loaded / LOAD + bytes added up / ADD) / num_sms

The choice is the smallest number of SMs with ``sm_us <= SLACK * link_us``, and no more than `OVERLAPPED_SMS` where
computation runs at the same time, whose time counts as well.
"""

from __future__ import annotations

from dataclasses import dataclass

LINK_GBPS = 366.0
"""Of one direction between two GPUs over NVLink 4, with both busy."""
STORE_GBPS = 53.0
"""What one SM stores."""
LOAD_GBPS = 170.0
"""What one SM loads."""
ADD_GBPS = 70.0
"""What one SM loads and adds up."""
SLACK = 0.75
OVERLAPPED_SMS = 24
"""Two blocks of DeepSeek-V3 on two H200, a micro-batch forward beside another backward, took 71.4 ms with 24, 71.6 with
16, 71.9 with 32; a layer with its shared expert beside communication 18.0, 18.6 and 17.5.
"""
MOST_SENDERS = 24
WARPS = 11
"""Of a combine kernel, on each multiprocessor: a warp that sends keeps to one peer where rings are short."""
QUANTISING_SMS = 120
"""From so many on a dispatch quantises by itself; with fewer, a kernel before it on all multiprocessors takes less."""
_STEP = 4


@dataclass(frozen=True)
class Work:
    """One operation on one rank: ``row_bytes`` of what travels, and whom it concerns."""

    op: str
    layout: str
    row_bytes: int
    num_tokens: int
    num_topk: int
    num_experts: int
    num_ranks: int

    @property
    def rows(self) -> float:
        """Rows of the layout, on each rank."""
        return self.num_tokens * (self.num_topk if self.layout == "expert" else self.ranks_per_token)

    @property
    def ranks_per_token(self) -> float:
        """Ranks that hold an expert of a token, on average: R (1 - (1 - 1/R)^K)."""
        return self.num_ranks * (1 - (1 - 1 / self.num_ranks) ** self.num_topk)

    @property
    def rows_sent(self) -> float:
        return self.num_tokens * self.ranks_per_token * (1 - 1 / self.num_ranks)

    def link_us(self) -> float:
        return self.rows_sent * self.row_bytes / LINK_GBPS / 1e3

    def sm_us(self, num_sms: int) -> float:
        own = self.num_tokens * self.ranks_per_token / self.num_ranks
        if self.op == "dispatch":
            stored, loaded, added = self.rows_sent + self.rows, 2 * self.rows_sent + own, 0.0
        else:
            stored, loaded, added = self.rows_sent + self.num_tokens, 0.0, self.rows_sent + self.rows
        time = stored / STORE_GBPS + loaded / LOAD_GBPS + added / ADD_GBPS
        return self.row_bytes * time / 1e3 / num_sms


def choose_num_sms(work: Work, available: int, overlapped: bool = False) -> int:
    """Between 1 and ``available``."""
    limit = min(available, OVERLAPPED_SMS) if overlapped else available
    if work.num_ranks == 1:
        return limit
    for num_sms in range(_STEP, limit, _STEP):
        if work.sm_us(num_sms) <= SLACK * work.link_us():
            return num_sms
    return limit


def split(work: Work, num_sms: int, quantises: bool = False) -> tuple[int, int]:
    """SMs of a kernel, at least 2 where there are peers, and how many of them send.

    The shares that were best on 2 H200 with 24, 64 and 132 SMs. Those that send help the others when they are done, so
    too many cost less than too few; past some 24 they only get into each other's way.
    """
    if work.num_ranks == 1:
        return num_sms, 0
    num_sms, most_senders = max(2, num_sms), MOST_SENDERS
    if quantises:  # which takes a warp longer than the link takes for the row
        senders, most_senders = num_sms / 3, num_sms
    elif work.op == "combine" and work.layout == "expert":
        senders = 0.6 * num_sms
    else:
        senders = min(0.42 * num_sms, 6.6 + 0.1 * num_sms)
    senders = max(1, min(int(senders), most_senders), -(-(work.num_ranks - 1) // WARPS))
    return max(num_sms, senders + 1), senders
