"""How much of the communication each kind of overlap hides, and what it costs the experts' matrix products."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import Communicator, functional
from ..streams import named_range
from ..timeline import Span, Timeline, own_us
from .copy_engine import CopyToNeighbour
from .measure import Stopwatch, gather, median
from .overlap_pieces import Operation, OverlapPlan, Piece, Pieces

_WARMUP = 2
_ROUNDS = 3
BESIDE_SMS = (4, 8, 12, 16, 24)
COMMUNICATION = ("moe_ep.dispatch", "moe_ep.combine")
EXPERTS = "moe_ep.experts.matmul"


@dataclass(frozen=True)
class Run:
    """One run: the slowest rank's median, and by how much its times differ.

    ``communication_us``: what calls take on the rank that is the last to come to each, since on others they wait for
    that. ``experts_us``: what of the run lies in the routed experts' matrix products. Both beside each other or not.
    ``peak_bytes``: the most memory, weights included.
    """

    us: float
    spread_us: float
    communication_us: float
    experts_us: float
    peak_bytes: int


@dataclass(frozen=True)
class Hidden:
    """A piece with ``num_sms`` SMs for communication beside computation (None: the library's choice), slowest rank's.

    ``plain``: without overlap, with all SMs for communication. ``in_turn``: the overlapped calls, on one stream.
    ``beside_us``: the computation that communication may hide behind.
    """

    piece: str
    num_sms: int | None
    plain: Run
    in_turn: Run
    overlapped: Run
    beside_us: float

    @property
    def efficiency(self) -> float | None:
        """Of hiding the plain run's communication, ``(t_comm + t_comp - t_both) / min(t_comm, t_comp)``; None where
        there is nothing to hide, or to hide it behind.
        """
        return self._efficiency(self.plain)

    @property
    def efficiency_in_turn(self) -> float | None:
        """The same against the overlapped run's own calls, whose communication takes fewer SMs and so more time."""
        return self._efficiency(self.in_turn)

    @property
    def experts_slower(self) -> float | None:
        """By how much the experts' products are, as a share; None where they are not told apart."""
        before = self.plain.experts_us
        return self.overlapped.experts_us / before - 1 if before else None

    def _efficiency(self, serial: Run) -> float | None:
        most = min(serial.communication_us, self.beside_us)
        return (serial.us - self.overlapped.us) / most if most > 0 else None


@dataclass(frozen=True)
class Beside:
    """The experts' forward under communication from its beginning to its end, with ``num_sms`` SMs; us, slowest rank's.

    With ``num_sms`` 0 communication is copies of the rank's tokens by a copy engine: what traffic alone costs.
    """

    num_sms: int
    alone_us: float
    beside_us: float
    call_alone_us: float
    call_beside_us: float

    @property
    def slower(self) -> float:
        return self.beside_us / self.alone_us - 1

    @property
    def lost_us(self) -> float:
        """What each call costs the experts: they take so much longer for every one beside them."""
        return (self.beside_us - self.alone_us) * self.call_beside_us / self.beside_us


class OverlapBench:
    """Measures on one communicator; every rank does the same."""

    def __init__(self, plan: OverlapPlan, comm: Communicator, device: torch.device) -> None:
        self.plan, self.comm, self.device = plan, comm, device
        self.pieces = Pieces(plan, comm, device)
        self.timeline = Timeline(device)
        self._watch = Stopwatch(device)
        self._kept: set[str] = set()

    def run(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Everything, as JSON's types; collective."""
        beside = self.beside() if self.device.type == "cuda" else []
        hidden = [each for piece in self.pieces for each in self.hidden(piece)]
        return dict(
            kind="overlap",
            machine=machine,
            sizes=asdict(self.plan),
            ranks=self.comm.size,
            backend=self.comm.backend,
            hidden=[
                dict(
                    asdict(each),
                    efficiency=each.efficiency,
                    efficiency_in_turn=each.efficiency_in_turn,
                    experts_slower=each.experts_slower,
                )
                for each in hidden
            ],
            beside=[dict(asdict(each), slower=each.slower, lost_us=each.lost_us) for each in beside],
            spans=gather([asdict(span) for span in self.timeline.spans()]),
        )

    def hidden(self, piece: Piece) -> list[Hidden]:
        """One for each number of SMs."""
        without = _Way(lambda: piece.plain)
        in_turn = [_Way(lambda: piece.overlapped(True), num_sms) for num_sms in self.plan.num_sms]
        overlapped = [_Way(lambda: piece.overlapped(False), num_sms) for num_sms in self.plan.num_sms]
        plain, *runs = self._measure([without, *in_turn, *overlapped])
        beside_us = max(plain.us - plain.communication_us, 0.0)
        if piece.beside is not None:
            beside_us = min(beside_us, self._time(piece.beside))
        for way in (without, *overlapped):
            self._keep(way)
        self.pieces.set_num_sms(None)
        pairs = zip(self.plan.num_sms, runs[: len(in_turn)], runs[len(in_turn) :], strict=True)
        return [Hidden(piece.name, num_sms, plain, *pair, beside_us) for num_sms, *pair in pairs]

    def _keep(self, way: _Way) -> None:
        """One run in the timeline, under the operation's name in brackets."""
        operation = self._prepare(way)
        name = f"[{operation.name}{'' if way.num_sms is None else f', {way.num_sms} SMs'}]"
        if operation.name is not None and name not in self._kept:
            self._kept.add(name)
            self._once(operation, lambda run: self._record(run, self.timeline, name))

    def _measure(self, ways: Sequence[_Way]) -> list[Run]:
        """They take turns, so that all see the same machine: GPUs at work get hot, and slower."""
        samples = [_Samples() for _ in ways]
        for i in range(_ROUNDS):
            iterations = len(range(i, self.plan.iterations, _ROUNDS))
            for way, found in zip(ways, samples, strict=True):
                self._sample(self._prepare(way), iterations, found)
        return [found.over_ranks() for found in samples]

    def _prepare(self, way: _Way) -> Operation:
        self.pieces.set_num_sms(way.num_sms)
        gc.collect()  # what was run before
        return way.make()

    def _sample(self, operation: Operation, iterations: int, found: _Samples) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        found.us += self._times(operation, 1, iterations)
        if on_gpu:
            found.peak_bytes = max(found.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        timeline = Timeline(self.device)
        self._once(operation, lambda run: self._record(run, timeline))
        spans = timeline.spans()
        # A dispatch has inside what is computed while the host waits.
        found.calls_us.append([own_us(span, spans) for span in _of(spans, COMMUNICATION)])
        found.experts_us.append(sum(span.end_us - span.begin_us for span in _of(spans, EXPERTS)))

    def _time(self, operation: Operation) -> float:
        return max(gather(median(self._times(operation, _WARMUP, self.plan.iterations))))

    def _times(self, operation: Operation, warmup: int, iterations: int) -> list[float]:
        """This rank's."""
        return [
            self._once(operation, lambda run, i=i: self._watch.device_us(lambda _: run(), i))
            for i in range(warmup + iterations)
        ][warmup:]

    def _once(self, operation: Operation, how: Callable[[Callable[[], object]], Any]) -> Any:
        prepared = operation.prepare()
        return how(lambda: operation.run(prepared))

    def _record(self, run: Callable[[], object], timeline: Timeline, name: str = "[run]") -> None:
        self._watch.begin_together()
        with timeline, named_range(name):
            run()

    @torch.no_grad()
    def beside(self) -> list[Beside]:
        layer, x = self.pieces.layer, self.pieces._x
        routed = layer.router(x)
        routing = routed.topk_idx, routed.topk_weights
        out = layer.dispatcher.dispatch(x, *routing)
        available = self.comm.available_sms or max(BESIDE_SMS)
        fp8 = self.plan.config(self.device).fp8

        def experts() -> None:
            layer.run_experts(out)

        def time(call: Callable[[], object]) -> float:
            return self._time(Operation(lambda _: call()))

        def dispatch(num_sms: int) -> Callable[[], object]:
            options = {"handle": out.handle, "fp8": fp8, "num_sms": num_sms}
            return lambda: functional.dispatch(x, None, None, self.comm, **options)

        ways = {n: dispatch(n) for n in BESIDE_SMS if n <= available}
        if self.comm.backend == "nvlink" and self.comm.size > 1:
            num_bytes = x.numel() * (1 if fp8 else x.element_size())
            copy = CopyToNeighbour(self.device, num_bytes)
            ways = {0: lambda: copy(num_bytes), **ways}
        results = []
        for num_sms, communicate in ways.items():
            alone_us, call_us = time(experts), time(communicate)
            calls = max(2, round(3 * alone_us / call_us))
            beside_us, call_beside_us = self._both(experts, communicate, calls)
            results.append(Beside(num_sms, alone_us, beside_us, call_us, call_beside_us))
        self._watch.begin_together()
        torch.cuda.synchronize()  # nobody drops its window while another still writes to it
        return results

    def _both(
        self, experts: Callable[[], None], communicate: Callable[[], object], calls: int
    ) -> tuple[float, float]:
        """Times of the experts and of one call of communication, with ``calls`` of those around the experts."""
        computing, communicating = torch.cuda.current_stream(), self.comm.stream(self.device)
        found = []
        for _ in range(_WARMUP + self.plan.iterations):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            self._watch.begin_together()
            communicating.wait_stream(computing)
            with torch.cuda.stream(communicating):
                events[0].record()
                for _ in range(calls):
                    communicate()
                events[1].record()
            torch.cuda._sleep(100_000)  # so that communication is under way
            events[2].record()
            experts()
            events[3].record()
            computing.wait_stream(communicating)
            torch.cuda.synchronize()
            found.append([b.elapsed_time(e) * 1e3 for b, e in (events[2:], events[:2])])
        times = [median(list(each)) for each in zip(*found[_WARMUP:], strict=True)]
        experts_us, calls_us = (max(each) for each in zip(*gather(times), strict=True))
        return experts_us, calls_us / calls


@dataclass(frozen=True)
class _Way:
    """One way to run a piece; ``make`` gives an operation that keeps nothing of another's runs."""

    make: Callable[[], Operation]
    num_sms: int | None = None


@dataclass
class _Samples:
    """This rank's, of one way; ``calls_us``: of each run, the calls of communication in their order."""

    us: list[float] = field(default_factory=list)
    calls_us: list[list[float]] = field(default_factory=list)
    experts_us: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def over_ranks(self) -> Run:
        """Collective."""
        everyone: list[_Samples] = gather(self)
        slowest = max(everyone, key=lambda samples: median(samples.us))
        runs = zip(*(samples.calls_us for samples in everyone), strict=True)
        return Run(
            us=median(slowest.us),
            spread_us=max(slowest.us) - min(slowest.us),
            communication_us=median([sum(min(us) for us in zip(*calls, strict=True)) for calls in runs]),
            experts_us=max(median(samples.experts_us) for samples in everyone),
            peak_bytes=max(samples.peak_bytes for samples in everyone),
        )


def _of(spans: list[Span], prefix: str | tuple[str, ...]) -> list[Span]:
    return [span for span in spans if span.name.startswith(prefix)]
