"""Numbers of SMs that `moe-ep tune` has measured to be best: what a Communicator may use instead of its model.

The file is JSON::

    {"format": 1, "device": "NVIDIA H200", "choices": [
        {"op": "dispatch", "layout": "expert", "dtype": "bfloat16", "num_tokens": 4096, "hidden": 7168,
         "num_ranks": 2, "latency": 64, "throughput": 24}, ...]}
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .errors import InvalidInput

FORMAT = 1
_ALLOWED = {"op": ("dispatch", "combine"), "layout": ("expert", "rank")}
_COUNTS = ("num_tokens", "hidden", "num_ranks", "latency", "throughput")


@dataclass(frozen=True)
class Choice:
    """What was best for one shape.

    ``dtype`` is torch's name of what travels ("float8_e4m3fn" for FP8); ``num_tokens`` are those of a rank;
    ``latency`` is the number of SMs when nothing else runs, ``throughput`` beside computation.
    """

    op: str
    layout: str
    dtype: str
    num_tokens: int
    hidden: int
    num_ranks: int
    latency: int
    throughput: int

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; allowed are {' and '.join(allowed)}")
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidInput(f"{name} is {value!r}; it must be a whole number from 1 on")
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise InvalidInput(
                f"dtype is {self.dtype!r}; it must be torch's name of a dtype, such as 'bfloat16'"
            )


@dataclass(frozen=True)
class Config:
    """The choices for some shapes on ``device``, a GPU's name.

    >>> choice = Choice("combine", "rank", "bfloat16", 4096, 7168, 2, latency=32, throughput=16)
    >>> config = Config("NVIDIA H200", (choice,))
    >>> shape = dict(layout="rank", dtype=torch.bfloat16, num_tokens=3000, hidden=7168, num_ranks=2)
    >>> config.num_sms(op="combine", **shape), config.num_sms(op="combine", **shape, overlapped=True)
    (32, 16)
    >>> config.num_sms(op="dispatch", **shape) is None
    True
    """

    device: str
    choices: tuple[Choice, ...]

    def num_sms(
        self,
        *,
        op: str,
        layout: str,
        dtype: torch.dtype | str,
        num_tokens: int,
        hidden: int,
        num_ranks: int,
        overlapped: bool = False,
    ) -> int | None:
        """The SMs of the nearest shape that was measured, or None if none has this op, layout, dtype and num_ranks.

        Nearest is the one whose num_tokens and hidden differ from those given by the smallest factor, both factors
        multiplied. ``dtype``: of what travels; its size counts. ``overlapped``: communication runs beside computation.
        """
        wanted = (op, layout, _size_of(dtype), num_ranks)
        found = [
            choice
            for choice in self.choices
            if (choice.op, choice.layout, _size_of(choice.dtype), choice.num_ranks) == wanted
        ]
        if not found:
            return None

        def distance(choice: Choice) -> float:
            by_tokens = math.log(choice.num_tokens / max(1, num_tokens))
            return abs(by_tokens) + abs(math.log(choice.hidden / hidden))

        nearest = min(found, key=distance)
        return nearest.throughput if overlapped else nearest.latency

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads, and folders on the way to it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        choices = [asdict(choice) for choice in self.choices]
        content = {"format": FORMAT, "device": self.device, "choices": choices}
        path.write_text(json.dumps(content, indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> Config:
        """Read a file of `moe-ep tune`. Raises InvalidInput, naming the file and what is wrong with it."""
        try:
            return _parse(json.loads(Path(path).read_text()))
        except OSError as error:
            raise InvalidInput(
                f"tuning file {path} can't be read: {error.strerror}; make it with moe-ep tune"
            ) from error
        except ValueError as error:  # InvalidInput is one
            raise InvalidInput(f"tuning file {path}: {error}; make it again with moe-ep tune") from error


def _size_of(dtype: torch.dtype | str) -> int:
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidInput(f"dtype is {dtype!r}; it must be torch's name of a dtype, such as 'bfloat16'")
    return found.itemsize


def _parse(content: Any) -> Config:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InvalidInput(f"its format is {found!r}; this version of moe_ep reads {FORMAT}")
    choices = content.get("choices")
    if not isinstance(choices, list):
        raise InvalidInput(f"its choices are {choices!r}; they must be a list")
    names = {field.name for field in fields(Choice)}
    parsed = []
    for i, choice in enumerate(choices):
        if not isinstance(choice, dict) or set(choice) != names:
            found = ", ".join(sorted(choice)) if isinstance(choice, dict) else repr(choice)
            raise InvalidInput(f"choice {i} has {found}; it must have {', '.join(sorted(names))}")
        try:
            parsed.append(Choice(**choice))
        except InvalidInput as error:
            raise InvalidInput(f"choice {i}: {error}") from error
    return Config(str(content.get("device", "")), tuple(parsed))
