"""The oracle against brute force, dense mathematics and numbers worked out by hand."""

import doctest
from functools import partial

import pytest
import torch
from cases import LAYOUTS, WORLD_SIZES, Case, standard_cases
from exercise import assert_same_bits, oracle_dispatch

import moe_ep.fp8
from moe_ep import reference

EXACT_CASES = standard_cases(
    names=["float64", "masked", "odd_alignment", "one_rank", "odd_ranks_empty", "top32"]
)
OVERFLOW_CASES = standard_cases(
    names=["static_overflow", "static_overflow_aligned", "static_one_row", "static_roomy"]
)


def integers_like(values, seed):
    """Small integers in float64: their sums and products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, values, generator=generator).double()


def integer_inputs(case):
    x = [
        integers_like((num_tokens, case.hidden), rank) for rank, num_tokens in enumerate(case.tokens_by_rank)
    ]
    weights = [
        integers_like((num_tokens, case.num_topk), 99 + rank)
        for rank, num_tokens in enumerate(case.tokens_by_rank)
    ]
    return x, [case.topk_idx(rank) for rank in range(case.world_size)], weights


def dispatch_integers(case):
    x, topk_idx, weights = integer_inputs(case)
    out = reference.dispatch(x, topk_idx, weights, num_experts=case.num_experts, **case.dispatch_arguments)
    return x, topk_idx, weights, out


def expected_rows(case, topk_idx, rank):
    """The rows of one rank by sorting tuples: (source, token, {k: local expert}), or None for padding."""
    local = case.experts_per_rank
    choices = [
        (expert % local, source, token, k)
        for source, ids in enumerate(topk_idx)
        for token, row in enumerate(ids.tolist())
        for k, expert in enumerate(row)
        if expert >= 0 and expert // local == rank
    ]
    if case.layout == "rank":
        tokens = sorted({(source, token) for _, source, token, _ in choices})
        return [(s, t, {k: e for e, s2, t2, k in choices if (s2, t2) == (s, t)}) for s, t in tokens]
    rows = []
    for expert in range(local):
        rows += [(source, token, {k: expert}) for e, source, token, k in sorted(choices) if e == expert]
        rows += [None] * (-len(rows) % case.expert_alignment)
    return rows


def test_worked_example_of_the_docstring():
    failures, tests = doctest.testmod(reference)
    assert tests > 5 and failures == 0


@pytest.mark.parametrize("case", EXACT_CASES + OVERFLOW_CASES, ids=str)
def test_rows_weights_and_counts_by_brute_force(case):
    x, topk_idx, weights, out = dispatch_integers(case)
    for rank, got in enumerate(out):
        rows = expected_rows(case, topk_idx, rank)
        counts = [0] * case.experts_per_rank
        for row in rows:
            for expert in row[2].values() if row else ():
                counts[expert] += 1
        assert got.tokens_per_expert.tolist() == counts
        padded = [-(-count // case.expert_alignment) * case.expert_alignment for count in counts]
        assert got.padded_tokens_per_expert.tolist() == padded
        assert got.placement.rows_needed == len(rows)

        num_rows = len(rows) if case.max_recv_rows is None else case.max_recv_rows
        assert got.tokens.shape == (num_rows, case.hidden)
        for n in range(num_rows):
            row = rows[n] if n < len(rows) else None
            source, token, experts = row or (0, 0, {})
            assert got.tokens[n].tolist() == (x[source][token].tolist() if row else [0.0] * case.hidden)
            weight_of_k = {k: weights[source][token, k].item() for k in experts}
            if case.layout == "expert":
                assert got.weights[n].item() == sum(weight_of_k.values())
            else:
                assert got.weights[n].tolist() == [weight_of_k.get(k, 0.0) for k in range(case.num_topk)]
                assert got.topk_idx[n].tolist() == [experts.get(k, -1) for k in range(case.num_topk)]


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_identity_experts_give_each_token_times_its_number_of_rows(case):
    x, topk_idx, _, out = dispatch_integers(case)
    y = reference.combine([each.tokens for each in out], out)
    for x_TH, y_TH, idx_TK in zip(x, y, topk_idx, strict=True):
        serving = (
            idx_TK
            if case.layout == "expert"
            else torch.where(idx_TK < 0, -1, idx_TK // case.experts_per_rank)
        )
        num_rows = torch.tensor([len({i for i in row if i >= 0}) for row in serving.tolist()]).reshape(-1, 1)
        assert torch.equal(y_TH, x_TH * num_rows)


@pytest.mark.parametrize("case", EXACT_CASES + OVERFLOW_CASES, ids=str)
def test_combine_is_the_transpose_of_dispatch(case):
    x, _, weights, out = dispatch_integers(case)
    rows = [integers_like(tuple(each.tokens.shape), 7) for each in out]
    forward = sum((each.tokens * r).sum() for each, r in zip(out, rows, strict=True))
    backward = sum((x_TH * y_TH).sum() for x_TH, y_TH in zip(x, reference.combine(rows, out), strict=True))
    assert forward.item() == float(backward)

    row_weights = [integers_like(tuple(each.weights.shape), 8) for each in out]
    forward = sum((each.weights * w).sum() for each, w in zip(out, row_weights, strict=True))
    backward = sum(
        (w_TK * g_TK).sum()
        for w_TK, g_TK in zip(weights, reference.combine_weights(row_weights, out), strict=True)
    )
    assert forward.item() == float(backward)


@pytest.mark.parametrize("case", EXACT_CASES + OVERFLOW_CASES, ids=str)
def test_gradients_are_those_of_dense_one_hot_products(case):
    """Dispatch as a matrix of zeros and ones: autograd through its product gives the gradients of rows."""
    x, topk_idx, _, out = dispatch_integers(case)
    x_all = torch.cat(x).requires_grad_()
    first_token = torch.tensor([0, *case.tokens_by_rank]).cumsum(0)
    grad_rows, rows = [], []
    total_x = total_y = 0.0
    grad_y = integers_like(tuple(x_all.shape), 5)
    for rank, got in enumerate(out):
        one_hot = torch.zeros(got.num_rows, len(x_all), dtype=torch.float64)
        for n, row in enumerate(expected_rows(case, topk_idx, rank)[: got.num_rows]):
            if row:
                one_hot[n, first_token[row[0]] + row[1]] = 1.0
        grad_rows.append(integers_like((got.num_rows, case.hidden), 20 + rank))
        rows.append(integers_like((got.num_rows, case.hidden), 40 + rank).requires_grad_())
        total_x = total_x + (one_hot @ x_all * grad_rows[-1]).sum()
        total_y = total_y + (one_hot.T @ rows[-1] * grad_y).sum()
    (dense_grad_x,) = torch.autograd.grad(total_x, x_all)
    dense_grad_rows = torch.autograd.grad(total_y, rows)

    grad_x, _ = reference.dispatch_backward(grad_rows, None, out)
    assert torch.equal(torch.cat(grad_x), dense_grad_x)
    got_rows = reference.combine_backward(grad_y.split(list(case.tokens_by_rank)), out)
    for got, dense in zip(got_rows, dense_grad_rows, strict=True):
        assert torch.equal(got, dense)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_max_recv_rows_delivers_a_prefix_of_the_exact_rows(layout, world_size):
    exact = Case("prefix", (13,) * world_size, layout=layout, routing="masked")
    out = dispatch_integers(exact)[-1]
    for limit in (1, 5, 500):
        limited = reference.dispatch(
            *integer_inputs(exact), num_experts=exact.num_experts, layout=layout, max_recv_rows=limit
        )
        for got, whole in zip(limited, out, strict=True):
            kept = min(limit, whole.num_rows)
            assert torch.equal(got.tokens[:kept], whole.tokens[:kept])
            assert torch.equal(got.weights[:kept], whole.weights[:kept])
            assert not got.tokens[kept:].any() and not got.weights[kept:].any()
            assert torch.equal(got.tokens_per_expert, whole.tokens_per_expert)
            assert got.placement.overflowed == (whole.num_rows > limit)
            if layout == "rank":
                assert (got.topk_idx[kept:] == -1).all()


def combine_by_expert(
    dtype, topk_idx, value_of_expert, *, world_size, num_experts, layout="expert", bias=None, **options
):
    """combine for one token on rank 0 whose experts each return one number."""
    idx = [torch.tensor([topk_idx])] + [torch.zeros(0, len(topk_idx), dtype=torch.int64)] * (world_size - 1)
    x = [torch.zeros(len(each), 1, dtype=dtype) for each in idx]
    out = reference.dispatch(x, idx, None, num_experts=num_experts, layout=layout, **options)
    rows = []
    for each in out:
        row = torch.full((each.num_rows, 1), float("nan"), dtype=dtype)
        for k, n in enumerate(each.placement.row_of[0][0].tolist()):
            if n >= 0:
                row[n] = value_of_expert[topk_idx[k]]
        rows.append(row)
    biases = (
        None
        if bias is None
        else [[torch.tensor([[b]], dtype=dtype) for b in bias]] + [None] * (world_size - 1)
    )
    return reference.combine(rows, out, biases)[0].item()


def test_a_rank_adds_its_rows_in_ascending_k_not_in_order_of_rows():
    big = 2.0**24
    values = {0: big, 1: 1.0, 2: -big}
    add = partial(combine_by_expert, torch.float32, value_of_expert=values, world_size=1, num_experts=3)
    assert add([0, 1, 2]) == 0.0  # (2^24 + 1) - 2^24, the 1 is lost
    assert add([0, 2, 1]) == 1.0
    assert add([1, 0, 2]) == 0.0


def test_ranks_are_added_in_ascending_order_of_the_highest_k_they_serve():
    big = 2.0**24
    values = {0: big, 1: 0.0, 2: 1.0, 3: 0.0, 4: -big, 5: 0.0}  # rank 0: 2^24, rank 1: 1, rank 2: -2^24
    add = partial(combine_by_expert, torch.float32, value_of_expert=values, world_size=3, num_experts=6)
    assert add([0, 2, 4, -1]) == 0.0
    assert add([0, 4, 2, -1]) == 1.0
    assert add([2, 0, 4, 3]) == 1.0  # rank 1 serves k = 0 and k = 3, so it comes last
    assert add([0, 2, 4, 1]) == 1.0  # rank 0 comes last: (1 - 2^24) + 2^24


def test_partial_sums_are_rounded_to_bfloat16_before_they_travel():
    values = {0: 1.0, 1: 2.0**-8, 2: 2.0**-8}
    one_rank = combine_by_expert(torch.bfloat16, [0, 1, 2], values, world_size=1, num_experts=3)
    assert one_rank == 1.0 + 2.0**-7  # all three in float32, rounded once
    values = {0: 1.0, 1: 2.0**-8, 2: 2.0**-8, 3: 0.0}
    two_ranks = combine_by_expert(torch.bfloat16, [0, 1, 2], values, world_size=2, num_experts=4)
    assert two_ranks == 1.0  # rank 0 sends round(1 + 2^-8) = 1 (ties to even), and again 1 + 2^-8 rounds to 1


def test_biases_come_first_and_in_order():
    big = 2.0**24
    values = {0: 1.0, 1: 1.0}
    add = partial(combine_by_expert, torch.float32, [0, 1], values, world_size=2, num_experts=2)
    assert add(bias=[big, -big]) == 2.0
    assert add(bias=[big]) == big  # 2^24 + 1 twice: each 1 is lost
    assert (
        combine_by_expert(torch.float32, [-1, -1], {}, world_size=2, num_experts=2, bias=[2.5, 0.25]) == 2.75
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_of_zero(layout):
    def add(ids, values, **options):
        value = combine_by_expert(
            torch.float32, ids, values, world_size=2, num_experts=2, layout=layout, **options
        )
        return torch.tensor(value)

    assert add([0, -1], {0: -0.0}).signbit()
    assert add([0, 1], {0: -0.0, 1: -0.0}).signbit()
    assert not add([0, 1], {0: -0.0, 1: 0.0}).signbit()
    assert not add([-1, -1], {}).signbit()
    assert not add([0, -1], {0: -0.0}, max_recv_rows=0).signbit()  # its only row was dropped: an empty sum
    assert add([0, 1], {0: -0.0, 1: 5.0}, max_recv_rows=[1, 0]) == 0.0
    assert not add(
        [0, 1], {0: -0.0, 1: 5.0}, max_recv_rows=[1, 0]
    ).signbit()  # rank 1 sends its empty sum, +0.0


def test_rank_layout_counts_a_row_once_whatever_its_number_of_experts():
    out = reference.dispatch(
        [torch.ones(1, 4)], [torch.tensor([[0, 1, 2]])], None, num_experts=4, layout="rank"
    )
    assert reference.combine([torch.full((1, 4), 5.0)], out)[0].tolist() == [[5.0] * 4]


@pytest.mark.parametrize(
    "case",
    standard_cases(names=["fp8_tokens", "fp8_tokens_aligned", "fp8_static"], world_sizes=[1, 2]),
    ids=str,
)
def test_fp8_rows_move_like_their_bytes(case):
    x = [moe_ep.fp8.quantize(case.inputs(rank).x) for rank in range(case.world_size)]
    topk_idx = [case.topk_idx(rank) for rank in range(case.world_size)]
    out = reference.dispatch(x, topk_idx, None, num_experts=case.num_experts, **case.dispatch_arguments)
    for rank, got in enumerate(out):
        assert got.tokens.data.dtype == torch.float8_e4m3fn and got.tokens.scale_inv.dtype == torch.float32
        rows = expected_rows(case, topk_idx, rank) + [None] * got.num_rows
        data, scale_inv = got.tokens.data.view(torch.uint8), got.tokens.scale_inv
        for n, row in enumerate(rows[: got.num_rows]):
            if row is None:
                assert not data[n].any() and (scale_inv[n] == 1.0).all()
            else:
                assert torch.equal(data[n], x[row[0]].data[row[1]].view(torch.uint8))
                assert torch.equal(scale_inv[n], x[row[0]].scale_inv[row[1]])


def test_dispatch_keeps_every_bit():
    case = standard_cases(names=["any_bits"], world_sizes=[2], layouts=["rank"])[0]
    for rank, got in enumerate(oracle_dispatch(case)):
        rows = expected_rows(case, [case.topk_idx(source) for source in range(2)], rank)
        x = [case.inputs(source).x for source in range(2)]
        assert_same_bits(
            got.tokens, torch.stack([x[source][token] for source, token, _ in rows]), f"rank {rank}"
        )


@pytest.mark.parametrize(
    "topk_idx, options, message",
    [
        ([[0, 4]], {}, "outside"),
        ([[0, -2]], {}, "outside"),
        ([[1, 1]], {}, "twice"),
        ([[0, 1]], {"layout": "token"}, "layout"),
        ([[0, 1]], {"expert_alignment": 0}, "expert_alignment"),
        ([[0, 1]], {"layout": "rank", "expert_alignment": 2}, "expert_alignment"),
    ],
)
def test_inputs_outside_the_contract_are_refused(topk_idx, options, message):
    with pytest.raises(ValueError, match=message):
        reference.dispatch([torch.zeros(1, 4)], [torch.tensor(topk_idx)], None, num_experts=4, **options)
