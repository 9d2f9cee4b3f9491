"""The results of moe-ep bench --layer as tables and as a picture."""

from __future__ import annotations

from pathlib import Path

from .layer import LayerResults, Row
from .table import print_table as print_lines

HEADER = (
    "layer", "forward ms", "backward ms", "both ms", "of the first", "step ms", "of the first", "peak GiB",
    "dispatch", "experts", "combine", "rest", "dispatch'", "experts'", "combine'", "rest'",
)  # fmt: skip
LEGEND = """forward, backward: GPU time on the slowest rank, median, of each by itself; step: of both where one step
follows the other, as in training. of the first: the first layer's time over this one's. peak: weights, their gradients,
activations, windows. dispatch, experts, combine and the rest of the forward, in ms, and of the backward ('), where
dispatch' is the backward of dispatch; timed apart from the totals."""
PARTS = ("dispatch", "experts", "combine")


def headline(results: LayerResults) -> str:
    m, s = results.machine, results.sizes
    return (
        f"{results.ranks} ranks, {results.backend}, {m['device']}, torch {m['torch']}, {m['date']}\n"
        f"{s.num_tokens} tokens a rank x {s.hidden}, top-{s.num_topk} of {s.num_experts} experts of {s.ffn_hidden}, "
        f"shared expert {s.shared_ffn_hidden}; medians of {results.iterations}\n$ {m['command']}"
    )


def part_ms(parts: dict[str, float], part: str) -> float:
    """Of the ranges of one part: ``moe_ep.experts.matmul`` belongs to "experts"."""
    return sum(ms for name, ms in parts.items() if name.split(".")[1:2] == [part])


def lines(results: LayerResults) -> list[tuple[str, ...]]:
    """One for each layer."""
    return [_line(row, results.rows[0]) for row in results.rows]


def _line(row: Row, first: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.forward_ms:.3f}",
        f"{row.backward_ms:.3f}",
        f"{row.both_ms:.3f}",
        f"{first.both_ms / row.both_ms:.2f}",
        f"{row.step_ms:.3f}",
        f"{first.step_ms / row.step_ms:.2f}",
        f"{row.peak_gib:.2f}",
        *_parts(row.forward_parts, row.forward_ms),
        *_parts(row.backward_parts, row.backward_ms),
    )


def _parts(parts: dict[str, float], total_ms: float) -> list[str]:
    if not parts:
        return ["-"] * (len(PARTS) + 1)
    times = [part_ms(parts, part) for part in PARTS]
    return [f"{ms:.3f}" for ms in [*times, max(0.0, total_ms - sum(times))]]


def ranges(results: LayerResults) -> tuple[list[str], list[tuple[str, ...]]]:
    """ms of every range that a layer of this package names: a header, and a line for each range."""
    rows = [row for row in results.rows if row.name.startswith("moe_ep")]
    names = sorted({name for row in rows for name in (*row.forward_parts, *row.backward_parts)})
    header = ["ms"]
    for row in rows:
        header += [f"{row.name}: forward", "backward"]
    table = []
    for name in names:
        line = [name.removeprefix("moe_ep.")]
        for row in rows:
            for parts in (row.forward_parts, row.backward_parts):
                line.append(f"{parts[name]:.3f}" if name in parts else "-")
        table.append(tuple(line))
    return header, table


def print_results(results: LayerResults) -> None:
    print(headline(results))
    print_lines(HEADER, [lines(results)], num_texts=1)
    print(LEGEND)
    header, table = ranges(results)
    if table:
        print_lines(header, [table], num_texts=1)
    for sentence in results.left_out:
        print(sentence)


def write_picture(results: LayerResults, path: Path) -> None:
    """Bars: forward and backward of each layer, and its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results.rows[::-1]
    names = [row.name for row in rows]
    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(11, 0.55 * len(rows) + 1.8), layout="constrained", sharey=True, width_ratios=[3, 1]
    )
    forward = [row.forward_ms for row in rows]
    times.barh(names, forward, color="#2f6fb0", label="forward")
    times.barh(names, [row.backward_ms for row in rows], left=forward, color="#9aa5b1", label="backward")
    for i, row in enumerate(rows):
        end = max(row.both_ms, row.step_ms)
        times.annotate(f" {row.both_ms:.2f}", (end, i), va="center", fontsize=8)
    times.plot(
        [row.step_ms for row in rows], range(len(rows)), "k|", markersize=14, label="a step among others"
    )
    times.set_xlabel("ms, slowest rank")
    times.margins(x=0.1)
    times.legend(loc="lower right", frameon=False, fontsize=8)
    memory.barh(names, [row.peak_gib for row in rows], color="#e39b3f")
    memory.set_xlabel("peak memory, GiB")
    for axes in (times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(headline(results), fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
