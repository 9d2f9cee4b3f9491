"""The results of a sweep as text."""

from __future__ import annotations

from collections.abc import Sequence

from .measure import Timing
from .results import Case, Measurement, Results

HEADER = (
    "operation",
    "dtype",
    "layout",
    "tokens",
    "SMs",
    "GPU us",
    "min",
    "median",
    "wire MB",
    "GB/s",
    "% copy",
    "host us",
    "wall us",
    "first: GPU",
    "wall",
    "static",
)
_NUM_TEXTS = 3  # columns that are left-aligned


def headline(results: Results) -> str:
    m, s = results.machine, results.sizes
    software = [f"torch {m['torch']}"]
    software += [f"{name} {m[key]}" for name, key in _SOFTWARE if m.get(key)]
    lines = [
        f"{results.ranks} ranks, {results.backend}, {m['device']}, {', '.join(software)}, {m['date']}",
        f"hidden {s['hidden']}, top-{s['num_topk']} of {s['num_experts']} experts, expert alignment "
        f"{s['expert_alignment']}, unbalanced ratio {s['unbalanced_ratio']:g}; "
        f"medians of {results.iterations} calls",
        f"$ {m['command']}",
    ]
    if results.copy_engine:
        rates = ", ".join(
            f"{rate.gb_per_s:.0f} ({rate.num_bytes / 2**20:g} MiB)" for rate in results.copy_engine
        )
        lines.append(f"copy engines, both directions busy, GB/s: {rates}")
    return "\n".join(lines)


_SOFTWARE = (("CUDA", "cuda"), ("NCCL", "nccl"), ("driver", "driver"))

LEGEND = """\
GPU us: a call with a cached handle, events around all its kernels; the slowest rank, then the fastest and the median.
wire MB: rows that leave or reach the busiest rank, scales included. % copy: of the copy engines' rate, above.
host us: what the call costs the host. wall us: until the GPU has ended it. first: a dispatch that exchanges its
routing: GPU, and wall, with exact sizes; static: GPU, with max_recv_rows. NCCL: all_to_all_single and torch's
permutations, indices ready, doing the same."""


def rows(results: Results) -> list[list[tuple[str, ...]]]:
    """The lines of the table, in one group for each case."""
    return [_rows_of(results, case) for case in results.cases]


def _rows_of(results: Results, case: Case) -> list[tuple[str, ...]]:
    lines = [_line(results, case, sms_text(each), each.gpu, each) for each in results.of(case)]
    if case in results.nccl:
        lines.append(_line(results, case, "NCCL", results.nccl[case], None))
    return lines


def _line(
    results: Results, case: Case, sms: str, timing: Timing, measured: Measurement | None
) -> tuple[str, ...]:
    percent = results.percent_of_copy_engine(case, timing)
    names = ("host_us", "wall_us", "first_gpu_us", "first_wall_us", "first_static_us")
    return (
        case.name,
        case.dtype,
        case.layout,
        str(case.num_tokens),
        sms,
        f"{timing.max_us:.1f}",
        f"{timing.min_us:.1f}",
        f"{timing.median_us:.1f}",
        f"{results.wire_bytes[case] / 1e6:.1f}",
        f"{results.gb_per_s(case, timing):.1f}",
        "-" if percent is None else f"{percent:.0f}",
        *(_number(getattr(measured, name, None)) for name in names),
    )


def sms_text(measured: Measurement) -> str:
    if measured.num_sms is not None:
        return str(measured.num_sms)
    return "auto" if measured.sms_used is None else f"auto ({measured.sms_used})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def print_results(results: Results) -> None:
    print(headline(results))
    print_table(HEADER, rows(results), _NUM_TEXTS)
    print(LEGEND)


def print_table(header: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], num_texts: int) -> None:
    """Groups of lines with a rule after each; by rich, or without it as plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *(line for group in groups for line in group)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        for line in lines:
            cells = zip(line, widths, strict=True)
            print("  ".join(f"{c:<{w}}" if i < num_texts else f"{c:>{w}}" for i, (c, w) in enumerate(cells)))
        return
    table = Table(*header)
    for column in table.columns[num_texts:]:
        column.justify = "right"
    for group in groups:
        for line in group:
            table.add_row(*line)
        table.add_section()
    console = Console()
    # A pipe has no width; rich would cut the columns to 80.
    console = console if console.is_terminal else Console(width=200)
    console.print(table)
