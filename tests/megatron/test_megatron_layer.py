"""A MoELayer with moe_ep's dispatcher against the same layer with Megatron's all-to-all, on two ranks."""

import pytest
from comparison import assert_equal

CASES = {
    "plain": 0,
    "in spec: plain": 0,
    "top-1": 0,
    "shared expert": 0,
    "shared expert overlap": 0,
    "in spec: shared expert overlap": 0,
    "capacity": 0,
    "capacity by position": 0,
    "a rank without rows": 0,
    "recompute": 0,
    # The input's gradient has terms of the experts, the shared expert and its gate, added in another order.
    "shared expert overlap with a gate": 1e-6,
    # Four terms are added in another order: inside a rank first.
    "sigmoid, groups and bias": 1e-6,
    "in spec: sigmoid, groups and bias": 1e-6,
    # Fillers are zeros at the end of an expert's rows, so that its weight gradients are summed in another order.
    "padded to capacity": 1e-6,
    "padded to capacity, some experts unused": 1e-6,
    "padded to capacity, top-4": 1e-6,
    "padded to a capacity of few experts": 1e-6,
    "bfloat16 router": 2**-7,
}


@pytest.fixture(scope="module")
def results(on_cpu_ranks):
    return on_cpu_ranks(2, "megatron_layer_cases.run_all")


@pytest.mark.parametrize("case", CASES)
def test_equals_all_to_all(results, case):
    for by_case in results:
        stock, ours = by_case[case]
        assert_equal(ours, stock, rtol=CASES[case])


def test_every_case_is_compared(results):
    assert set(results[0]) == {*CASES, "a wrong backward"}


def test_a_wrong_backward_is_noticed(results):
    for by_case in results:
        stock, wrong = by_case["a wrong backward"]
        with pytest.raises(AssertionError, match=r"input differs by \d"):
            assert_equal(wrong, stock, rtol=1e-3)
