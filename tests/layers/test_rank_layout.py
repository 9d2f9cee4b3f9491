"""Rows of the rank layout in the order of experts, and back, in plain torch."""

import pytest
import torch

from moe_ep import Fp8Tokens, fp8
from moe_ep.layers.rank_layout import expand_rows, order_by_expert, reduce_rows


def test_docstring_example():
    rows = torch.tensor([[0.0], [1.0]])
    order = order_by_expert(torch.tensor([[1, -1], [0, 1]]), 2)
    assert order.slot_NK.tolist() == [[1, -1], [0, 2]]
    assert (order.num_rows, order.splits, order.tokens_per_expert.tolist()) == (3, [1, 2], [1, 2])
    expanded, weights = expand_rows(rows, torch.tensor([[0.5, 0.0], [0.1, 0.2]]), order)
    assert expanded.tolist() == [[1.0], [0.0], [1.0]]
    torch.testing.assert_close(weights, torch.tensor([0.1, 0.5, 0.2]))
    assert reduce_rows(torch.tensor([[1.0], [10.0], [100.0]]), order).tolist() == [[10.0], [101.0]]


def test_alignment():
    """Experts 0 and 2 have 1 and 2 rows of 4, expert 1 none."""
    ids, rows = torch.tensor([[2, 0], [-1, 2]]), torch.tensor([[5.0], [6.0]])
    order = order_by_expert(ids, 3, alignment=4, splits=[1, 0, 2])
    assert order.slot_NK.tolist() == [[4, 0], [-1, 5]]
    assert (order.num_rows, order.splits, order.tokens_per_expert.tolist()) == (8, [4, 0, 4], [4, 0, 4])
    expanded, weights = expand_rows(rows, torch.tensor([[0.1, 0.2], [0.3, 0.4]]), order)
    assert expanded.flatten().tolist() == [5, 0, 0, 0, 5, 6, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([0.2, 0, 0, 0, 0.1, 0.4, 0, 0]))


@pytest.mark.parametrize(
    ("max_rows", "slots", "expanded"),
    [
        (9, [[4, 0], [-1, 5]], [5, 0, 0, 0, 5, 6, 0, 0, 0]),
        (5, [[4, 0], [-1, -1]], [5, 0, 0, 0, 5]),
        (2, [[-1, 0], [-1, -1]], [5, 0]),
    ],
)
def test_static_size_leaves_out_what_does_not_fit(max_rows, slots, expanded):
    ids, rows = torch.tensor([[2, 0], [-1, 2]]), torch.tensor([[5.0], [6.0]])
    order = order_by_expert(ids, 3, alignment=4, max_rows=max_rows)
    assert order.slot_NK.tolist() == slots
    assert (order.num_rows, order.splits, order.tokens_per_expert.tolist()) == (max_rows, None, [4, 0, 4])
    got, weights = expand_rows(rows, torch.ones(2, 2), order)
    assert got.flatten().tolist() == expanded
    assert weights.tolist() == [float(value > 0) for value in expanded]


def test_sums_start_from_their_first_term():
    order = order_by_expert(torch.tensor([[0, 1], [-1, -1], [1, -1]]), 2)
    sums = reduce_rows(torch.tensor([[-0.0], [-0.0], [-0.0]]), order)
    assert sums.signbit().flatten().tolist() == [True, False, True]  # an empty sum is +0.0
    assert not sums.any()


def test_fp8_rows_stay_fp8():
    torch.manual_seed(0)
    x = torch.randn(5, 128, requires_grad=True)
    ids = torch.tensor([[0, 2], [2, -1], [1, 0], [-1, -1], [1, 2]])
    weights = torch.rand(5, 2)
    order = order_by_expert(ids, 3, alignment=4)
    tokens, _ = expand_rows(fp8.quantize(x), weights, order)
    plain, _ = expand_rows(fp8.quantize(x).dequantize(torch.float32), weights, order)
    assert torch.equal(tokens.dequantize(torch.float32), plain)
    padding = torch.ones(order.num_rows, dtype=torch.bool).index_fill_(
        0, order.slot_NK[order.slot_NK >= 0], 0
    )
    assert padding.sum() == order.num_rows - 7
    assert (tokens.scale_inv[padding] == 1).all()

    grad = torch.randn(order.num_rows, 128)
    [got] = torch.autograd.grad(tokens.dequantize(torch.float32), x, grad)
    assert torch.equal(got, reduce_rows(grad, order))
    without_carrier, _ = expand_rows(Fp8Tokens(*fp8.quantize_torch(x.detach())), weights, order)
    assert without_carrier.carrier is None
    assert torch.equal(without_carrier.scale_inv, tokens.scale_inv)


class TakesCarried(torch.autograd.Function):
    """Rows whose gradient may stand for FP8."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(fp8.carried(grad))
        return torch.zeros_like(grad), None


def test_fp8_gradients_stay_fp8():
    torch.manual_seed(0)
    order = order_by_expert(torch.tensor([[0, 2], [2, -1], [1, 0]]), 3, alignment=4)
    x, seen = torch.randn(order.num_rows, 128, requires_grad=True), []
    rows = TakesCarried.apply(x, seen)
    assert not fp8.takes_carried_gradient(reduce_rows(rows, order))
    fp8.take_carried_gradient(rows)
    y = reduce_rows(rows, order)
    assert fp8.takes_carried_gradient(y)
    grad = Fp8Tokens(*fp8.quantize_torch(torch.randn(3, 128)))
    y.backward(fp8.carry(grad, y.dtype))
    [arrived] = seen
    wanted, _ = expand_rows(grad, torch.zeros(3, 2), order)
    assert torch.equal(arrived.data.view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(arrived.scale_inv, wanted.scale_inv)


@pytest.mark.parametrize("num_rows", [0, 7])
@pytest.mark.parametrize("alignment", [1, 4])
def test_gradcheck(num_rows, alignment):
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(num_rows)]) if num_rows else torch.zeros(0, 3)
    ids = torch.where(ids < 4, ids, -1).long()
    order = order_by_expert(ids, 4, alignment=alignment)
    rows = torch.randn(num_rows, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_rows, 3, dtype=torch.float64, requires_grad=True)

    def run(rows, weights):
        expanded, row_weights = expand_rows(rows, weights, order)
        return reduce_rows(expanded * row_weights[:, None], order)

    expected = (rows[:, None] * (weights * (ids >= 0))[..., None]).sum(1)
    torch.testing.assert_close(run(rows, weights), expected)
    if num_rows:
        assert torch.autograd.gradcheck(run, (rows, weights))
