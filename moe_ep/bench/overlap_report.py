"""The results of `moe-ep bench --overlap` as text."""

from __future__ import annotations

from typing import Any

from .table import print_table

_HEADER = (
    "piece",
    "SMs",
    "serial ms",
    "comm.",
    "behind",
    "overlap",
    "faster",
    "effic.",
    "in turn",
    "comm.",
    "effic.",
    "experts",
    "GiB",
    "serial",
)
_BESIDE = ("SMs", "alone ms", "beside", "slower", "a call us", "beside", "costs us")

LEGEND = """\
serial: without overlap, communication with all SMs; comm.: its part, of each call on the rank that is the last to come
to it. behind: the computation that it can hide behind. overlap: with overlap, where communication takes SMs. in turn:
the same calls on one stream (with few SMs, their communication takes longer). effic. = (t_comm + t_comp - t_both) /
min(t_comm, t_comp), against the serial run and against the calls in turn; on a CPU nothing runs side by side. experts:
how much slower their matrix products are than in the serial run. GiB: most memory, weights included. Slowest rank."""
_LEGEND_BESIDE = """\
The experts' forward with dispatches beside it all the time; 0 SMs: copies of all tokens by copy engines instead. costs:
what a call adds to the experts' time."""


def print_results(results: dict[str, Any]) -> None:
    sizes, m = results["sizes"], results["machine"]
    print(
        f"{results['ranks']} ranks, {results['backend']}, {m['device']}, torch {m['torch']}, {m['date']}\n"
        f"{sizes['num_tokens']} tokens a rank, hidden {sizes['hidden']}, top-{sizes['num_topk']} of "
        f"{sizes['num_experts']} experts, {sizes['dtype']}, {sizes['layout']} layout; forward and backward, medians of "
        f"{sizes['iterations']}\n$ {m['command']}"
    )
    groups: dict[str, list[tuple[str, ...]]] = {}
    for each in results["hidden"]:
        groups.setdefault(each["piece"], []).append(_line(each))
    print_table(_HEADER, list(groups.values()), 1)
    print(LEGEND)
    if results["beside"]:
        print_table(_BESIDE, [[_beside_line(each) for each in results["beside"]]], 0)
        print(_LEGEND_BESIDE)


def _line(each: dict[str, Any]) -> tuple[str, ...]:
    plain, in_turn, overlapped = each["plain"], each["in_turn"], each["overlapped"]
    return (
        each["piece"],
        "auto" if each["num_sms"] is None else str(each["num_sms"]),
        _ms(plain["us"]),
        _ms(plain["communication_us"]),
        _ms(each["beside_us"]),
        _ms(overlapped["us"]),
        f"{plain['us'] / overlapped['us']:.3f} x",
        _share(each["efficiency"]),
        _ms(in_turn["us"]),
        _ms(in_turn["communication_us"]),
        _share(each["efficiency_in_turn"]),
        _percent(each["experts_slower"]),
        _gib(overlapped["peak_bytes"]),
        _gib(plain["peak_bytes"]),
    )


def _beside_line(each: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(each["num_sms"]),
        _ms(each["alone_us"]),
        _ms(each["beside_us"]),
        _percent(each["slower"]),
        f"{each['call_alone_us']:.0f}",
        f"{each['call_beside_us']:.0f}",
        f"{each['lost_us']:.0f}",
    )


def _ms(us: float) -> str:
    return f"{us / 1e3:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else "-"
