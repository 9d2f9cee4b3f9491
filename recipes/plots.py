"""The three pictures of a run, drawn from its metrics file: loss.png, balance.png, expert_load.png.

The only file that imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import METRICS_FILE, read_metrics

TRAIN, VALID, BIGRAM = "#7fa8d1", "#0b3c6f", "#c8553d"
MAX_LOAD_PANELS = 6


def draw_plots(run_folder: Path) -> list[Path]:
    """Draw what the metrics of `run_folder` allow into `run_folder/plots`; returns the paths written.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    records = read_metrics(run_folder / METRICS_FILE)
    train = [r for r in records if r["kind"] == "train" and r.get("loss") is not None]
    valid = [r for r in records if r["kind"] == "valid" and r.get("loss") is not None]
    run = next((r for r in reversed(records) if r["kind"] == "run"), {})
    folder = run_folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_STYLE):
        if train:
            written.append(_draw_loss(folder / "loss.png", run, train, valid))
        if any(r.get("balance") is not None for r in train):
            written.append(_draw_balance(folder / "balance.png", train))
        if any(r.get("load") for r in train):
            written.append(_draw_load(folder / "expert_load.png", run, train))
    return written


_STYLE = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _draw_loss(path: Path, run: dict[str, Any], train: list[dict], valid: list[dict]) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6))
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axes.plot(steps, losses, color=TRAIN, alpha=0.45, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=1.8, label="training (smoothed)")
    bigram = run.get("bigram_loss")
    if valid:
        axes.plot(
            [r["step"] for r in valid],
            [r["loss"] for r in valid],
            color=VALID,
            marker="o",
            markersize=4,
            linewidth=1.6,
            label=f"validation, at the end: {valid[-1]['loss']:.3f}",
        )
    if bigram is not None:
        axes.axhline(
            bigram,
            color=BIGRAM,
            linestyle="--",
            linewidth=1.4,
            label=f"byte-bigram, same bytes: {bigram:.3f}",
        )
    # The first steps fall from ln(vocabulary); what matters happens below.
    marks = _smooth(losses)[len(losses) // 10 :] + [r["loss"] for r in valid] + [bigram or losses[-1]]
    low, high = min(marks), max(marks)
    margin = 0.08 * (high - low) + 0.02
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, steps[-1] * 1.01 + 1)
    axes.set(xlabel="optimiser step", ylabel=f"cross-entropy, nats per {run.get('unit', 'token')}")
    axes.set_title(_title("Loss", run))
    axes.legend(loc="upper right")
    return _save(figure, path)


def _draw_balance(path: Path, train: list[dict]) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6))
    points = [(r["step"], r["balance"]) for r in train if r.get("balance") is not None]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    axes.plot(steps, values, color=TRAIN, alpha=0.45, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=VALID, linewidth=1.8, label="busiest expert / mean")
    axes.axhline(1.0, color="#555555", linestyle=":", linewidth=1.2, label="perfectly even")
    axes.set_ylim(0.9, max(1.5, max(_smooth(values)) * 1.1))
    axes.set_xlim(0, steps[-1] * 1.01 + 1)
    axes.set(xlabel="optimiser step", ylabel="load of the busiest expert\nover the mean load")
    axes.set_title("Expert balance, mean over the MoE layers")
    axes.legend(loc="upper right")
    return _save(figure, path)


def _draw_load(path: Path, run: dict[str, Any], train: list[dict]) -> Path:
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    records = [r for r in train if r.get("load")]
    num_layers = len(records[0]["load"])
    layers = _spread(num_layers, MAX_LOAD_PANELS)
    steps = [r["step"] for r in records]
    num_experts = len(records[0]["load"][0])
    figure, grid = plt.subplots(
        len(layers), 1, figsize=(8, 1.0 + 1.7 * len(layers)), sharex=True, squeeze=False
    )
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=2.0)
    image = None
    for axes, layer in zip(grid[:, 0], layers, strict=True):
        load_ES = [[r["load"][layer][expert] for r in records] for expert in range(num_experts)]
        image = axes.imshow(
            load_ES,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r",
            norm=norm,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, num_experts - 0.5),
        )
        axes.grid(False)
        in_mtp = layer - (num_layers - run.get("mtp_layers", 0))
        name = f"MTP module {in_mtp + 1}" if in_mtp >= 0 else f"MoE layer {layer + 1}"
        axes.set_ylabel(f"{name}\nexpert")
    grid[0, 0].set_title("Expert load over time (1 = its even share)")
    grid[-1, 0].set_xlabel("optimiser step")
    figure.colorbar(image, ax=list(grid[:, 0]), label="load / mean load", extend="max", shrink=0.9)
    return _save(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about 2 % of the run."""
    reach = max(1, len(values) // 100)
    prefix = [0.0]
    for value in values:
        prefix.append(prefix[-1] + value)
    result = []
    for i in range(len(values)):
        low, high = max(0, i - reach), min(len(values), i + reach + 1)
        result.append((prefix[high] - prefix[low]) / (high - low))
    return result


def _spread(count: int, at_most: int) -> list[int]:
    """At most `at_most` of range(count), first and last included, evenly spread."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]


def _title(what: str, run: dict[str, Any]) -> str:
    details = [run["preset"]] if run.get("preset") else []
    if run.get("parameters"):
        details.append(f"{run['parameters'] / 1e6:.2f} M parameters")
    if run.get("world_size"):
        details.append(f"{run['world_size']} ranks, EP {run.get('ep')}")
    return what + (f"   ({', '.join(details)})" if details else "")


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path)
    plt.close(figure)
    return path
