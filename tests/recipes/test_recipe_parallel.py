"""The same losses on any number of ranks, and from any checkpoint: several gloo processes against one."""

import dataclasses
import math
import shutil

import miniature
import pytest
import torch
from miniature import Run, losses, validation
from processes import run_gloo

from moe_ep.recipes.checkpoint import LATEST, complete_checkpoints, latest_checkpoint, read_run
from moe_ep.recipes.errors import RecipeError
from moe_ep.recipes.train import train

PARITY_STEPS = 50
# float64: the runs differ in nothing but the order of sums, some 1e-16 each (seen: 2e-15 after 50 steps). Any real
# difference, as a gradient counted twice or a router seeing other loads, is larger by many orders of magnitude.
PARITY_TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of some finished runs: those of one process, and, in one launch, those of four."""
    root = tmp_path_factory.mktemp("runs")
    text = miniature.write_text(root / "text.txt")
    exact = miniature.miniature(text, steps=PARITY_STEPS, dtype="float64")
    saving = miniature.miniature(text, checkpoint_every=5, keep_checkpoints=3)
    on_ep2, on_ep4 = (dataclasses.replace(saving, ep=ep) for ep in (2, 4))

    miniature.run_all(
        [
            Run(exact, root / "one"),
            Run(dataclasses.replace(exact, accumulate=4), root / "one-accumulated"),
            Run(saving, root / "saved-by-one"),
        ]
    )
    four = [Run(dataclasses.replace(exact, ep=ep), root / f"four-ep{ep}") for ep in (1, 2, 4)]
    four += [
        Run(on_ep2, root / "unbroken"),
        Run(on_ep2, root / "resumed", root / "unbroken"),
        Run(on_ep4, root / "resumed-ep4", root / "unbroken"),
        Run(on_ep2, root / "resumed-by-four", root / "saved-by-one"),
    ]
    run_gloo(4, miniature.run_all, four)
    miniature.run_all([Run(saving, root / "resumed-by-one", root / "unbroken")])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-accumulated", "four-ep1", "four-ep2", "four-ep4"])
def test_loss_parity_with_one_process(runs, name):
    one, many = losses(runs / "one"), losses(runs / name)
    assert list(many) == list(range(1, PARITY_STEPS + 1))
    difference = max(abs(many[step] - one[step]) for step in one)
    assert difference < PARITY_TOLERANCE
    assert abs(validation(runs / name) - validation(runs / "one")) < PARITY_TOLERANCE
    assert one[PARITY_STEPS] < one[1] - 1.0  # it did learn


@pytest.mark.slow
def test_resume_is_bit_equal(runs):
    assert losses(runs / "resumed") == losses(runs / "unbroken")
    assert validation(runs / "resumed") == validation(runs / "unbroken")
    ours, theirs = (_tensors(runs / name) for name in ("resumed", "unbroken"))
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "origin"),
    [("resumed-ep4", "unbroken"), ("resumed-by-one", "unbroken"), ("resumed-by-four", "saved-by-one")],
)
def test_resume_onto_other_ranks(runs, name, origin):
    # float32: seven steps after the checkpoint, sums in another order, some 1e-7 each and more through the optimiser.
    ours, theirs = losses(runs / name), losses(runs / origin)
    assert list(ours) == list(range(1, 13))
    for step in range(1, 6):
        assert ours[step] == theirs[step]
    for step in range(6, 13):
        assert ours[step] == pytest.approx(theirs[step], abs=1e-4)


@pytest.mark.slow
def test_checkpoints_are_whole_and_old_ones_go(runs):
    folder = runs / "unbroken" / "checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == [
        "step-00000005",
        "step-00000010",
        "step-00000012",
    ]
    assert (folder / LATEST).read_text().strip() == "step-00000012"
    run = read_run(latest_checkpoint(folder))
    assert (run["step"], run["world_size"], run["ep"]) == (12, 4, 2)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_an_unfinished_checkpoint_is_passed_over(runs, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs / "saved-by-one" / "checkpoints", folder)
    (folder / "step-00000099.tmp").mkdir()
    (folder / "step-00000098").mkdir()
    assert latest_checkpoint(folder).name == "step-00000012"
    (folder / LATEST).write_text("step-00000098\n")
    assert latest_checkpoint(folder).name == "step-00000012"


def test_old_checkpoints_are_dropped_and_bad_resumes_refused(tmp_path):
    text = miniature.write_text(tmp_path / "text.txt")
    config = miniature.miniature(text, steps=6, checkpoint_every=2, keep_checkpoints=2)
    result = train(config, tmp_path / "run")
    assert (result.step, result.interrupted) == (6, False)
    assert math.isfinite(result.valid_loss) and result.bigram_loss > 0
    names = [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    with pytest.raises(RecipeError, match="no complete checkpoint"):
        train(config, tmp_path / "elsewhere", resume=True)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_topk=3))
    with pytest.raises(RecipeError, match="num_topk = 2, this run has 3"):
        train(other, tmp_path / "run", resume=True)


def test_a_gradient_that_stays_infinite_ends_the_run(tmp_path):
    text = miniature.write_text(tmp_path / "text.txt")
    config = miniature.miniature(text, steps=10)
    wild = dataclasses.replace(config, model=dataclasses.replace(config.model, init_std=1e25))
    with pytest.raises(RecipeError, match=r"not finite in 5 steps in a row.*lower --lr"):
        train(wild, tmp_path / "run")


def _tensors(folder):
    """Every tensor of the latest checkpoint, by name."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = folder / "whole.pt"
    dcp_to_torch_save(latest_checkpoint(folder / "checkpoints"), target)
    state = torch.load(target, weights_only=False)
    return {f"{part}/{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
