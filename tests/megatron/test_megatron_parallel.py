"""Expert tensor parallelism with moe_ep's dispatcher against Megatron's, on four ranks."""

import pytest
from comparison import assert_equal


@pytest.fixture(scope="module")
def results(on_cpu_ranks):
    return on_cpu_ranks(4, "megatron_parallel_cases.run_all")


@pytest.mark.parametrize("case", ["ETP", "ETP, shared expert", "ETP, padded to capacity", "TP and ETP"])
def test_equals_stock_dispatchers(results, case):
    """An output is the sum of four partial ones, added in another order."""
    for by_case in results:
        stock, ours = by_case[case]
        assert_equal(ours, stock, rtol=1e-6)
