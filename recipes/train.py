"""The training loop: what one rank does, from joining the others to the last line it prints."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moe_ep import launch
from moe_ep.layers import (
    DeepSeekModel,
    MicroBatchSchedule,
    ParallelGroups,
    build_model,
    clip_grad_norm,
    reduce_gradients,
    update_expert_biases,
)

from .bigram import ByteBigram
from .checkpoint import latest_checkpoint, load_checkpoint, read_run, save_checkpoint
from .config import TrainConfig
from .data import Corpus, evaluation_starts, load_corpus, training_batch
from .errors import RecipeError
from .evaluate import evaluate
from .fit import check_fits
from .interrupt import StopRequest, catch_signals
from .metrics import MetricsLog
from .optim import MasterAdamW, learning_rate, make_optimizer
from .progress import make_progress
from .summary import describe_result, describe_run, draw_and_describe_plots, resume_command

MAX_BAD_STEPS = 5  # in a row, with a gradient that isn't finite
LOAD_RECORDS = 100  # of the expert load, over a run


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses in nats per token; None where not measured (the bigram's on rank 0 alone)."""

    step: int
    interrupted: bool
    valid_loss: float | None
    bigram_loss: float | None


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> Result:
    """Train on this rank and the others of the launch (see `moe_ep.launch`); collective.

    A default process group that exists already is used and left as it is.
    out: the run's folder, on a file system that all ranks see. resume: go on from its latest checkpoint.
    Raises RecipeError for settings, text, memory or a folder that can't work, on all ranks, before training.
    """
    if config.deterministic:  # cuBLAS reads it when the first CUDA context is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dist.is_initialized():
        joined, (rank, world_size) = False, (dist.get_rank(), dist.get_world_size())
    else:
        joined = True
        rank, world_size = launch.init_process_group(None if config.device == "auto" else config.device)
    try:
        with catch_signals(StopRequest()) as stop:
            return _train(config, out, resume, stop, rank, world_size)
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()


def _train(
    config: TrainConfig, out: Path, resume: bool, stop: StopRequest, rank: int, world_size: int
) -> Result:
    # 1. The machine: device, number format, threads, and whether the model fits.
    device, local_ranks = _device(config), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dtype = _dtype(config, device)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, _cores() // local_ranks))
    ep_size, micro_batch = config.ep_size(world_size), config.micro_batch(world_size)
    check_fits(config, world_size=world_size, local_ranks=local_ranks, dtype=dtype, device=device)

    # 2. The text, and the line to beat (counted by rank 0 alone; the others wait).
    corpus = load_corpus(
        config.data,
        token_dtype=config.token_dtype,
        held_out_fraction=config.held_out,
        window=config.window,
        vocab_size=config.model.vocab_size,
    )
    eval_starts = evaluation_starts(len(corpus.held_out), config.window, config.eval_windows)
    bigram_loss = None
    if rank == 0 and config.token_dtype == "uint8":
        bigram_loss = ByteBigram.fit(corpus.train).cross_entropy(corpus.held_out, eval_starts, config.seq_len)
    if world_size > 1:
        dist.barrier()

    # 3. Model and optimiser, fresh or from a checkpoint.
    groups = ParallelGroups.create(ep_size)
    model = build_model(
        config.model,
        groups,
        max_tokens_per_rank=micro_batch * config.seq_len,
        backend=config.backend,
        seed=config.seed,
        device=device,
        dtype=dtype,
        timeout_s=config.timeout_s,
    )
    optimizer = make_optimizer(model, config)
    first_step, notes = 0, []
    if resume:
        checkpoint = latest_checkpoint(out / "checkpoints")
        if checkpoint is None:
            raise RecipeError(f"{out} has no complete checkpoint to resume; start again without --resume")
        saved = read_run(checkpoint)
        notes = _check_resumable(config, corpus, saved)
        load_checkpoint(checkpoint, model, optimizer, groups)
        first_step = saved["step"]

    # 4. What people see and what is kept (rank 0).
    metrics = MetricsLog(out, resume_step=first_step if resume else None) if rank == 0 else None
    progress = make_progress(config.steps, first_step, rank=rank)
    remembered = {
        "config": config.to_json(),
        "corpus": corpus.fingerprint(),
        "world_size": world_size,
        "ep": ep_size,
    }

    def measure(step: int) -> float:
        """The validation loss."""
        loss = evaluate(
            model,
            corpus.held_out,
            eval_starts,
            seq_len=config.seq_len,
            micro_batch=micro_batch,
            groups=groups,
            device=device,
        )
        if metrics is not None:
            metrics.write("valid", step=step, loss=loss, bigram_loss=bigram_loss)
        return loss

    def save(step: int) -> None:
        save_checkpoint(
            out / "checkpoints", step, model, optimizer, groups, remembered, keep=config.keep_checkpoints
        )

    if metrics is not None:
        metrics.write(
            "run",
            step=first_step,
            preset=config.preset,
            parameters=config.model.parameter_counts().total,
            world_size=world_size,
            ep=ep_size,
            corpus=corpus.describe(),
            mtp_layers=config.model.mtp_layers,
            unit="byte" if config.token_dtype == "uint8" else "token",
            valid_tokens=len(eval_starts) * config.seq_len,
            bigram_loss=bigram_loss,
        )
        for line in describe_run(config, corpus, out, world_size, ep_size, device, dtype, first_step) + notes:
            progress.say(line)

    # 5. The loop.
    model.train()
    bad_steps, step, interrupted, last_saved = 0, first_step, False, first_step
    with progress:
        while step < config.steps and not interrupted:
            began = time.perf_counter()
            step += 1
            lr = learning_rate(
                step,
                peak=config.lr,
                warmup=config.warmup,
                steps=config.steps,
                min_ratio=config.min_lr_ratio,
            )
            loss = _accumulate_gradients(model, corpus, config, step, groups, micro_batch, device)
            norm = _update(model, optimizer, lr, groups, config.grad_clip)
            load_ME = update_expert_biases(model, groups)

            # One small sum tells every rank the mean loss and whether any of them was asked to stop.
            totals = torch.stack([loss, torch.full_like(loss, float(stop.requested))])
            if world_size > 1:
                dist.all_reduce(totals)
            mean_loss, interrupted = totals[0].item() / world_size, totals[1].item() > 0
            if config.model.max_recv_rows is not None:
                model.raise_if_overflow()
            bad_steps = 0 if math.isfinite(norm) else bad_steps + 1
            if bad_steps == MAX_BAD_STEPS:
                raise RecipeError(
                    f"the gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step {step}: "
                    f"lower --lr (now {config.lr:g}) or lengthen --warmup (now {config.warmup})"
                )
            took = time.perf_counter() - began
            load = _relative_load(load_ME)
            shown = {
                "loss": mean_loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_s": config.batch * config.seq_len / took,
                "balance": sum(max(row) for row in load) / len(load) if load else 1.0,
            }
            progress.step(step, shown)
            if metrics is not None:
                keep_load = step % max(1, config.steps // LOAD_RECORDS) == 0 or step == 1
                metrics.write("train", step=step, **shown, **({"load": load} if keep_load and load else {}))

            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                valid_loss = measure(step)
                beside = f"  (byte-bigram {bigram_loss:.4f})" if bigram_loss is not None else ""
                progress.say(f"step {step}: validation loss {valid_loss:.4f}{beside}")
            if config.checkpoint_every and (step % config.checkpoint_every == 0 or step == config.steps):
                save(step)
                last_saved = step

    # 6. The end: an interrupted run is saved where it stands; a finished one is measured. Both are drawn.
    if interrupted and step < config.steps:
        if last_saved != step:
            save(step)
        result = Result(step, True, None, bigram_loss)
        last_words = [
            f"stopped after step {step}, saved in {out}. To go on:",
            f"  {resume_command(out, world_size)}",
        ]
    else:
        result = Result(step, False, measure(step), bigram_loss)
        last_words = describe_result(result.valid_loss, result.bigram_loss, eval_starts, config)
    model.comm.close()
    if metrics is not None:
        metrics.close()
        for line in draw_and_describe_plots(out) + last_words:
            progress.say(line)
    return result


def _accumulate_gradients(
    model: DeepSeekModel,
    corpus: Corpus,
    config: TrainConfig,
    step: int,
    groups: ParallelGroups,
    micro_batch: int,
    device: torch.device,
) -> torch.Tensor:
    """Gradients of this rank's share of the batch of `step`; returns its mean next-token loss, float64 scalar."""
    count = config.num_micro_batches
    batches = []
    for micro in range(count):
        first = (micro * groups.world_size + groups.rank) * micro_batch
        windows = training_batch(
            corpus.train,
            config.window,
            seed=config.seed,
            step=step,
            indices=range(first, first + micro_batch),
        ).to(device)
        batches.append((windows[:, :-1], windows[:, 1:]))
    if config.micro_batch_overlap:
        losses = [each.main_loss for each in MicroBatchSchedule(model).step(batches)]
    else:
        losses = []
        for batch in batches:
            out = model(*batch)
            (out.loss / count).backward()
            losses.append(out.main_loss.detach())
    return sum(
        (loss.double() / count for loss in losses), torch.zeros((), dtype=torch.float64, device=device)
    )


def _update(
    model: DeepSeekModel, optimizer: MasterAdamW, lr: float, groups: ParallelGroups, grad_clip: float
) -> float:
    """Reduce, clip, step, forget the gradients. Returns the norm before clipping; no step where it isn't finite."""
    reduce_gradients(model, groups)
    norm = clip_grad_norm(model, groups, grad_clip).item()
    if math.isfinite(norm):
        optimizer.set_lr(lr)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _check_resumable(config: TrainConfig, corpus: Corpus, saved: dict) -> list[str]:
    """Notes on what differs from the run that was saved. Raises RecipeError where the weights can't fit."""
    before = TrainConfig.from_json(saved["config"])
    free = {
        "max_seq_len",
        "layout",
        "expert_alignment",
        "fp8",
        "fp8_backward",
        "fp8_experts",
        "fp8_shared",
        "keep_fp8_weights",
        "max_recv_rows",
        "overlap_chunks",
        "overlap_num_sms",
    }
    for name, value in vars(before.model).items():
        now = getattr(config.model, name)
        if name not in free and now != value:
            raise RecipeError(
                f"the checkpoint's model has {name} = {value!r}, this run has {now!r}: make them equal"
            )
    notes = []
    if saved["corpus"] != corpus.fingerprint():
        notes.append(
            "note: the text is not the one this run began with; held-out bytes may have been trained on"
        )
    for name in ("seed", "batch", "seq_len", "steps", "lr", "warmup", "min_lr_ratio", "dtype"):
        was, now = getattr(before, name), getattr(config, name)
        if was != now:
            notes.append(
                f"note: {name} was {was}, now {now}: the losses differ from those of an unbroken run"
            )
    return notes


def _relative_load(load_ME: torch.Tensor) -> list[list[float]]:
    """Each expert's load over its layer's mean, [routers][E], rounded for the metrics file."""
    if load_ME.numel() == 0:
        return []
    load = load_ME.double()
    relative = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)
    return [[round(value, 4) for value in row] for row in relative.tolist()]


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    on_gpu = (
        dist.get_backend(dist.group.WORLD) != "gloo" if dist.is_initialized() else torch.cuda.is_available()
    )
    if on_gpu:
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda":
        raise RecipeError("--device is cuda, but torch finds no GPU; use --device cpu")
    return torch.device("cpu")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
