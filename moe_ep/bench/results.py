"""What a sweep measured, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .copy_engine import CopyRate, best_rate
from .measure import Timing


@dataclass(frozen=True)
class Case:
    """One job: an operation on given rows. ``dtype`` is what travels; with ``quantize`` x is bfloat16 before."""

    op: str
    layout: str
    dtype: str
    num_tokens: int
    quantize: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, quantise on the way" if self.quantize else self.op

    def __str__(self) -> str:
        return f"{self.dtype} {self.name}, {self.layout} layout, {self.num_tokens} tokens"


@dataclass(frozen=True)
class Measurement:
    """A case with a number of SMs; times in us.

    - ``num_sms``: as asked for, None = chosen by the library; ``sms_used``: what that came to, None where unknown
    - ``gpu``: GPU time of the call with a cached handle
    - ``wall_us``, ``host_us``: of that call, the host's time until the GPU has ended, and until the host may go on
    - ``first_gpu_us``, ``first_wall_us``: of a dispatch that exchanges its routing and learns the sizes on the host
    - ``first_static_us``: GPU time of a dispatch that exchanges its routing with ``max_recv_rows``

    The slowest rank's, but for ``gpu``, which has all; None for combine, which has no first call.
    """

    case: Case
    num_sms: int | None
    sms_used: int | None
    gpu: Timing
    wall_us: float
    host_us: float
    first_gpu_us: float | None = None
    first_wall_us: float | None = None
    first_static_us: float | None = None


@dataclass(frozen=True)
class Results:
    """``wire_bytes``: by case, what the busiest rank sends to others or gets from others, whichever is more.

    ``nccl``: the same jobs by all_to_all_single and torch's permutations.
    """

    machine: dict[str, Any]
    sizes: dict[str, Any]
    ranks: int
    backend: str
    iterations: int
    copy_engine: list[CopyRate]
    wire_bytes: dict[Case, float]
    measurements: list[Measurement]
    nccl: dict[Case, Timing]

    def floor_us(self, case: Case) -> float | None:
        """The time of the wire bytes at the copy engine's best rate; None where that is unknown."""
        rate = best_rate(self.copy_engine)
        return None if rate is None else self.wire_bytes[case] / rate / 1e3

    def gb_per_s(self, case: Case, timing: Timing) -> float:
        return self.wire_bytes[case] / timing.max_us / 1e3

    def percent_of_copy_engine(self, case: Case, timing: Timing) -> float | None:
        floor = self.floor_us(case)
        return None if floor is None else 100 * floor / timing.max_us

    def of(self, case: Case) -> list[Measurement]:
        return [each for each in self.measurements if each.case == case]

    @property
    def cases(self) -> list[Case]:
        return list(self.wire_bytes)

    def to_json(self) -> str:
        """One object; each case with its measurements, and what follows from them beside."""
        cases = [
            dict(
                asdict(case),
                name=case.name,
                wire_bytes=self.wire_bytes[case],
                floor_us=self.floor_us(case),
                nccl=self._timing_json(case, self.nccl[case]) if case in self.nccl else None,
                measurements=[
                    {**asdict(each), "case": None, "gpu": self._timing_json(case, each.gpu)}
                    for each in self.of(case)
                ],
            )
            for case in self.cases
        ]
        for case in cases:
            for each in case["measurements"]:
                del each["case"]
        head = dict(
            kind="sweep",
            machine=self.machine,
            sizes=self.sizes,
            ranks=self.ranks,
            backend=self.backend,
            iterations=self.iterations,
            copy_engine=[dict(asdict(rate), gb_per_s=rate.gb_per_s) for rate in self.copy_engine],
        )
        return json.dumps(dict(head, cases=cases), indent=2) + "\n"

    def _timing_json(self, case: Case, timing: Timing) -> dict[str, Any]:
        times = asdict(timing)
        del times["outside_us"]
        return dict(
            times,
            gb_per_s=self.gb_per_s(case, timing),
            percent_of_copy_engine=self.percent_of_copy_engine(case, timing),
        )

    @staticmethod
    def from_json(text: str) -> Results:
        """The inverse of `to_json`."""
        loaded = json.loads(text)
        wire_bytes, measurements, nccl = {}, [], {}
        for each in loaded["cases"]:
            case = _of(Case, each)
            wire_bytes[case] = each["wire_bytes"]
            if each["nccl"] is not None:
                nccl[case] = _of(Timing, each["nccl"])
            measurements += [
                _of(Measurement, {**measured, "case": case, "gpu": _of(Timing, measured["gpu"])})
                for measured in each["measurements"]
            ]
        return Results(
            machine=loaded["machine"],
            sizes=loaded["sizes"],
            ranks=loaded["ranks"],
            backend=loaded["backend"],
            iterations=loaded["iterations"],
            copy_engine=[_of(CopyRate, rate) for rate in loaded["copy_engine"]],
            wire_bytes=wire_bytes,
            measurements=measurements,
            nccl=nccl,
        )


def _of(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
