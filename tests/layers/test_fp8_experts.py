"""FP8 experts in plain torch: quantisation block by block, products and gradients against exact dequantised numbers."""

import contextlib
import itertools
import weakref

import pytest
import torch

import moe_ep
from moe_ep import Fp8Tokens, fp8
from moe_ep.errors import InvalidInput
from moe_ep.layers import (
    GroupedExperts,
    ModelConfig,
    MoELayer,
    SharedExperts,
    WeightGradStore,
    fp8_quantize,
    fp8_weights,
    swiglu,
)
from moe_ep.layers.fp8_experts import fp8_experts, fp8_matmul
from moe_ep.layers.fp8_weights import Fp8Weights, QuantizedWeight
from moe_ep.layers.row_groups import RowGroups
from moe_ep.testing import run_ranks

SPLITS = [144, 0, 16, 300]
HIDDEN, FFN = 256, 192  # gate and up share a block


def groups_of(splits=SPLITS, extra=0) -> RowGroups:
    return RowGroups(torch.tensor(splits), splits, sum(splits) + extra)


def random(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dequantized(x: torch.Tensor) -> torch.Tensor:
    return fp8.quantize(x).dequantize(x.dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def make_experts(fp8_mode="blockwise", dtype=torch.float32, **options) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(len(SPLITS), HIDDEN, FFN, init_std=0.1, fp8=fp8_mode, dtype=dtype, **options)


def test_row_groups_are_cut_off():
    groups = RowGroups(torch.tensor([3, 4, 5]), None, 6)
    assert groups.splits == [3, 3, 0]
    assert groups.segments == [(0, 3), (3, 6), (6, 6)]
    assert groups.ends.tolist() == [3, 6, 6]
    with pytest.raises(InvalidInput, match="splits"):
        RowGroups(torch.tensor([3, 4]), [3], 7)


@pytest.mark.parametrize("extra", [0, 5])
def test_columns_block_by_block(extra):
    groups = groups_of(extra=extra)
    tokens = fp8.quantize(random(groups.num_rows, HIDDEN) * random(groups.num_rows, 1, seed=1).exp())
    columns = fp8_quantize.requantize_columns(tokens, groups)
    wide, blocks = tokens.dequantize(torch.float32), 0
    for (start, end), (data, scale_inv) in zip(groups.segments, columns.by_expert(groups), strict=True):
        for b, first in enumerate(range(start, end, 128)):
            last = min(first + 128, end)
            for column in (0, 7, HIDDEN - 1):
                wanted, scale = fp8.quantize_torch(wide[first:last, column].reshape(1, -1))
                got = data[column, first - start : last - start]
                assert torch.equal(got.view(torch.uint8), wanted[0].view(torch.uint8))
                assert scale_inv[b, column] == scale
        blocks += len(scale_inv)
    assert blocks == len(columns.scale_inv)


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("hidden", [256, 300])
def test_tiles_keep_what_is_near_their_largest(hidden, extra):
    groups = groups_of(extra=extra)
    rows = random(groups.num_rows, hidden) * random(groups.num_rows, 1, seed=1).exp()
    rows[3] = 0  # whose scale of 1 must not count
    rows[:, :128] *= 2.0**-30
    tokens = fp8.quantize(rows)
    tiles = fp8_quantize.requantize_tiles(tokens, groups)
    wide = tokens.dequantize(torch.float32)
    both = zip(tiles.by_expert(groups), tiles.dequantize(groups, torch.float32), strict=True)
    for (start, end), ((data, scale_inv), got) in zip(groups.segments, both, strict=True):
        assert data.shape == got.shape == (hidden, end - start)
        assert scale_inv.shape == (-(-hidden // 128), -(-(end - start) // 128))
        for i, j in itertools.product(*map(range, scale_inv.shape)):
            columns, block = slice(128 * i, 128 * i + 128), slice(128 * j, min(128 * j + 128, end - start))
            wanted = wide[start:end][block, columns].t()
            of_rows = tokens.scale_inv[start:end][block, i][wanted.any(0)]
            assert scale_inv[i, j] == of_rows.max()
            near = wanted.abs() >= wanted.abs().max() * 2.0**-13
            assert near.float().mean() > 0.9
            assert torch.equal(got[columns, block][near], wanted[near])
            assert (got[columns, block] - wanted).abs().max() <= scale_inv[i, j] * 2.0**-10


def test_tiles_of_nothing():
    groups = RowGroups(torch.tensor([0, 128]), [0, 128], 128)
    tokens = fp8.quantize(torch.zeros(128, 256))
    (empty, no_scales), (data, scale_inv) = fp8_quantize.requantize_tiles(tokens, groups).by_expert(groups)
    assert empty.shape == (256, 0)
    assert no_scales.shape == (2, 0)
    assert not data.float().any()
    assert (scale_inv == 1).all()


@pytest.mark.parametrize("shape", [(2, 256, 384), (1, 200, 130)])
def test_weights_block_by_block(shape):
    weight = random(*shape) * 0.05
    plain, turned = fp8_quantize.quantize_weight(weight, transposed=True)
    for e in range(shape[0]):
        for row in range(0, shape[1], 128):
            for column in range(0, shape[2], 128):
                tile = weight[e, row : row + 128, column : column + 128]
                _, scale = fp8.quantize_tiles_torch(tile.reshape(1, -1))
                assert plain.scale_inv[e, row // 128, column // 128] == scale
                got = plain.data[e, row : row + 128, column : column + 128].float() * scale
                assert (got - tile).abs().max() <= tile.abs().max() / 16
    assert torch.equal(turned.dequantize(torch.float32), plain.dequantize(torch.float32).transpose(1, 2))


def test_swiglu_formulas_are_the_derivative():
    gate_up = random(5, 12, dtype=torch.float64).requires_grad_()
    weights = torch.rand(5, dtype=torch.float64).requires_grad_()
    grad = random(5, 6, seed=1, dtype=torch.float64)
    y = swiglu.weighted_swiglu(gate_up, weights)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up * weights[:, None])
    wanted = torch.autograd.grad(y, [gate_up, weights], grad)
    got = swiglu.differentiate_torch(gate_up, weights, grad)
    torch.testing.assert_close(got, wanted)
    got = swiglu.differentiate_torch(gate_up, None, grad * weights[:, None])[0]
    torch.testing.assert_close(got, wanted[0])


def test_products_are_of_the_quantised_numbers():
    """y, written out with operands that are quantised and dequantised by themselves."""
    experts, groups = make_experts(), groups_of()
    rows, weights = random(groups.num_rows, HIDDEN), torch.rand(groups.num_rows)
    y = experts(rows, weights, groups.tokens_per_expert, SPLITS)

    def weight(parameter):
        return fp8_quantize.quantize_weight(parameter.detach())[0].dequantize(torch.float32)

    w_gate_up, w_down = weight(experts.w_gate_up), weight(experts.w_down)
    for e, (start, end) in enumerate(groups.segments):
        gate, up = (dequantized(rows[start:end]) @ w_gate_up[e].t()).chunk(2, dim=-1)
        activation = torch.nn.functional.silu(gate) * up * weights[start:end, None]
        torch.testing.assert_close(
            y[start:end], dequantized(activation) @ w_down[e].t(), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_close_to_those_without_fp8(dtype):
    groups = groups_of()
    grad = random(groups.num_rows, HIDDEN, seed=2, dtype=dtype)
    results = {}
    for mode in (None, "blockwise"):
        experts = make_experts(mode, dtype)
        rows = random(groups.num_rows, HIDDEN, dtype=dtype).requires_grad_()
        weights = torch.rand(groups.num_rows, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = experts(rows, weights, groups.tokens_per_expert, SPLITS)
        inputs = [rows, weights, *experts.parameters()]
        results[mode] = [y, *torch.autograd.grad(y, inputs, grad)]
    for ours, wanted in zip(results["blockwise"], results[None], strict=True):
        assert ours.dtype == wanted.dtype
        assert relative(ours.float(), wanted.float()) < 0.09
    for gradient in results["blockwise"][3:]:
        assert not gradient[1].any()  # of the expert without rows


def test_a_carried_gradient_is_the_gradient_of_its_numbers():
    experts, groups = make_experts(), groups_of()
    rows = random(groups.num_rows, HIDDEN).requires_grad_()
    grad = fp8.quantize(random(groups.num_rows, HIDDEN, seed=2))
    inputs = [rows, *experts.parameters()]
    results = []
    for form in (fp8.carry(grad, torch.float32), grad.dequantize(torch.float32)):
        y = experts(rows, None, groups.tokens_per_expert, SPLITS)
        assert fp8.takes_carried_gradient(y)
        results.append(torch.autograd.grad(y, inputs, form))
    assert all(map(torch.equal, *results))


def test_a_carrier_is_told_from_other_tensors():
    tokens = fp8.quantize(random(4, 128))
    carrier = fp8.carry(tokens, torch.bfloat16)
    assert carrier.shape == (4, 128) and carrier.isnan().all()
    assert fp8.carried(carrier.detach()).data is tokens.data
    assert fp8.carried(carrier[:2]) is None
    assert fp8.carried(carrier.clone()) is None
    assert fp8.carried(random(4, 128)) is None
    y = random(4, 128).requires_grad_() + 1
    assert not fp8.takes_carried_gradient(y)
    fp8.take_carried_gradient(y)
    assert fp8.takes_carried_gradient(y) and not fp8.takes_carried_gradient(y[1:])
    assert not fp8.takes_carried_gradient(y.detach().requires_grad_())


def test_a_differentiable_carrier_brings_the_gradient_back():
    x = random(4, 128).requires_grad_()
    tokens = fp8.quantize(x)
    carrier = fp8.carry_differentiable(tokens, torch.float32)
    assert carrier is tokens.carrier and fp8.carried(carrier).data is tokens.data
    Fp8Tokens(tokens.data, tokens.scale_inv, carrier).dequantize(torch.float32).backward(x.detach())
    assert torch.equal(x.grad, x)
    alone = fp8.carry_differentiable(Fp8Tokens(tokens.data, tokens.scale_inv), torch.bfloat16)
    assert alone.dtype == torch.bfloat16 and fp8.carried(alone).data is tokens.data


@pytest.mark.parametrize("delayed", [False, True])
def test_a_matrix_for_each_expert_is_the_same_as_a_stack(delayed):
    experts, groups = make_experts(), groups_of()
    tokens, grad = (
        fp8.quantize(random(groups.num_rows, HIDDEN).requires_grad_()),
        random(groups.num_rows, HIDDEN),
    )
    stacks = experts.w_gate_up, experts.w_down
    y = fp8_experts(tokens, None, *stacks, groups, Fp8Weights(keep=False))
    wanted = torch.autograd.grad(y, stacks, grad)

    matrices = [[torch.nn.Parameter(each.detach().clone()) for each in stack] for stack in stacks]
    store = WeightGradStore()
    with store.collecting() if delayed else contextlib.nullcontext():
        apart = fp8_experts(tokens, None, *matrices, groups, Fp8Weights(keep=True))
    assert torch.equal(apart, y)
    apart.backward(grad)
    assert len(store) == 2 * delayed and (matrices[0][0].grad is None) == delayed
    store.run()
    for parameters, gradient in zip(matrices, wanted, strict=True):
        assert torch.equal(torch.stack([each.grad for each in parameters]), gradient)


def test_weights_are_quantised_again_when_they_change():
    weight = torch.nn.Parameter(random(2, 128, 256))

    def forward(quantized):
        return quantized.for_forward(weight, trained=True)

    for keep in (False, True):
        quantized = QuantizedWeight(keep)
        first = forward(quantized)
        assert (forward(quantized) is first) == keep
        with torch.no_grad():
            weight.mul_(2)
        second = forward(quantized)
        assert torch.equal(second.scale_inv, 2 * first.scale_inv)
        ((_, turned),) = quantized.for_backward(weight)
        expected = second.dequantize(torch.float32).transpose(1, 2)
        assert torch.equal(turned.dequantize(torch.float32), expected)
        weight.data.mul_(2)  # leaves no trace
        quantized.forget()
        assert torch.equal(forward(quantized).scale_inv, 2 * second.scale_inv)


def test_a_weight_that_was_prepared_is_used_once_and_only_as_it_was():
    weight = torch.nn.Parameter(random(2, 128, 256))
    for keep in (False, True):
        quantized = QuantizedWeight(keep)
        quantized.prepare(weight, trained=True)
        first = quantized.for_forward(weight, trained=True)
        assert (quantized.for_forward(weight, trained=True) is first) == keep
        quantized.prepare(weight, trained=True)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(quantized.for_forward(weight, trained=True).scale_inv, 2 * first.scale_inv)


def test_calls_share_weights_from_the_first_to_the_last(monkeypatch):
    quantized, copies = [], []
    original = fp8_weights.quantize_weight

    def watched(*weights, **how):
        result = original(*weights, **how)
        quantized.append(how)
        copies.extend(weakref.ref(each.data) for each in result if each is not None)
        return result

    monkeypatch.setattr(fp8_weights, "quantize_weight", watched)
    splits = [16, 0, 32, 16]
    inputs = [random(64, HIDDEN).requires_grad_() for _ in range(3)]

    def run(calls):
        experts = make_experts()
        with experts.sharing_fp8_weights(calls):
            outputs = [experts(x, None, torch.tensor(splits), splits) for x in inputs]
        assert not any(copy() is not None for copy in copies)  # not kept for the backward
        loss = sum(y.square().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, [*inputs, *experts.parameters()])]

    expected = run(1)
    assert len(quantized) == 3 * 2 * 2 and not any(copy() is not None for copy in copies)
    quantized.clear()
    got = run(3)
    assert len(quantized) == 2 * 2 and not any(copy() is not None for copy in copies)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("stacked", [True, False])
def test_weights_are_quantised_some_experts_at_a_time(stacked, monkeypatch):
    groups = RowGroups(torch.tensor([16, 0, 32, 16, 8]), [16, 0, 32, 16, 8], 72)
    tokens = fp8.quantize(random(72, 256).requires_grad_())
    weight = random(5, 128, 256).requires_grad_()

    def run():
        weights = weight if stacked else weight.unbind()
        y = fp8_matmul(tokens, weights, groups, QuantizedWeight(keep=False))
        return y, *torch.autograd.grad(y, (tokens.carrier, weight), torch.ones_like(y))

    expected = run()
    monkeypatch.setattr("moe_ep.layers.fp8_weights.PIECE_BYTES", 2 * 128 * 256)
    assert [first for first, _ in QuantizedWeight(False).for_backward(weight)] == [0, 2, 4]
    for got, wanted in zip(run(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_refusals():
    with pytest.raises(InvalidInput, match="'blockwise'"):
        GroupedExperts(2, 128, 128, fp8="rowwise")
    experts = make_experts(dtype=torch.float64)
    with pytest.raises(InvalidInput, match="float64"):
        experts(random(4, HIDDEN, dtype=torch.float64), None, torch.tensor([4, 0, 0, 0]), [4, 0, 0, 0])
    with pytest.raises(InvalidInput, match="expert_alignment"):
        ModelConfig(fp8_experts="blockwise")


CONFIG = {
    "hidden": HIDDEN,
    "moe_ffn_hidden": 128,
    "shared_ffn_hidden": 128,
    "num_experts": 8,
    "num_topk": 2,
    "expert_alignment": 16,
    "init_std": 0.1,
}
FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise", "fp8_experts": "blockwise"}


def run_layer(world_size, overlap_chunks=0, **changes):
    """Outputs and gradients of all ranks: those of 48 tokens, however many ranks share them."""
    config = ModelConfig(**{**CONFIG, **changes})

    def fn(comm):
        layer = MoELayer(config, comm, seed=1, dtype=torch.bfloat16)
        x = random(48, HIDDEN, dtype=torch.bfloat16).chunk(world_size)[comm.rank].requires_grad_()
        y, _ = layer(x, overlap_chunks=overlap_chunks)
        grad = random(48, HIDDEN, seed=4, dtype=torch.bfloat16).chunk(world_size)[comm.rank]
        y.backward(grad)
        experts = [p.grad for p in layer.experts.parameters()]
        return y.detach(), x.grad, *experts, layer.router.weight.grad

    limits = {"max_tokens_per_rank": 48, "num_experts": config.num_experts, "num_topk": config.num_topk}
    results = run_ranks(world_size, fn, hidden=config.hidden, **limits)
    *split, routers = zip(*results, strict=True)
    return [*map(torch.cat, split), sum(routers)]


def test_layer_is_close_to_bfloat16_and_the_same_on_two_ranks():
    wanted, one, two = run_layer(1), run_layer(1, **FP8), run_layer(2, **FP8)
    for ours, reference, split in zip(one, wanted, two, strict=True):
        assert relative(ours.float(), reference.float()) < 0.09
        # Sums over the experts of a token are rounded on each rank; weight gradients are of the same rows.
        assert relative(split.float(), ours.float()) < 0.02


def test_layer_gives_the_same_with_chunks():
    whole, chunked = run_layer(2, **FP8), run_layer(2, overlap_chunks=2, **FP8)
    assert torch.equal(chunked[0], whole[0])
    for ours, reference in zip(chunked, whole, strict=True):
        assert relative(ours.float(), reference.float()) < 0.05  # columns have other blocks


def test_the_gradient_stays_fp8_between_combine_and_experts(monkeypatch):
    seen = []
    carried = fp8.carried

    def remember(carrier):
        seen.append(carried(carrier) is not None)
        return carried(carrier)

    monkeypatch.setattr(fp8, "carried", remember)
    run_layer(2, **FP8)
    assert seen == [True] * 4  # both products on both ranks
    seen.clear()
    run_layer(2, fp8="blockwise", fp8_experts="blockwise")
    assert sorted(seen) == [False, False, True, True]


@pytest.mark.parametrize("overlap_chunks", [0, 2])
def test_layer_with_a_shared_expert_in_fp8(overlap_chunks):
    wanted = run_layer(2, overlap_chunks=overlap_chunks, **FP8)
    ours = run_layer(2, overlap_chunks=overlap_chunks, **FP8, fp8_shared="blockwise")
    assert not torch.equal(ours[0], wanted[0])
    assert all(relative(*map(torch.Tensor.float, pair)) < 0.09 for pair in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("shape", [(3, 16), (48,)])
def test_shared_expert_is_one_expert_of_all_tokens(shape):
    torch.manual_seed(0)
    shared = SharedExperts(HIDDEN, FFN, fp8="blockwise")
    experts = make_experts()
    x = random(*shape, HIDDEN).requires_grad_()
    grad = random(*shape, HIDDEN, seed=2)
    y = shared(x)
    inputs = [x, shared.gate_up.weight, shared.down.weight]
    got = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        experts.w_gate_up[0], experts.w_down[0] = inputs[1:]
    rows = x.detach().flatten(0, -2).requires_grad_()
    z = experts(rows, None, torch.tensor([48, 0, 0, 0]), [48, 0, 0, 0])
    wanted = torch.autograd.grad(z, [rows, experts.w_gate_up, experts.w_down], grad.flatten(0, -2))
    assert torch.equal(y.flatten(0, -2), z) and torch.equal(got[0].flatten(0, -2), wanted[0])
    assert torch.equal(got[1], wanted[1][0]) and torch.equal(got[2], wanted[2][0])


def test_a_dispatch_gives_fp8_experts_what_travelled():
    experts = make_experts()

    def fn(comm):
        x = random(20, HIDDEN).requires_grad_()
        topk_idx = torch.arange(20).remainder(4).unsqueeze(1)
        options = {"fp8": "blockwise", "expert_alignment": 16}
        out = moe_ep.dispatch(x, topk_idx, torch.ones(20, 1), comm, **options)
        assert isinstance(out.tokens, Fp8Tokens)
        y = experts(out.tokens, out.weights, out.padded_tokens_per_expert, out.splits)
        z = moe_ep.combine(y, out.handle)
        (grad,) = torch.autograd.grad(z, [x], random(20, HIDDEN, seed=3))
        direct = experts(x[topk_idx[:, 0].argsort(stable=True)], None, torch.tensor([5, 5, 5, 5]), [5] * 4)
        return z, direct, topk_idx, grad

    ((z, direct, topk_idx, grad),) = run_ranks(
        1, fn, hidden=HIDDEN, max_tokens_per_rank=20, num_experts=4, num_topk=1
    )
    # Products of 16 rows and of 5 may be rounded differently, and then quantised differently.
    assert relative(z[topk_idx[:, 0].argsort(stable=True)], direct) < 1e-3
    assert grad.isfinite().all() and grad.abs().max() > 0
