"""A small DeepSeek-V3-like GPTModel on two ranks: training, and the 1F1B schedule."""

import pytest
from comparison import assert_equal


@pytest.fixture(scope="module")
def results(on_cpu_ranks):
    return on_cpu_ranks(2, "megatron_model_cases.run_all")


@pytest.mark.parametrize(
    ("how", "stock"),
    [
        ("installed", "stock"),
        ("in spec", "stock"),
        ("installed, full recompute", "stock, full recompute"),
        ("installed, recompute of MoE layers", "stock, recompute of MoE layers"),
    ],
)
def test_six_steps_give_the_same_losses(results, how, stock):
    for by_maker, _ in results:
        losses, bias = by_maker[stock]
        assert losses[-1] < 0.5 * losses[0]
        assert by_maker[how][0] == pytest.approx(losses, rel=1e-5)
        assert by_maker[how][1].equal(bias)
        assert bias.any()


@pytest.mark.parametrize("how", ["installed", "in spec"])
@pytest.mark.parametrize("schedule", ["overlap", "overlap and delayed wgrad"])
def test_overlap_gives_the_same_gradients(results, how, schedule):
    for _, by_name in results:
        assert_equal(by_name[f"{how}, {schedule}"], by_name[f"stock, {schedule}"], rtol=0)


def test_gradients_without_overlap(results):
    for _, by_name in results:
        assert_equal(by_name["installed, no overlap"], by_name["stock, no overlap"], rtol=0)


def test_the_schedule_frees_what_it_may(results):
    """Else equal gradients would not show that no freed tensor is read."""
    for _, by_name in results:
        assert "data is not allocated" in by_name["misdeclared, overlap"]
