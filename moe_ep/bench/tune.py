"""Which numbers of SMs are best for a shape: measuring, and choosing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..tuning import Choice
from .computation import Computation
from .jobs import Jobs
from .measure import Operation, Stopwatch, gather, median_us
from .results import Case
from .workload import FP8

TOLERANCE = 0.02
"""A number of SMs that is slower than the fastest by no more than this is as good, and the smallest such is chosen."""
CALLS = 4
"""Calls in a row beside computation, so that its beginning and its end matter less."""


@dataclass(frozen=True)
class Trial:
    """One number of SMs; us on the slowest rank.

    ``call_us``: a call alone; ``both_us``: `CALLS` calls and the computation beside them, until both have ended.
    """

    num_sms: int
    call_us: float
    both_us: float


@dataclass(frozen=True)
class Tuned:
    """All trials of a case; ``compute_us``: what the computation beside takes alone."""

    case: Case
    trials: tuple[Trial, ...]
    compute_us: float

    @property
    def latency(self) -> int:
        """The smallest number of SMs whose call takes at most 1 + TOLERANCE of the fastest's time."""
        return smallest_near_best({trial.num_sms: trial.call_us for trial in self.trials})

    @property
    def throughput(self) -> int:
        """The same of the time until communication and computation have both ended."""
        return smallest_near_best({trial.num_sms: trial.both_us for trial in self.trials})

    def choice(self, hidden: int, num_ranks: int) -> Choice:
        case = self.case
        dtype = "float8_e4m3fn" if case.dtype == FP8 else case.dtype
        return Choice(
            case.op,
            case.layout,
            dtype,
            case.num_tokens,
            hidden,
            num_ranks,
            self.latency,
            self.throughput,
        )


def smallest_near_best(us_by_sms: Mapping[int, float]) -> int:
    """The smallest number of SMs within TOLERANCE of the shortest time."""
    limit = min(us_by_sms.values()) * (1 + TOLERANCE)
    return min(num_sms for num_sms, us in us_by_sms.items() if us <= limit)


def measure(
    groups: Iterable[Jobs],
    num_sms: Sequence[int],
    compute_ratio: float,
    iterations: int,
    device: torch.device,
    side_stream: torch.cuda.Stream | None,
) -> list[Tuned]:
    """Try every number of SMs on every case; collective, and the same on every rank.

    The computation beside is as many matmuls as take ``compute_ratio`` times `CALLS` calls at their fastest.
    """
    watch = Stopwatch(device)
    computation = Computation(device)
    matmul_us = max(gather(computation.matmul_us(watch)))
    tuned = []
    for jobs in groups:
        for case in jobs.cases:
            if case.quantize:
                continue  # the same communication as of FP8 input
            calls = {n: jobs.cached(case, n) for n in num_sms}
            alone = {n: _slowest(watch, calls[n], iterations) for n in num_sms}
            wanted_us = compute_ratio * CALLS * min(alone.values())
            matmuls = max(1, round(wanted_us / matmul_us))
            beside = {n: computation.beside(calls[n], CALLS, matmuls, side_stream) for n in num_sms}
            both = {n: _slowest(watch, beside[n], iterations) for n in num_sms}
            trials = tuple(Trial(n, alone[n], both[n]) for n in num_sms)
            tuned.append(Tuned(case, trials, compute_us=matmuls * matmul_us))
    return tuned


def _slowest(watch: Stopwatch, operation: Operation, iterations: int) -> float:
    return max(gather(median_us(watch.device_us, operation, iterations)))
