"""The compiled module moe_ep._C where it can be built, and its absence in words where it can't."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_ep
from moe_ep import _extension

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"})


@pytest.fixture
def module():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc, so no extension")
    if os.environ.get("MOE_EP_BUILD_CUDA") == "0" or os.environ.get("MOE_EP_EXTENSION") == "0":
        pytest.skip("the extension is switched off by an environment variable")
    module = _extension.load()
    assert module is not None, _extension.why_missing()
    return module


def test_says_what_it_was_built_for(module):
    printed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", printed).groups())
    assert module.CUDA_VERSION == 1000 * major + 10 * minor
    assert module.ARCHS == os.environ.get("MOE_EP_CUDA_ARCHS", "90a")
    assert module.__version__ == moe_ep.__version__
    assert _extension.why_missing() is None


def test_loads_without_torch_and_without_a_gpu(module):
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_C', {module.__file__!r});"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec));"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_rows_is_no_launch(module):
    bf16 = module.DType.bfloat16
    module.quantize_rowwise(x=0, dtype=bf16, rows=0, cols=128, data=0, scale_inv=0, stream=0)
    module.dequantize_rowwise(data=0, scale_inv=0, rows=0, cols=128, out=0, dtype=bf16, stream=0)


def test_bad_arguments_are_value_errors(module):
    arguments = {
        "x": 16,
        "dtype": module.DType.float32,
        "cols": 128,
        "data": 16,
        "scale_inv": 16,
        "stream": 0,
    }
    with pytest.raises(ValueError, match="rows and cols must be >= 0, got -1 and 128"):
        module.quantize_rowwise(rows=-1, **arguments)
    with pytest.raises(ValueError, match="must not be null for 2 x 128 elements"):
        module.quantize_rowwise(rows=2, **{**arguments, "data": 0})
    with pytest.raises(ValueError, match="thread blocks"):
        module.quantize_rowwise(rows=2**40, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so a launch does not fail")
def test_grouped_products_without_transformer_engine(module):
    products = module.grouped_gemm
    if products.is_there():
        pytest.skip("Transformer Engine is loaded")
    names = ("data", "scales", "width", "height", "scale_width")
    rows = products.Matrices(
        form=products.Form.rows, dtype=module.DType.bfloat16, places=(), **dict.fromkeys(names, 16)
    )
    with pytest.raises(ValueError, match="Transformer Engine is not loaded"):
        products.multiply(
            product=products.Product.rows_by_weights,
            a=rows,
            b=rows,
            out=rows,
            adds=False,
            rows=[1],
            workspace=0,
            workspace_bytes=1 << 20,
            stream=0,
        )


def test_refusals_of_the_router_and_of_deep_eps_numbers(module):
    routing = module.router.Routing(
        tokens=4, sequence_length=4, experts=6, topk=2, softmax=False, scaling=1.0
    )
    choose = {
        "pieces": 16,
        "slices": 1,
        "parts": 1,
        "bias": 0,
        "groups": 4,
        "topk_groups": 1,
        "logits": 0,
        "topk_idx": 16,
        "topk_weights": 16,
        "load": 0,
        "highest": 0,
        "stream": 0,
    }
    with pytest.raises(ValueError, match="6 experts in 4 groups"):
        module.router.choose(routing, **choose)
    with pytest.raises(ValueError, match="slices"):
        module.router.choose(routing, **{**choose, "slices": 0})
    with pytest.raises(ValueError, match="multiple of 4"):
        module.router.split(x=16, count=3, parts=16, stream=0)
    numbers = module.deep_ep
    place = (16, numbers.Number.uint8, 1, 1)
    with pytest.raises(ValueError, match="8-bit"):
        numbers.fill_columns([(place, place, place, 1, 1, 1, numbers.How.copy, 0, 0)], 0)


@pytest.mark.parametrize("name", ["requantize_columns", "requantize_tiles"])
def test_refusals_of_kernels_that_turn_rows_into_columns(module, name):
    names = ("data", "scale_inv", "counts", "out", "out_scale_inv")
    arguments = {**dict.fromkeys(names, 16), "rows": 128, "cols": 256, "num_experts": 1, "stream": 0}
    requantize = getattr(module, name)
    requantize(**{**arguments, "rows": 0})
    for argument, (value, message) in {
        "cols": (100, "cols must be a multiple of 128, got 100"),
        "rows": (-1, "rows and cols must be >= 0, got -1 and 256"),
        "counts": (0, "must not be null for 128 x 256 elements"),
        "out": (8, "16-byte aligned"),
        "num_experts": (0, "128 rows of 0 experts"),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            requantize(**{**arguments, argument: value})


def test_refusals_of_the_rank_layouts_kernels(module):
    kernels = module.rank_layout
    sizes = {"rows": 4, "num_topk": 2, "num_experts": 3, "alignment": 1, "num_slots": 8}
    addresses = ("topk_idx", "counts", "slots", "gaps", "tokens_per_expert", "stream")
    with pytest.raises(ValueError, match="num_experts must be 1 to 1024, got 2000"):
        kernels.number(**{**sizes, "num_experts": 2000}, **dict.fromkeys(addresses, 0))
    with pytest.raises(ValueError, match="got 4, 8, 2 and 0"):
        kernels.number(**{**sizes, "alignment": 0}, **dict.fromkeys(addresses, 0))
    numbers = ("slots", "weights", "to_weights", "stream")
    rows = {"rows": 4, "num_topk": 2, "from_rows": 16, "to_rows": 16, "dtype": module.DType.float32}
    with pytest.raises(ValueError, match="a multiple of 16 bytes, got 24 bytes"):
        kernels.reduce(**rows, row_bytes=24, **dict.fromkeys(numbers, 0))
    with pytest.raises(ValueError, match="num_topk 1 to 32, got 4 and 33"):
        kernels.reduce(**{**rows, "num_topk": 33}, row_bytes=32, **dict.fromkeys(numbers, 0))


def test_a_failed_launch_is_a_runtime_error(module):
    with pytest.raises(RuntimeError, match="launching quantize_rowwise: cudaError"):
        module.quantize_rowwise(
            x=16, dtype=module.DType.float32, rows=1, cols=128, data=16, scale_inv=16, stream=0
        )


def test_switched_off_by_environment(monkeypatch):
    monkeypatch.setenv("MOE_EP_EXTENSION", "0")
    assert _extension.load() is None
    assert "MOE_EP_EXTENSION=0" in _extension.why_missing()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80;90a", (8, 6), True),
        ("86", (8, 0), False),
        ("100f;90a", (9, 0), True),
        ("100a", (10, 3), False),
        ("120", (12, 0), True),
    ],
)
def test_kernels_run_where_they_were_built_for(archs, capability, runs):
    assert _extension._is_built_for(archs, capability) is runs


def test_sources_include_neither_torch_nor_locale_users():
    # Where libstdc++ is linked statically, its locale machinery must not meet the copy that torch brings.
    forbidden = re.compile(
        r"#include\s*[<\"](torch|ATen|c10|iostream|ostream|istream|sstream|fstream|iomanip|locale|regex)\b"
    )
    assert len(SOURCES) > 4
    for path in SOURCES:
        assert not forbidden.search(path.read_text()), path


def test_sources_never_ask_for_fast_math():
    build = (CSRC.parent / "setup.py").read_text()
    assert not re.search(r"fast.?math|ftz=true|prec-div=false", build)
