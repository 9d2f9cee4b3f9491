"""Virtual ranks on one GPU: the CUDA kernels bit for bit against the oracle, in both layouts and every direction."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from cases import WORLD_SIZES, Case, standard_cases
from core.strategies import cases
from exercise import assert_case, assert_results, dispatch_results, expected, on_cpu, run_case
from hypothesis import HealthCheck, given, settings

import moe_ep
from gpu.kernel_cases import experts, kernel_cases, ring_of_waits, routing_cases
from gpu.machine import needs_gpu
from moe_ep import sm_model
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

TIMEOUT_S = 20.0


def check(case: Case, **communicator_arguments) -> None:
    def fn(comm):
        assert (comm.backend, comm.size) == ("virtual", case.world_size)
        return run_case(case, comm, "cuda")

    results = run_ranks(
        case.world_size,
        fn,
        device="cuda",
        timeout_s=TIMEOUT_S,
        **case.communicator_arguments,
        **communicator_arguments,
    )
    assert_case(case, results)


# The kernels take no float64: test_nvlink_errors.py has what becomes of it.
@pytest.mark.parametrize(
    "case", [case for case in standard_cases(WORLD_SIZES) if case.dtype != torch.float64], ids=str
)
def test_standard_cases(case):
    check(case)


@pytest.mark.parametrize("case", [*kernel_cases(2), *routing_cases(3), *kernel_cases(8)], ids=str)
def test_kernel_cases(case):
    check(case)


@pytest.mark.parametrize("case", kernel_cases(3), ids=str)
@pytest.mark.parametrize("early", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_some_ranks_wait_on_one_sm(case, early):
    """A call on a stream with priority waits for those of other ranks, whether they wait or not."""

    def fn(comm):
        current = torch.cuda.current_stream()
        with torch.cuda.stream(comm.stream(current.device) if comm.rank in early else current):
            return run_case(case, comm, "cuda")

    arguments = {"device": "cuda", "timeout_s": TIMEOUT_S, **case.communicator_arguments}
    assert_case(case, run_ranks(case.world_size, fn, **arguments))


def quantising(cases: Iterable[Case]) -> list[Case]:
    return [
        replace(case, dtype=dtype)
        for case in cases
        for dtype in {case.dtype, torch.float16, torch.float32}
        if "blockwise" in (case.fp8, case.fp8_backward) and case.dtype != torch.float64
    ]


@pytest.mark.parametrize("case", quantising([*standard_cases((1, 2, 4)), *kernel_cases(2)]), ids=str)
def test_quantising_on_the_way(case, monkeypatch):
    """With few multiprocessors as well, where a kernel before the dispatch would do it."""
    monkeypatch.setattr(sm_model, "QUANTISING_SMS", 1)
    check(case)


@pytest.mark.parametrize("case", [*experts(16), *experts(24)], ids=str)
def test_many_ranks(case):
    check(case)


@pytest.mark.parametrize("num_sms", [1, None])
@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_rounds_that_wait_in_a_ring(world_size, num_sms):
    check(ring_of_waits(world_size), num_sms=num_sms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_rows_at_any_address(dtype, fp8):
    """Tensors that are contiguous but begin between two words of 16 bytes."""
    case = Case("unaligned", (7, 9), hidden=128, num_experts=4, num_topk=2, dtype=dtype, num_biases=1)
    if fp8:
        case = replace(case, fp8="tokens")

    def fn(comm):
        inputs = case.inputs(comm.rank, "cuda")
        x = moe_ep.fp8.quantize(inputs.x) if fp8 else shifted(inputs.x)
        if fp8:
            x = moe_ep.Fp8Tokens(shifted(x.data), shifted(x.scale_inv))
        out = moe_ep.dispatch(x, shifted(inputs.topk_idx), shifted(inputs.topk_weights), comm)
        rows = case.expert_rows(comm.rank, out.handle.num_rows, "cuda")
        y = moe_ep.combine(shifted(rows), out.handle, bias=shifted(inputs.biases[0]))
        return on_cpu(dispatch_results(out) | {"y": y})

    results = run_ranks(2, fn, device="cuda", timeout_s=TIMEOUT_S, **case.communicator_arguments)
    for rank, (actual, wanted) in enumerate(zip(results, expected(case), strict=True)):
        assert_results(actual, {name: wanted[name] for name in actual}, f"{case}: rank {rank}")


def shifted(values: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element behind where its storage does."""
    storage = values.new_empty(values.numel() + 1)
    storage[1:].copy_(values.flatten())
    return storage[1:].view(values.shape)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_any_routing(case):
    check(case)
