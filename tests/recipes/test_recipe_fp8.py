"""Training with FP8 experts follows the losses of training without."""

import miniature
import pytest
from miniature import Run, losses, validation
from processes import run_gloo

from moe_ep.recipes.config import with_fp8

STEPS, WINDOW = 100, 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs: without FP8 on one rank, and with it on two."""
    root = tmp_path_factory.mktemp("runs")
    config = miniature.miniature(miniature.write_text(root / "text.txt"), steps=STEPS)
    miniature.run_all([Run(config, root / "float32")])
    run_gloo(2, miniature.run_all, [Run(with_fp8(config), root / "fp8")])
    return root


def test_loss_curves_are_within_one_percent(runs):
    wanted, got = (list(losses(runs / name).values()) for name in ("float32", "fp8"))
    assert len(wanted) == len(got) == STEPS and got != wanted
    for first in range(0, STEPS, WINDOW):
        window = slice(first, first + WINDOW)
        assert sum(got[window]) == pytest.approx(sum(wanted[window]), rel=0.01)
    assert got[-1] < 0.3 * got[0]  # it did learn
    assert validation(runs / "fp8") == pytest.approx(validation(runs / "float32"), rel=0.01)


def test_all_of_it_is_in_fp8(tmp_path):
    model = miniature.miniature(tmp_path).model
    with_it = with_fp8(miniature.miniature(tmp_path)).model
    assert with_it.fp8 == with_it.fp8_backward == with_it.fp8_experts == "blockwise"
    assert with_it.expert_alignment == 16 and model.expert_alignment == 1
    without = with_fp8(with_fp8(miniature.miniature(tmp_path)), False).model
    assert without.fp8 is without.fp8_backward is without.fp8_experts is None
