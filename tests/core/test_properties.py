"""What must hold for every routing: drawn by hypothesis, run on virtual ranks."""

import pytest
import torch
from cases import Case
from exercise import assert_case, assert_same_bits, oracle_dispatch, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_ep
from moe_ep.testing import run_ranks

from .strategies import cases

FIXED = settings(
    deadline=None,  # a case starts threads, whose time says nothing
    derandomize=True,  # the same cases on every run
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


def run(case, fn):
    return run_ranks(case.world_size, fn, timeout_s=20, **case.communicator_arguments)


def dispatch(case, comm, x, topk_idx=None, weights=None):
    topk_idx = case.topk_idx(comm.rank) if topk_idx is None else topk_idx
    return moe_ep.dispatch(x, topk_idx, weights, comm, **case.dispatch_arguments)


def numbered_tokens(case, rank):
    """Tokens whose every element is their number in the whole group, counted from 1."""
    first = 1 + sum(case.tokens_by_rank[:rank])
    numbers = torch.arange(first, first + case.tokens_by_rank[rank], dtype=torch.float64)
    return numbers.unsqueeze(1).expand(-1, case.hidden).contiguous()


@FIXED
@given(cases())
def test_any_routing_equals_the_oracle(case):
    assert_case(case, run(case, lambda comm: run_case(case, comm)))


@FIXED
@given(cases(payload="bits"))
def test_any_payload_equals_the_oracle(case):
    assert_case(case, run(case, lambda comm: run_case(case, comm)))


@FIXED
@given(cases())
def test_two_runs_give_the_same_bits(case):
    first, second = (run(case, lambda comm: run_case(case, comm)) for _ in range(2))
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        for name, value in one.items():
            assert_same_bits(other[name], value, f"rank {rank}: {name}")


@FIXED
@given(cases(static=False, dtypes=[torch.float64]))
def test_every_choice_arrives_once_at_its_expert(case):
    outs = run(case, lambda comm: dispatch(case, comm, numbered_tokens(case, comm.rank)))
    chosen = {}  # expert -> numbers of the tokens that named it
    number = 0
    for tokens in case.routing:
        for ids in tokens:
            number += 1
            for expert in ids:
                chosen.setdefault(expert, []).append(number)
    assert sum(int(out.tokens_per_expert.sum()) for out in outs) == sum(
        len(numbers) for expert, numbers in chosen.items() if expert >= 0
    )
    for rank, out in enumerate(outs):
        received = out.tokens[:, 0].long()
        if case.layout == "expert":
            segments = received.split(out.splits)
        else:
            assert (received > 0).all() and len(set(received.tolist())) == len(received)
            segments = [received[(out.topk_idx == e).any(1)] for e in range(case.experts_per_rank)]
        for local, segment in enumerate(segments):
            wanted = chosen.get(rank * case.experts_per_rank + local, [])
            assert segment[segment > 0].tolist() == wanted
            assert int(out.tokens_per_expert[local]) == len(wanted)
            assert (segment[len(wanted) :] == 0).all()


@FIXED
@given(cases(dtypes=[torch.float64]))
def test_combine_is_the_transpose_of_dispatch(case):
    """<dispatch(x), r> over all ranks equals <x, combine(r)>; on integers, exactly."""

    def integers(purpose, rank, *shape):
        return torch.randint(-9, 10, shape, generator=case.generator(rank, purpose)).double()

    def fn(comm):
        x = integers("x", comm.rank, case.tokens_by_rank[comm.rank], case.hidden)
        out = dispatch(case, comm, x)
        rows = integers("rows", comm.rank, *out.tokens.shape)
        y = moe_ep.combine(rows, out.handle)
        return (out.tokens * rows).sum().item(), (x * y).sum().item()

    forward, backward = zip(*run(case, fn), strict=True)
    assert sum(forward) == sum(backward)


@FIXED
@given(cases())
def test_rows_without_a_token_are_never_read(case):
    """NaN in padding and tail rows of what combine and dispatch's backward get changes nothing."""
    is_token = []
    for dispatched in oracle_dispatch(case):
        rows = torch.zeros(dispatched.num_rows, dtype=torch.bool)
        for row_of in dispatched.placement.row_of:
            rows[row_of[row_of >= 0]] = True
        is_token.append(rows.unsqueeze(1))

    def fn(comm):
        inputs = case.inputs(comm.rank)
        x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
        out = dispatch(case, comm, x, weights=weights)
        results = []
        for filler in (0.0, float("nan")):
            rows = torch.where(is_token[comm.rank], case.expert_rows(comm.rank, out.handle.num_rows), filler)
            y = moe_ep.combine(rows, out.handle)
            grad_rows = torch.where(is_token[comm.rank], case.grad_tokens(comm.rank, len(rows)), filler)
            used = is_token[comm.rank][:, 0] if case.layout == "expert" else out.topk_idx >= 0
            grad_weights = torch.where(used, case.grad_weights(comm.rank, tuple(out.weights.shape)), filler)
            grads = torch.autograd.grad(
                [out.tokens, out.weights], [x, weights], [grad_rows, grad_weights], retain_graph=True
            )
            results.append([y, *grads])
        return results

    for rank, (clean, poisoned) in enumerate(run(case, fn)):
        for name, one, other in zip(("y", "grad_x", "grad_topk_weights"), clean, poisoned, strict=True):
            assert not other.isnan().any(), f"rank {rank}: {name} read a row without a token"
            assert_same_bits(other, one, f"rank {rank}: {name}")


@FIXED
@given(cases(static=False, dtypes=[torch.float64]), st.randoms(use_true_random=False))
def test_renaming_the_tokens_of_a_rank_renames_its_results(case, random):
    """Permute each rank's tokens: y is permuted alike, and every expert still gets the same set of tokens."""
    orders = [torch.tensor(random.sample(range(n), n), dtype=torch.int64) for n in case.tokens_by_rank]

    def fn(comm):
        x, idx, order = numbered_tokens(case, comm.rank), case.topk_idx(comm.rank), orders[comm.rank]
        results = []
        for mine, ids in ((x, idx), (x[order].contiguous(), idx[order].contiguous())):
            out = dispatch(case, comm, mine, ids)
            results.append((out.tokens, out.tokens_per_expert, moe_ep.combine(out.tokens, out.handle)))
        return results

    for order, (straight, permuted) in zip(orders, run(case, fn), strict=True):
        assert torch.equal(straight[1], permuted[1])
        assert torch.equal(straight[2][order], permuted[2])
        if case.layout == "rank":
            assert torch.equal(straight[0].sort(dim=0).values, permuted[0].sort(dim=0).values)
        else:
            sizes = (-(-straight[1] // case.expert_alignment) * case.expert_alignment).tolist()
            for one, other in zip(straight[0].split(sizes), permuted[0].split(sizes), strict=True):
                assert torch.equal(one.sort(dim=0).values, other.sort(dim=0).values)


@FIXED
@given(cases(static=False, dtypes=[torch.float32]), st.randoms(use_true_random=False))
def test_the_order_of_choices_does_not_move_rows(case, random):
    """Permute the columns of topk_idx and topk_weights together: the same rows arrive in the same order."""
    order = torch.tensor(random.sample(range(case.num_topk), case.num_topk))

    def fn(comm):
        inputs = case.inputs(comm.rank)
        straight = dispatch(case, comm, inputs.x, weights=inputs.topk_weights)
        idx, weights = inputs.topk_idx[:, order].contiguous(), inputs.topk_weights[:, order].contiguous()
        return straight, dispatch(case, comm, inputs.x, idx, weights)

    for rank, (straight, permuted) in enumerate(run(case, fn)):
        assert_same_bits(permuted.tokens, straight.tokens, f"rank {rank}: tokens")
        weights = straight.weights if case.layout == "expert" else straight.weights[:, order]
        assert_same_bits(permuted.weights, weights, f"rank {rank}: weights")
        if case.layout == "rank":
            assert torch.equal(permuted.topk_idx, straight.topk_idx[:, order])


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_thousand_tokens_equal_the_oracle(layout):
    """More rows than any block or buffer that small cases fit into."""
    options = {"num_experts": 32, "num_topk": 6, "routing": "zipf", "dtype": torch.bfloat16}
    case = Case("thousand", (1000, 3, 999, 500), hidden=64, layout=layout, **options)
    assert_case(case, run(case, lambda comm: run_case(case, comm)))
