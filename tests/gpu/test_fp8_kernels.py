"""The CUDA kernels of FP8 tokens against their formulas in torch, bit for bit, and their speed."""

import statistics

import pytest
import torch

from moe_ep import _extension, fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Widths of whole blocks, with a partial last block, and (130, 999, 7) whose rows start at any address.
SHAPES = [(0, 256), (1, 16), (1, 128), (1, 16384), (3, 130), (5, 7), (17, 144), (33, 999)]
SHAPES += [(64, 2048), (257, 7168)]


@pytest.fixture(scope="module")
def kernels():
    module = _extension.load()
    assert module is not None, _extension.why_missing()
    return module


def quantize(kernels, x):
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale_inv = torch.empty(x.shape[0], -(-x.shape[1] // fp8.BLOCK), device=x.device)
    kernels.quantize_rowwise(
        x=x.data_ptr(),
        dtype=named(kernels, x.dtype),
        rows=x.shape[0],
        cols=x.shape[1],
        data=data.data_ptr(),
        scale_inv=scale_inv.data_ptr(),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    return data, scale_inv


def dequantize(kernels, data, scale_inv, dtype):
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    kernels.dequantize_rowwise(
        data=data.data_ptr(),
        scale_inv=scale_inv.data_ptr(),
        rows=data.shape[0],
        cols=data.shape[1],
        out=out.data_ptr(),
        dtype=named(kernels, dtype),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    return out


def named(kernels, dtype):
    return getattr(kernels.DType, str(dtype).removeprefix("torch."))


def mixed_rows(rows, cols, dtype):
    """Rows of very different magnitude, so that scales of every exponent occur."""
    torch.manual_seed(rows * 7919 + cols)
    lowest, highest = (-20, 14) if dtype == torch.float16 else (-140, 120)
    magnitude = torch.exp2(torch.randint(lowest, highest, (rows, 1)).float())
    return (torch.randn(rows, cols) * magnitude).to(dtype)


def special_rows(dtype):
    """Each row is one 1x128 block with its own peculiarity."""
    x = torch.randn(12, 128).to(dtype)
    nan, inf = float("nan"), float("inf")
    x[0] = 0.0
    x[1] = -0.0
    x[2, 5] = nan
    x[3, 7], x[3, 8] = -nan, nan
    x[4] = nan
    x[5, 0], x[5, 1], x[5, 2] = inf, 1000.0, -449.0
    x[6, 127] = -inf
    x[7] = torch.finfo(dtype).smallest_normal
    x[8] = 0.0
    x[8, 64] = torch.finfo(dtype).smallest_normal / 2 ** (3 if dtype == torch.bfloat16 else 8)  # subnormal
    x[9] = torch.finfo(dtype).max
    # Every tie between neighbouring E4M3 values, with scale 1.
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x[10, :126] = ((grid[:-1] + grid[1:]) / 2).to(dtype)
    x[10, 126:] = torch.tensor([448.0, -448.0])
    x[11, ::2] = inf
    x[11, 1::2] = nan
    return x


def assert_quantized_like_torch(kernels, x):
    data, scale_inv = quantize(kernels, x)
    expected_data, expected_scale_inv = fp8.quantize_torch(x.cpu())
    assert torch.equal(scale_inv.cpu().view(torch.int32), expected_scale_inv.view(torch.int32))
    assert torch.equal(data.cpu().view(torch.uint8), expected_data.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_quantize_equals_the_formulas(kernels, rows, cols, dtype):
    assert_quantized_like_torch(kernels, mixed_rows(rows, cols, dtype).cuda())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_special_values(kernels, dtype):
    x = special_rows(dtype)
    assert_quantized_like_torch(kernels, x.cuda())
    assert_quantized_like_torch(kernels, x.view(3, 512).cuda())
    assert_quantized_like_torch(kernels, x[:, :120].contiguous().cuda())
    assert_quantized_like_torch(kernels, x[:, :119].contiguous().cuda())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_of_an_unaligned_address(kernels, dtype):
    padded = mixed_rows(1, 1 + 9 * 256, dtype).cuda()
    assert_quantized_like_torch(kernels, padded[0, 1:].view(9, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_16_bits(kernels, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(512, 128)
    x = patterns.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)
    assert_quantized_like_torch(kernels, x.cuda())
    assert_quantized_like_torch(kernels, x.view(128, 512).t().contiguous().cuda())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_dequantize_equals_the_formulas(kernels, rows, cols, dtype):
    torch.manual_seed(rows + cols)
    data = torch.randint(0, 256, (rows, cols), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale_inv = torch.exp2(torch.randint(-30, 20, (rows, -(-cols // fp8.BLOCK))).float())
    out = dequantize(kernels, data.cuda(), scale_inv.cuda(), dtype).cpu()
    expected = fp8.dequantize_torch(data, scale_inv, dtype)
    # Which NaN stands for a NaN is left open.
    assert torch.equal(out.isnan(), expected.isnan())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.nan_to_num(0.0).view(bits), expected.nan_to_num(0.0).view(bits))


def test_fp8_tokens_use_the_kernels(monkeypatch):
    x = mixed_rows(33, 384, torch.bfloat16).cuda()
    expected = fp8.quantize_torch(x)

    def fail(*_args):
        raise AssertionError("plain torch was used although the extension is there")

    monkeypatch.setattr(fp8, "quantize_torch", fail)
    monkeypatch.setattr(fp8, "dequantize_torch", fail)
    tokens = fp8.quantize(x)
    assert torch.equal(tokens.data.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(tokens.scale_inv, expected[1])
    assert tokens.dequantize().dtype == torch.bfloat16


def test_launches_on_the_current_stream_and_in_graphs(kernels):
    x = mixed_rows(64, 1024, torch.bfloat16).cuda()
    data, scale_inv = quantize(kernels, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        data, scale_inv = quantize(kernels, x)
    x.mul_(-2.0)
    graph.replay()
    expected_data, expected_scale_inv = fp8.quantize_torch(x)
    assert torch.equal(data.view(torch.uint8), expected_data.view(torch.uint8))
    assert torch.equal(scale_inv, expected_scale_inv)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu(kernels):
    with torch.cuda.device(1):
        assert_quantized_like_torch(kernels, mixed_rows(64, 1024, torch.bfloat16).cuda())


def microseconds(fn, repeats=30):
    """Median GPU time of ``fn``: the host, which is slower than the kernels, runs ahead of a waiting GPU."""
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(500_000)  # clock cycles
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_speed(kernels, dtype, record_property):
    """Both kernels are bound by memory: near the rate of a plain copy, measured in the same run."""
    rows, cols = 16384, 7168  # several times the L2 cache
    x = torch.randn(rows, cols, device="cuda").to(dtype)
    target = torch.empty_like(x)
    copy_rate = 2 * x.nbytes / microseconds(lambda: target.copy_(x))
    data, scale_inv = quantize(kernels, x)
    moved = x.nbytes + data.nbytes + scale_inv.nbytes
    for name, fn in {
        "quantize_rowwise": lambda: quantize(kernels, x),
        "dequantize_rowwise": lambda: dequantize(kernels, data, scale_inv, dtype),
    }.items():
        time = microseconds(fn)
        rate = moved / time
        line = (
            f"{name:18} {rows} x {cols} {str(dtype).removeprefix('torch.'):8} {time:7.1f} us  "
            f"{moved / 1e6:6.1f} MB  {rate / 1e3:6.0f} GB/s  {rate / copy_rate:4.0%} of a copy's rate"
        )
        print(line)
        record_property(name, line)
        assert rate > 0.7 * copy_rate, line
