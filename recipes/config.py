"""TrainConfig: every setting of a training run, checked when it is made, kept as JSON beside its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moe_ep.layers import ModelConfig

from .errors import RecipeError

DTYPES = ("auto", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `presets.py` has named ones; the command line overrides single fields.

    Batch: every optimiser step sees `batch` sequences of `seq_len` tokens, whatever the number of ranks; a rank works
    through its share in `accumulate` micro-batches, and with `micro_batch_overlap` in at least two, each one's
    communication beside another's computation. Schedule: the rate rises linearly to `lr` over `warmup` steps, then
    falls as a cosine to `lr * min_lr_ratio` at `steps`.
    """

    preset: str
    model: ModelConfig
    # batch
    seq_len: int
    batch: int
    steps: int
    accumulate: int = 1
    micro_batch_overlap: bool = False
    # AdamW
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    # numbers and ranks
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    deterministic: bool = False
    seed: int = 0
    ep: int | None = None
    backend: str = "auto"
    timeout_s: float = 100.0
    # text
    data: tuple[str, ...] = ()
    token_dtype: str = "uint8"
    held_out: float = 0.05
    # evaluation and checkpoints
    eval_every: int = 100
    eval_windows: int = 64
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "steps", "accumulate", "eval_windows"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("seq_len", self.seq_len <= self.model.max_seq_len, f"at most {self.model.max_seq_len}")
        for name in ("warmup", "eval_every", "checkpoint_every", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "adam_eps", "grad_clip", "timeout_s"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a number above 0")
        self._require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1")
        self._require("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        self._require("dtype", self.dtype in DTYPES, " or ".join(DTYPES))
        self._require("threads", self.threads is None or self.threads >= 1, "at least 1")
        self._require("ep", self.ep is None or self.ep >= 1, "at least 1")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            option = "--" + name.replace("_", "-")
            raise RecipeError(f"{option} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def window(self) -> int:
        """Tokens of one sample: the inputs and the target of the last one."""
        return self.seq_len + 1

    def ep_size(self, world_size: int) -> int:
        """Ranks that share one set of experts: `ep`, or the most that divide both the ranks and the experts.

        Raises RecipeError where `ep` divides either of them not.
        """
        experts = self.model.num_experts
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0 and experts % n == 0]
        if self.ep is None:
            return fitting[-1]
        if self.ep not in fitting:
            raise RecipeError(
                f"--ep {self.ep} must divide the {world_size} ranks and the {experts} experts; "
                f"possible here: {', '.join(map(str, fitting))}"
            )
        return self.ep

    @property
    def num_micro_batches(self) -> int:
        """Of a rank in an optimiser step."""
        return max(2, self.accumulate) if self.micro_batch_overlap else self.accumulate

    def micro_batch(self, world_size: int) -> int:
        """Sequences of one rank's micro-batch. Raises RecipeError where `batch` can't be shared evenly."""
        shares = world_size * self.num_micro_batches
        if self.batch % shares:
            nearest = max(1, round(self.batch / shares)) * shares
            raise RecipeError(
                f"--batch {self.batch} is not a multiple of ranks x micro-batches = {world_size} x "
                f"{self.num_micro_batches}; the nearest that is: --batch {nearest}"
            )
        return self.batch // shares

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; `from_json` turns them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises RecipeError for fields this version doesn't know."""
        values = dict(values)
        try:
            model = ModelConfig(**values.pop("model"))
            values["data"] = tuple(values.get("data", ()))
            return cls(model=model, **values)
        except (KeyError, TypeError) as error:
            raise RecipeError(f"the saved settings are of another version of moe_ep: {error}") from error


def with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with some fields of its model replaced."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_fp8(config: TrainConfig, on: bool = True) -> TrainConfig:
    """`config` with experts that compute in FP8, tokens that travel so, and gradients to the experts; or without."""
    mode = "blockwise" if on else None
    alignment = math.lcm(config.model.expert_alignment, 16) if on else config.model.expert_alignment
    return with_model(config, fp8=mode, fp8_backward=mode, fp8_experts=mode, expert_alignment=alignment)


def with_seq_len(config: TrainConfig, seq_len: int) -> TrainConfig:
    """`config` with another sequence length, the model's limit raised where it is shorter."""
    if seq_len < 1:
        raise RecipeError(f"--seq-len is {seq_len}; it must be at least 1")
    model = dataclasses.replace(config.model, max_seq_len=max(seq_len, config.model.max_seq_len))
    return dataclasses.replace(config, model=model, seq_len=seq_len)
