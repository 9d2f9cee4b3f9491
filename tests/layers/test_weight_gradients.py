"""Weight gradients that are computed later, or added up by the products: the same numbers, and hooks as autograd would
run them.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

from moe_ep.fp8 import quantize
from moe_ep.layers import GradAccumulation, WeightGradStore
from moe_ep.layers.fp8_experts import fp8_matmul
from moe_ep.layers.fp8_weights import QuantizedWeight
from moe_ep.layers.grouped_matmul import grouped_matmul
from moe_ep.layers.row_groups import RowGroups
from moe_ep.layers.weight_gradients import GradientSums, Keeper, Linear, add_to_grad, give

SPLITS = [3, 0, 2, 4]


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(Linear(6, 8, dtype=dtype), nn.SiLU(), Linear(8, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6)])
def test_linear_is_torchs_bit_for_bit(dtype, shape):
    later, now = two_layers(dtype), two_layers(dtype)
    numbers = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).view(shape)
    x_later, x_now = (numbers.clone().requires_grad_() for _ in range(2))
    store = WeightGradStore()
    with store.collecting():
        y_later = later(x_later)
    y_now = now(x_now)
    assert torch.equal(y_later, y_now)
    for y in (y_later, y_now):
        y.float().pow(2).sum().backward()
    assert torch.equal(x_later.grad, x_now.grad)
    assert all(p.grad is None for p in later.parameters()) and len(store) == 2
    store.run()
    assert len(store) == 0
    for ours, torchs in zip(later.parameters(), now.parameters(), strict=True):
        assert torch.equal(ours.grad, torchs.grad)


def test_grouped_matmul():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 5, 6))
    expected, x = copy.deepcopy(weight), torch.randn(9, 6)
    counts, store = torch.tensor(SPLITS), WeightGradStore()
    grouped_matmul(x, expected, counts).sin().sum().backward()
    with store.collecting():
        y = grouped_matmul(x.clone().requires_grad_(), weight, counts)
    y.sin().sum().backward()
    assert weight.grad is None
    store.run()
    assert torch.equal(weight.grad, expected.grad)


def test_gradients_add_up_and_hooks_run_once_each():
    layer, store, hooks = Linear(2, 2), WeightGradStore(), []
    layer.weight.register_hook(lambda grad: hooks.append("hook"))
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: hooks.append("after"))
    with store.collecting():
        outputs = [layer(torch.full((1, 2), float(i), requires_grad=True)) for i in (1, 2)]
    for y in outputs:
        y.sum().backward()
    assert hooks == []
    store.run()
    assert hooks == ["hook", "after"] * 2
    assert torch.equal(layer.weight.grad, torch.full((2, 2), 3.0))


def test_gradients_are_kept_in_the_weights_grad_dtype():
    layer, store = Linear(2, 2, dtype=torch.bfloat16), WeightGradStore()
    layer.weight.grad_dtype = torch.float32
    with store.collecting():
        y = layer(torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True))
    y.sum().backward()
    store.run()
    assert layer.weight.grad.dtype == torch.float32


def test_what_cannot_wait_does_not():
    layer, frozen, store = Linear(2, 2), Linear(2, 2).requires_grad_(False), WeightGradStore()
    with store.collecting():
        first = layer(torch.ones(1, 2))  # nothing before it needs a gradient
        last = frozen(torch.ones(1, 2, requires_grad=True))
    (first + last).sum().backward()
    assert len(store) == 0 and layer.weight.grad is not None and frozen.weight.grad is None


def test_stores_may_be_nested():
    layer, outer, inner = Linear(2, 2), WeightGradStore(), WeightGradStore()
    x = torch.ones(1, 2, requires_grad=True)
    with outer.collecting():
        with inner.collecting():
            y = layer(x)
        y = y + layer(x)
    (y + layer(x)).sum().backward()
    assert (len(outer), len(inner)) == (1, 1)
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))


class OnGpu(nn.Parameter):
    """A weight to which products add as if it were on a GPU."""

    is_cuda = True


def accumulating_stores():
    """Keepers that add to ``.grad``, and what ends a backward."""
    store = WeightGradStore(add_to_grad)
    return {"at once": (GradAccumulation(), lambda: None), "later": (store, store.run)}


def linear_product(x, weight):
    layer = Linear(6, 5, dtype=x.dtype)
    layer.weight = weight[0]
    return layer(x)


def expert_product(x, weight):
    return grouped_matmul(x, weight[0], torch.tensor(SPLITS), SPLITS)


def fp8_product(x, weight):
    groups = RowGroups(torch.tensor(SPLITS), SPLITS, sum(SPLITS))
    return fp8_matmul(quantize(x), weight[0], groups, QuantizedWeight(False))


def fp8_product_of_a_weight_each(x, weight):
    groups = RowGroups(torch.tensor(SPLITS), SPLITS, sum(SPLITS))
    return fp8_matmul(quantize(x), weight, groups, QuantizedWeight(False))


def fp8_linear_product(x, weight):
    groups = RowGroups(torch.tensor([sum(SPLITS)]), [sum(SPLITS)], sum(SPLITS))
    return fp8_matmul(quantize(x), weight, groups, QuantizedWeight(False))


PRODUCTS = {
    linear_product: [(5, 6)],
    expert_product: [(4, 5, 6)],
    fp8_product: [(4, 128, 256)],
    fp8_linear_product: [(128, 256)],
    fp8_product_of_a_weight_each: [(128, 256)] * 4,
}


def micro_batches(product, weights, keeper=None, end=lambda: None):
    """Gradients of three; ``.grad`` of the weights after each."""
    torch.manual_seed(1)
    seen = []
    for _ in range(3):
        x = torch.randn(sum(SPLITS), weights[0].shape[-1], requires_grad=True)
        with contextlib.nullcontext() if keeper is None else keeper.collecting():
            y = product(x, weights)
        y.sin().sum().backward()
        end()
        seen.append([weight.grad for weight in weights])
    return seen


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("when", accumulating_stores())
def test_micro_batches_add_to_grad_in_the_products(product, when):
    torch.manual_seed(0)
    numbers = [torch.randn(shape) for shape in PRODUCTS[product]]
    expected = [nn.Parameter(each) for each in numbers]
    micro_batches(product, expected)
    keeper, end = accumulating_stores()[when]
    weights = [OnGpu(each) for each in numbers]
    grads = micro_batches(product, weights, keeper, end)
    for weight, wanted, *of_each in zip(weights, expected, *grads, strict=True):
        torch.testing.assert_close(weight.grad, wanted.grad, rtol=1e-5, atol=1e-5)
        assert all(grad is weight.grad for grad in of_each)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("when", accumulating_stores())
def test_what_products_cannot_add_to_is_autograds(when):
    def hooked(numbers):
        weight = OnGpu(numbers)
        weight.register_post_accumulate_grad_hook(lambda _: runs.append("hook"))
        return weight

    def transposed(numbers):
        weight = OnGpu(numbers)
        weight.grad = torch.zeros(numbers.shape[::-1]).t()
        return weight

    def wide(numbers):
        weight = OnGpu(numbers)
        weight.grad_dtype = torch.float64
        return weight

    torch.manual_seed(0)
    numbers, runs = torch.randn(5, 6), []
    expected = [nn.Parameter(numbers)]
    micro_batches(linear_product, expected)
    exact = wide(numbers)
    micro_batches(linear_product, [exact], *accumulating_stores()[when])
    assert exact.grad.dtype == torch.float64
    torch.testing.assert_close(exact.grad, expected[0].grad.double())
    for make in (nn.Parameter, hooked, transposed):  # the first is on a CPU
        keeper, end = accumulating_stores()[when]
        weights = [make(numbers)]
        micro_batches(linear_product, weights, keeper, end)
        assert torch.equal(weights[0].grad, expected[0].grad)
    assert runs == ["hook"] * 3


def test_chunks_of_micro_batches_add_to_grad():
    torch.manual_seed(0)
    weight = OnGpu(torch.randn(5, 6))
    expected, x = nn.Parameter(weight.detach()), torch.randn(9, 6, requires_grad=True)
    for _ in range(2):
        linear_product(x, [expected]).sin().sum().backward()
        with GradAccumulation().collecting(), GradientSums().collecting():
            y = torch.cat([linear_product(part, [weight]) for part in x.split(4)])
        y.sin().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_accumulation_leaves_a_frozen_weight_and_one_that_is_computed_alone():
    frozen, weight = OnGpu(torch.randn(5, 6), requires_grad=False), OnGpu(torch.randn(5, 6))
    x = torch.randn(9, 6, requires_grad=True)
    with GradAccumulation().collecting():
        for each in (frozen, 2 * weight):
            [product_weight], put = give(x, each)
            assert product_weight is each and put is None
    assert frozen.grad is None and weight.grad is None


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_add_up_their_gradients(product, monkeypatch):
    torch.manual_seed(0)
    shapes = PRODUCTS[product]
    summed = len(shapes) == 1
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    inputs = [torch.randn(sum(SPLITS), shapes[0][-1], requires_grad=True) for _ in range(3)]
    seen = []  # what each product was given to add to

    def run(sums=None):
        outputs = []
        for x in inputs:
            if sums is None:
                outputs.append(product(x, weights))
            else:
                with sums.collecting():
                    outputs.append(product(x, weights))
        return torch.autograd.grad(sum(y.sin().sum() for y in outputs), [*weights, *inputs])

    expected, sums = run(), GradientSums()
    take = sums.take

    def watched(given):
        instead, put = take(given)
        return instead, None if put is None else lambda compute: put(lambda into: watch(compute, into))

    def watch(compute, into):
        seen.append(into)
        return compute(into)

    monkeypatch.setattr(sums, "take", watched)
    got = run(sums)
    for ours, autograds in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-5)
    if summed:
        assert seen[0] is None and len(seen) == 3
        assert seen[1].data_ptr() == seen[2].data_ptr() == got[0].data_ptr()
    else:
        assert seen == []


def test_sums_reach_grad_and_hooks_once_for_each_backward():
    layer, hooks, sums = Linear(2, 2, dtype=torch.float64), [], GradientSums()
    layer.weight.register_hook(lambda grad: hooks.append(grad.clone()))
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    with sums.collecting():
        loss = (layer(x) + layer(2 * x)).sum()
    loss = (
        loss + 5 * layer.weight.sum() + (7 * give(x, layer.weight)[0][0]).sum()
    )  # outside: autograd's alone
    loss.backward(retain_graph=True)
    loss.backward()
    once = torch.full((2, 2), 15.0, dtype=torch.float64)
    assert torch.equal(layer.weight.grad, 2 * once)
    assert len(hooks) == 2 and all(torch.equal(grad, once) for grad in hooks)


def test_a_store_around_sums_comes_first():
    layer, store, sums = Linear(2, 2), WeightGradStore(), GradientSums()
    x = torch.ones(1, 2, requires_grad=True)
    with store.collecting(), sums.collecting():
        y = layer(x) + layer(x)
    y.sum().backward()
    assert len(store) == 2 and layer.weight.grad is None
    store.run()
    assert torch.equal(layer.weight.grad, torch.full((2, 2), 2.0))


class IntoFloat64(Keeper):
    """Has products add to tensors of another dtype, one for each weight."""

    def __init__(self, totals):
        self.totals = totals

    def take(self, weights):
        return weights, lambda compute: compute(self.totals) and None


def test_a_weight_each_adds_to_a_tensor_each():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(128, 256)) for _ in SPLITS]
    x = torch.randn(sum(SPLITS), 256, requires_grad=True)
    fp8_product_of_a_weight_each(x, weights).sin().sum().backward()
    before = [torch.randn(128, 256, dtype=torch.float64) for _ in SPLITS]
    totals = [each.clone() for each in before]
    expected = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    with IntoFloat64(totals).collecting():
        y = fp8_product_of_a_weight_each(x, weights)
    y.sin().sum().backward()
    for total, start, gradient, weight in zip(totals, before, expected, weights, strict=True):
        torch.testing.assert_close(total - start, gradient.double(), rtol=1e-5, atol=1e-6)
        assert weight.grad is None


def test_sums_leave_a_frozen_weight_alone():
    layer, sums = Linear(2, 2).requires_grad_(False), GradientSums()
    x = torch.ones(1, 2, requires_grad=True)
    with sums.collecting():
        y = layer(x) + layer(x)
    y.sum().backward()
    assert layer.weight.grad is None and x.grad is not None
