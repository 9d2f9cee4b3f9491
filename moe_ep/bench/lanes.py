"""Recorded spans as a trace for Chrome or Perfetto, and as a picture with a lane for each stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LANES = ("computation", "communication")
_KINDS = {  # the first that a span's name contains
    "weight gradients": "#b07aa1",
    "wgrad": "#b07aa1",
    "dispatch": "#e15759",
    "combine": "#f28e2b",
    "shared expert": "#76b7b2",
    "experts": "#4e79a7",
    "attention": "#59a14f",
}


def write_trace(spans_by_rank: Sequence[Sequence[dict[str, Any]]], path: Path) -> None:
    """A process for each rank, a thread for each stream (Trace Event Format)."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(spans_by_rank):
        events.append(_name("process_name", f"rank {rank}", pid=rank))
        for stream in sorted({span["stream"] for span in spans}):
            events.append(_name("thread_name", lane_name(stream), pid=rank, tid=stream))
        for span in spans:
            length = span["end_us"] - span["begin_us"]
            events.append(
                dict(
                    name=span["name"],
                    ph="X",
                    ts=span["begin_us"],
                    dur=length,
                    pid=rank,
                    tid=span["stream"],
                )
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def write_picture(spans: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """One rank's spans: a row of lanes for each run, whose names are those in brackets, all on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    runs = [span for span in spans if span["name"].startswith("[")]
    figure, all_axes = pyplot.subplots(
        len(runs), 1, figsize=(15, 0.5 + 1.0 * len(runs)), sharex=True, squeeze=False, layout="constrained"
    )
    for run, axes in zip(runs, all_axes[:, 0], strict=True):
        for span in spans:
            if span is not run and run["begin_us"] <= span["begin_us"] < run["end_us"]:
                _draw(axes, span, run["begin_us"])
        axes.set_title(run["name"].strip("[]"), fontsize=8, loc="left", pad=2)
        axes.set_ylim(len(LANES) - 0.5, -0.5)
        axes.set_yticks(range(len(LANES)), LANES, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlim(0, max(run["end_us"] - run["begin_us"] for run in runs) / 1e3)
    all_axes[-1, 0].set_xlabel("ms")
    kinds = {colour: kind for kind, colour in reversed(_KINDS.items())}
    handles = [patches.Patch(color=colour, label=kind) for colour, kind in kinds.items()]
    handles.append(patches.Patch(facecolor="white", edgecolor="black", hatch="////", label="backward"))
    figure.legend(handles=handles, ncols=len(handles), fontsize=7, frameon=False, loc="outside lower center")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def lane_name(stream: int) -> str:
    return LANES[stream] if stream < len(LANES) else f"stream {stream}"


def _draw(axes, span: dict[str, Any], zero_us: float) -> None:
    name = span["name"]
    colour = next((colour for kind, colour in _KINDS.items() if kind in name), "#bab0ac")
    backward = any(word in name for word in ("backward", "dgrad", "wgrad", "weight gradients"))
    axes.barh(
        span["stream"],
        (span["end_us"] - span["begin_us"]) / 1e3,
        left=(span["begin_us"] - zero_us) / 1e3,
        height=0.8,
        color=colour,
        edgecolor="white",
        linewidth=0.4,
        hatch="////" if backward else None,
    )


def _name(kind: str, name: str, **where: int) -> dict[str, Any]:
    return dict(name=kind, ph="M", args=dict(name=name), **where)
