"""What `moe-ep bench --overlap` runs: a DeepSeek-V3 layer, or two blocks of a model, with and without overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import Communicator
from ..errors import InvalidInput
from ..layers import DeepSeekModel, GradAccumulation, MicroBatchSchedule, ModelConfig
from .workload import DTYPES, FP8

CHUNKS = (2, 3, 4)
_DEEPSEEK_V3 = {
    "num_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_ffn_hidden": 2048,
    "shared_ffn_hidden": 2048,
    "num_groups": 8,
    "topk_groups": 4,
}


@dataclass(frozen=True)
class OverlapPlan:
    """``num_tokens`` of each rank and micro-batch, which travel in ``layout``; with ``dtype`` "fp8" they travel, and
    experts compute, in FP8.

    ``num_sms``: of communication beside computation, each to be measured; None: the communicator's choice.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    num_sms: tuple[int | None, ...]
    iterations: int
    layout: str = "expert"

    def check(self, num_ranks: int) -> None:
        """Raises InvalidInput for sizes that can't be."""
        if self.num_topk > self.num_experts:
            raise InvalidInput(f"--num-topk {self.num_topk} is more than --num-experts {self.num_experts}")
        if self.num_experts % num_ranks:
            raise InvalidInput(f"--num-experts {self.num_experts} is no multiple of the {num_ranks} ranks")

    def config(self, device: torch.device) -> ModelConfig:
        """Two MoE blocks with DeepSeek-V3's widths, on a CPU with small ones, and next to no vocabulary."""
        widths = _DEEPSEEK_V3
        if device.type == "cpu":
            widths = {"moe_ffn_hidden": self.hidden, "shared_ffn_hidden": self.hidden}
        fp8 = "blockwise" if self.dtype == FP8 else None
        return ModelConfig(
            vocab_size=256,
            num_layers=2,
            num_dense_layers=0,
            hidden=self.hidden,
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            max_seq_len=self.num_tokens,
            routed_scaling=2.5,
            layout=self.layout,
            expert_alignment=16,
            fp8=fp8,
            fp8_backward=fp8,
            fp8_experts=fp8,
            **widths,
        )


@dataclass(frozen=True)
class Operation:
    """``prepare``, which is not timed, gives what ``run`` takes. ``name``: in the timeline; None: not kept there."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None
    name: str | None = None


@dataclass(frozen=True)
class Piece:
    """One kind of overlap.

    - ``plain``: without it, as a user would have it: communication alone, with all SMs it wants
    - ``overlapped(one_stream)``: with it, or the same calls in turn on one stream
    - ``beside``: the computation that communication may hide behind, if that is not all of it
    """

    name: str
    plain: Operation
    overlapped: Callable[[bool], Operation]
    beside: Operation | None = None


class Pieces:
    """All pieces on one communicator; they share the model's weights."""

    def __init__(self, plan: OverlapPlan, comm: Communicator, device: torch.device) -> None:
        self.comm, self.device = comm, device
        dtype = DTYPES.get(plan.dtype, torch.bfloat16)
        self.model = DeepSeekModel(plan.config(device), comm, device=device, dtype=dtype)
        self.layer = self.model.layers[0].moe
        self._accumulation = GradAccumulation()
        torch.manual_seed(100 + comm.rank)
        shape = plan.num_tokens, plan.hidden
        self._x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self._grad = torch.randn(shape, device=device, dtype=dtype)
        self._batches = [
            tuple(torch.randint(256, (1, plan.num_tokens), device=device) for _ in range(2)) for _ in range(4)
        ]

    def set_num_sms(self, num_sms: int | None) -> None:
        """Of communication beside computation, from now on."""
        for module in self.model.modules():
            if isinstance(getattr(module, "config", None), ModelConfig):
                module.config = dataclasses.replace(module.config, overlap_num_sms=num_sms)

    def __iter__(self) -> Iterator[Piece]:
        layer = self._layer(0, False)
        alone = Operation(lambda _: self.layer.shared(self._x).backward(self._grad))
        yield Piece("shared expert", layer, lambda one: self._layer(1, one), alone)
        for n in CHUNKS:
            yield Piece(f"chunked layer, n = {n}", layer, lambda one, n=n: self._layer(n, one))
        yield Piece("two micro-batches", self._pair_in_turn(), self._pair)
        for n in (2, 4):
            in_turn = self._step_in_turn(n)
            yield Piece(f"step of {n} micro-batches", in_turn, lambda one, n=n: self._step(n, one))

    def _layer(self, chunks: int, one_stream: bool) -> Operation:
        def run(_: object) -> None:
            with self._streams(one_stream):
                with self._accumulation.collecting():
                    y, aux_loss = self.layer(self._x, overlap_chunks=chunks)
                torch.autograd.backward([y, aux_loss], [self._grad, torch.ones_like(aux_loss)])

        names = {0: "layer without overlap", 1: "shared expert"}
        return Operation(run, name=names.get(chunks, f"chunked layer, n = {chunks}"))

    def _pair_in_turn(self) -> Operation:
        first, second, *_ = self._batches

        def forward(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            with self._accumulation.collecting():
                return self.model(*batch).loss

        def run(before: torch.Tensor) -> None:
            before.backward()
            forward(second)

        return Operation(run, lambda: forward(first), "micro-batches without overlap")

    def _pair(self, one_stream: bool) -> Operation:
        """One micro-batch forward beside another backward, as in the midst of many."""
        schedule = MicroBatchSchedule(self.model, overlap=not one_stream)
        batch = self._batches[0]
        forward_done = []

        def prepare() -> object:
            if not forward_done:
                forward_done.append(schedule.make_pass(*batch, share=1))
                schedule.run(forward_done[0], None)
            return forward_done.pop()

        def run(before: object) -> None:
            forward_done.append(schedule.make_pass(*batch, share=1))
            schedule.run(forward_done[0], before)

        return Operation(run, prepare, "two micro-batches")

    def _step_in_turn(self, count: int) -> Operation:
        def run(_: object) -> None:
            for batch in self._batches[:count]:
                with self._accumulation.collecting():
                    loss = self.model(*batch).loss / count
                loss.backward()

        return Operation(run)

    def _step(self, count: int, one_stream: bool) -> Operation:
        schedule = MicroBatchSchedule(self.model, overlap=not one_stream)
        return Operation(lambda _: schedule.step(self._batches[:count]))

    @contextmanager
    def _streams(self, one: bool) -> Iterator[None]:
        """``one``: asynchronous calls run on the current stream."""
        if not one or self.device.type != "cuda":
            yield
            return
        own = self.comm.stream(self.device)
        self.comm._streams[self.device] = torch.cuda.current_stream(self.device)
        try:
            yield
        finally:
            self.comm._streams[self.device] = own
