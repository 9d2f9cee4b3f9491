"""Training with micro-batches side by side gives the losses of training with them in turn."""

import dataclasses

import miniature
from miniature import Run, losses, validation
from processes import run_gloo


def test_losses_are_those_of_two_micro_batches_bit_for_bit(tmp_path):
    config = miniature.miniature(miniature.write_text(tmp_path / "text.txt"), steps=6)
    side_by_side = dataclasses.replace(config, micro_batch_overlap=True)
    in_turn = dataclasses.replace(config, accumulate=2)
    runs = [Run(side_by_side, tmp_path / "side-by-side"), Run(in_turn, tmp_path / "in-turn")]
    run_gloo(2, miniature.run_all, runs)
    assert len(losses(tmp_path / "in-turn")) == 6
    assert losses(tmp_path / "side-by-side") == losses(tmp_path / "in-turn")
    assert validation(tmp_path / "side-by-side") == validation(tmp_path / "in-turn")


def test_global_batch_is_unchanged(tmp_path):
    config = miniature.miniature(tmp_path, batch=8)
    for accumulate, micro_batch in ((1, 2), (2, 2), (4, 1)):
        overlapped = dataclasses.replace(config, accumulate=accumulate, micro_batch_overlap=True)
        assert overlapped.micro_batch(2) * overlapped.num_micro_batches * 2 == 8
        assert overlapped.micro_batch(2) == micro_batch
