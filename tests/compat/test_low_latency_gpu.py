"""Low-latency calls by their kernels, bit for bit against their semantics written out (low_latency_exercise)."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from cases import Case
from exercise import assert_results, settle
from gpu.machine import group_of, groups_of_processes, needs_gpu
from gpu.test_graphs import Graph
from low_latency_exercise import (
    WAYS,
    Way,
    assert_low_latency,
    call_low_latency,
    experts_output,
    run_low_latency,
)
from processes import run_cuda
from test_deep_ep_low_latency import (
    assert_late_rank,
    assert_masks,
    assert_ways,
    make_cases,
    run_ways,
    run_with_a_late_process,
    run_with_a_late_rank,
    run_with_masks,
)

import moe_ep
from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep.low_latency_kernels import KernelCalls
from moe_ep.errors import InvalidInput
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

_BFLOAT16 = {"dtype": torch.bfloat16, "hidden": 512}
_FOR_GRAPHS = ("uniform", "one_rank", "none", "masked", "zipf", "uniform")


def on_virtual_ranks(world_size: int, fn) -> list:
    """``fn(group)`` on each."""
    shape = {"hidden": 16, "max_tokens_per_rank": 1, "num_experts": world_size, "num_topk": 1}
    return run_ranks(world_size, lambda comm: fn(group_of(comm)), device="cuda", **shape)


def kernel_cases(world_size: int) -> list[Case]:
    """Corners of the kernels: several pieces of work for a block, more bytes of a row than threads load ahead."""
    experts = 8 * world_size
    few = tuple(3 - rank % 2 for rank in range(world_size))
    return [
        Case("decode", (9, 12, 0, 5)[:world_size], **(_BFLOAT16 | {"hidden": 7168}), num_experts=experts),
        Case("wide", few, **(_BFLOAT16 | {"hidden": 16896}), num_experts=2 * world_size, num_topk=2),
        Case("many", (150,) * world_size, **_BFLOAT16, num_experts=experts, num_topk=8),
        Case("top32", few, **_BFLOAT16, num_experts=64, num_topk=32),
        Case("one_token", (0,) * (world_size - 1) + (1,), **_BFLOAT16, num_experts=experts),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_way_on_virtual_ranks(world_size):
    cases = kernel_cases(world_size) + (make_cases(world_size) if world_size > 1 else [])
    for case in cases:
        assert_ways(case, on_virtual_ranks(world_size, lambda group: run_ways(case, group, "cuda")))


@pytest.mark.parametrize("hidden", [8, 136, 384])
def test_widths_of_whole_16_bytes(hidden):
    case = Case("width", (3, 4), hidden=hidden, dtype=torch.bfloat16)
    ways = [Way()] if hidden % 16 else [Way(), Way("fp8", hook=True)]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        return [run_low_latency(case, buffer, way, "cuda") for way in ways]

    by_rank = on_virtual_ranks(2, fn)
    for number, way in enumerate(ways):
        if hidden % 128 == 0 or way == Way():
            assert_low_latency(case, {r: results[number] for r, results in enumerate(by_rank)}, way)


def test_fp8_is_that_of_the_operators():
    """Blocks of zeros, tiny and huge numbers, infinities and NaNs of both signs; a last block that is not whole."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 400, generator=generator).clamp(-3, 3)
    x[:6] *= torch.logspace(-38, 38, 6).unsqueeze(1)
    x[:, 128:256] = 0
    x = x.bfloat16()
    x[6, 5], x[6, 300] = torch.inf, -torch.inf
    x[7, 7], x[7, 310], x[7, 395] = torch.nan, -torch.nan, torch.inf
    ids = torch.arange(8).unsqueeze(1)

    def fn(group, device):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        results = {}
        for rounded in (False, True):
            (data, scales), *_ = buffer.low_latency_dispatch(
                x.to(device), ids.to(device), 8, 8, round_scale=rounded
            )
            settle(device)
            how = "rounded" if rounded else "exact"
            results[f"{how} data"] = data.view(torch.uint8)[:, 0].cpu()
            results[f"{how} scales"] = scales[:, 0].cpu()
        return results

    by_kernels = on_virtual_ranks(1, lambda group: fn(group, "cuda"))[0]
    shape = {"hidden": 16, "max_tokens_per_rank": 1, "num_experts": 1, "num_topk": 1}
    by_operators = run_ranks(1, lambda comm: fn(comm._impl.group, "cpu"), **shape)[0]
    assert_results(by_kernels, by_operators, "the kernels' FP8, by [token, column],")


def run_cases(cases: list[Case]) -> list:
    return [run_ways(case, torch.distributed.group.WORLD, "cuda") for case in cases]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_one_gpu=(2,), on_gpus=(2, 4)))
def test_every_way_on_processes(world_size, one_gpu):
    cases = make_cases(world_size)[:1] if one_gpu else make_cases(world_size) + kernel_cases(world_size)
    by_rank = run_cuda(world_size, run_cases_of_kernels, cases, one_gpu=one_gpu)
    for number, case in enumerate(cases):
        assert_ways(case, [results[number] for results in by_rank])


def run_cases_of_kernels(cases: list[Case]) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_EP_BACKEND", "nvlink")
        return run_cases(cases)


def test_the_kernels_do_it():
    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        return isinstance(buffer._low_latency._calls_on(torch.device("cuda")), KernelCalls)

    assert on_virtual_ranks(2, fn) == [True, True]


# ---- graphs


def replay_with_new_inputs(case: Case, way: Way, group, together) -> list:
    """The results of replays with other numbers and routings; in the end many replays, one behind the other."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True, timeout_s=20)
    rank = buffer.rank
    static, rows = case.inputs(rank, "cuda"), experts_output(case, rank).cuda()
    results = []
    with Graph(lambda: call_low_latency(case, buffer, way, static, rows), together) as graph:
        for each in replays(case):
            inputs = each.inputs(rank)
            for name in ("x", "topk_idx", "topk_weights"):
                getattr(static, name).copy_(getattr(inputs, name))
            rows.copy_(experts_output(each, rank))
            graph.replay()
            settle("cuda")
            results.append({name: value.cpu() for name, value in graph.results.items()})
        for _ in range(50):
            graph.replay()
        settle("cuda")
        results.append({name: value.cpu() for name, value in graph.results.items()})
    return results


def replays(case: Case) -> list[Case]:
    return [replace(case, routing=routing, seed=1 + i) for i, routing in enumerate(_FOR_GRAPHS)]


def assert_replays(case: Case, way: Way, by_rank: list) -> None:
    expected = replays(case)
    for number, each in enumerate([*expected, expected[-1]]):
        assert_low_latency(each, {rank: results[number] for rank, results in enumerate(by_rank)}, way)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.async_finish], ids=lambda way: way.fmt)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_graphs_follow_their_inputs(world_size, way):
    case = graph_case(world_size)
    barrier = threading.Barrier(world_size)
    try:
        by_rank = on_virtual_ranks(
            world_size, lambda group: replay_with_new_inputs(case, way, group, lambda: barrier.wait(60))
        )
    finally:
        barrier.abort()  # ranks that wait for one that failed
    assert_replays(case, way, by_rank)


def graph_case(world_size: int) -> Case:
    return Case("graph", (12, 7, 9, 12)[:world_size], **_BFLOAT16, num_experts=8 * world_size, num_topk=4)


def run_graph_on_process(case: Case, way: Way) -> list:
    return replay_with_new_inputs(case, way, torch.distributed.group.WORLD, lambda: None)


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_gpus=(2,)))
def test_graphs_on_processes(world_size, one_gpu):
    case, way = graph_case(world_size), Way("fp8", hook=True)
    assert_replays(case, way, run_cuda(world_size, run_graph_on_process, case, way, one_gpu=one_gpu))


# ---- calls under way at once


def test_two_dispatches_in_flight_and_no_third():
    cases = [replace(make_cases(2)[0], seed=seed) for seed in (1, 2)]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, timeout_s=20)
        inputs = [case.inputs(buffer.rank, "cuda") for case in cases]

        def send(mine):
            return buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, 16, cases[0].num_experts, use_fp8=False, return_recv_hook=True
            )

        for _ in range(3):
            sent = [send(mine) for mine in inputs]
            with pytest.raises(InvalidInput, match="two"):
                send(inputs[0])
            for *_, hook in reversed(sent):
                hook()
            sums = []
            for mine, (rows, _, handle, _, _) in zip(inputs, sent, strict=True):
                weights = torch.ones_like(mine.topk_weights)
                sums.append(
                    buffer.low_latency_combine(rows, mine.topk_idx, weights, handle, return_recv_hook=True)
                )
            for *_, hook in reversed(sums):
                hook()
            settle("cuda")
            for mine, (y, _, _) in zip(inputs, sums, strict=True):
                assert torch.allclose(y.float(), mine.x.float() * mine.topk_idx.shape[1], rtol=0.02)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_a_hook_may_come_while_others_combine():
    """A rank's waiting kernels leave room on every multiprocessor for those that they wait for."""
    case = next(each for each in kernel_cases(2) if each.name == "many")

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, timeout_s=20)
        mine = case.inputs(buffer.rank, "cuda")
        weights = torch.ones_like(mine.topk_weights)
        sums = []
        settle("cuda")
        for late in (0, 1):
            rows, _, handle, _, hook = buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, 150, case.num_experts, use_fp8=False, return_recv_hook=True
            )
            if buffer.rank == late:
                time.sleep(0.5)
            hook()
            y, _, hook = buffer.low_latency_combine(
                rows, mine.topk_idx, weights, handle, return_recv_hook=True
            )
            hook()
            sums.append(y)
        settle("cuda")
        buffer._low_latency._calls_on(mine.x.device)._check_health()
        for y in sums:
            assert torch.allclose(y.float(), mine.x.float() * mine.topk_idx.shape[1], rtol=0.02)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


# ---- masks


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.fmt)
def test_masked_ranks_take_no_part(way):
    case, gone = make_cases(4)[0], 2
    way = replace(way, masked=(gone,))
    run = lambda group: run_with_masks(case, gone, way, group, "cuda")  # noqa: E731
    assert_masks(case, gone, way, on_virtual_ranks(4, run))


def test_a_late_rank_is_masked_and_the_rest_goes_on():
    case = make_cases(4)[0]
    run = lambda group: run_with_a_late_rank(case, 2, group, "cuda")  # noqa: E731
    assert_late_rank(case, 2, on_virtual_ranks(4, run))


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_gpus=(2, 4)))
def test_a_late_process_is_masked_and_the_rest_goes_on(world_size, one_gpu):
    case = make_cases(world_size)[0]
    by_rank = run_cuda(world_size, run_with_a_late_process, case, 1, "cuda", one_gpu=one_gpu)
    assert_late_rank(case, 1, by_rank)


def test_without_shrink_a_late_rank_is_an_error_of_the_next_call():
    case = make_cases(2)[0]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, timeout_s=1)
        run_low_latency(case, buffer, device="cuda")
        if buffer.rank == 1:
            return None
        run_low_latency(case, buffer, device="cuda")
        with pytest.raises(moe_ep.PeerTimeoutError) as raised:
            run_low_latency(case, buffer, device="cuda")
        return raised.value.ranks

    assert on_virtual_ranks(2, fn) == [(1,), None]
