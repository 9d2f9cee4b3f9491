"""The kernels between the rank layout and the order of experts against plain torch, bit for bit, and their times."""

import pytest
import torch
from gpu.machine import needs_gpu
from launched import kernels_of

from moe_ep import Fp8Tokens, _extension, fp8
from moe_ep.layers.rank_layout import expand_rows, order_by_expert, reduce_rows

pytestmark = needs_gpu

# (rows, top-k, experts here, of all)
SHAPES = [
    (0, 4, 8, 16),
    (1, 1, 1, 1),
    (5, 1, 3, 4),
    (37, 3, 1, 8),
    (700, 8, 16, 32),
    (3000, 8, 256, 256),
    (400, 32, 1024, 1024),
    (70_000, 5, 7, 9),
]
ALIGNMENTS = [1, 16]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def uses_the_kernels():
    torch.manual_seed(0)
    assert _extension.load() is not None, _extension.why_missing()


def make_ids(num_rows, num_topk, num_local, num_experts):
    """Distinct in a row, and -1 for those of other ranks."""
    ids = torch.rand(num_rows, num_experts).argsort(dim=1)[:, :num_topk]
    return torch.where(ids < num_local, ids, -1)


def orders(ids, num_experts, **options):
    """By the kernels, and by plain torch."""
    order, wanted = (
        order_by_expert(ids.cuda(), num_experts, **options),
        order_by_expert(ids, num_experts, **options),
    )
    assert order.gaps is not None
    return order, wanted


def numbers(shape, dtype):
    """Negative zeros among them."""
    x = torch.randn(shape)
    return x.masked_fill_(torch.rand(shape) < 0.3, -0.0).to(dtype)


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.uint8)


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("room", [None, 0.5, 2.0])
def test_numbers(shape, alignment, room):
    ids = make_ids(*shape)
    copies = int((ids >= 0).sum())
    max_rows = None if room is None else int(room * copies) + 1
    order, wanted = orders(ids, shape[2], alignment=alignment, max_rows=max_rows)
    assert torch.equal(order.slot_NK.cpu().long(), wanted.slot_NK)
    assert torch.equal(order.tokens_per_expert.cpu(), wanted.tokens_per_expert)
    assert (order.num_rows, order.splits) == (wanted.num_rows, wanted.splits)
    free = torch.ones(order.num_rows, dtype=torch.bool)
    free[wanted.slot_NK[wanted.slot_NK >= 0]] = False
    for begin, end in order.gaps.tolist():
        assert free[begin:end].all()
        free[begin:end] = False
    assert not free.any()


@pytest.mark.parametrize("ids", [[[-1, -1]] * 9, [[2, -1], [-1, 2]] * 200], ids=["no expert", "one expert"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_extremes(ids, alignment):
    ids = torch.tensor(ids)
    order, wanted = orders(ids, 3, alignment=alignment)
    assert torch.equal(order.slot_NK.cpu().long(), wanted.slot_NK)
    rows, weights = torch.randn(len(ids), 64), torch.rand(ids.shape)
    for got, expected in zip(
        expand_rows(rows.cuda(), weights.cuda(), order), expand_rows(rows, weights, wanted), strict=True
    ):
        assert_same(got, expected)
    copies = numbers((order.num_rows, 64), torch.float32)
    assert_same(reduce_rows(copies.cuda(), order), reduce_rows(copies, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [8, 72, 1032, 7168])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("room", [None, 300, 3000])
def test_rows_and_gradients(dtype, hidden, alignment, room):
    ids = make_ids(200, 8, 16, 32)
    order, wanted = orders(ids, 16, alignment=alignment, max_rows=room)
    rows, weights = numbers((200, hidden), dtype), torch.rand(ids.shape)
    grads = numbers((order.num_rows, hidden), dtype), torch.rand(order.num_rows)
    grad_sums = numbers((200, hidden), dtype)

    def run(order, device):
        x, w, copies = (t.to(device).requires_grad_() for t in (rows, weights, grads[0]))
        expanded, row_weights = expand_rows(x, w, order)
        sums = reduce_rows(copies, order)
        both, alone = (expanded, row_weights), [row_weights]
        row_grad, weight_grad, sum_grad = (t.to(device) for t in (*grads, grad_sums))
        of_both = torch.autograd.grad(both, (x, w), (row_grad, weight_grad), retain_graph=True)
        of_weights = torch.autograd.grad(alone, [w], [weight_grad])
        return *both, *of_both, *of_weights, sums, *torch.autograd.grad(sums, copies, sum_grad)

    for got, expected in zip(run(order, "cuda"), run(wanted, "cpu"), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("hidden", [144, 7168])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("room", [None, 3000])
def test_fp8(hidden, alignment, room):
    ids = make_ids(200, 8, 16, 32)
    order, wanted = orders(ids, 16, alignment=alignment, max_rows=room)
    x, weights = numbers((200, hidden), torch.bfloat16), torch.rand(ids.shape)
    data, scale_inv = fp8.quantize_torch(x)
    carrier = fp8.make_carrier(x.shape, x.dtype, torch.device("cuda")).requires_grad_()
    tokens = Fp8Tokens(data.cuda(), scale_inv.cuda(), carrier)
    got, row_weights = expand_rows(tokens, weights.cuda(), order)
    expected, expected_weights = expand_rows(Fp8Tokens(data, scale_inv), weights, wanted)
    assert_same(got.data, expected.data)
    assert_same(got.scale_inv, expected.scale_inv)
    assert_same(row_weights, expected_weights)

    grad = numbers((order.num_rows, hidden), torch.bfloat16)
    [of_carrier] = torch.autograd.grad(got.dequantize(), carrier, grad.cuda())
    assert_same(of_carrier, reduce_rows(grad, wanted))


def test_other_numbers_take_plain_torch():
    ids = make_ids(50, 4, 8, 16)
    order, wanted = orders(ids, 8, alignment=16)
    for dtype, hidden in ((torch.float64, 64), (torch.bfloat16, 20)):
        rows, weights = numbers((50, hidden), dtype), torch.rand(ids.shape)
        for got, expected in zip(
            expand_rows(rows.cuda(), weights.cuda(), order), expand_rows(rows, weights, wanted), strict=True
        ):
            assert_same(got, expected)
        copies = numbers((order.num_rows, hidden), dtype)
        assert_same(reduce_rows(copies.cuda(), order), reduce_rows(copies, wanted))


def test_runs_in_a_graph_with_another_routing():
    """A static size waits for nothing."""
    first, second = make_ids(300, 8, 16, 32), make_ids(300, 8, 16, 32)
    rows, weights = numbers((300, 128), torch.bfloat16), torch.rand(first.shape)
    ids, x, w = first.cuda(), rows.cuda(), weights.cuda()

    def run(ids, x, w):
        order = order_by_expert(ids, 16, alignment=16, max_rows=2000)
        copies, _ = expand_rows(x, w, order)
        return reduce_rows(copies, order)

    run(ids, x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(ids, x, w)
    for routing in (first, second):
        ids.copy_(routing)
        graph.replay()
        assert_same(out, run(routing, rows, weights))


def test_times():
    """A rank of two with DeepSeek-V3's layer: 4096 tokens a rank, top-8 of 32 experts, hidden 7168."""
    ids = make_ids(8192, 8, 16, 32).cuda()
    splits = torch.bincount(ids[ids >= 0], minlength=16).tolist()
    options = {"alignment": 16, "splits": splits}
    order = order_by_expert(ids, 16, **options)
    weights = torch.rand(ids.shape, device="cuda")
    x = torch.randn(8192, 7168, device="cuda", dtype=torch.bfloat16)
    tokens = fp8.quantize(x)
    copies, _ = expand_rows(x, weights, order)
    gigabytes = (x.numel() + copies.numel()) * 2 / 1e9
    print(f"\n{len(copies)} rows; expand and reduce move {gigabytes:.3f} GB, in FP8 half")
    assert kernels_of("number", lambda: order_by_expert(ids, 16, **options)) == 2
    assert kernels_of("expand, bfloat16", lambda: expand_rows(x, weights, order)) == 1
    assert (
        kernels_of(
            "expand, FP8", lambda: expand_rows(Fp8Tokens(tokens.data, tokens.scale_inv), weights, order)
        )
        == 1
    )
    assert kernels_of("reduce", lambda: reduce_rows(copies, order)) == 1
    assert kernels_of("a copy of as many bytes as expanded", lambda: copies.clone()) == 1
