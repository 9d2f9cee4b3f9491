"""Virtual ranks on the CPU against the oracle, bit for bit; what handles promise beyond one call."""

import pytest
import torch
from cases import LAYOUTS, Case, standard_cases
from exercise import (
    assert_case,
    assert_same_bits,
    dispatch_results,
    expected,
    is_the_same_by_default_elsewhere,
    oracle_dispatch,
    run_case,
)

import moe_ep
from moe_ep import reference
from moe_ep.backends import alltoall
from moe_ep.testing import run_ranks

SMALL = Case("small", (5, 0, 9, 4), num_experts=8, num_topk=3, routing="masked", dtype=torch.bfloat16)


def run(case, fn):
    return run_ranks(case.world_size, fn, timeout_s=20, **case.communicator_arguments)


def with_layout(case, layout):
    return Case(**{**vars(case), "layout": layout})


@pytest.mark.parametrize("case", standard_cases(), ids=str)
def test_forward_and_backward_equal_the_oracle(case):
    assert_case(case, run(case, lambda comm: run_case(case, comm)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "collective"])
def test_one_rank_needs_no_process_group(layout, backend):
    assert not torch.distributed.is_initialized()
    case = Case("alone", (13,), routing="masked", layout=layout, dtype=torch.bfloat16)
    with moe_ep.Communicator(backend=backend, **case.communicator_arguments) as comm:
        assert (comm.rank, comm.size, comm.backend) == (0, 1, "collective")
        assert_case(case, [run_case(case, comm)])
        comm.barrier()


def test_communicator_says_what_it_is():
    def fn(comm):
        comm.barrier()
        return comm.rank, comm.size, comm.backend, comm.num_local_experts, comm.timeout_s, comm.closed

    results = run(SMALL, fn)
    assert results == [(rank, 4, "virtual", 2, 20, False) for rank in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_handle_describe_the_rows(layout):
    case = with_layout(Case("describe", (6, 11), routing="zipf", expert_alignment=1), layout)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        return moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, comm, layout=layout)

    for rank, (out, wanted) in enumerate(zip(run(case, fn), oracle_dispatch(case), strict=True)):
        handle = out.handle
        assert handle.layout == layout
        assert handle.num_rows == wanted.num_rows == out.tokens.shape[0]
        assert handle.num_tokens == case.tokens_by_rank[rank]
        assert torch.equal(handle.tokens_per_expert, wanted.tokens_per_expert)
        assert torch.equal(handle.padded_tokens_per_expert, wanted.padded_tokens_per_expert)
        assert out.splits == handle.splits == wanted.padded_tokens_per_expert.tolist()
        handle.raise_if_overflow()


def test_splits_of_a_cut_off_output_add_up_to_its_rows():
    case = Case("cut", (6, 11), routing="zipf", expert_alignment=4, max_recv_rows=20)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        return moe_ep.dispatch(inputs.x, inputs.topk_idx, None, comm, **case.dispatch_arguments).splits

    for splits, wanted in zip(run(case, fn), oracle_dispatch(case), strict=True):
        left = case.max_recv_rows
        for rows, padded in zip(splits, wanted.padded_tokens_per_expert.tolist(), strict=True):
            assert rows == min(left, padded)
            left -= rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow_is_reported_by_the_rank_it_happened_on(layout):
    case = Case("overflow", (10, 10), num_topk=2, routing="one_rank", layout=layout, max_recv_rows=15)
    needed = [each.placement.rows_needed for each in oracle_dispatch(case)]
    assert needed[0] <= 15 < needed[1]

    def fn(comm):
        inputs = case.inputs(comm.rank)
        handle = moe_ep.dispatch(inputs.x, inputs.topk_idx, None, comm, **case.dispatch_arguments).handle
        if comm.rank == 0:
            handle.raise_if_overflow()
            return None
        with pytest.raises(moe_ep.ReceiveOverflowError) as caught:
            handle.raise_if_overflow()
        return str(caught.value)

    message = run(case, fn)[1]
    assert str(needed[1]) in message and "15" in message


@pytest.mark.parametrize("fp8", [None, "blockwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_handle_repeats_its_routing_for_other_tokens(layout, fp8):
    first = Case("reuse", (5, 0, 9, 4), hidden=128, num_experts=8, layout=layout, routing="masked", fp8=fp8)
    second = Case(
        **{**vars(first), "seed": 1, "routing": tuple(first.topk_idx(rank).tolist() for rank in range(4))}
    )

    def fn(comm):
        inputs = first.inputs(comm.rank)
        handle = moe_ep.dispatch(
            inputs.x, inputs.topk_idx, inputs.topk_weights, comm, layout=layout, fp8=fp8
        ).handle
        again = second.inputs(comm.rank)
        x, weights = again.x.requires_grad_(), again.topk_weights.requires_grad_()
        out = moe_ep.dispatch(x, None, weights, comm, handle=handle, fp8=fp8)
        results = dispatch_results(out)
        rows = second.expert_rows(comm.rank, handle.num_rows).requires_grad_()
        results["y"] = moe_ep.combine(rows, out.handle)
        (results["grad_rows"],) = torch.autograd.grad(results["y"], rows, again.grad_y)
        tokens = out.tokens.carrier if fp8 else out.tokens
        grads = (
            second.grad_tokens(comm.rank, len(rows)),
            second.grad_weights(comm.rank, tuple(out.weights.shape)),
        )
        grads = torch.autograd.grad([tokens, out.weights], [x, weights], grads)
        results["grad_x"], results["grad_topk_weights"] = grads
        return {name: value.detach() for name, value in results.items()}

    assert_case(second, run(first, fn))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_handles_live_at_once_and_are_used_in_reverse_order(layout):
    """Four micro-batches in flight, as in a pipeline: combined and differentiated last first."""
    batches = [Case("pipeline", (7 + i, 3, 0, 5 * i), num_experts=8, layout=layout, seed=i) for i in range(4)]
    arguments = {**batches[0].communicator_arguments, "max_tokens_per_rank": 32}

    def fn(comm):
        started = []
        for case in batches:
            inputs = case.inputs(comm.rank)
            x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
            out = moe_ep.dispatch(x, inputs.topk_idx, weights, comm, layout=layout)
            rows = case.expert_rows(comm.rank, out.handle.num_rows).requires_grad_()
            started.append((case, inputs, x, weights, out, rows))
        sums = [moe_ep.combine(rows, out.handle) for *_, out, rows in reversed(started)]
        results = []
        for (case, inputs, x, weights, out, rows), y in reversed(
            list(zip(started, reversed(sums), strict=True))
        ):
            result = dispatch_results(out) | {"y": y}
            (result["grad_rows"],) = torch.autograd.grad(y, rows, inputs.grad_y)
            grads = (
                case.grad_tokens(comm.rank, len(rows)),
                case.grad_weights(comm.rank, tuple(out.weights.shape)),
            )
            grads = torch.autograd.grad([out.tokens, out.weights], [x, weights], grads)
            result["grad_x"], result["grad_topk_weights"] = grads
            results.append({name: value.detach() for name, value in result.items()})
        return results[::-1]

    by_rank = run_ranks(4, fn, timeout_s=20, **arguments)
    for i, case in enumerate(batches):
        assert_case(case, [results[i] for results in by_rank])


def test_two_communicators_of_different_shapes_work_in_turns():
    narrow = Case("narrow", (3, 8), hidden=8, num_experts=4, num_topk=2)
    wide = Case("wide", (9, 1), hidden=64, num_experts=16, num_topk=5, dtype=torch.bfloat16)

    def fn(comm):
        with moe_ep.Communicator(comm_group(comm), **wide.communicator_arguments) as other:
            first = run_case(narrow, comm)
            inputs = wide.inputs(other.rank)
            out = moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, other)
            second = run_case(narrow, comm)
            rows = wide.expert_rows(other.rank, out.handle.num_rows)
            return first, second, moe_ep.combine(rows, out.handle)

    results = run(narrow, fn)
    for which in range(2):
        assert_case(narrow, [result[which] for result in results])
    for rank, wanted in enumerate(expected(wide)):
        assert_same_bits(results[rank][2], wanted["y"], f"rank {rank}")


def comm_group(comm):
    """The virtual group that run_ranks made this communicator on."""
    return comm._impl.group


@pytest.mark.parametrize("max_recv_rows", [None, 80])
def test_meanwhile_is_called_once_by_every_dispatch(max_recv_rows):
    case = with_layout(SMALL, "expert")

    def fn(comm):
        inputs, calls = case.inputs(comm.rank), []

        def meanwhile():
            calls.append(torch.is_grad_enabled())

        x = inputs.x.requires_grad_()
        options = {"max_recv_rows": max_recv_rows, "meanwhile": meanwhile}
        out = moe_ep.dispatch(x, inputs.topk_idx, inputs.topk_weights, comm, **options)
        again = moe_ep.dispatch(x, None, inputs.topk_weights, comm, handle=out.handle, meanwhile=meanwhile)
        assert_same_bits(again.tokens, out.tokens, "again")
        again.tokens.sum().backward()
        return calls

    assert run(case, fn) == [[True, True]] * case.world_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_async_calls_give_the_same_after_their_event(layout):
    case = with_layout(SMALL, layout)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        out, event = moe_ep.dispatch_async(
            inputs.x, inputs.topk_idx, inputs.topk_weights, comm, layout=layout
        )
        event.wait()
        y, event = moe_ep.combine_async(case.expert_rows(comm.rank, out.handle.num_rows), out.handle)
        event.wait()
        return dispatch_results(out) | {"y": y}

    for rank, (actual, wanted) in enumerate(zip(run(case, fn), expected(case), strict=True)):
        for name, value in actual.items():
            assert_same_bits(value, wanted[name], f"rank {rank}: {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["none", "one_expert", "last_rank_none"])
def test_every_rank_stays_in_the_graph_with_no_tokens_or_no_rows(layout, routing):
    """One backward call through dispatch, experts and combine, as training does it."""
    case = Case("connected", (0, 6, 4, 3), num_experts=8, num_topk=2, routing=routing, layout=layout)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
        scale = torch.ones(case.hidden, requires_grad=True)
        out = moe_ep.dispatch(x, inputs.topk_idx, weights, comm, layout=layout)
        weight = out.weights if layout == "expert" else out.weights.sum(1)
        y = moe_ep.combine(out.tokens * scale * weight.unsqueeze(1), out.handle)
        y.sum().backward()
        return x, weights, scale, y

    for rank, (x, weights, scale, y) in enumerate(run(case, fn)):
        assert y.shape == x.shape == (case.tokens_by_rank[rank], case.hidden)
        assert scale.grad is not None
        idx = case.topk_idx(rank)
        assert torch.equal(x.grad.abs().sum(1) > 0, (idx >= 0).any(1))
        wanted = torch.where(idx >= 0, x.detach().sum(1, keepdim=True), 0.0)
        torch.testing.assert_close(weights.grad, wanted)


@pytest.mark.parametrize("used", ["tokens", "weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_of_only_one_output_reaches_its_input(layout, used):
    case = with_layout(SMALL, layout)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
        out = moe_ep.dispatch(x, inputs.topk_idx, weights, comm, layout=layout)
        getattr(out, used).float().sum().backward()
        return x.grad, weights.grad

    for rank, (grad_x, grad_weights) in enumerate(run(case, fn)):
        idx = case.topk_idx(rank)
        if used == "tokens":
            assert torch.equal(grad_x[:, 0] != 0, (idx >= 0).any(1))
            assert grad_weights is None or not grad_weights.any()
        else:
            assert torch.equal(grad_weights, (idx >= 0).float())
            assert grad_x is None or not grad_x.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_may_use_different_outputs_in_their_loss(layout):
    """A rank may leave the weights out of its loss; its peers must not wait for, or misread, its message."""
    case = with_layout(SMALL, layout)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
        out = moe_ep.dispatch(x, inputs.topk_idx, weights, comm, layout=layout)
        loss = out.tokens.float().sum() if comm.rank != 1 else 0.0
        if comm.rank != 0:
            loss = loss + out.weights.sum()
        loss.backward()
        return weights.grad

    for rank, grad_weights in enumerate(run(case, fn)):
        idx = case.topk_idx(rank)
        wanted = torch.where(idx // case.experts_per_rank >= 1, 1.0, 0.0)
        assert torch.equal(grad_weights, torch.where(idx < 0, 0.0, wanted))


def test_without_grad_nothing_is_recorded():
    def fn(comm):
        inputs = SMALL.inputs(comm.rank)
        with torch.no_grad():
            out = moe_ep.dispatch(inputs.x.requires_grad_(), inputs.topk_idx, inputs.topk_weights, comm)
            return out.tokens.requires_grad or moe_ep.combine(out.tokens, out.handle).requires_grad

    assert run(SMALL, fn) == [False] * 4


def test_fp8_tokens_without_a_carrier_travel_too():
    case = Case("bare", (6, 3), hidden=256, num_experts=8, fp8="tokens", dtype=torch.bfloat16)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        quantised = moe_ep.fp8.quantize(inputs.x)
        bare = moe_ep.Fp8Tokens(quantised.data, quantised.scale_inv)
        return dispatch_results(moe_ep.dispatch(bare, inputs.topk_idx, inputs.topk_weights, comm))

    for rank, (actual, wanted) in enumerate(zip(run(case, fn), oracle_dispatch(case), strict=True)):
        for name, value in dispatch_results(wanted).items():
            assert_same_bits(actual[name], value, f"rank {rank}: {name}")


def test_results_do_not_alias_a_shared_buffer():
    """Results keep their values while later calls run; changing them does not reach into other ranks."""
    case = Case("alias", (6, 6), num_experts=2, num_topk=1, routing="uniform")

    def fn(comm):
        inputs = case.inputs(comm.rank)
        out = moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, comm)
        before = out.tokens.clone()
        for _ in range(3):
            other = moe_ep.dispatch(inputs.x + 1, inputs.topk_idx, inputs.topk_weights, comm)
            other.tokens.fill_(-1.0)
        comm.barrier()
        return before, out.tokens, inputs.x

    for rank, (before, after, x) in enumerate(run(case, fn)):
        assert_same_bits(after, before, f"rank {rank}: tokens")
        assert_same_bits(x, case.inputs(rank).x, f"rank {rank}: x")


def test_the_combined_sum_is_in_the_dtype_of_the_rows_whatever_x_was():
    case = Case("mixed", (6, 5), num_experts=4, num_topk=3, dtype=torch.bfloat16)

    def fn(comm):
        inputs = case.inputs(comm.rank)
        out = moe_ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, comm)
        return moe_ep.combine(out.tokens.double() * 1.1, out.handle)

    dispatched = oracle_dispatch(case)
    wanted = reference.combine([each.tokens.double() * 1.1 for each in dispatched], dispatched)
    for rank, y in enumerate(run(case, fn)):
        assert_same_bits(y, wanted[rank], f"rank {rank}")


def test_routing_too_large_for_one_message(monkeypatch):
    monkeypatch.setattr(alltoall, "ONE_MESSAGE_BYTES", 0)
    for case in standard_cases((1, 4)):
        arguments = case.communicator_arguments
        assert_case(
            case, run_ranks(case.world_size, lambda comm, case=case: run_case(case, comm), **arguments)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_recv_rows", [None, 90])
def test_the_callers_default_device_makes_no_difference(layout, max_recv_rows):
    case = Case(**{**vars(with_layout(SMALL, layout)), "max_recv_rows": max_recv_rows})
    assert all(run(case, lambda comm: is_the_same_by_default_elsewhere(case, comm._impl.group, comm.rank)))
