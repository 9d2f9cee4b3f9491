"""The calls that a sweep times: ours, and the same job by all_to_all_single."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .. import Communicator, DispatchHandle, Fp8Tokens, combine, dispatch
from .. import fp8 as fp8_format
from .measure import Operation, gather
from .nccl import AllToAllJob
from .permutation import permutation
from .plan import Sweep
from .results import Case
from .workload import FP8, busiest_rows, row_bytes

NUM_ROUTINGS = 3
_MAX_INPUTS = 96


def jobs_of(sweep: Sweep, comm: Communicator, device: torch.device) -> Iterator[Jobs]:
    """By size and layout, one after another: the inputs of all would not fit at once."""
    groups: dict[tuple[int, str], list[Case]] = {}
    for case in sweep.cases():
        groups.setdefault((case.num_tokens, case.layout), []).append(case)
    for cases in groups.values():
        yield Jobs(sweep, cases, comm, device)


class Jobs:
    """The calls of one size and layout, on inputs that together exceed the L2 cache, by several routings in turn."""

    def __init__(self, sweep: Sweep, cases: list[Case], comm: Communicator, device: torch.device) -> None:
        self.cases = cases
        self._sweep, self._comm, self._device = sweep, comm, device
        self._num_tokens, self._layout = cases[0].num_tokens, cases[0].layout
        self._options = {"layout": self._layout}
        if self._layout == "expert":
            self._options["expert_alignment"] = sweep.expert_alignment
        workload = sweep.workload(self._num_tokens, self._layout, "bfloat16")
        self._by_rank = [
            [workload.topk_idx(rank, comm.size, variant) for rank in range(comm.size)]
            for variant in range(NUM_ROUTINGS)
        ]
        self._pairs = [
            [workload.pairs_by_rank(ids, comm.size) for ids in by_rank] for by_rank in self._by_rank
        ]
        self._topk_idx = [by_rank[comm.rank].to(device) for by_rank in self._by_rank]
        self._weights = [torch.rand(ids.shape, device=device) for ids in self._topk_idx]
        probe = workload.inputs(comm.rank, device, 1)[0]
        self._handles: list[DispatchHandle] = [
            dispatch(probe, ids, weights, comm, **self._options).handle
            for ids, weights in zip(self._topk_idx, self._weights, strict=True)
        ]
        # All ranks ask for the same number of rows.
        self._max_recv_rows = max(map(max, gather([handle.num_rows for handle in self._handles])))
        self._inputs: dict[str, list] = {}

    def wire_bytes(self, case: Case) -> float:
        """Mean over the routings."""
        rows = sum(map(busiest_rows, self._pairs)) / NUM_ROUTINGS
        return rows * row_bytes(case.dtype, self._sweep.hidden)

    def sms_used(self, case: Case, num_sms: int | None) -> int | None:
        if num_sms is not None or self._comm.backend != "nvlink":
            return num_sms
        dtype = torch.float8_e4m3fn if case.dtype == FP8 else getattr(torch, case.dtype)
        sizes = {"layout": case.layout, "dtype": dtype, "num_tokens": case.num_tokens}
        return self._comm.choose_num_sms(case.op, **sizes)

    def cached(self, case: Case, num_sms: int | None) -> Operation:
        """The call with a cached handle."""
        inputs, options = self._inputs_of(case), _sms_option(num_sms)
        if case.op == "combine":
            return lambda i: combine(inputs[i % len(inputs)], self._handles[i % NUM_ROUTINGS], **options)
        if case.quantize:
            options["fp8"] = "blockwise"
        weights = self._weights if self._sweep.weights else [None] * NUM_ROUTINGS

        def call(i: int) -> object:
            which = i % NUM_ROUTINGS
            x = inputs[i % len(inputs)]
            return dispatch(x, None, weights[which], self._comm, handle=self._handles[which], **options)

        return call

    def first(self, case: Case, num_sms: int | None, is_static: bool = False) -> Operation:
        """The dispatch that exchanges its routing; ``is_static``: without learning the sizes on the host."""
        inputs, options = self._inputs_of(case), {**self._options, **_sms_option(num_sms)}
        if case.quantize:
            options["fp8"] = "blockwise"
        if is_static:
            options["max_recv_rows"] = self._max_recv_rows

        def call(i: int) -> object:
            which = i % NUM_ROUTINGS
            x = inputs[i % len(inputs)]
            return dispatch(x, self._topk_idx[which], self._weights[which], self._comm, **options)

        return call

    def all_to_all_jobs(self) -> list[AllToAllJob]:
        """One for each routing."""
        alignment = self._options.get("expert_alignment", 1)
        return [
            AllToAllJob(
                permutation(by_rank, self._comm.rank, self._sweep.num_experts, self._layout, alignment),
                self._device,
            )
            for by_rank in self._by_rank
        ]

    def by_all_to_all(self, case: Case, jobs: list[AllToAllJob]) -> Operation:
        inputs = self._inputs_of(case)
        if case.op == "combine":
            return lambda i: jobs[i % NUM_ROUTINGS].combine(inputs[i % len(inputs)])
        if case.quantize:
            return lambda i: jobs[i % NUM_ROUTINGS].dispatch(fp8_format.quantize(inputs[i % len(inputs)]))
        return lambda i: jobs[i % NUM_ROUTINGS].dispatch(inputs[i % len(inputs)])

    def _inputs_of(self, case: Case) -> list[torch.Tensor | Fp8Tokens]:
        """Input i belongs to routing i % NUM_ROUTINGS, so there is a multiple of that many."""
        dtype = "bfloat16" if case.quantize else case.dtype
        key = f"{case.op} {dtype}"
        if key not in self._inputs:
            num_rows = [handle.num_rows for handle in self._handles] if case.op == "combine" else []
            rows = min(num_rows, default=case.num_tokens)
            self._inputs[key] = self._make_inputs(dtype, num_rows, self._count(rows, dtype))
        return self._inputs[key]

    def _make_inputs(self, dtype: str, num_rows: list[int], count: int) -> list[torch.Tensor | Fp8Tokens]:
        workload = self._sweep.workload(self._num_tokens, self._layout, dtype)
        if num_rows:
            like = workload.inputs(self._comm.rank, self._device, 1)[0]
            shapes = [(num_rows[i % NUM_ROUTINGS], self._sweep.hidden) for i in range(count)]
            return [torch.randn(shape, device=self._device, dtype=like.dtype) for shape in shapes]
        inputs = workload.inputs(self._comm.rank, self._device, count)
        return [fp8_format.quantize(x) for x in inputs] if dtype == FP8 else inputs

    def _count(self, num_rows: int, dtype: str) -> int:
        """So many inputs that the next use of one finds it gone from the L2 cache."""
        is_gpu = self._device.type == "cuda"
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size if is_gpu else 0
        needed = 2 * cache // max(1, num_rows * row_bytes(dtype, self._sweep.hidden)) + 1
        rounds = -(-min(needed, _MAX_INPUTS) // NUM_ROUTINGS)
        return NUM_ROUTINGS * max(1, rounds)


def _sms_option(num_sms: int | None) -> dict[str, Any]:
    return {} if num_sms is None else {"num_sms": num_sms}
