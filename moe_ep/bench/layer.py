"""moe-ep bench --layer: one Mixture-of-Experts layer, forward and backward, by different means in one run."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..timeline import Timeline, own_us
from .measure import Stopwatch, gather, median

WARMUP = 3
TIMED_PARTS = 3
"""Iterations in which parts are timed; apart from the others, which their events would slow down."""


@dataclass(frozen=True)
class Sizes:
    """A layer of DeepSeek-V3 with fewer experts is the default. ``num_tokens`` is of a rank."""

    num_tokens: int = 4096
    hidden: int = 7168
    num_experts: int = 32
    num_topk: int = 8
    ffn_hidden: int = 2048
    shared_ffn_hidden: int = 2048
    num_groups: int = 8
    topk_groups: int = 4


@dataclass
class Layer:
    """A layer to be measured.

    ``forward``: tokens ``[T, H]`` in bfloat16 to the same shape, and an auxiliary loss if that is not in the graph of
    the tokens. ``parameters``: whose gradients a step makes.
    ``extra_bytes``: what torch's allocator does not see of its memory. ``close``: afterwards.
    """

    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    parameters: list[torch.nn.Parameter]
    extra_bytes: Callable[[], int] = lambda: 0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Variant:
    name: str
    make: Callable[[], Layer]


@dataclass
class Row:
    """What was measured of a variant: the slowest rank's median times, the largest rank's memory.

    - ``forward_ms``, ``backward_ms``: each by itself, begun by all ranks together on GPUs that have nothing else to do
    - ``step_ms``: of forward and backward where one step follows the other, as in training
    - ``peak_gib``: of weights, their gradients, activations and windows
    - ``forward_parts``, ``backward_parts``: ms of the ranges that the layer names, on the rank with the longest
    """

    name: str
    forward_ms: float
    backward_ms: float
    step_ms: float
    peak_gib: float
    forward_parts: dict[str, float] = field(default_factory=dict)
    backward_parts: dict[str, float] = field(default_factory=dict)

    @property
    def both_ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass
class LayerResults:
    """``left_out``: why variants are missing, a sentence each."""

    machine: dict[str, Any]
    sizes: Sizes
    ranks: int
    backend: str
    iterations: int
    rows: list[Row]
    left_out: list[str]

    def to_json(self) -> str:
        return json.dumps({"kind": "layer", **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> LayerResults:
        """The inverse of `to_json`."""
        loaded = json.loads(text)
        del loaded["kind"]
        rows = [Row(**row) for row in loaded.pop("rows")]
        return LayerResults(sizes=Sizes(**loaded.pop("sizes")), rows=rows, **loaded)


def measure(variant: Variant, sizes: Sizes, iterations: int, device: torch.device) -> Row:
    """Build the layer, time it on all ranks at once, and free it; collective."""
    _forget_memory(device)
    before = _allocated(device)
    layer = variant.make()
    try:
        run = _Runs(layer, sizes, device)
        peak = 0
        for i in range(WARMUP):
            if i == WARMUP - 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            run.forward(i)
            run.backward(i)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) - before + layer.extra_bytes()
        watch = Stopwatch(device)
        times = [
            [watch.device_us(each, i) for each in (run.forward, run.backward)] for i in range(iterations)
        ]
        step_us = watch.device_us(lambda _: _steps(run, iterations), 0) / iterations
        parts = _parts(run, device)
    finally:
        layer.close()
    medians = [median(list(each)) / 1e3 for each in zip(*times, strict=True)]
    everyone = gather([*medians, step_us / 1e3, peak / 2**30])
    slowest = [max(each) for each in zip(*everyone, strict=True)]
    longest = [max(each, key=lambda times: sum(times.values())) for each in zip(*gather(parts), strict=True)]
    return Row(variant.name, *slowest, *longest)


class _Runs:
    """Forward and backward of one layer, each as an operation of its own."""

    def __init__(self, layer: Layer, sizes: Sizes, device: torch.device) -> None:
        self._layer = layer
        rank = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(rank)
        shape = sizes.num_tokens, sizes.hidden
        self._x = torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        self._grad = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        self._results: list[torch.Tensor] = []
        self._grads: list[torch.Tensor] = []

    def forward(self, _: int) -> None:
        self._x.grad = None
        for parameter in self._layer.parameters:
            parameter.grad = None
        y, aux_loss = self._layer.forward(self._x)
        self._results, self._grads = [y], [self._grad]
        if aux_loss is not None:
            self._results.append(aux_loss)
            self._grads.append(torch.ones_like(aux_loss))

    def backward(self, _: int) -> None:
        results, self._results = self._results, []
        torch.autograd.backward(results, self._grads)


def _steps(run: _Runs, count: int) -> None:
    for i in range(count):
        run.forward(i)
        run.backward(i)


def _parts(run: _Runs, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """ms of each named range, without those inside, in a forward and in a backward."""
    watch = Stopwatch(device)
    timelines = Timeline(device), Timeline(device)
    for i in range(TIMED_PARTS):
        for operation, timeline in zip((run.forward, run.backward), timelines, strict=True):
            with timeline:
                watch.device_us(operation, i)
    return _sums(timelines[0]), _sums(timelines[1])


def _sums(timeline: Timeline) -> dict[str, float]:
    sums: dict[str, float] = {}
    spans = timeline.spans()
    for span in spans:
        sums[span.name] = sums.get(span.name, 0.0) + own_us(span, spans) / TIMED_PARTS / 1e3
    return sums


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _forget_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
