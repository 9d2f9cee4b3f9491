"""The results of a sweep as a picture: time against SMs beside the floor, and bandwidth against message size."""

from __future__ import annotations

from pathlib import Path

from .results import Case, Results
from .table import headline


def write_picture(results: Results, path: Path) -> None:
    """One panel of times for each operation and layout, at the largest size, and one of bandwidths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_tokens = max(case.num_tokens for case in results.cases)
    panels: dict[str, list[Case]] = {}
    for case in results.cases:
        if case.num_tokens == num_tokens:
            panels.setdefault(f"{case.op}, {case.layout} layout", []).append(case)
    num_columns = 2
    num_rows = -(-len(panels) // num_columns)
    figure = pyplot.figure(figsize=(13, 3.2 * max(2, num_rows) + 1.2), layout="constrained")
    grid = figure.add_gridspec(num_rows, num_columns + 1, width_ratios=[1, 1, 1.2])
    for i, (title, cases) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // num_columns, i % num_columns])
        _draw_times(axes, results, cases)
        axes.set_title(f"{title}, {num_tokens} tokens", fontsize=9)
    _draw_bandwidths(figure.add_subplot(grid[:, num_columns]), results)
    figure.suptitle(headline(results), fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_times(axes, results: Results, cases: list[Case]) -> None:
    """Lines over SMs; dashed the floor at the copy engines' rate; dotted NCCL, where it fits in."""
    slowest = 0.0
    for i, case in enumerate(cases):
        colour = f"C{i}"
        measured = sorted(
            (each.sms_used, each.gpu.max_us) for each in results.of(case) if each.sms_used is not None
        )
        if measured:
            axes.plot(*zip(*measured, strict=True), marker="o", ms=3, color=colour, label=_label(case))
            slowest = max(slowest, *(us for _, us in measured))
        floor = results.floor_us(case)
        if floor is not None:
            axes.axhline(floor, color=colour, ls="--", lw=0.8)
    for i, case in enumerate(cases):
        if case in results.nccl and results.nccl[case].max_us < 2 * slowest:
            label = f"NCCL, {_label(case)}"
            axes.axhline(results.nccl[case].max_us, color=f"C{i}", ls=":", lw=0.8, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("SMs")
    axes.set_ylabel("us, slowest rank (dashed: floor)")
    _finish(axes)


def _draw_bandwidths(axes, results: Results) -> None:
    """The best number of SMs at each size, over the bytes on the wire."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in results.cases:
        megabytes = results.wire_bytes[case] / 1e6
        name = f"{_label(case)} {case.op}, {case.layout}"
        measured = results.of(case)
        if megabytes == 0 or not measured:
            continue
        best = min((each.gpu for each in measured), key=lambda timing: timing.max_us)
        lines.setdefault((name, "-"), []).append((megabytes, results.gb_per_s(case, best)))
        if case in results.nccl:
            rate = results.gb_per_s(case, results.nccl[case])
            lines.setdefault((name, ":"), []).append((megabytes, rate))
    names = list(dict.fromkeys(name for name, _ in lines))
    for (name, style), points in lines.items():
        label = name if style == "-" else None
        points = zip(*sorted(points), strict=True)
        axes.plot(*points, ls=style, marker="o", ms=3, color=f"C{names.index(name)}", label=label)
    if results.copy_engine:
        points = [(rate.num_bytes / 1e6, rate.gb_per_s) for rate in results.copy_engine]
        axes.plot(*zip(*points, strict=True), color="black", marker="x", ms=4, label="copy engines")
    axes.set_title("bandwidth (dotted: NCCL doing the same)", fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MB on the wire")
    axes.set_ylabel("GB/s, slowest rank")
    _finish(axes)


def _label(case: Case) -> str:
    return f"bfloat16 to {case.dtype}" if case.quantize else case.dtype


def _finish(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6, frameon=False)
