"""The collective backend's results as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .table import print_table as print_lines


def headline(results: dict[str, Any]) -> str:
    w = results["workload"]
    return (
        f"{results['ranks']} ranks on {results['device']}, {results['transport']}, torch {results['torch']}, "
        f"threads per rank: {results['threads_per_rank']}\n"
        f"{w['num_tokens']} tokens a rank x {w['hidden']} {w['dtype']}, top-{w['num_topk']} of "
        f"{w['num_experts']} experts, {w['layout']} layout; {results['wire_bytes'] / 1e6:.1f} MB leave rank 0 each way"
    )


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Operation; time on the fastest, the median and the slowest rank; outside communication; GB/s."""
    table = []
    for name, timing in results["timings"].items():
        outside = timing["outside_us"]
        shown = outside is not None and not name.startswith("all_to_all")
        rate = results["wire_bytes"] / timing["max_us"] / 1e3
        times = (f"{timing[key]:.0f}" for key in ("min_us", "median_us", "max_us"))
        table.append((name, *times, f"{outside:.0f}" if shown else "-", f"{rate:.2f}"))
    return table


HEADER = ("operation", "min us", "median us", "max us", "outside communication us", "wire GB/s")


def verdict(results: dict[str, Any]) -> list[str]:
    """The ratios in words."""
    if results["ratio"] is None:
        return ["one rank: nothing is sent, so there is nothing to compare with"]
    timings = results["timings"]
    ours = timings["dispatch"]["max_us"] + timings["combine"]["max_us"]
    lines = [
        f"dispatch (routing exchanged) + combine: {ours:.0f} us = "
        f"{results['ratio']:.2f} x the bare all_to_all_single calls"
    ]
    lines.append(
        f"without the rows that stay on their rank in those calls: {results['ratio_off_rank']:.2f} x"
    )
    if timings["dispatch"]["outside_us"] is not None:
        outside = timings["dispatch"]["outside_us"] + timings["combine"]["outside_us"]
        lines.append(f"outside communication: {outside:.0f} us of them ({100 * outside / ours:.0f} %)")
    return lines


def print_table(results: dict[str, Any]) -> None:
    print(headline(results))
    print_lines(HEADER, [rows(results)], num_texts=1)
    print("\n".join(verdict(results)))


def write_picture(results: dict[str, Any], path: Path) -> None:
    """Bars: each operation's time, and within it what was spent outside communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results["timings"])[::-1]
    timings = [results["timings"][name] for name in names]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    colours = ["#9aa5b1" if name.startswith("all_to_all") else "#2f6fb0" for name in names]
    axes.barh(names, [t["max_us"] for t in timings], color=colours)
    ours = [(n, t) for n, t in zip(names, timings, strict=True) if not n.startswith("all_to_all")]
    outside = [(n, t["outside_us"]) for n, t in ours if t["outside_us"] is not None]
    if outside:
        axes.barh(
            [n for n, _ in outside],
            [us for _, us in outside],
            color="#e39b3f",
            label="outside communication",
        )
        axes.legend(loc="lower right", frameon=False)
    for i, timing in enumerate(timings):
        axes.annotate(f" {timing['max_us']:.0f}", (timing["max_us"], i), va="center")
    axes.set_xlabel("us, slowest rank, median over iterations")
    figure.suptitle(headline(results), fontsize=8, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
