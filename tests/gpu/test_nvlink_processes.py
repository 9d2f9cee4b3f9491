"""The nvlink backend between processes, bit for bit against the oracle: on one GPU in time slices, on several GPUs."""

import pytest
import torch
from cases import Case, standard_cases
from exercise import assert_cases
from processes import run_cases, run_cuda

import moe_ep
from gpu.kernel_cases import kernel_cases
from gpu.machine import groups_of_processes, needs_gpu
from moe_ep import sm_model

pytestmark = needs_gpu

# Where processes share a GPU, every wait for another costs time slices: few cases, each with several corners.
SLOW_NAMES = ["float32", "bfloat16", "aligned", "same_experts", "masked", "odd_ranks_empty", "top32", "wide"]
SLOW_NAMES += ["any_bits", "static_aligned", "static_overflow", "two_biases", "no_weights"]
SLOW_NAMES += ["fp8_tokens_aligned", "fp8_on_dispatch", "fp8_both_ways"]


def all_cases(world_size: int) -> list[Case]:
    cases = [*standard_cases((world_size,)), *kernel_cases(world_size)]
    return [case for case in cases if case.dtype != torch.float64]  # which the kernels don't take


def slow_cases(world_size: int) -> list[Case]:
    return standard_cases((world_size,), names=SLOW_NAMES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_one_gpu=(2, 4), on_gpus=(2, 4, 8)))
def test_equals_the_oracle(world_size, one_gpu):
    cases = slow_cases(world_size) if one_gpu else all_cases(world_size)
    outcomes = run_cuda(world_size, run, cases, one_gpu=one_gpu, timeout_s=400)
    assert_cases(cases, outcomes)


def run(cases: list[Case]) -> dict:
    sm_model.QUANTISING_SMS = 1  # FP8 rows are made on the way, whatever the number of multiprocessors
    return run_cases(cases, "cuda", backend="nvlink", timeout_s=30.0)


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_gpus=(2,)))
def test_auto_takes_nvlink_where_gpus_reach_each_other(world_size, one_gpu):
    assert run_cuda(world_size, backend_of_auto, one_gpu=one_gpu, timeout_s=120) == ["nvlink"] * world_size


def backend_of_auto() -> str:
    sizes = {"hidden": 16, "max_tokens_per_rank": 4, "num_experts": 4, "num_topk": 2}
    with moe_ep.Communicator(**sizes) as comm:
        return comm.backend
