"""HybridEPBuffer on virtual ranks and over gloo, bit for bit."""

import functools

import pytest
import torch
from cases import Case
from elastic_cases import Mode, cases, expected_combine, expert_rows, places
from exercise import assert_same_bits
from hybrid_cases import CALLS, as_map, expected, routing_map, run
from processes import run_gloo

from moe_ep.compat.deep_ep.hybrid import HybridEPBuffer
from moe_ep.compat.deep_ep.hybrid_routing import topk_indices
from moe_ep.errors import InvalidInput
from moe_ep.testing import run_ranks


def assert_results(case, call, by_rank):
    for rank, (actual, wanted) in enumerate(zip(by_rank, expected(case, call), strict=True)):
        assert sorted(actual) == sorted(wanted)
        for name, value in wanted.items():
            what = f"{case}, {call}: rank {rank}: {name}"
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
                assert torch.equal(actual[name], value), what
            elif isinstance(value, torch.Tensor):
                assert_same_bits(actual[name], value, what)
            else:
                assert actual[name] == value, f"{what} is {actual[name]}, expected {value}"


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("case", [case for size in (1, 2, 4, 8) for case in cases(size)], ids=str)
def test_virtual_ranks(case, call):
    by_rank = run_ranks(
        case.world_size,
        lambda comm: run(case, call, comm._impl.group, comm.rank),
        **case.communicator_arguments,
    )
    assert_results(case, call, by_rank)


def run_all(world_size):
    rank = torch.distributed.get_rank()
    return {
        (str(case), str(call)): run(case, call, torch.distributed.group.WORLD, rank)
        for case in cases(world_size)[:2]
        for call in CALLS
    }


@functools.cache
def outcomes(world_size):
    return run_gloo(world_size, run_all, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes(world_size):
    for case in cases(world_size)[:2]:
        for call in CALLS:
            assert_results(case, call, [each[str(case), str(call)] for each in outcomes(world_size)])


def test_rows_that_do_not_fit_are_dropped_and_said_to_be():
    case = as_map(Case("overflow", (9, 12), num_topk=3, dtype=torch.bfloat16))
    limit = 16
    mode = Mode("permuted", expand=True, alignment=4)

    def fn(comm):
        rank = comm.rank
        buffer = HybridEPBuffer(comm._impl.group, case.hidden, 12, case.experts_per_rank)
        x = case.inputs(rank).x
        recv, _, _, counts, handle = buffer.dispatch_with_permute(
            hidden=x,
            routing_map=routing_map(case, rank),
            pad_multiple=4,
            num_permuted_tokens=limit,
            non_blocking=True,
        )
        rows, _ = expert_rows(case, mode, rank, 64)
        return (
            recv,
            counts,
            handle,
            buffer.combine_with_unpermute(hidden=rows[:limit], handle=handle)[0],
            rows,
        )

    results = run_ranks(2, fn, **case.communicator_arguments)
    for rank, (recv, counts, handle, y, _) in enumerate(results):
        assert len(recv) == counts.sum() == limit
        assert handle[-1].tolist() == [1]
        for place in places(case, mode, rank):
            for row in place.rows:
                if row < limit:
                    assert_same_bits(recv[row], case.inputs(place.source).x[place.token], "row")
        # A dropped row is as good as a zero.
        returned = [
            (torch.where(torch.arange(64)[:, None] < limit, each[4], 0.0), torch.zeros(64))
            for each in results
        ]
        assert torch.equal(y, expected_combine(case, mode, rank, returned)["y"])


def test_gradients_that_are_not_contiguous_and_larger_calls():
    def fn(comm):
        buffer = HybridEPBuffer(comm._impl.group, 16, 4, 4)
        for num_tokens in (3, 4, 9):
            routing = torch.zeros(num_tokens, 8, dtype=torch.bool)
            routing[:, :2] = True
            x = torch.arange(16.0 * num_tokens).view(16, num_tokens).t()
            recv, _, _, counts, handle = buffer.dispatch_with_permute(hidden=x, routing_map=routing)
            assert counts.tolist() == ([2 * num_tokens] * 2 + [0] * 2 if comm.rank == 0 else [0] * 4)
            y, _ = buffer.combine_with_unpermute(hidden=recv.t().contiguous().t(), handle=handle)
            assert torch.equal(y, 2 * x)
        return True

    assert run_ranks(2, fn, hidden=16, max_tokens_per_rank=9, num_experts=8, num_topk=2) == [True, True]


def test_room_is_made_for_what_any_rank_has():
    """More tokens, and more experts of a token, than any call before had, on one rank alone."""

    def fn(comm):
        buffer = HybridEPBuffer(comm._impl.group, 16, 1 + comm.rank, 12)
        results = []
        for num_tokens, num_experts in [(2, 1), (7, 9), (1, 24), (30, 2)]:
            if comm.rank == 0:
                num_tokens, num_experts = 1, 1
            routing = torch.zeros(num_tokens, 24, dtype=torch.bool)
            routing[-1, :num_experts] = True
            recv, *_, handle = buffer.dispatch_with_permute(
                hidden=torch.ones(num_tokens, 16), routing_map=routing
            )
            y, _ = buffer.combine_with_unpermute(hidden=recv, handle=handle)
            results.append((y, routing.sum(1, keepdim=True).expand(-1, 16)))
        return results

    for results in run_ranks(2, fn, hidden=16, max_tokens_per_rank=4, num_experts=24, num_topk=2):
        for y, wanted in results:
            assert torch.equal(y, wanted.float())


def test_too_many_experts_where_no_rank_may_wait():
    buffer = HybridEPBuffer(None, 16, 4, 24)
    for num_experts in (8, 9):
        routing = torch.zeros(2, 24, dtype=torch.bool)
        routing[1, :num_experts] = True
        call = functools.partial(
            buffer.dispatch_with_permute,
            hidden=torch.ones(2, 16),
            routing_map=routing,
            num_permuted_tokens=20,
            non_blocking=True,
        )
        if num_experts == 8:
            assert call()[3].sum() == 8
        else:
            with pytest.raises(InvalidInput, match="more than 8 experts"):
                call()


def test_topk_indices():
    generator = torch.Generator().manual_seed(0)
    routing = torch.rand(50, 12, generator=generator) < 0.3
    for num_topk in (1, 4, 12):
        for row, ids in zip(routing.tolist(), topk_indices(routing, num_topk).tolist(), strict=True):
            experts = [e for e, chosen in enumerate(row) if chosen]
            if len(experts) > num_topk:
                assert ids[0] == -2
            else:
                assert ids == experts + [-1] * (num_topk - len(experts))


MAP = torch.zeros(3, 8, dtype=torch.bool)
REFUSED = {
    "no routing": ({}, "routing_map is None, topk_idx is None"),
    "two routings": (
        dict(routing_map=MAP, topk_idx=torch.zeros(3, 1).long()),
        "not None, topk_idx is not None",
    ),
    "a map of numbers": (dict(routing_map=MAP.float()), "routing_map is torch.float32"),
    "a map for other tokens": (dict(routing_map=MAP[:2]), "routing_map is"),
    "probs of a wrong dtype": (dict(routing_map=MAP, probs=MAP.double()), "probs is torch.float64"),
    "ids without number of experts": (dict(topk_idx=torch.zeros(3, 1).long()), "num_of_experts is None"),
    "no wait and no size": (dict(routing_map=MAP, non_blocking=True), "num_permuted_tokens None"),
    "a size between paddings": (
        dict(routing_map=MAP, num_permuted_tokens=10, pad_multiple=4),
        "num_permuted_tokens is 10",
    ),
    "not a handle": (dict(handle=(1, 2)), "handle is a tuple"),
    "a handle of dispatch": (dict(handle="plain"), "the other dispatch's handle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments(name):
    changes, message = REFUSED[name]
    buffer = HybridEPBuffer(None, 16, 4, 8)
    x = torch.zeros(3, 16)
    if changes.get("handle") == "plain":
        changes = {"handle": buffer.dispatch(x, routing_map=MAP)[3]}
    with pytest.raises(InvalidInput, match=message):
        buffer.dispatch_with_permute(hidden=x, **changes)
