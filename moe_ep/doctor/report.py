"""What the doctor says, and printing it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    ``ok`` is None for what is neither good nor bad; ``remedy`` says what to do, and what for.
    """

    section: str
    name: str
    text: str
    ok: bool | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a backend runs here, and in words where, or why not."""

    runs: bool
    text: str


@dataclass(frozen=True)
class Report:
    """``verdicts`` by backend; ``healthy``: the CPU backends work, and no self-test failed."""

    facts: list[Fact]
    verdicts: dict[str, Verdict]
    healthy: bool


_MARKS = {True: "+", False: "!", None: " "}
_STYLES = {True: "green", False: "bold red", None: ""}


def print_report(report: Report) -> None:
    """As text, coloured where rich is installed."""
    if importlib.util.find_spec("rich"):
        _print_rich(report)
    else:
        _print_plain(report)


def _line(fact: Fact) -> str:
    return fact.text if fact.remedy is None else f"{fact.text}; {fact.remedy}"


def _sections(report: Report) -> dict[str, list[Fact]]:
    sections: dict[str, list[Fact]] = {}
    for fact in report.facts:
        sections.setdefault(fact.section, []).append(fact)
    sections["Verdict"] = [
        Fact("Verdict", name, each.text, ok=True if each.runs else None)
        for name, each in report.verdicts.items()
    ]
    return sections


def _print_plain(report: Report) -> None:
    for section, facts in _sections(report).items():
        print(section)
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            print(f"  {_MARKS[fact.ok]} {fact.name:<{width}}  {_line(fact)}")


def _print_rich(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section, facts in _sections(report).items():
        table = Table.grid(padding=(0, 1))
        for fact in facts:
            style = _STYLES[fact.ok]
            table.add_row(Text(f"  {_MARKS[fact.ok]}", style), Text(fact.name, style), Text(_line(fact)))
        console.print(Text(section, "bold"))
        console.print(table)
