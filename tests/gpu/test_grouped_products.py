"""cuBLAS's product for each expert, through Transformer Engine's C interface, against plain products."""

import threading

import pytest
import torch

from gpu.machine import needs_gpu
from moe_ep.layers import GradAccumulation, WeightGradStore, grouped_matmul, transformer_engine
from moe_ep.layers.row_groups import RowGroups
from moe_ep.layers.weight_gradients import add_to_grad

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not transformer_engine.can_run(torch.device("cuda")),
        reason=f"needs a Hopper GPU and Transformer Engine: {transformer_engine.why_missing()}",
    ),
]

SPLITS = [[5, 0, 300, 1], [0, 7, 0], [33] * 20, [0, 0], [2048]]
WIDE, NARROW = 512, 192


def operands(splits, extra=0, seed=0):
    """Rows [N, I], weights [L, O, I] and gradients [N, O]."""
    torch.manual_seed(seed)
    num_rows = sum(splits) + extra

    def random(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    return random(num_rows, WIDE), random(len(splits), NARROW, WIDE), random(num_rows, NARROW)


def products(rows, weight, grad, splits):
    out = torch.empty_like(grad)
    transformer_engine.rows_by_weights(rows, None, weight, None, splits, out)
    grad_rows = transformer_engine.rows_by_transposed_weights(grad, weight, splits)
    return out, grad_rows, transformer_engine.rows_by_rows(grad, rows, splits)


def assert_products(got, rows, weight, grad, splits):
    out, grad_rows, grad_weight = got
    start = 0
    for e, size in enumerate(splits):
        where = slice(start, start + size)
        start += size
        assert_close(out[where], rows[where].double() @ weight[e].double().t())
        assert_close(grad_rows[where], grad[where].double() @ weight[e].double())
        assert_close(grad_weight[e], grad[where].double().t() @ rows[where].double())


def assert_close(got, wanted):
    """As bfloat16 rounds a sum in float32."""
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("extra", [0, 9])
def test_products(splits, extra):
    tensors = operands(splits, extra)
    assert_products(products(*tensors, splits), *tensors, splits)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_a_product_is_added_to_what_is_there(splits):
    """As exactly as by autograd, which rounds the product and then the sum: cuBLAS may, too."""
    rows, _, grad = operands(splits)
    before = torch.randn(len(splits), NARROW, WIDE, device="cuda", dtype=torch.bfloat16)
    total = before.clone()
    assert transformer_engine.rows_by_rows(grad, rows, splits, total) is total
    parts = zip(grad.double().split(splits), rows.double().split(splits), strict=True)
    for e, (grad_part, rows_part) in enumerate(parts):
        product = grad_part.t() @ rows_part
        wanted = before[e].double() + product
        assert ((total[e] - wanted).abs() <= 2**-8 * (product.abs() + wanted.abs()) + 1e-3).all()
        assert splits[e] > 0 or torch.equal(total[e], before[e])


@pytest.mark.parametrize("later", [False, True])
def test_micro_batches_add_to_grad(later, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "LARGE_PRODUCT", 1)
    splits = SPLITS[0]
    groups = RowGroups(torch.tensor(splits, device="cuda"), splits, sum(splits))
    rows, numbers, grad = operands(splits)
    weight = torch.nn.Parameter(numbers)
    store = WeightGradStore(add_to_grad)
    grads = []
    for _ in range(3):
        with (store if later else GradAccumulation()).collecting():
            y = grouped_matmul.matmul_by_expert(rows.clone().requires_grad_(), weight, groups)
        y.backward(grad)
        store.run()
        grads.append(weight.grad)
    assert all(each is weight.grad for each in grads)
    parts = zip(grad.double().split(splits), rows.double().split(splits), strict=True)
    for e, (grad_part, rows_part) in enumerate(parts):
        product = grad_part.t() @ rows_part
        assert ((weight.grad[e] - 3 * product).abs() <= 6 * 2**-8 * product.abs() + 1e-2).all()


def test_another_stream():
    splits = SPLITS[0]
    tensors = operands(splits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = products(*tensors, splits)
    torch.cuda.current_stream().wait_stream(stream)
    assert_products(got, *tensors, splits)


def test_threads_on_streams_of_their_own():
    """As virtual ranks are; many in a row, each product on the results of the one before."""
    results = [None] * 4

    def run(index):
        splits = SPLITS[index % 2]
        with torch.cuda.stream(torch.cuda.Stream()):
            tensors = operands(splits, seed=index)
            for _ in range(50):
                got = products(*tensors, splits)
            assert_products(got, *tensors, splits)
            torch.cuda.current_stream().synchronize()
        results[index] = True

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results)


def test_large_products_take_this_way_and_give_the_gradients(monkeypatch):
    splits = [300, 0, 41, 700]
    rows, weight, grad = operands(splits)
    groups = RowGroups(torch.tensor(splits, device="cuda"), splits, sum(splits))
    results = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(grouped_matmul, "LARGE_PRODUCT", least)
        inputs = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        calls = []
        original = transformer_engine._multiply
        with monkeypatch.context() as patch:
            patch.setattr(
                transformer_engine, "_multiply", lambda *a, **k: (calls.append(a[0]), original(*a, **k))
            )
            y = grouped_matmul.matmul_by_expert(*inputs, groups)
            results.append([y, *torch.autograd.grad(y, inputs, grad)])
        assert len(calls) == (3 if least == 1 else 0)
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted.double())
