"""A run small enough for tests, and the ranks' side of those that need several processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch.distributed as dist

from moe_ep.layers import ModelConfig
from moe_ep.recipes.checkpoint import LATEST
from moe_ep.recipes.config import TrainConfig
from moe_ep.recipes.metrics import METRICS_FILE, read_metrics
from moe_ep.recipes.train import train

MODEL = ModelConfig(
    vocab_size=256,
    num_layers=2,
    num_dense_layers=1,
    hidden=32,
    num_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    ffn_hidden=32,
    moe_ffn_hidden=16,
    shared_ffn_hidden=16,
    num_experts=8,
    num_topk=2,
    num_groups=4,
    topk_groups=2,
    mtp_layers=1,
    max_seq_len=16,
)


def miniature(text: Path, **changes) -> TrainConfig:
    """8 experts, 16 bytes a sequence, 8 sequences a step, learning from the file `text`."""
    config = TrainConfig(
        preset="miniature",
        model=MODEL,
        device="cpu",
        threads=1,
        data=(str(text),),
        seq_len=16,
        batch=8,
        steps=12,
        lr=3e-3,
        warmup=4,
        eval_every=0,
        eval_windows=5,
        checkpoint_every=0,
    )
    return dataclasses.replace(config, **changes)


def write_text(path: Path) -> Path:
    """24 KB in which a byte depends on those before it."""
    words = ["dispatch ", "combine ", "expert ", "token ", "rank ", "router\n"]
    state, parts = 1, []
    for _ in range(3600):
        state = (state * 1103515245 + 12345) % 2**31
        parts.append(words[(state >> 16) % len(words)])
    path.write_text("".join(parts))
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `train`. origin: the finished run that this one goes on with, as it was at `ORIGIN_STEP`."""

    config: TrainConfig
    folder: Path
    origin: Path | None = None


ORIGIN_STEP = 5  # of the checkpoint; the metrics go on for two more steps, as if the run had died after them


def run_all(runs: list[Run]) -> None:
    """Each run on the ranks of the default group (or on this process alone), one after the other."""
    for run in runs:
        together = dist.is_initialized()
        if run.origin is not None and (not together or dist.get_rank() == 0):
            _copy_as_of(run.origin, run.folder)
        if together:
            dist.barrier()
        train(run.config, run.folder, resume=run.origin is not None)


def _copy_as_of(origin: Path, folder: Path) -> None:
    name = f"step-{ORIGIN_STEP:08d}"
    shutil.copytree(origin / "checkpoints" / name, folder / "checkpoints" / name)
    (folder / "checkpoints" / LATEST).write_text(name + "\n")
    records = read_metrics(origin / METRICS_FILE)
    kept = [json.dumps(record) for record in records if record["step"] <= ORIGIN_STEP + 2]
    (folder / METRICS_FILE).write_text("\n".join(kept) + "\n")


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["loss"] for r in read_metrics(Path(folder) / METRICS_FILE) if r["kind"] == "train"}


def validation(folder: Path) -> float:
    """The last validation loss."""
    return [r["loss"] for r in read_metrics(Path(folder) / METRICS_FILE) if r["kind"] == "valid"][-1]
