"""Times of dispatch and combine over layouts, dtypes, sizes and numbers of SMs, beside NCCL doing the same job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import Communicator
from . import copy_engine
from .jobs import Jobs, jobs_of
from .measure import Stopwatch, Timing, gather, median_us
from .plan import Sweep
from .results import Case, Measurement, Results

_FIRST_CALLS = 10
_ENQUEUED = 20


class Bench:
    """Calls and times of one communicator; every rank does the same. Use under torch.no_grad()."""

    def __init__(self, sweep: Sweep, comm: Communicator, device: torch.device) -> None:
        self.sweep, self.comm, self.device = sweep, comm, device
        self.watch = Stopwatch(device)

    def run(self, machine: dict[str, Any], with_nccl: bool = True) -> Results:
        """Everything; collective, and the same on every rank."""
        wire_bytes: dict[Case, float] = {}
        mine: list[Measurement] = []
        nccl: dict[Case, float] = {}
        rates = copy_engine.measure(self.device)
        for jobs in jobs_of(self.sweep, self.comm, self.device):
            for case in jobs.cases:
                wire_bytes[case] = jobs.wire_bytes(case)
                mine += [self._measure(jobs, case, num_sms) for num_sms in self.sweep.sms_on(self.device)]
            if with_nccl:
                with_lists = jobs.all_to_all_jobs()
                for case in jobs.cases:
                    operation = jobs.by_all_to_all(case, with_lists)
                    nccl[case] = median_us(self.watch.device_us, operation, self.sweep.iterations)
        everyone = gather((mine, nccl))
        sweep = self.sweep
        return Results(
            machine=machine,
            sizes=dict(
                hidden=sweep.hidden,
                num_topk=sweep.num_topk,
                num_experts=sweep.num_experts,
                expert_alignment=sweep.expert_alignment,
                unbalanced_ratio=sweep.unbalanced_ratio,
                weights=sweep.weights,
            ),
            ranks=self.comm.size,
            backend=self.comm.backend,
            iterations=sweep.iterations,
            copy_engine=rates,
            wire_bytes=wire_bytes,
            measurements=[_over_ranks(each) for each in zip(*(mine for mine, _ in everyone), strict=True)],
            nccl={case: Timing.of_ranks([times[case] for _, times in everyone]) for case in nccl},
        )

    def _measure(self, jobs: Jobs, case: Case, num_sms: int | None) -> Measurement:
        cached = jobs.cached(case, num_sms)
        watch, iterations = self.watch, self.sweep.iterations
        gpu_us = median_us(watch.device_us, cached, iterations)
        enqueue = median_us(lambda operation, _: watch.enqueue_us(operation, _ENQUEUED), cached, 3)
        measured = Measurement(
            case,
            num_sms,
            jobs.sms_used(case, num_sms),
            gpu=Timing.of_ranks([gpu_us]),
            wall_us=median_us(watch.wall_us, cached, _FIRST_CALLS),
            host_us=enqueue,
        )
        if case.op == "combine":
            return measured
        first, static = jobs.first(case, num_sms), jobs.first(case, num_sms, is_static=True)
        return replace(
            measured,
            first_gpu_us=median_us(watch.device_us, first, _FIRST_CALLS),
            first_wall_us=median_us(watch.wall_us, first, _FIRST_CALLS),
            first_static_us=median_us(watch.device_us, static, _FIRST_CALLS),
        )


def _over_ranks(measured: tuple[Measurement, ...]) -> Measurement:
    """One measurement from those of all ranks."""

    def slowest(name: str) -> float | None:
        values = [getattr(each, name) for each in measured]
        return None if None in values else max(values)

    names = ("wall_us", "host_us", "first_gpu_us", "first_wall_us", "first_static_us")
    return replace(
        measured[0],
        gpu=Timing.of_ranks([each.gpu.median_us for each in measured]),
        **{name: slowest(name) for name in names},
    )
