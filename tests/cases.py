"""One generator of test cases for every backend and every number of ranks.

A ``Case`` is a value: it names the shapes, the routing, the options and a seed, and builds the same tensors
for a rank wherever that rank runs (a thread, a process, a GPU), so that results can be compared with the
oracle elsewhere. ``standard_cases`` lists the cases that every backend has to pass; ``exercise.py`` runs one
through the public API and says what the oracle expects.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("expert", "rank")
EXPERT = ("expert",)
WORLD_SIZES = (1, 2, 4, 8)

Routing = Callable[["Case", int, torch.Generator], Tensor]


@dataclass(frozen=True)
class RankInputs:
    """What one rank passes in: x, biases and grad_y [T, H], topk_idx [T, K], topk_weights [T, K] or None."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    biases: tuple[Tensor, ...]
    grad_y: Tensor


@dataclass(frozen=True)
class Case:
    """One dispatch and combine of all ranks. ``tokens_by_rank`` has T of each rank.

    routing: a name in ``ROUTINGS``, or the ids themselves: per rank, per token, K numbers.
    payload: "normal" (values of mixed magnitude, so that the order of a sum shows), "special" (NaN,
    infinities, signed zeros, subnormal numbers among them) or "bits" (any bit pattern). fp8: None, "tokens"
    (x is quantised before dispatch), or "blockwise" (dispatch quantises).
    """

    name: str
    tokens_by_rank: tuple[int, ...]
    hidden: int = 16
    num_experts: int = 16
    num_topk: int = 4
    layout: str = "expert"
    expert_alignment: int = 1
    dtype: torch.dtype = torch.float32
    routing: str | tuple = "uniform"
    payload: str = "normal"
    max_recv_rows: int | None = None
    idx_dtype: torch.dtype = torch.int64
    has_weights: bool = True
    num_biases: int = 0
    fp8: str | None = None
    fp8_backward: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}-{self.layout}-EP{self.world_size}"

    @property
    def world_size(self) -> int:
        return len(self.tokens_by_rank)

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.world_size

    @property
    def communicator_arguments(self) -> dict[str, int]:
        """The arguments of moe_ep.Communicator that this case needs."""
        return {
            "hidden": self.hidden,
            "max_tokens_per_rank": max(1, *self.tokens_by_rank),
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
        }

    @property
    def dispatch_arguments(self) -> dict[str, Any]:
        """The keyword arguments of moe_ep.dispatch but fp8, which needs x in the right form."""
        return {
            "layout": self.layout,
            "expert_alignment": self.expert_alignment,
            "max_recv_rows": self.max_recv_rows,
        }

    def generator(self, rank: int, purpose: str) -> torch.Generator:
        """A stream of random numbers of its own for each rank and purpose, equal in every process."""
        key = f"{self.name}/{self.seed}/{rank}/{purpose}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def values(self, rank: int, purpose: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random values of this case's payload and dtype, on the CPU."""
        return PAYLOADS[self.payload](shape, dtype or self.dtype, self.generator(rank, purpose))

    def topk_idx(self, rank: int) -> Tensor:
        """The expert ids [T, K] of one rank."""
        if isinstance(self.routing, str):
            ids = ROUTINGS[self.routing](self, rank, self.generator(rank, "routing"))
        else:
            ids = torch.tensor(self.routing[rank], dtype=torch.int64)
        return ids.reshape(self.tokens_by_rank[rank], self.num_topk).to(self.idx_dtype)

    def inputs(self, rank: int, device: torch.device | str = "cpu") -> RankInputs:
        """What ``rank`` passes in, on ``device``."""
        num_tokens = self.tokens_by_rank[rank]
        weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = self.values(rank, "weights", num_tokens, self.num_topk, dtype=weight_dtype)
        biases = [self.values(rank, f"bias {i}", num_tokens, self.hidden) for i in range(self.num_biases)]
        return RankInputs(
            x=self.values(rank, "x", num_tokens, self.hidden).to(device),
            topk_idx=self.topk_idx(rank).to(device),
            topk_weights=weights.to(device) if self.has_weights else None,
            biases=tuple(bias.to(device) for bias in biases),
            grad_y=self.values(rank, "grad_y", num_tokens, self.hidden).to(device),
        )

    def expert_rows(self, rank: int, num_rows: int, device: torch.device | str = "cpu") -> Tensor:
        """What the experts of ``rank`` might make of its rows [N, H]; padding rows hold values too."""
        return self.values(rank, "expert_rows", num_rows, self.hidden).to(device)

    def grad_tokens(self, rank: int, num_rows: int, device: torch.device | str = "cpu") -> Tensor:
        """A gradient of the received rows [N, H]."""
        return self.values(rank, "grad_tokens", num_rows, self.hidden).to(device)

    def grad_weights(self, rank: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """A gradient of the received weights, [N] or [N, K]."""
        weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.values(rank, "grad_weights", *shape, dtype=weight_dtype).to(device)


# ---- payloads: (shape, dtype, generator) -> values


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    exponents = torch.randint(-4, 5, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())).to(
        dtype
    )


def _special(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = _normal(shape, dtype, generator)
    finfo = torch.finfo(dtype)
    specials = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, finfo.tiny, finfo.tiny / 4, finfo.max]
    chosen = torch.tensor(specials, dtype=torch.float64)[
        torch.randint(0, len(specials), shape, generator=generator)
    ]
    return torch.where(torch.rand(shape, generator=generator) < 0.3, chosen.to(dtype), values)


def _bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    num_bytes = dtype.itemsize
    raw = torch.randint(0, 256, (*shape, num_bytes), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


PAYLOADS = {"normal": _normal, "special": _special, "bits": _bits}


# ---- routings: (case, rank, generator) -> ids [T, K]


def _draw(case: Case, rank: int, generator: torch.Generator, popularity: Tensor) -> Tensor:
    """K distinct experts for each token by popularity [E]; -1 where fewer than K have any."""
    num_tokens, num_topk = case.tokens_by_rank[rank], case.num_topk
    # The K smallest of exponential variates with these rates are a draw without replacement.
    waiting = torch.empty(num_tokens, case.num_experts).exponential_(generator=generator) / popularity
    chosen = waiting.topk(num_topk, largest=False)
    return torch.where(chosen.values.isinf(), -1, chosen.indices).gather(
        1, _shuffled(num_tokens, num_topk, generator)
    )


def _shuffled(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num_rows, num_columns, generator=generator).argsort(dim=1)


def _uniform(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    return _draw(case, rank, generator, torch.ones(case.num_experts))


def _zipf(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    return _draw(case, rank, generator, 1.0 / torch.arange(1, case.num_experts + 1) ** 1.5)


def _masked(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    ids = _uniform(case, rank, generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -1, ids)


def _none(case: Case, rank: int, _generator: torch.Generator) -> Tensor:
    return torch.full((case.tokens_by_rank[rank], case.num_topk), -1)


def _last_rank_none(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    return (_none if rank == case.world_size - 1 else _masked)(case, rank, generator)


def _one_expert(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    popularity = torch.zeros(case.num_experts)
    popularity[case.num_experts // 2] = 1.0
    return _draw(case, rank, generator, popularity)


def _one_rank(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    popularity = torch.zeros(case.num_experts)
    popularity[-case.experts_per_rank :] = 1.0
    return _draw(case, rank, generator, popularity)


def _same_experts(case: Case, rank: int, _generator: torch.Generator) -> Tensor:
    """Every token names the same experts in the same order: the worst imbalance with all K used."""
    ids = torch.randperm(case.num_experts, generator=torch.Generator().manual_seed(case.seed))[
        : case.num_topk
    ]
    return ids.expand(case.tokens_by_rank[rank], -1).clone()


ROUTINGS: dict[str, Routing] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "masked": _masked,
    "none": _none,
    "last_rank_none": _last_rank_none,
    "one_expert": _one_expert,
    "one_rank": _one_rank,
    "same_experts": _same_experts,
}


# ---- the cases of every backend


@dataclass(frozen=True)
class _Recipe:
    """A case for any number of ranks: ``tokens(rank, world_size)`` gives T of a rank."""

    name: str
    tokens: Callable[[int, int], int] = lambda rank, _world_size: 11 + 3 * (rank % 3)
    layouts: tuple[str, ...] = LAYOUTS
    options: dict[str, Any] = field(default_factory=dict)

    def case(self, world_size: int, layout: str) -> Case:
        tokens_by_rank = tuple(self.tokens(rank, world_size) for rank in range(world_size))
        return Case(name=self.name, tokens_by_rank=tokens_by_rank, layout=layout, **self.options)


def _recipe(
    name: str, *, tokens: Callable | int | None = None, layouts: tuple[str, ...] = LAYOUTS, **options: Any
) -> _Recipe:
    how = (
        {}
        if tokens is None
        else {"tokens": tokens if callable(tokens) else lambda _rank, _world_size: tokens}
    )
    return _Recipe(name, layouts=layouts, options=options, **how)


_RECIPES = [
    _recipe("float32"),
    _recipe("bfloat16", dtype=torch.bfloat16, num_experts=32, num_topk=8),
    _recipe("float16", dtype=torch.float16, num_experts=32, num_topk=8),
    _recipe("float64", dtype=torch.float64),
    _recipe("zipf", routing="zipf", dtype=torch.bfloat16, num_experts=64, num_topk=6),
    _recipe("aligned", routing="masked", expert_alignment=16, layouts=EXPERT, dtype=torch.bfloat16),
    _recipe("odd_alignment", routing="zipf", expert_alignment=7, layouts=EXPERT),
    _recipe("one_expert", routing="one_expert", num_topk=2),
    _recipe("one_rank", routing="one_rank", dtype=torch.bfloat16, num_topk=4),
    _recipe("same_experts", routing="same_experts", dtype=torch.bfloat16),
    _recipe("masked", routing="masked"),
    _recipe("all_masked", routing="none"),
    _recipe("all_masked_on_a_rank", routing="last_rank_none"),
    _recipe("first_rank_empty", tokens=lambda rank, _world_size: 9 * (rank > 0)),
    _recipe("odd_ranks_empty", tokens=lambda rank, _world_size: 9 * (rank % 2 == 0), routing="zipf"),
    _recipe("all_empty", tokens=0),
    _recipe("one_token", tokens=lambda rank, world_size: int(rank == world_size - 1)),
    _recipe("top1", num_topk=1),
    _recipe("top32", num_experts=64, num_topk=32, dtype=torch.bfloat16),
    _recipe("every_expert", num_experts=8, num_topk=8),
    _recipe("1024_experts", num_experts=1024, num_topk=8, dtype=torch.bfloat16),
    _recipe("wide", hidden=7168, tokens=3, dtype=torch.bfloat16),
    _recipe("special", payload="special", routing="masked"),
    _recipe("special_bfloat16", payload="special", dtype=torch.bfloat16, num_biases=1),
    _recipe("any_bits", payload="bits", dtype=torch.bfloat16),
    _recipe("static_roomy", max_recv_rows=500, dtype=torch.bfloat16),
    _recipe("static_aligned", max_recv_rows=600, expert_alignment=8, layouts=EXPERT, routing="masked"),
    _recipe("static_overflow", max_recv_rows=7, dtype=torch.bfloat16, payload="special"),
    _recipe("static_overflow_aligned", max_recv_rows=13, expert_alignment=4, layouts=EXPERT, num_biases=1),
    _recipe("static_one_row", max_recv_rows=1),
    _recipe("int32_ids", idx_dtype=torch.int32, routing="masked"),
    _recipe("no_weights", has_weights=False),
    _recipe("one_bias", num_biases=1, routing="masked", dtype=torch.bfloat16),
    _recipe("two_biases", num_biases=2, dtype=torch.float16),
    _recipe("fp8_tokens", fp8="tokens", hidden=256, dtype=torch.bfloat16),
    _recipe("fp8_tokens_aligned", fp8="tokens", hidden=144, expert_alignment=16, layouts=EXPERT),
    _recipe("fp8_on_dispatch", fp8="blockwise", hidden=256, dtype=torch.bfloat16, routing="masked"),
    _recipe("fp8_on_dispatch_special", fp8="blockwise", hidden=144, payload="special"),
    _recipe("fp8_static", fp8="blockwise", hidden=128, max_recv_rows=400, expert_alignment=8, layouts=EXPERT),
    _recipe("fp8_both_ways", fp8="blockwise", fp8_backward="blockwise", hidden=256, dtype=torch.bfloat16),
    _recipe("fp8_backward", fp8_backward="blockwise", hidden=144, expert_alignment=8, layouts=EXPERT),
]  # fmt: skip


def standard_cases(
    world_sizes: Iterable[int] = WORLD_SIZES,
    layouts: Iterable[str] = LAYOUTS,
    names: Iterable[str] | None = None,
) -> list[Case]:
    """The cases that every backend must pass; ``names`` selects some."""
    wanted = None if names is None else set(names)
    unknown = (wanted or set()) - {recipe.name for recipe in _RECIPES}
    if unknown:
        raise KeyError(f"no cases named {sorted(unknown)}")
    return [
        recipe.case(world_size, layout)
        for world_size in world_sizes
        for recipe in _RECIPES
        if wanted is None or recipe.name in wanted
        for layout in layouts
        if layout in recipe.layouts
    ]
