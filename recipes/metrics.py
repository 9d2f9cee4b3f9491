"""What a run writes down: metrics.jsonl (always) and TensorBoard event files (where tensorboard is installed).

One JSON object a line. `kind` says which:
  run    {"preset", "parameters", "world_size", "ep", "corpus", "bigram_loss", ...}       once per start
  train  {"step", "loss", "lr", "grad_norm", "tokens_per_s", "balance", ["load"]}         every optimiser step
  valid  {"step", "loss", "bigram_loss"}                                                  every evaluation
Losses are nats per token. `balance` is the busiest expert's load over the mean load, averaged over the MoE layers
(1.0 is even). `load` holds, per MoE layer (those of MTP modules last), each expert's load over the mean load; it is
written about a hundred times per run.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to `folder/metrics.jsonl` and, if it can, to `folder/tensorboard`.

    resume_step: with a value, records of later steps (from a run that died after its last checkpoint) are dropped
      first, so that the file reads as one uninterrupted run. None starts an empty file.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = []
        if resume_step is not None and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record.get("step", 0) <= resume_step]
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = _open_tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def write(self, kind: str, **values: Any) -> None:
        """Add one record. Numbers that JSON can't hold (NaN, infinities) become null."""
        record = {"kind": kind, **{name: _finite(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None and "step" in values:
            for name, value in values.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _open_tensorboard(folder: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
