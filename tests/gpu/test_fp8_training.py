"""Training runs with FP8 experts beside the same in bfloat16, 200 steps each, on two GPUs, or one: loss curves within
1 %.
"""

import os
from pathlib import Path

import pytest
import torch
from processes import run_cuda

from gpu import fp8_curves
from gpu.machine import needs_gpu
from moe_ep.layers import transformer_engine

OUT = os.environ.get("FP8_TRAINING_OUT")
"""A folder for the curves and speeds, as JSON and as a picture."""
LEARNING_RATE = float(os.environ.get("FP8_TRAINING_LR", fp8_curves.LEARNING_RATE))
SEEDS = int(os.environ.get("FP8_TRAINING_SEEDS", fp8_curves.SEEDS))

pytestmark = [
    *needs_gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600 * SEEDS),
    pytest.mark.skipif(
        not torch.cuda.is_available() or not transformer_engine.can_run(torch.device("cuda")),
        reason=f"needs a Hopper GPU and Transformer Engine: {transformer_engine.why_missing()}",
    ),
]


def test_loss_curves_are_within_one_percent(tmp_path):
    world_size = min(2, torch.cuda.device_count())
    arguments = "train-s", 200, LEARNING_RATE, SEEDS, str(tmp_path)
    results = run_cuda(world_size, fp8_curves.run, *arguments, timeout_s=580 * SEEDS)[0]
    for name, run in results["runs"].items():
        ends = f"loss {run['loss'][0]:.3f} to {run['loss'][-1]:.3f}"
        print(f"{name}: {run['tokens_per_s']:,.0f} tokens/s, {run['peak_gib']:.1f} GiB, {ends}")
    for seed, ratio in enumerate([*results["by_seed"], results["differences"]]):
        which = f"seed {seed}" if seed < SEEDS else "mean"
        print(f"{which}, difference in %:", " ".join(f"{100 * each:+.2f}" for each in ratio))
    if OUT:
        print(*fp8_curves.write(results, Path(OUT)))
    losses = {name: run["loss"] for name, run in results["runs"].items()}
    assert losses[fp8_curves.PLAIN][-1] < 0.5 * losses[fp8_curves.PLAIN][0]
    assert losses[fp8_curves.FP8] != losses[fp8_curves.PLAIN]
    assert max(map(abs, results["differences"])) < 0.01
