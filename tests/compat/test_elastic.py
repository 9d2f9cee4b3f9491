"""V2's dispatch and combine in all modes, on virtual ranks and over gloo, bit for bit."""

import functools

import pytest
import torch
from elastic_cases import MODES, cases, expected, run
from exercise import assert_same_bits
from processes import run_gloo

from moe_ep.testing import run_ranks

WORLD_SIZES = (1, 2, 4, 8)
GLOO_WORLD_SIZES = (2, 4, 8)


def assert_results(case, mode, by_rank):
    for rank, (actual, wanted) in enumerate(zip(by_rank, expected(case, mode), strict=True)):
        assert sorted(actual) == sorted(wanted)
        for name, value in wanted.items():
            what = f"{case}, {mode}: rank {rank}: {name}"
            if isinstance(value, torch.Tensor):
                assert_same_bits(actual[name], value, what)
            else:
                assert actual[name] == value, f"{what} is {actual[name]}, expected {value}"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", [case for size in WORLD_SIZES for case in cases(size)], ids=str)
def test_virtual_ranks(case, mode):
    by_rank = run_ranks(
        case.world_size,
        lambda comm: run(case, mode, comm._impl.group, comm.rank),
        **case.communicator_arguments,
    )
    assert_results(case, mode, by_rank)


def run_all(world_size):
    """On one rank: every case in every mode; for a mode that raised, what it raised, and nothing after it."""
    rank = torch.distributed.get_rank()
    outcomes = {}
    for case in gloo_cases(world_size):
        for mode in MODES:
            try:
                outcomes[str(case), str(mode)] = run(case, mode, torch.distributed.group.WORLD, rank)
            except Exception as error:
                outcomes["error"] = f"{case}, {mode}: {type(error).__name__}: {error}"
                return outcomes
    return outcomes


def gloo_cases(world_size):
    return cases(world_size)[: 2 if world_size == 8 else None]


@functools.cache
def outcomes(world_size):
    return run_gloo(world_size, run_all, world_size)


@pytest.mark.parametrize("world_size", GLOO_WORLD_SIZES)
def test_processes(world_size):
    by_rank = outcomes(world_size)
    assert not [each["error"] for each in by_rank if "error" in each]
    for case in gloo_cases(world_size):
        for mode in MODES:
            assert_results(case, mode, [each[str(case), str(mode)] for each in by_rank])
