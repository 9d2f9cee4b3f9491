"""What a person sees of a run: a live line with rich on a terminal, plain lines elsewhere, nothing off rank 0.

The only file that imports rich for the training loop.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

PLAIN_INTERVAL_S = 5.0


def make_progress(total_steps: int, first_step: int, *, rank: int, stream: TextIO | None = None):
    """The display for this rank: live on a terminal that rich can drive, else plain lines; silent off rank 0."""
    if rank != 0:
        return SilentProgress()
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            return LiveProgress(total_steps, first_step)
        except ImportError:
            pass
    return PlainProgress(total_steps, first_step, stream)


class SilentProgress:
    """Shows nothing. The three displays share these methods."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    def step(self, step: int, values: dict[str, float]) -> None:
        """After an optimiser step. values: loss, lr, tokens_per_s, balance."""

    def say(self, text: str) -> None:
        """A line that stays on the screen."""


class PlainProgress(SilentProgress):
    """One line about every five seconds, and the first and the last step."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO):
        self._total, self._stream = total_steps, stream
        self._eta = _Eta(total_steps, first_step)
        self._last_line = None

    def step(self, step: int, values: dict[str, float]) -> None:
        remaining = self._eta.after(step)
        now = time.monotonic()
        due = self._last_line is None or now - self._last_line >= PLAIN_INTERVAL_S
        if due or step == self._total:
            self._last_line = now
            self.say(
                f"step {step:>{len(str(self._total))}}/{self._total}  loss {values['loss']:.4f}  "
                f"{_short(values['tokens_per_s'])} tokens/s  balance {values['balance']:.2f}  "
                f"eta {_clock(remaining)}"
            )

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveProgress(SilentProgress):
    """A bar with step, loss, tokens/s, expert balance and the time left, redrawn in place."""

    def __init__(self, total_steps: int, first_step: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._eta = _Eta(total_steps, first_step)
        self._progress = Progress(
            TextColumn("[bold]step {task.completed:>5,.0f}[/]/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss [bold cyan]{task.fields[loss]}[/]"),
            TextColumn("{task.fields[rate]} tok/s"),
            TextColumn("balance [{task.fields[balance_colour]}]{task.fields[balance]}[/]"),
            TextColumn("eta {task.fields[eta]}"),
            console=Console(),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task(
            "train",
            total=total_steps,
            completed=first_step,
            loss="-",
            rate="-",
            balance="-",
            balance_colour="white",
            eta="-",
        )

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._progress.stop()

    def step(self, step: int, values: dict[str, float]) -> None:
        balance = values["balance"]
        fields: dict[str, Any] = {
            "loss": f"{values['loss']:.3f}",
            "rate": _short(values["tokens_per_s"]),
            "balance": f"{balance:.2f}",
            "balance_colour": "green" if balance < 1.5 else "yellow" if balance < 2.5 else "red",
            "eta": _clock(self._eta.after(step)),
        }
        self._progress.update(self._task, completed=step, **fields)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


class _Eta:
    """Seconds left, from an exponential mean of the time per step; the first step (warm-up costs) is not counted."""

    def __init__(self, total_steps: int, first_step: int):
        self._total = total_steps
        self._last: float | None = None
        self._last_step = first_step
        self._per_step: float | None = None

    def after(self, step: int) -> float | None:
        now = time.monotonic()
        if self._last is not None and step > self._last_step:
            took = (now - self._last) / (step - self._last_step)
            self._per_step = took if self._per_step is None else 0.95 * self._per_step + 0.05 * took
        self._last, self._last_step = now, step
        return None if self._per_step is None else self._per_step * (self._total - step)


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
