"""Who is to blame when messages stop.

A failure of one rank soon becomes a failure of all: a rank that gives up closes its connections, and its peers see
them break. So every rank that notices a failure writes whom it suspects into the group's store before it raises; a
dead or late rank can't. Whoever stays silent is to blame.
"""

from __future__ import annotations

import time

import torch.distributed as dist

_GRACE_S = 5.0
_POLL_S = 0.02


def find_silent_ranks(
    store: dist.Store, rank: int, size: int, suspects: set[int], phase: str
) -> tuple[set[int], str]:
    """The ranks to blame, and what the others have said.

    ``suspects`` are the ranks whose messages this rank misses. Ends when all ranks that speak agree on those that
    don't, and after a few seconds in any case.
    """
    try:
        store.set(_key(rank), f"{phase}|{','.join(map(str, sorted(suspects)))}")
        deadline = time.monotonic() + _GRACE_S
        while True:
            reports = _read_reports(store, size)
            silent = suspects - set(reports)
            if not silent:
                return suspects, _accounts_of(reports, suspects, rank)
            others = set(range(size)) - silent
            agreed = others <= set(reports) and all(silent <= reports[r][1] for r in others)
            if agreed or time.monotonic() > deadline:
                return silent, ""
            time.sleep(_POLL_S)
    except RuntimeError:
        return suspects, "the store that ranks report to is gone as well"


def _key(rank: int) -> str:
    return f"failure/{rank}"


def _read_reports(store: dist.Store, size: int) -> dict[int, tuple[str, set[int]]]:
    reports = {}
    for rank in range(size):
        if store.check([_key(rank)]):
            phase, accused = store.get(_key(rank)).decode().split("|")
            reports[rank] = phase, {int(r) for r in accused.split(",") if r}
    return reports


def _accounts_of(reports: dict[int, tuple[str, set[int]]], ranks: set[int], me: int) -> str:
    """Every suspect has itself reported a failure: tell what they said."""
    accounts = []
    for rank in sorted(ranks):
        phase, accused = reports[rank]
        names = " and ".join("this rank" if r == me else f"rank {r}" for r in sorted(accused))
        accounts.append(f"rank {rank} had given up waiting for {names} during {phase}")
    return "; ".join(accounts)
