"""Loss curves of a preset without FP8 and with it: trained, compared, written down and drawn.

``python tests/gpu/fp8_curves.py RESULTS.json`` draws what a test has written, on a machine that has matplotlib.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ep import machine
from moe_ep.recipes.config import TrainConfig, with_fp8
from moe_ep.recipes.metrics import METRICS_FILE, read_metrics
from moe_ep.recipes.presets import get_preset
from moe_ep.recipes.train import train

PLAIN, FP8 = "bfloat16", "FP8"
COLOURS = {PLAIN: "#0b3c6f", FP8: "#c8553d"}
LEARNING_RATE = 1e-4
"""The preset's own lets roundings grow: at 6e-4 two runs in bfloat16 come 2.6 % apart, whatever FP8 does."""
SEEDS = 8
"""Pairs of runs whose differences are averaged: rounding moves a single pair by more than a percent."""
WINDOW = 10
"""Steps whose mean loss is compared: of single steps, rounding alone moves some by a percent."""

WARM = 20
"""Steps that don't count for the speed."""


def run(preset: str, steps: int, learning_rate: float, seeds: int, folder: str) -> dict[str, Any]:
    """Train on the ranks of the default group, by each of the first ``seeds`` seeds; on each rank, what `write` takes.

    Losses and differences are means over the seeds; ``by_seed`` has the differences of each.
    """
    results: dict[str, Any] = {
        "preset": preset,
        "learning_rate": learning_rate,
        "seeds": seeds,
        "ranks": dist.get_world_size(),
        "machine": machine.facts(
            torch.device("cuda", torch.cuda.current_device()), "tests/gpu/test_fp8_training.py"
        ),
    }
    config = get_preset(preset)
    config = dataclasses.replace(
        config, steps=steps, lr=learning_rate, eval_every=0, eval_windows=16, checkpoint_every=0
    )
    configs = {PLAIN: config, FP8: with_fp8(config)}
    runs = {
        name: [
            _train(dataclasses.replace(each, seed=seed), Path(folder, f"{name} {seed}"))
            for seed in range(seeds)
        ]
        for name, each in configs.items()
    }
    results["runs"] = {name: _mean(of_seeds) for name, of_seeds in runs.items()}
    pairs = zip(runs[PLAIN], runs[FP8], strict=True)
    results["by_seed"] = [differences(plain["loss"], fp8["loss"]) for plain, fp8 in pairs]
    results["differences"] = _mean(results["by_seed"])
    return results


def _train(config: TrainConfig, out: Path) -> dict[str, Any]:
    result = train(config, out)
    dist.barrier()
    records = [record for record in read_metrics(out / METRICS_FILE) if record["kind"] == "train"]
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {
        "loss": [record["loss"] for record in records],
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records[WARM:]),
        "valid_loss": result.valid_loss,
        "peak_gib": peak_gib,
    }


def _mean(values: list[Any]) -> Any:
    """Of numbers, or lists or dicts of them, element by element."""
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [statistics.fmean(each) for each in zip(*values, strict=True)]
    return statistics.fmean(values)


def differences(wanted: list[float], got: list[float]) -> list[float]:
    """Of each window's mean loss, relative."""
    starts = range(0, len(wanted), WINDOW)
    sums = [[sum(losses[start : start + WINDOW]) for start in starts] for losses in (wanted, got)]
    return [b / a - 1 for a, b in zip(*sums, strict=True)]


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """The JSON, and the picture where matplotlib is installed; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fp8-training-{results['preset']}-{results['ranks']}gpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    try:
        return [path, draw(path)]
    except ImportError:
        return [path]


def draw(path: Path) -> Path:
    """The picture of a JSON file, beside it. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = json.loads(path.read_text())
    figure, (losses, ratios) = plt.subplots(
        2, sharex=True, figsize=(8, 6), height_ratios=[3, 1], constrained_layout=True
    )
    for name, each in results["runs"].items():
        label = f"{name}: {each['tokens_per_s']:,.0f} tokens/s, {each['peak_gib']:.1f} GiB"
        steps = range(1, len(each["loss"]) + 1)
        losses.plot(steps, each["loss"], color=COLOURS[name], linewidth=1.4, alpha=0.85, label=label)
    losses.set_ylabel("training loss (nats per byte)")
    losses.legend(frameon=False)
    facts = results["machine"]
    where = f"{results['ranks']} x {facts['device']}, {facts['date']}"
    what = f"{results['preset']}, learning rate {results['learning_rate']:g}, mean of {results['seeds']} runs"
    losses.set_title(f"{what}, {where}", loc="left", fontsize="medium")
    for each in results["by_seed"]:
        ratios.plot(*_steps(each), color=COLOURS[FP8], linewidth=0.6, alpha=0.35)
    ratios.plot(*_steps(results["differences"]), color=COLOURS[FP8], linewidth=1.8)
    for limit in (-1, 1):
        ratios.axhline(limit, color="#999999", linewidth=0.8, linestyle="--")
    ratios.set_ylabel(f"FP8 against bfloat16, %\n(means of {WINDOW} steps)")
    ratios.set_xlabel("step")
    for axes in (losses, ratios):
        axes.spines[["top", "right"]].set_visible(False)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def _steps(ratio: list[float]) -> tuple[list[float], list[float]]:
    """The midst of each window, and its difference in percent."""
    return [(window + 0.5) * WINDOW for window in range(len(ratio))], [100 * each for each in ratio]


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
