"""FP8 experts on a GPU: kernels against their formulas bit for bit, products against plain torch's, and times."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from gpu.machine import needs_gpu
from moe_ep import Fp8Tokens, fp8
from moe_ep.layers import (
    GradAccumulation,
    GroupedExperts,
    SharedExperts,
    fp8_matmul,
    fp8_quantize,
    swiglu,
    transformer_engine,
)
from moe_ep.layers.row_groups import RowGroups

pytestmark = needs_gpu

needs_transformer_engine = pytest.mark.skipif(
    not torch.cuda.is_available() or not transformer_engine.can_run(torch.device("cuda")),
    reason=f"needs a Hopper GPU and Transformer Engine: {transformer_engine.why_missing()}",
)
SPLITS = [[256, 0, 128, 144], [0, 16, 0], [16] * 40, [0, 400, 1024, 16, 0]]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# A rank of two with DeepSeek-V3's layer: 4096 tokens a rank, top-8 of 32 experts.
LAYER = {"num_local_experts": 16, "hidden": 7168, "ffn_hidden": 2048}
LAYER_ROWS = 32768


def groups_of(splits, extra=0):
    counts = torch.tensor(splits, device="cuda")
    return RowGroups(counts, splits, sum(splits) + extra)


def tokens_of(num_rows, hidden, seed=0):
    torch.manual_seed(seed)
    magnitude = torch.exp2(torch.randint(-12, 12, (num_rows, 1), device="cuda").float())
    return fp8.quantize((torch.randn(num_rows, hidden, device="cuda") * magnitude).bfloat16())


def assert_same_bytes(got, wanted):
    assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(got.scale_inv, wanted.scale_inv)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("extra", [0, 64])
@pytest.mark.parametrize("hidden", [128, 1024])
def test_columns_equal_the_formulas(splits, extra, hidden):
    groups = groups_of(splits, extra)
    tokens = tokens_of(groups.num_rows, hidden)
    assert_same_bytes(
        fp8_quantize.requantize_columns(tokens, groups),
        fp8_quantize.requantize_columns_torch(tokens, groups),
    )


def test_columns_of_many_tiles_equal_the_formulas():
    """So many that a thread block turns several, and one of them fewer."""
    splits = [4096, 3008, 16]
    groups, tokens = groups_of(splits), tokens_of(sum(splits), 7168)
    assert_same_bytes(
        fp8_quantize.requantize_columns(tokens, groups),
        fp8_quantize.requantize_columns_torch(tokens, groups),
    )


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("extra", [0, 64])
@pytest.mark.parametrize("hidden", [128, 1024])
def test_tiles_equal_the_formulas(splits, extra, hidden):
    assert_same_tiles(tokens_of(sum(splits) + extra, hidden), groups_of(splits, extra))


def test_many_tiles_equal_the_formulas():
    assert_same_tiles(tokens_of(7120, 7168), groups_of([4096, 3008, 16]))


def assert_same_tiles(tokens, groups):
    tokens.data[1] = 0
    got = fp8_quantize.requantize_tiles(tokens, groups)
    wanted = fp8_quantize.requantize_tiles_torch(tokens, groups)
    assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
    for ours, formulas in zip(got.by_expert(groups), wanted.by_expert(groups), strict=True):
        assert torch.equal(ours[0].view(torch.uint8), formulas[0].view(torch.uint8))
        assert torch.equal(ours[1], formulas[1])


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("blocks", [1, 8, 56])
def test_scales_by_expert(splits, blocks):
    groups = groups_of(splits)
    scale_inv = torch.randn(sum(splits), blocks, device="cuda")
    got = fp8_quantize.transpose_scales(scale_inv, groups)
    assert torch.equal(got, torch.cat([part.t().flatten() for part in scale_inv.split(splits)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 256, 128), (1, 128, 640), (2, 512, 1024)])
def test_weights_equal_the_formulas(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape, device="cuda") * 0.05).to(dtype)
    weight[0, :128, :128] = 0
    wanted = fp8_quantize.quantize_weight_torch(weight)
    for rows, transposed in ((True, True), (True, False), (False, True)):
        plain, turned = fp8_quantize.quantize_weight(weight, rows=rows, transposed=transposed)
        assert (plain is not None) == rows and (turned is not None) == transposed
        if plain is not None:
            assert torch.equal(plain.data.view(torch.uint8), wanted.data.view(torch.uint8))
            assert torch.equal(plain.scale_inv[:, :, : shape[2] // 128], wanted.scale_inv)
        if turned is not None:
            data = wanted.data.view(torch.uint8).transpose(1, 2)
            assert torch.equal(turned.data.view(torch.uint8), data)
            assert torch.equal(turned.scale_inv[:, :, : shape[1] // 128], wanted.scale_inv.transpose(1, 2))
        apart = fp8_quantize.quantize_weight(*weight, rows=rows, transposed=transposed)  # a tensor for each
        for one, stacked in zip(apart, (plain, turned), strict=True):
            if one is not None:
                assert torch.equal(one.data.view(torch.uint8), stacked.data.view(torch.uint8))
                assert torch.equal(one.dequantize(torch.float32), stacked.dequantize(torch.float32))


@needs_transformer_engine
def test_shared_expert_is_close_to_bfloat16():
    torch.manual_seed(0)
    num_tokens, hidden, ffn_hidden = 4096, LAYER["hidden"], LAYER["ffn_hidden"]
    flops = 18 * num_tokens * hidden * ffn_hidden
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    results = []
    for mode in (None, "blockwise"):
        shared = SharedExperts(hidden, ffn_hidden, fp8=mode, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            for seed, weight in enumerate(shared.parameters()):
                weight.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(seed))
        y = shared(x)
        results.append([y, *torch.autograd.grad(y, [x, *shared.parameters()], grad)])
        ms = milliseconds(lambda shared=shared: shared(x).backward(grad))
        report(f"shared expert, fp8={mode}: both", ms, flops=flops)
    for exact, ours in zip(*results, strict=True):
        assert (ours.float() - exact.float()).norm() < 0.09 * exact.float().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 256), (33, 128), (100, 640), (17, 2048)])
def test_swiglu_equals_the_formulas(num_rows, width, weighted, dtype):
    torch.manual_seed(0)
    gate_up = (torch.randn(num_rows, 2 * width, device="cuda") * 3).to(dtype)
    grad = torch.randn(num_rows, width, device="cuda").to(dtype)
    weights = torch.rand(num_rows, device="cuda") if weighted else None

    assert swiglu.kernels_for(gate_up, weights, 128) is not None
    wanted = swiglu.activate_torch(gate_up, weights)
    assert_same_bytes(fp8_quantize.quantize_swiglu(gate_up, weights), Fp8Tokens(*fp8.quantize_torch(wanted)))
    inputs = [gate_up.requires_grad_()] + ([weights.requires_grad_()] if weighted else [])
    y = swiglu.weighted_swiglu(gate_up, weights)
    assert torch.equal(y, wanted.to(dtype))

    got, got_weights = fp8_quantize.quantize_swiglu_gradient(gate_up.detach(), weights, grad)
    wanted, wanted_weights = swiglu.differentiate_torch(gate_up.detach(), weights, grad)
    assert_same_bytes(got, Fp8Tokens(*fp8.quantize_torch(wanted)))
    rounded = torch.autograd.grad(y, inputs, grad)
    assert torch.equal(rounded[0], wanted.to(dtype))
    if weighted:
        torch.testing.assert_close(got_weights, wanted_weights, rtol=1e-4, atol=1e-3)
        assert torch.equal(rounded[1], got_weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 200])
def test_swiglu_of_gates_where_exp_overflows_or_its_reciprocal_is_subnormal(num_rows, dtype):
    edges = torch.tensor([86.5, 87.0, 87.5, 88.5, 95.0, 103.5, 104.0, 60000.0], device="cuda")
    gates = torch.cat([-edges, edges])
    torch.manual_seed(0)
    gate_up = torch.randn(num_rows, 2 * 512, device="cuda")
    gate_up[:, 128:256:8] = gates  # one in a vector
    gate_up[:, 256:512] = gates.repeat(16)  # all of it
    gate_up = gate_up.to(dtype)
    grad = torch.randn(num_rows, 512, device="cuda").to(dtype)
    wanted = swiglu.activate_torch(gate_up, None)
    assert_same_bytes(fp8_quantize.quantize_swiglu(gate_up, None), Fp8Tokens(*fp8.quantize_torch(wanted)))
    assert torch.equal(swiglu.weighted_swiglu(gate_up, None), wanted.to(dtype))
    wanted, _ = swiglu.differentiate_torch(gate_up, None, grad)
    got, _ = fp8_quantize.quantize_swiglu_gradient(gate_up, None, grad)
    assert_same_bytes(got, Fp8Tokens(*fp8.quantize_torch(wanted)))


def rows_by_weights(tokens, weight, groups):
    out = torch.empty(groups.num_rows, weight.data.shape[1], dtype=torch.bfloat16, device="cuda")
    fp8_matmul.rows_by_weights(tokens, weight, groups, out)
    return out


@needs_transformer_engine
@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize(("hidden", "ffn_hidden"), [(512, 256), (1024, 384)])
def test_transformer_engine_multiplies_the_same_numbers(splits, hidden, ffn_hidden, monkeypatch):
    groups = groups_of(splits)
    tokens, grad = tokens_of(sum(splits), hidden, 1), tokens_of(sum(splits), ffn_hidden, 2)
    torch.manual_seed(3)
    weight = torch.randn(len(splits), ffn_hidden, hidden, device="cuda", dtype=torch.bfloat16) * 0.05
    plain, turned = fp8_quantize.quantize_weight(weight, transposed=True)
    columns = fp8_quantize.requantize_columns(grad, groups), fp8_quantize.requantize_tiles(tokens, groups)

    def products():
        return {
            "forward": rows_by_weights(tokens, plain, groups),
            "dgrad": rows_by_weights(grad, turned, groups),
            "wgrad": fp8_matmul.columns_by_columns(*columns, groups, torch.bfloat16),
        }

    got = products()
    monkeypatch.setattr(transformer_engine, "can_run", lambda _: False)
    for name, wanted in products().items():
        error = (got[name].float() - wanted.float()).norm() / wanted.float().norm()
        print(f"{name} {splits}: relative difference {error:.2e}")
        assert error < 4e-3, name  # both round to bfloat16 once
    for e, size in enumerate(splits):
        assert size > 0 or not got["wgrad"][e].any()
    monkeypatch.undo()
    before = torch.randn_like(got["wgrad"])
    total = before.clone()
    assert fp8_matmul.columns_by_columns(*columns, groups, torch.bfloat16, total) is total
    torch.testing.assert_close(total, before + got["wgrad"], rtol=2**-7, atol=2**-6)
    totals = [each.float() for each in before.flip(0)]  # not one behind the other, and not rounded
    assert fp8_matmul.columns_by_columns(*columns, groups, torch.bfloat16, totals) is totals
    for e, each in enumerate(totals):
        torch.testing.assert_close(
            each - before.flip(0)[e].float(), got["wgrad"][e].float(), rtol=2**-7, atol=1e-3
        )


@needs_transformer_engine
def test_experts_are_close_to_bfloat16():
    torch.manual_seed(0)
    splits = [256, 0, 144, 400]
    rows = torch.randn(sum(splits), 512, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(sum(splits), device="cuda")
    grad = torch.randn_like(rows)
    results = {}
    for mode in (None, "blockwise"):
        torch.manual_seed(1)
        experts = GroupedExperts(4, 512, 256, init_std=0.05, fp8=mode, device="cuda", dtype=torch.bfloat16)
        inputs = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = experts(*inputs, torch.tensor(splits, device="cuda"), splits)
        results[mode] = [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], grad)]
    for name, ours, wanted in zip(
        ["y", "x", "weights", "w_gate_up", "w_down"], results["blockwise"], results[None], strict=True
    ):
        error = (ours.float() - wanted.float()).norm() / wanted.float().norm()
        print(f"{name}: relative difference to bfloat16 {error:.3f}")
        assert error < 0.09, name


@needs_transformer_engine
@pytest.mark.parametrize("kind", ["experts", "shared expert"])
def test_micro_batches_add_to_grad(kind):
    torch.manual_seed(0)
    splits, options = [256, 0, 144, 400], {"fp8": "blockwise", "device": "cuda", "dtype": torch.bfloat16}
    counts = torch.tensor(splits, device="cuda")
    if kind == "experts":
        module = GroupedExperts(4, 512, 256, init_std=0.05, **options)
    else:
        module = SharedExperts(512, 256, **options)
    rows = torch.randn(sum(splits), 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(rows)

    def run():
        y = (
            module(rows, torch.ones(len(rows), device="cuda"), counts, splits)
            if kind == "experts"
            else module(rows)
        )
        y.backward(grad)
        return [parameter.grad for parameter in module.parameters()]

    once = [each.clone() for each in run()]
    module.zero_grad()
    seen = []
    for _ in range(3):
        with GradAccumulation().collecting():
            seen.append(run())
    for total, one, *of_each in zip(seen[-1], once, *seen, strict=True):
        assert all(each is total for each in of_each)
        torch.testing.assert_close(total.float(), 3 * one.float(), rtol=2**-6, atol=2**-6 * one.std().item())


def milliseconds(fn, repeats=10):
    """Median GPU time; the GPU waits first, so that the host gets ahead of it."""
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def layer_splits(alignment=16):
    torch.manual_seed(0)
    shares = torch.rand(LAYER["num_local_experts"]) * 0.2 + 0.9
    splits = (shares / shares.sum() * LAYER_ROWS / alignment).long() * alignment
    splits[0] += LAYER_ROWS - splits.sum()
    return splits.tolist()


def report(name, ms, *, flops=0, moved=0):
    rate = f"{flops / ms / 1e9:8.0f} TFLOP/s" if flops else f"{moved / ms / 1e6:8.0f} GB/s"
    print(f"{name:34} {ms * 1e3:8.1f} us {rate}")


@pytest.mark.parametrize("alignment", [16, 128])
def test_times_of_columns(alignment):
    """Of experts' rows in multiples of ``alignment``, which must not matter: columns are whole cache lines."""
    groups, hidden, ffn = groups_of(layer_splits(alignment)), LAYER["hidden"], LAYER["ffn_hidden"]
    tokens, narrow = tokens_of(LAYER_ROWS, hidden), tokens_of(LAYER_ROWS, 2 * ffn)
    pieces = {
        "of a gradient": (lambda: fp8_quantize.requantize_columns(tokens, groups), 2 * tokens.data.nbytes),
        "of x in tiles": (lambda: fp8_quantize.requantize_tiles(tokens, groups), 2 * tokens.data.nbytes),
        "of gate and up": (lambda: fp8_quantize.requantize_columns(narrow, groups), 2 * narrow.data.nbytes),
    }
    for name, (fn, moved) in pieces.items():
        ms = milliseconds(fn)
        report(f"columns {name}, {alignment}", ms, moved=moved)
        assert ms < 5.0, name


def test_times_of_quantisation():
    groups, hidden, ffn = groups_of(layer_splits()), LAYER["hidden"], LAYER["ffn_hidden"]
    tokens = tokens_of(LAYER_ROWS, hidden)
    gate_up = torch.randn(LAYER_ROWS, 2 * ffn, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(LAYER_ROWS, ffn, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(LAYER_ROWS, device="cuda")
    weight = torch.randn(16, 2 * ffn, hidden, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(gate_up)
    report("copy", milliseconds(lambda: target.copy_(gate_up)), moved=2 * gate_up.nbytes)
    pieces = {
        "scales by expert": (
            lambda: fp8_quantize.transpose_scales(tokens.scale_inv, groups),
            2 * tokens.scale_inv.nbytes,
        ),
        "w_gate_up": (lambda: fp8_quantize.quantize_weight(weight), 1.5 * weight.nbytes),
        "w_gate_up transposed": (
            lambda: fp8_quantize.quantize_weight(weight, rows=False, transposed=True),
            1.5 * weight.nbytes,
        ),
        "w_gate_up both": (lambda: fp8_quantize.quantize_weight(weight, transposed=True), 2 * weight.nbytes),
        "swiglu to FP8": (
            lambda: fp8_quantize.quantize_swiglu(gate_up, weights),
            gate_up.nbytes + grad.numel(),
        ),
        "swiglu to bfloat16": (
            lambda: swiglu.weighted_swiglu(gate_up, weights),
            gate_up.nbytes + grad.nbytes,
        ),
        "swiglu backward to FP8": (
            lambda: fp8_quantize.quantize_swiglu_gradient(gate_up, weights, grad),
            gate_up.nbytes + grad.nbytes + gate_up.numel(),
        ),
        "swiglu backward to bfloat16": (
            lambda: swiglu.launch_backward(gate_up, weights, grad, grad=target),
            2 * gate_up.nbytes + grad.nbytes,
        ),
        "quantise rows of grad": (lambda: fp8.quantize(grad), 1.5 * grad.nbytes),
    }
    for name, (fn, moved) in pieces.items():
        ms = milliseconds(fn)
        report(name, ms, moved=moved)
        assert ms < 5.0, name


@needs_transformer_engine
@pytest.mark.parametrize(
    ("name", "out_features", "in_features"), [("gate_up", 4096, 7168), ("down", 7168, 2048)]
)
def test_times_of_products(name, out_features, in_features):
    splits = layer_splits()
    groups = groups_of(splits)
    tokens, grad = tokens_of(LAYER_ROWS, in_features), tokens_of(LAYER_ROWS, out_features)
    weight = torch.randn(16, out_features, in_features, device="cuda", dtype=torch.bfloat16)
    plain, turned = fp8_quantize.quantize_weight(weight, transposed=True)
    columns = fp8_quantize.requantize_columns(grad, groups), fp8_quantize.requantize_tiles(tokens, groups)
    wide, wide_grad = tokens.dequantize(), grad.dequantize()
    flops = 2 * LAYER_ROWS * out_features * in_features
    bf16 = torch.bfloat16
    out = torch.empty_like(wide_grad)
    gemm = pytest.importorskip("transformer_engine.pytorch.cpp_extensions").general_grouped_gemm

    def loop():
        for e, (start, end) in enumerate(groups.segments):
            torch.mm(wide[start:end], weight[e].t(), out=out[start:end])

    def engine():
        gemm(
            list(weight), list(wide.split(splits)), [out], [None] * 16, bf16, m_splits=splits,
            single_output=True,
        )  # fmt: skip

    products = {
        "FP8 forward": lambda: rows_by_weights(tokens, plain, groups),
        "FP8 dgrad": lambda: rows_by_weights(grad, turned, groups),
        "FP8 wgrad": lambda: fp8_matmul.columns_by_columns(*columns, groups, bf16),
        "bf16 forward": lambda: transformer_engine.rows_by_weights(wide, None, weight, None, splits, out),
        "bf16 dgrad": lambda: transformer_engine.rows_by_transposed_weights(wide_grad, weight, splits),
        "bf16 wgrad": lambda: transformer_engine.rows_by_rows(wide_grad, wide, splits),
        "bf16 forward, grouped_mm": lambda: F.grouped_mm(wide, weight.transpose(1, 2), offs=groups.ends),
        "bf16 forward, mm each": loop,
        "bf16 forward, Transformer Engine's own call": engine,
        "bf16 dgrad, grouped_mm": lambda: F.grouped_mm(wide_grad, weight, offs=groups.ends),
        "bf16 wgrad, grouped_mm": lambda: F.grouped_mm(wide_grad.t(), wide, offs=groups.ends),
    }
    for product, fn in products.items():
        ms = milliseconds(fn)
        report(f"{name}: {product}", ms, flops=flops)
        assert ms < 50.0, product


@needs_transformer_engine
def test_times_of_experts():
    splits = layer_splits()
    counts = torch.tensor(splits, device="cuda")
    tokens, weights = tokens_of(LAYER_ROWS, LAYER["hidden"]), torch.rand(LAYER_ROWS, device="cuda")
    grad = tokens_of(LAYER_ROWS, LAYER["hidden"], 5)
    wide = tokens.dequantize().requires_grad_()
    weights.requires_grad_()
    times = {}
    for name, options in (
        ("bf16", {}),
        ("fp8", {"fp8": "blockwise"}),
        ("fp8, weights kept", {"fp8": "blockwise", "keep_fp8_weights": True}),
    ):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        experts = GroupedExperts(**LAYER, **options, device="cuda", dtype=torch.bfloat16)
        if options:
            carrier = fp8.make_carrier(wide.shape, wide.dtype, wide.device).requires_grad_()
            rows, grad_y = Fp8Tokens(tokens.data, tokens.scale_inv, carrier), fp8.carry(grad, wide.dtype)
        else:
            carrier, rows, grad_y = wide, wide, grad.dequantize()

        def forward(experts=experts, rows=rows):
            return experts(rows, weights, counts, splits)

        def both(experts=experts, rows=rows, grad_y=grad_y, carrier=carrier):
            experts.zero_grad(set_to_none=True)
            carrier.grad = None
            forward(experts, rows).backward(grad_y)

        both()
        torch.cuda.reset_peak_memory_stats()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        with torch.no_grad():
            alone = milliseconds(forward)
        times[name] = milliseconds(both)
        flops = 6 * LAYER_ROWS * LAYER["hidden"] * LAYER["ffn_hidden"]
        report(f"experts, {name}: forward", alone, flops=flops)
        report(f"experts, {name}: both", times[name], flops=3 * flops)
        print(f"experts, {name}: peak {peak:.2f} GiB with weights and their gradients")
        del experts
    assert times["fp8, weights kept"] < times["bf16"]
