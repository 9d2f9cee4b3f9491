"""The FP8 format against exact arithmetic on rational numbers, written element by element from the formulas."""

import math
from fractions import Fraction

import pytest
import torch
from cases import LAYOUTS, Case
from exercise import assert_same_bits, oracle_dispatch

import moe_ep
from moe_ep import fp8, reference
from moe_ep.testing import run_ranks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN, INF = float("nan"), float("inf")

# (bits after the leading one, smallest normal exponent)
FORMATS = {
    torch.float8_e4m3fn: (3, -6),
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float32: (23, -126),
}


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The nearest number of a format, ties to even, without its largest number: subnormals included."""
    if value == 0:
        return value
    bits, smallest = FORMATS[dtype]
    quantum = Fraction(2) ** (max(floor_log2(abs(value)), smallest) - bits)
    return round(value / quantum) * quantum


def scale_of(tile: list[float], dtype: torch.dtype) -> Fraction:
    amax = max((abs(value) for value in tile if not math.isnan(value)), default=0.0)
    if amax in (0.0, INF):
        return Fraction(1)
    scale = rounded(448 / Fraction(amax), torch.float32)
    if scale > Fraction(torch.finfo(torch.float32).max):
        scale = Fraction(torch.finfo(dtype).max)
    return Fraction(2) ** floor_log2(scale)


def e4m3_byte(value: float, scale: Fraction) -> int:
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return sign | 0x7E
    magnitude = rounded(rounded(abs(Fraction(value)) * scale, torch.float32), torch.float8_e4m3fn)
    magnitude = min(magnitude, Fraction(448))
    if magnitude < Fraction(2) ** -6:
        return sign | int(magnitude * 2**9)
    exponent = floor_log2(magnitude)
    return sign | (exponent + 7) << 3 | int((magnitude / Fraction(2) ** exponent - 1) * 8)


def exact_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    data, scale_inv = [], []
    for row in x.double().tolist():
        tiles = [row[start : start + 128] for start in range(0, len(row), 128)]
        scales = [scale_of(tile, x.dtype) for tile in tiles]
        data.append(
            [e4m3_byte(value, scale) for tile, scale in zip(tiles, scales, strict=True) for value in tile]
        )
        scale_inv.append([float(rounded(1 / scale, torch.float32)) for scale in scales])
    return torch.tensor(data, dtype=torch.uint8), torch.tensor(scale_inv, dtype=torch.float64).float()


def exact_dequantize(data: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = data.to(torch.float64).tolist()
    scales = scale_inv.double().tolist()
    out = torch.empty(data.shape, dtype=torch.float64)
    for m, row in enumerate(values):
        for h, value in enumerate(row):
            if math.isnan(value):
                out[m, h] = NAN
                continue
            product = rounded(Fraction(value) * Fraction(scales[m][h // 128]), torch.float32)
            result = float(rounded(product, dtype))
            result = INF if result > torch.finfo(dtype).max else result
            out[m, h] = math.copysign(abs(result), value)
    return out.to(dtype)


def tile(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """128 values of one kind, [128]."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(128, generator=generator, dtype=torch.float64)
    finfo = torch.finfo(dtype)
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    with_one = normal.clone()
    kinds = {
        "normal": normal,
        "wide": normal * torch.exp2(torch.randint(-14, 14, (128,), generator=generator).double()),
        "zero": torch.zeros(128),
        "negative_zero": torch.full((128,), -0.0),
        "representable": torch.cat([grid, -grid[:1]]),
        "ties": torch.cat([(grid[1:] + grid[:-1]) / 2, torch.tensor([448.0, -448.0])]),
        "power_of_two": torch.exp2(torch.arange(128) % 12 - 11.0),
        "one_nan": with_one.index_fill(0, torch.tensor([5]), NAN),
        "all_nan": torch.full((128,), NAN),
        "inf": (normal * 300).index_fill(0, torch.tensor([9]), INF),
        "negative_inf": (normal * 300).index_fill(0, torch.tensor([0]), -INF),
        "largest": normal.clamp(-1, 1) * finfo.max,
        "smallest_normal": normal.clamp(-1, 1) * finfo.tiny * 4,
        "subnormal": normal.clamp(-1, 1) * finfo.smallest_normal / 2,
        "one_subnormal": torch.zeros(128).index_fill(0, torch.tensor([7]), finfo.smallest_normal * finfo.eps),
        "just_above_a_step": torch.full((128,), 448.0 * (1 + finfo.eps)),
        "just_below_a_step": torch.full((128,), 448.0 * (1 - finfo.eps)),
    }
    return kinds[kind].to(dtype)


KINDS = [
    "normal", "wide", "zero", "negative_zero", "representable", "ties", "power_of_two", "one_nan", "all_nan", "inf",
    "negative_inf", "largest", "smallest_normal", "subnormal", "one_subnormal", "just_above_a_step",
    "just_below_a_step",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_equals_exact_arithmetic(kind, dtype):
    x = tile(kind, dtype).unsqueeze(0)
    tokens = fp8.quantize(x)
    data, scale_inv = exact_quantize(x)
    assert_same_bits(tokens.scale_inv, scale_inv, f"{kind}: scale_inv")
    assert_same_bits(tokens.data.view(torch.uint8), data, f"{kind}: data")


def largest_values(dtype: torch.dtype) -> torch.Tensor:
    """Every positive finite number of a 16-bit dtype; of float32 those around each step of the scale, 7 * 2^j."""
    if dtype == torch.float32:
        steps = torch.tensor([7.0 * 2.0**j for j in range(-128, 126)]).view(torch.int32)
        return (steps.unsqueeze(1) + torch.arange(-4, 5, dtype=torch.int32)).view(torch.float32).flatten()
    infinity = torch.tensor(INF, dtype=dtype).view(torch.int16).item()
    return torch.arange(1, infinity, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_of_every_largest_value_is_exact(dtype):
    x = largest_values(dtype).unsqueeze(1)
    tokens = fp8.quantize(x)
    data, scale_inv = exact_quantize(x)
    assert_same_bits(tokens.scale_inv, scale_inv, "scale_inv")
    assert_same_bits(tokens.data.view(torch.uint8), data, "data")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 16, 127, 129, 144, 272])
def test_a_partial_last_block_has_a_scale_of_its_own_values(hidden, dtype):
    x = (
        torch.cat([tile(kind, dtype) for kind in ("wide", "normal", "ties")])[:hidden]
        .expand(3, -1)
        .contiguous()
    )
    x = x * torch.tensor([[1.0], [2.0**-9], [2.0**5]], dtype=dtype)
    tokens = fp8.quantize(x)
    assert tokens.data.shape == (3, hidden) and tokens.scale_inv.shape == (3, -(-hidden // 128))
    data, scale_inv = exact_quantize(x)
    assert_same_bits(tokens.scale_inv, scale_inv, "scale_inv")
    assert_same_bits(tokens.data.view(torch.uint8), data, "data")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_dequantize_equals_exact_arithmetic(source, dtype):
    x = torch.stack([tile(kind, source) for kind in KINDS])
    tokens = fp8.quantize(x)
    wanted = exact_dequantize(tokens.data, tokens.scale_inv, dtype)
    got = moe_ep.Fp8Tokens(tokens.data, tokens.scale_inv).dequantize(dtype)
    assert_same_bits(got, wanted, "dequantized", any_nan=True)
    assert_same_bits(tokens.dequantize(dtype).detach(), wanted, "dequantized with a carrier", any_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_e4m3_values_with_any_scale_are_dequantized_exactly(dtype):
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256).contiguous()
    for scales in ([1.0, 2.0**-20], [0.3, 7.7]):
        scale_inv = torch.tensor([scales])
        got = moe_ep.Fp8Tokens(data, scale_inv).dequantize(dtype)
        assert_same_bits(got, exact_dequantize(data, scale_inv, dtype), f"scales {scales}", any_nan=True)


def test_quantising_again_changes_no_value():
    """With power-of-two scales the values that FP8 holds come back exactly, whatever new scale they get."""
    x = torch.stack(
        [tile(kind, torch.float32) for kind in ("normal", "wide", "ties", "power_of_two", "zero")]
    )
    once = fp8.quantize(x).dequantize(torch.float32)
    assert_same_bits(fp8.quantize(once).dequantize(torch.float32), once, "values")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_half_a_step(dtype):
    x = torch.randn(50, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
    tokens = fp8.quantize(x)
    error = (tokens.dequantize(torch.float32).detach() - x.float()).abs()
    half_step = torch.maximum(x.float().abs() * 2**-4, tokens.scale_inv.repeat_interleave(128, 1) * 2**-10)
    assert (error <= half_step).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_rows(rows):
    tokens = fp8.quantize(torch.ones(rows, 256))
    assert tokens.data.shape == (rows, 256) and tokens.scale_inv.shape == (rows, 2)
    assert tokens.dequantize(torch.float32).shape == (rows, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_pass_straight_through(dtype):
    x = torch.stack([tile(kind, dtype) for kind in ("normal", "inf", "one_nan")]).requires_grad_()
    tokens = fp8.quantize(x)
    assert not tokens.data.requires_grad and not tokens.scale_inv.requires_grad
    assert tokens.carrier.dtype == dtype and tokens.carrier.shape == x.shape
    assert tokens.carrier.untyped_storage().nbytes() <= dtype.itemsize
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    for out_dtype in DTYPES:
        (grad_x,) = torch.autograd.grad(
            tokens.dequantize(out_dtype), x, grad.to(out_dtype), retain_graph=True
        )
        assert_same_bits(grad_x, grad.to(out_dtype).to(dtype), f"gradient through {out_dtype}")


def test_float64_and_other_shapes_are_refused():
    with pytest.raises(moe_ep.InvalidInput, match="float64"):
        fp8.quantize(torch.ones(2, 128, dtype=torch.float64))
    with pytest.raises(moe_ep.InvalidInput, match="128"):
        fp8.quantize(torch.ones(128))


@pytest.mark.parametrize(
    "data, scale_inv, seen",
    [
        (torch.zeros(2, 256, dtype=torch.uint8), torch.ones(2, 2), "uint8"),
        (torch.zeros(256).to(torch.float8_e4m3fn), torch.ones(2), "256"),
        (torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(2, 2).double(), "float64"),
        (torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(2, 3), r"\(2, 3\)"),
        (torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(1, 2), r"\(1, 2\)"),
    ],
)
def test_tokens_that_do_not_fit_together_are_refused(data, scale_inv, seen):
    with pytest.raises(moe_ep.InvalidInput, match=seen):
        moe_ep.Fp8Tokens(data, scale_inv)
    with pytest.raises(moe_ep.InvalidInput, match=r"\(2, 255\)"):
        good = torch.zeros(2, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)
        moe_ep.Fp8Tokens(*good, carrier=torch.zeros(2, 255))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [16, 144, 256])
def test_any_bytes_and_any_scales_travel_unchanged(layout, hidden):
    """Also bytes that quantize never makes (0xFF) and scales that are no powers of two, infinite or NaN."""
    case = Case("bytes", (6, 0, 3, 5), hidden=hidden, num_experts=8, layout=layout, fp8="tokens")

    def tokens_of(rank):
        generator = case.generator(rank, "bytes")
        shape, blocks = (case.tokens_by_rank[rank], hidden), -(-hidden // 128)
        data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(0, 256, (shape[0], blocks, 4), generator=generator, dtype=torch.uint8)
        return moe_ep.Fp8Tokens(
            data.view(torch.float8_e4m3fn), scales.view(torch.float32).squeeze(-1).contiguous()
        )

    def fn(comm):
        return moe_ep.dispatch(
            tokens_of(comm.rank), case.topk_idx(comm.rank), None, comm, layout=layout
        ).tokens

    got = run_ranks(case.world_size, fn, **case.communicator_arguments)
    wanted = reference.dispatch(
        [tokens_of(rank) for rank in range(4)], [case.topk_idx(rank) for rank in range(4)], None,
        num_experts=case.num_experts, layout=layout,
    )  # fmt: skip
    for rank in range(case.world_size):
        assert_same_bits(got[rank].data, wanted[rank].tokens.data, f"rank {rank}: data")
        assert_same_bits(got[rank].scale_inv, wanted[rank].tokens.scale_inv, f"rank {rank}: scale_inv")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_received_rows_dequantize_to_what_was_sent_and_return_its_gradient(layout):
    """As in training: quantise on dispatch, dequantise for the experts, straight through on the way back."""
    case = Case("train", (4, 3), hidden=256, num_experts=4, num_topk=2, layout=layout, fp8="blockwise",
                dtype=torch.bfloat16)  # fmt: skip

    def fn(comm):
        inputs = case.inputs(comm.rank)
        x = inputs.x.requires_grad_()
        out = moe_ep.dispatch(x, inputs.topk_idx, None, comm, layout=layout, fp8="blockwise")
        rows = out.tokens.dequantize(torch.bfloat16)
        grad_rows = case.grad_tokens(comm.rank, out.handle.num_rows)
        (grad_x,) = torch.autograd.grad(rows, x, grad_rows)
        return rows.detach(), grad_x

    dispatched = oracle_dispatch(case)
    grad_rows = [case.grad_tokens(rank, each.num_rows) for rank, each in enumerate(dispatched)]
    grad_x, _ = reference.dispatch_backward(grad_rows, None, dispatched)
    for rank, (rows, grad) in enumerate(run_ranks(2, fn, **case.communicator_arguments)):
        sent = dispatched[rank].tokens
        assert_same_bits(
            rows, exact_dequantize(sent.data, sent.scale_inv, torch.bfloat16), f"rank {rank}: rows"
        )
        assert_same_bits(grad, grad_x[rank], f"rank {rank}: grad_x")
