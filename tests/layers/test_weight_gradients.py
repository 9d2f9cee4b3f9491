"""Weight gradients that are computed later: the same numbers, in order, and hooks as autograd would run them."""

import copy

import pytest
import torch
from torch import nn

from moe_ep.layers import WeightGradStore
from moe_ep.layers.grouped_matmul import grouped_matmul
from moe_ep.layers.weight_gradients import Linear

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
