"""Megatron's flex dispatcher on moe_ep's deep_ep, by configuration alone, against its all-to-all; two ranks."""

import importlib.util

import pytest
from comparison import assert_equal
from megatron_with_deep_ep import call_with_deep_ep
from processes import run_gloo

# Terms are added in another order than in the all-to-all: inside a rank first.
ROUNDING = 1e-6
CASES = [
    "plain",
    "top-1",
    "shared expert",
    "shared expert overlap",
    "sigmoid, groups and bias",
    "capacity",
    "a rank without rows",
    "recompute",
    "padded to capacity",
    "uneven",
]
BACKENDS = ["deepep", "hybridep"]


@pytest.fixture(scope="module")
def run_ranks():
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("needs megatron-core: pip install 'moe_ep[megatron]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield lambda path: run_gloo(2, call_with_deep_ep, path, ())


@pytest.fixture(scope="module")
def results(run_ranks):
    return run_ranks("megatron_flex_cases.run_all")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_all_to_all(results, case, backend):
    if (case, backend) == ("padded to capacity", "deepep"):
        pytest.skip("Megatron refuses to pad to capacity with this backend")
    for by_case in results:
        stock, flex = by_case[backend, case]
        assert_equal(flex, stock, rtol=ROUNDING)


def test_every_case_is_compared(results):
    wanted = {(backend, case) for backend in BACKENDS for case in CASES}
    assert set(results[0]) == wanted - {("deepep", "padded to capacity")}


def test_megatron_has_moe_eps_buffers(run_ranks):
    for modules in run_ranks("megatron_flex_cases.where_deep_ep_is"):
        assert modules == ["moe_ep.compat.deep_ep.buffer", "moe_ep.compat.deep_ep.hybrid"]
