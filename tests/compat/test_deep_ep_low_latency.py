"""deep_ep V1's low-latency calls, against their semantics written out."""

import time
from dataclasses import replace

import pytest
import torch
from cases import Case
from low_latency_exercise import WAYS, Way, assert_low_latency, renamed, room, run_low_latency
from processes import run_gloo
from test_deep_ep_v1 import on_virtual_ranks

import moe_ep
from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep.fp8 import quantize
from moe_ep.errors import InvalidInput

_UNEQUAL = {2: (6, 3), 4: (5, 0, 7, 2), 8: (3, 0, 2, 5, 1, 0, 4, 2)}
_BFLOAT16 = {"dtype": torch.bfloat16, "hidden": 512}


def make_cases(world_size: int) -> list[Case]:
    tokens = _UNEQUAL[world_size]
    common = {"num_experts": 16, "num_topk": 5} | _BFLOAT16
    return [
        Case("uniform", tokens, **common),
        Case("zipf", tokens, routing="zipf", **common),
        Case("masked", tokens, routing="masked", idx_dtype=torch.int32, **common),
        Case("one_rank", tokens, routing="one_rank", **(common | {"num_topk": 2})),
        Case("all_masked", tokens, routing="none", **common),
        Case("all_empty", (0,) * world_size, **common),
        Case("every_expert", tokens, **(common | {"num_topk": 16})),
    ]


def run_ways(case: Case, group, device: str = "cpu") -> list:
    buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True, timeout_s=30)
    buffer.clean_low_latency_buffer(room(case), case.hidden, case.num_experts)
    results = [run_low_latency(case, buffer, way, device) for way in WAYS]
    buffer.destroy()
    return results


def assert_ways(case: Case, by_rank: list) -> None:
    for number, way in enumerate(WAYS):
        assert_low_latency(case, {rank: results[number] for rank, results in enumerate(by_rank)}, way)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_way_on_virtual_ranks(world_size):
    for case in make_cases(world_size):
        assert_ways(case, on_virtual_ranks(world_size, lambda group: run_ways(case, group)))


def run_over_gloo(cases: list[Case]) -> list:
    return [run_ways(case, torch.distributed.group.WORLD) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_way_over_gloo(world_size):
    cases = [case for case in make_cases(world_size) if case.name in ("uniform", "masked", "all_empty")]
    by_rank = run_gloo(world_size, run_over_gloo, cases)
    for number, case in enumerate(cases):
        assert_ways(case, [results[number] for results in by_rank])


@pytest.mark.parametrize("hidden", [8, 136, 384])
def test_widths_of_whole_16_bytes(hidden):
    case = Case("width", (3, 4), hidden=hidden, dtype=torch.bfloat16)

    def fn(group):
        return run_low_latency(case, deep_ep.Buffer(group, low_latency_mode=True))

    assert_low_latency(case, dict(enumerate(on_virtual_ranks(2, fn))), Way())


def test_fp8_of_infinities_and_nans():
    """An infinity makes a NaN of itself and zeros of its block; a NaN stays one and leaves its block as it is."""
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[0, 3], x[1, 5], x[1, 6] = -torch.inf, torch.nan, -torch.nan
    for rounded in (False, True):
        data, scales = quantize(x, rounded)
        plain, plain_scale = quantize(torch.ones(1, 128), rounded)
        data = data.view(torch.uint8).view(2, 2, 128)
        wanted = plain.view(torch.uint8).expand(2, 2, 128).clone()
        wanted[0, 0] = 0
        wanted[0, 0, 3] = wanted[1, 0, 5] = wanted[1, 0, 6] = 0x7F
        assert torch.equal(data, wanted)
        assert scales[0, 0] == torch.inf
        assert scales.flatten()[1:].eq(plain_scale).all()


def test_two_dispatches_in_flight_and_two_combine_buffers():
    cases = [renamed(make_cases(2)[0], seed) for seed in (1, 2)]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        sent = []
        for case in cases:
            mine = case.inputs(buffer.rank)
            sent.append(
                buffer.low_latency_dispatch(
                    mine.x, mine.topk_idx, room(case), case.num_experts, use_fp8=False, return_recv_hook=True
                )
            )
        for *_, hook in reversed(sent):
            hook()
        first = buffer.get_next_low_latency_combine_buffer(sent[0][2])
        assert buffer.get_next_low_latency_combine_buffer(sent[0][2]).data_ptr() == first.data_ptr()
        sums, places = [], set()
        for case, (rows, _, handle, _, _) in zip(cases, sent, strict=True):
            mine = case.inputs(buffer.rank)
            target = buffer.get_next_low_latency_combine_buffer(handle)
            places.add(target.data_ptr())
            target.copy_(rows)
            weights = torch.ones_like(mine.topk_weights)
            sums.append(
                buffer.low_latency_combine(
                    target, mine.topk_idx, weights, handle, zero_copy=True, return_recv_hook=True
                )
            )
        assert len(places) == 2
        for case, (y, _, hook) in zip(cases, sums, strict=True):
            hook()
            x = case.inputs(buffer.rank).x.float()
            assert torch.allclose(y.float(), x * case.num_topk, rtol=0.02)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_ids_of_minus_one_in_combine_leave_rows_out():
    case = make_cases(2)[0]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        mine = case.inputs(buffer.rank)
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, room(case), case.num_experts, use_fp8=False
        )
        ids = mine.topk_idx.clone()
        ids[:, 1:] = -1
        y, _, _ = buffer.low_latency_combine(rows, ids, torch.ones_like(mine.topk_weights), handle)
        assert torch.equal(y, mine.x)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def run_with_masks(case: Case, gone: int, way: Way, group, device: str = "cpu") -> tuple:
    """Everyone; all but one; everyone."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, timeout_s=30)
    whole = run_low_latency(case, buffer, Way(), device)
    if buffer.rank != gone:
        buffer.low_latency_update_mask_buffer(gone, True)
        part = run_low_latency(case, buffer, way, device)
        status = torch.zeros(case.world_size, dtype=torch.int32, device=device)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank == gone) for rank in range(case.world_size)]
    else:
        part = None
    buffer.low_latency_clean_mask_buffer()
    return whole, part, run_low_latency(case, buffer, Way(), device)


def assert_masks(case: Case, gone: int, way: Way, by_rank: list) -> None:
    assert_low_latency(case, {rank: results[0] for rank, results in enumerate(by_rank)}, Way())
    assert_low_latency(case, {r: results[1] for r, results in enumerate(by_rank) if r != gone}, way)
    assert_low_latency(case, {rank: results[2] for rank, results in enumerate(by_rank)}, Way())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.fmt)
def test_masked_ranks_take_no_part(way):
    case, gone = make_cases(4)[0], 2
    way = replace(way, masked=(gone,))
    assert_masks(case, gone, way, on_virtual_ranks(4, lambda group: run_with_masks(case, gone, way, group)))


def run_with_a_late_rank(case: Case, gone: int, group, device: str = "cpu") -> list | None:
    """Two rounds without the late rank, which shows in the first call; status."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, timeout_s=3)
    run_low_latency(case, buffer, device=device)
    if buffer.rank == gone:
        return None
    rounds = [run_low_latency(case, buffer, way, device) for way in WAYS[:2]]
    status = torch.zeros(buffer.group_size, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(status)
    return [*rounds, status.tolist()]


def assert_late_rank(case: Case, gone: int, by_rank: list) -> None:
    for number in range(2):
        way = Way(WAYS[number].fmt, masked=(gone,))
        took_part = {r: results[number] for r, results in enumerate(by_rank) if r != gone}
        assert_low_latency(case, took_part, way)
    expected = [int(rank == gone) for rank in range(case.world_size)]
    assert all(results[2] == expected for r, results in enumerate(by_rank) if r != gone)


def test_a_late_rank_is_masked_and_the_rest_goes_on():
    case = make_cases(4)[0]
    assert_late_rank(case, 2, on_virtual_ranks(4, lambda group: run_with_a_late_rank(case, 2, group)))


def run_with_a_late_process(case: Case, gone: int, device: str = "cpu") -> list | None:
    results = run_with_a_late_rank(case, gone, torch.distributed.group.WORLD, device)
    store = (
        torch.distributed.distributed_c10d._get_default_store()
    )  # the late one stays until the others are done
    store.add("done", 1)
    while store.add("done", 0) < case.world_size:
        time.sleep(0.05)
    return results


@pytest.mark.slow
def test_a_late_process_is_masked_and_the_rest_goes_on():
    case = make_cases(4)[0]
    assert_late_rank(case, 1, run_gloo(4, run_with_a_late_process, case, 1))


def test_the_rest_goes_on_between_dispatch_and_combine():
    case, gone = make_cases(4)[0], 0

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, timeout_s=30)
        mine = case.inputs(buffer.rank)
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, room(case), case.num_experts, use_fp8=False
        )
        if buffer.rank == gone:
            return True
        buffer.low_latency_update_mask_buffer(gone, True)
        y, _, _ = buffer.low_latency_combine(rows, mine.topk_idx, torch.ones_like(mine.topk_weights), handle)
        there = (mine.topk_idx // case.experts_per_rank != gone).sum(1, keepdim=True)
        assert torch.allclose(y.float(), mine.x.float() * there, rtol=0.02)
        return True

    assert on_virtual_ranks(4, fn) == [True] * 4


def test_without_shrink_a_late_rank_is_an_error():
    case = make_cases(2)[0]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True, timeout_s=1)
        if buffer.rank == 1:
            return None
        with pytest.raises(moe_ep.PeerTimeoutError) as raised:
            run_low_latency(case, buffer)
        return raised.value.ranks

    assert on_virtual_ranks(2, fn) == [(1,), None]


def test_bad_arguments_are_told_before_anything_is_sent():
    case = make_cases(2)[0]

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        mine = case.inputs(buffer.rank)
        x, ids, weights = mine.x, mine.topk_idx, mine.topk_weights
        most, experts = room(case), case.num_experts
        send, back = buffer.low_latency_dispatch, buffer.low_latency_combine
        rows, _, handle, _, _ = send(x, ids, most, experts, use_fp8=False)
        narrow = x[:, :384].contiguous()
        bad = [
            ("num_max_dispatch_tokens_per_rank", lambda: send(x, ids, 1, experts)),
            ("multiple of 2", lambda: send(x, ids, most, 15)),
            ("bfloat16", lambda: send(x.float(), ids, most, experts)),
            ("topk_idx", lambda: send(x, ids.float(), most, experts)),
            ("exclude", lambda: send(x, ids, most, experts, async_finish=True, return_recv_hook=True)),
            ("round_scale", lambda: send(x, ids, most, experts, use_ue8m0=True)),
            ("512", lambda: send(narrow, ids, most, experts, round_scale=True, use_ue8m0=True)),
            ("cumulative", lambda: send(x, ids, most, experts, torch.zeros(3))),
            ("x is", lambda: back(rows[:, 1:], ids, weights, handle)),
            ("this handle", lambda: back(rows, ids[:1], weights[:1], handle)),
            ("topk_weights", lambda: back(rows, ids, weights.double(), handle)),
            ("it must be what", lambda: back(rows, ids, weights, tuple(handle))),
            ("enable_shrink", buffer.low_latency_clean_mask_buffer),
        ]
        for pattern, call in bad:
            with pytest.raises(InvalidInput, match=pattern):
                call()
        with pytest.raises(NotImplementedError, match="10-bit"):
            back(rows, ids, weights, handle, use_logfmt=True)
        with pytest.raises(NotImplementedError, match="waiting"):
            send(x, ids, most, experts, dispatch_wait_recv_cost_stats=torch.zeros(2, dtype=torch.int64))
        shrinking = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
        with pytest.raises(InvalidInput, match="itself"):
            shrinking.low_latency_update_mask_buffer(buffer.rank, True)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_calls_work_under_inference_mode():
    case, way = make_cases(2)[0], Way("fp8", hook=True, out=True)

    def fn(group):
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        with torch.inference_mode():  # statistics and out are made there, too
            first = run_low_latency(case, buffer, way)
        return first, run_low_latency(case, buffer, way)

    by_rank = on_virtual_ranks(2, fn)
    for number in range(2):
        assert_low_latency(case, {rank: results[number] for rank, results in enumerate(by_rank)}, way)
