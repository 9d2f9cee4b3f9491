"""Processes over gloo against the oracle, bit for bit. Processes start once for all cases of a world size."""

import functools

import pytest
import torch
from cases import LAYOUTS, Case, standard_cases
from exercise import (
    assert_case,
    assert_same_bits,
    dispatch_results,
    expected,
    is_the_same_by_default_elsewhere,
    run_case,
)
from processes import run_gloo

import moe_ep
from moe_ep.backends import collective

FEW = ("bfloat16", "masked", "odd_ranks_empty", "static_overflow", "special_bfloat16", "fp8_both_ways")
CASES = [("messages", case) for case in standard_cases(world_sizes=[1, 2, 4])]
CASES += [("messages", case) for case in standard_cases(world_sizes=[8], names=FEW)]
CASES += [("shared memory", case) for case in standard_cases(world_sizes=[2])]
CASES += [("shared memory", case) for case in standard_cases(world_sizes=[4], names=FEW)]

# Messages from this many bytes on go through memory that ranks of one machine share.
MIN_BYTES = {"messages": 1 << 62, "shared memory": 1}


def run_cases(transport, cases):
    """On one rank: the results of each case, or what went wrong in it, and nothing after that."""
    collective.SHARED_MEMORY_MIN_BYTES = MIN_BYTES[transport]
    outcomes = []
    for case in cases:
        try:
            with moe_ep.Communicator(timeout_s=30, **case.communicator_arguments) as comm:
                assert (comm.backend, comm.size) == ("collective", case.world_size)
                outcomes.append(run_case(case, comm))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
            break
    return outcomes


@functools.cache
def outcomes(transport, world_size):
    """By case name and layout: the outcome of every rank."""
    cases = [case for how, case in CASES if (how, case.world_size) == (transport, world_size)]
    by_rank = run_gloo(world_size, run_cases, transport, cases)
    return {
        str(case): [mine[i] if i < len(mine) else f"not reached; earlier: {mine[-1]}" for mine in by_rank]
        for i, case in enumerate(cases)
    }


@pytest.mark.parametrize("transport, case", CASES, ids=str)
def test_forward_and_backward_equal_the_oracle(transport, case):
    results = outcomes(transport, case.world_size)[str(case)]
    failures = {rank: result for rank, result in enumerate(results) if isinstance(result, str)}
    assert not failures, f"{case}: {failures}"
    assert_case(case, results)


SIZES = [
    Case(f"size_{n}", (n, 1000 - n), hidden=512, num_topk=2, dtype=torch.bfloat16)
    for n in (10, 900, 90, 899, 1, 0)
]


def run_sizes():
    """Messages that grow and shrink around the size at which they change their way; combined in reverse order."""
    options = {**SIZES[0].communicator_arguments, "max_tokens_per_rank": 1000}
    with moe_ep.Communicator(timeout_s=30, **options) as comm:
        started = []
        for case in SIZES:
            inputs = case.inputs(comm.rank)
            started.append((case, moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, comm)))
        results = []
        for case, out in reversed(started):
            rows = case.expert_rows(comm.rank, out.handle.num_rows)
            results.append(dispatch_results(out) | {"y": moe_ep.combine(rows, out.handle)})
        return results[::-1]


def test_large_messages_of_changing_size():
    by_rank = run_gloo(2, run_sizes)
    for i, case in enumerate(SIZES):
        for rank, wanted in enumerate(expected(case)):
            for name, value in by_rank[rank][i].items():
                assert_same_bits(value, wanted[name], f"{case}: rank {rank}: {name}")


SUBGROUP_CASE = Case("subgroups", (5, 8), num_experts=8, num_topk=3, routing="masked")
OVERLAP_CASES = [
    Case("overlap", (9, 4, 0, 7), num_experts=8, layout=layout, dtype=torch.bfloat16) for layout in LAYOUTS
]


def run_on_subgroups():
    """Ranks 0, 2 and ranks 1, 3 form two expert-parallel groups of their own, which work at the same time."""
    world_rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group([first, first + 2]) for first in (0, 1)]
    arguments = SUBGROUP_CASE.communicator_arguments
    with moe_ep.Communicator(groups[world_rank % 2], backend="collective", **arguments) as comm:
        first = comm.rank, run_case(SUBGROUP_CASE, comm)
    # Two communicators over one group, used in turns, interleaved with collectives of the group's owner.
    case, other_case = OVERLAP_CASES
    both = []
    with (
        moe_ep.Communicator(**case.communicator_arguments) as comm,
        moe_ep.Communicator(**other_case.communicator_arguments) as other,
    ):
        for _ in range(3):
            both.append(run_case(case, comm))
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            assert total.item() == 4.0
            both.append(run_case(other_case, other))
    return first, both


def test_subgroups_and_two_communicators_of_one_group():
    results = run_gloo(4, run_on_subgroups)
    assert [first[0] for first, _ in results] == [0, 0, 1, 1]
    for ranks in ((0, 2), (1, 3)):
        assert_case(SUBGROUP_CASE, [results[rank][0][1] for rank in ranks])
    for i in range(6):
        assert_case(OVERLAP_CASES[i % 2], [both[i] for _, both in results])


def run_elsewhere():
    same = []
    for least in MIN_BYTES.values():
        collective.SHARED_MEMORY_MIN_BYTES = least
        for case in (SUBGROUP_CASE, *OVERLAP_CASES):
            if case.world_size == 2:
                rank = torch.distributed.get_rank()
                same.append(is_the_same_by_default_elsewhere(case, torch.distributed.group.WORLD, rank))
    return same


def test_the_callers_default_device_makes_no_difference():
    results = run_gloo(2, run_elsewhere)
    assert all(results[0]) and len(results[0]) >= 2 and results[0] == results[1]
