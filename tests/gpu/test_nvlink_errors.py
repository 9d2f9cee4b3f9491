"""Bad input to the CUDA kernels: what is found on the device is reported, at the latest at the next wait."""

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, Case
from exercise import assert_case, assert_results, dispatch_results, expected, on_cpu, run_case

import moe_ep
from gpu.machine import needs_gpu
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

GUILTY = 1
CASE = Case("errors", (9, 12), hidden=64, num_experts=8, num_topk=3, dtype=torch.bfloat16)
# What stands in token 2 of the guilty rank, and what the message has to say of it.
BAD_IDS = {"too_large": ([8, 0, 1], "8"), "negative": ([0, -2, 1], "-2"), "huge": ([2**40, 0, 1], str(2**40))}
TWICE = ([5, 0, 5], "5")


def run(fn, case=CASE, timeout_s=20.0):
    arguments = {**case.communicator_arguments, "timeout_s": timeout_s}
    return run_ranks(case.world_size, fn, device="cuda", **arguments)


def with_ids(rank: int, ids: list[int], guilty: tuple[int, ...] = (GUILTY,)) -> torch.Tensor:
    topk_idx = CASE.topk_idx(rank)
    if rank in guilty:
        topk_idx[2] = torch.tensor(ids)
    return topk_idx.cuda()


def dispatch(comm: moe_ep.Communicator, topk_idx: torch.Tensor, **options) -> moe_ep.DispatchOutput:
    inputs = CASE.inputs(comm.rank, "cuda")
    return moe_ep.dispatch(inputs.x, topk_idx, inputs.topk_weights, comm, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*BAD_IDS, "twice"])
def test_exact_sizes_every_rank_refuses_before_rows_are_sent(kind, layout):
    ids, seen = BAD_IDS.get(kind, TWICE)

    def fn(comm):
        with pytest.raises(moe_ep.errors.InvalidInput) as caught:
            dispatch(comm, with_ids(comm.rank, ids), layout=layout)
        return str(caught.value), run_case(CASE, comm, "cuda")

    results = run(fn)
    message = results[GUILTY][0]
    assert "topk_idx" in message and seen in message, message
    assert all(text for text, _ in results)
    assert_case(CASE, [result for _, result in results])  # the communicator is as good as before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BAD_IDS)
def test_static_sizes_bad_ids_name_no_expert_and_are_reported(kind, layout):
    ids, _ = BAD_IDS[kind]
    routing = [CASE.topk_idx(rank).tolist() for rank in range(2)]
    routing[GUILTY][2] = [e if 0 <= e < CASE.num_experts else -1 for e in ids]
    meant = replace(CASE, routing=tuple(routing), max_recv_rows=100, layout=layout)

    def fn(comm):
        out = dispatch(comm, with_ids(comm.rank, ids), layout=layout, max_recv_rows=100)
        actual = on_cpu(dispatch_results(out))
        if comm.rank == GUILTY:
            with pytest.raises(moe_ep.errors.InvalidInput, match="topk_idx"):
                out.handle.raise_if_overflow()
        return actual

    for rank, (actual, wanted) in enumerate(zip(run(fn), expected(meant), strict=True)):
        wanted = {name: wanted[name] for name in actual}
        assert_results(actual, wanted, f"{kind}: rank {rank}")


@pytest.mark.parametrize("how", ["barrier", "dispatch"])
def test_static_sizes_bad_ids_are_reported_by_the_next_call_that_waits(how):
    ids, _ = BAD_IDS["too_large"]

    def fn(comm):
        dispatch(comm, with_ids(comm.rank, ids, guilty=(0, 1)), max_recv_rows=100)
        torch.cuda.current_stream().synchronize()
        with pytest.raises(moe_ep.errors.InvalidInput, match="topk_idx"):
            comm.barrier() if how == "barrier" else dispatch(comm, with_ids(comm.rank, [0, 1, 2]))
        comm.barrier()  # told once
        return run_case(CASE, comm, "cuda")

    assert_case(CASE, run(fn))


def test_static_sizes_an_expert_named_twice_is_reported():
    ids, _ = TWICE

    def fn(comm):
        handle = dispatch(comm, with_ids(comm.rank, ids), max_recv_rows=100).handle
        if comm.rank == GUILTY:
            with pytest.raises(moe_ep.errors.InvalidInput, match="topk_idx"):
                handle.raise_if_overflow()

    run(fn)
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", [*BAD_IDS, "twice"])
def test_a_variable_asks_for_the_check_at_once(kind, monkeypatch):
    monkeypatch.setenv("MOE_EP_CHECK", "1")
    ids, seen = BAD_IDS.get(kind, TWICE)

    def fn(comm):
        with pytest.raises(moe_ep.errors.InvalidInput) as caught:
            dispatch(comm, with_ids(comm.rank, ids, guilty=(0, 1)), max_recv_rows=100)
        assert "topk_idx" in str(caught.value) and seen in str(caught.value)
        return run_case(CASE, comm, "cuda")

    assert_case(CASE, run(fn))


def test_float64_is_refused():
    case = replace(CASE, dtype=torch.float64)

    def fn(comm):
        inputs = case.inputs(comm.rank, "cuda")
        with pytest.raises(moe_ep.errors.InvalidInput, match="float64"):
            moe_ep.dispatch(inputs.x, inputs.topk_idx, None, comm)
        out = dispatch(comm, inputs.topk_idx)
        with pytest.raises(moe_ep.errors.InvalidInput, match="float64"):
            moe_ep.combine(out.tokens.double(), out.handle)
        return run_case(CASE, comm, "cuda")

    assert_case(CASE, run(fn))


def test_tensors_of_another_device_are_refused():
    def fn(comm):
        inputs = CASE.inputs(comm.rank)
        with pytest.raises(moe_ep.errors.InvalidInput, match="cpu"):
            moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, comm)
        return run_case(CASE, comm, "cuda")

    assert_case(CASE, run(fn))


def test_a_window_that_does_not_fit_is_explained():
    total = torch.cuda.get_device_properties(0).total_memory
    hidden = 32768
    sizes = {"hidden": hidden, "num_experts": 8, "num_topk": 8}
    # Tokens in bfloat16 alone take more than the GPU has.
    with pytest.raises(moe_ep.MoeEpError) as caught:
        run_ranks(
            2,
            lambda comm: None,
            device="cuda",
            max_tokens_per_rank=total // (hidden * 2) + 1,
            **sizes,
        )
    message = str(caught.value)
    assert "window" in message and "max_tokens_per_rank" in message and "hidden" in message, message
    run_ranks(
        2,
        lambda comm: comm.barrier(),
        device="cuda",
        max_tokens_per_rank=128,
        **sizes,
    )


def test_the_window_has_the_stated_size():
    """At the benchmark's shape no more than 114, 226 and 452 MiB for 2, 4 and 8 ranks."""
    sizes = {"hidden": 7168, "max_tokens_per_rank": 4096, "num_experts": 256, "num_topk": 8}
    for world_size, limit_mib in ((2, 114), (4, 226), (8, 452)):
        held = run_ranks(world_size, lambda comm: comm.window_bytes, device="cuda", **sizes)
        assert all(0 < each <= limit_mib << 20 for each in held), (world_size, held)
