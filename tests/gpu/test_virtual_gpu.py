"""Virtual ranks on one GPU: the CUDA kernels bit for bit against the oracle, in both layouts and every direction."""

import pytest
import torch
from cases import WORLD_SIZES, Case, standard_cases
from core.strategies import cases
from exercise import assert_case, run_case
from hypothesis import HealthCheck, given, settings

from gpu.kernel_cases import kernel_cases, routing_cases
from gpu.machine import needs_gpu
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

TIMEOUT_S = 20.0


def check(case: Case) -> None:
    def fn(comm):
        assert (comm.backend, comm.size) == ("virtual", case.world_size)
        return run_case(case, comm, "cuda")

    results = run_ranks(
        case.world_size, fn, device="cuda", timeout_s=TIMEOUT_S, **case.communicator_arguments
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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_any_routing(case):
    check(case)
