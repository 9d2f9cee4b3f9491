"""Cases for the corners of the CUDA kernels: widths, numbers of choices and experts, imbalance, sizes, FP8.

They add to the standard cases of every backend (``cases.py``), which are small, what makes a kernel take another
path: rows of one 16-byte word or of many pipeline stages, more tokens than a grid holds at once, counts that differ by
orders of magnitude.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from cases import EXPERT, LAYOUTS, Case

from moe_ep import reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# (hidden, dtype): rows of 16 bytes, of an odd multiple of 16, of a model's width, of 32 and 64 KiB.
WIDTHS = [(8, BF16), (8, F16), (4, F32), (24, BF16), (12, F32), (1000, F16), (520, BF16)]
WIDTHS += [(7168, BF16), (7176, BF16), (7168, F32), (16384, BF16), (16384, F32)]
# Scales per row: 1, 1, 2 (the last block partial), 2, 17, 56.
FP8_WIDTHS = [16, 128, 144, 208, 2064, 7168]


def kernel_cases(world_size: int) -> list[Case]:
    """Every case of this file for ``world_size`` ranks."""
    return [*routing_cases(world_size), *row_cases(world_size)]


def routing_cases(world_size: int) -> list[Case]:
    """Those about which row goes where."""
    families = [choices, experts, imbalance, sizes, many_tokens]
    return [case for family in families for case in family(world_size)]


def row_cases(world_size: int) -> list[Case]:
    """Those about what a row is."""
    families = [widths, bit_patterns, fp8, no_tokens]
    return [case for family in families for case in family(world_size)]


def ragged(world_size: int, about: int) -> tuple[int, ...]:
    """A different number of tokens on each rank."""
    return tuple(about + about * (rank % 7) // 5 for rank in range(world_size))


def widths(world_size: int) -> Iterator[Case]:
    for hidden, dtype in WIDTHS:
        for layout in LAYOUTS:
            yield Case(
                f"hidden_{hidden}_{short(dtype)}",
                ragged(world_size, 6),
                hidden=hidden,
                num_experts=8 * world_size,
                num_topk=4,
                dtype=dtype,
                layout=layout,
                num_biases=hidden % 3,
            )


def choices(world_size: int) -> Iterator[Case]:
    """K from 1 to 32."""
    for num_topk in (1, 2, 3, 5, 9, 16, 31, 32):
        for layout in LAYOUTS:
            yield Case(
                f"choose_{num_topk}",
                ragged(world_size, 40),
                hidden=64,
                num_experts=-(-40 // world_size) * world_size,
                num_topk=num_topk,
                dtype=BF16,
                layout=layout,
                routing="masked" if num_topk % 2 else "uniform",
            )


def experts(world_size: int) -> Iterator[Case]:
    """One expert on each rank; a number that is no power of two; as many as there may be."""
    for per_rank in {1, min(129, 1024 // world_size), 1024 // world_size}:
        num_experts = per_rank * world_size
        for layout in LAYOUTS:
            yield Case(
                f"of_{num_experts}",
                ragged(world_size, 100),
                hidden=64,
                num_experts=num_experts,
                num_topk=min(32, num_experts),
                dtype=F16,
                layout=layout,
                routing="zipf",
            )


def imbalance(world_size: int) -> Iterator[Case]:
    """Everything to one rank or one expert; nearly all tokens on one rank."""
    common = {"hidden": 256, "num_experts": 8 * world_size, "dtype": BF16}
    crowd = tuple(1500 if rank == world_size - 1 else rank % 2 for rank in range(world_size))
    for layout in LAYOUTS:
        yield Case(
            "to_one_rank", (600,) * world_size, num_topk=4, routing="one_rank", layout=layout, **common
        )
        yield Case(
            "to_one_expert", (900,) * world_size, num_topk=2, routing="one_expert", layout=layout, **common
        )
        yield Case("from_one_rank", crowd, num_topk=4, layout=layout, **common)
        yield Case("from_one_rank_to_one", crowd, num_topk=8, routing="one_rank", layout=layout, **common)
    yield Case("same_experts_often", (300,) * world_size, num_topk=8, routing="same_experts", **common)


def bit_patterns(world_size: int) -> Iterator[Case]:
    """NaN payloads, infinities, subnormal numbers: what is moved keeps its bits."""
    for dtype in (BF16, F16, F32):
        for layout in LAYOUTS:
            yield Case(
                f"any_bits_{short(dtype)}",
                ragged(world_size, 7),
                hidden=2056,
                num_experts=4 * world_size,
                num_topk=3,
                dtype=dtype,
                layout=layout,
                payload="bits",
            )


def sizes(world_size: int) -> Iterator[Case]:
    """``max_recv_rows`` around what rank 0 needs, with the alignments of grouped matrix products."""
    for layout, alignment in (("expert", 1), ("expert", 16), ("expert", 128), ("rank", 1)):
        exact = Case(
            f"aligned_{alignment}",
            ragged(world_size, 30),
            hidden=64,
            num_experts=4 * world_size,
            dtype=BF16,
            layout=layout,
            expert_alignment=alignment,
            routing="masked",
        )
        yield exact
        needed = rows_needed(exact)
        for rows in (0, 1, needed - 1, needed, needed + 1, 3 * needed):
            yield replace(exact, name=f"aligned_{alignment}_room_for_{rows}", max_recv_rows=rows)


def rows_needed(case: Case, rank: int = 0) -> int:
    routing = [case.topk_idx(each) for each in range(case.world_size)]
    return reference.place(routing, case.num_experts, case.layout, case.expert_alignment)[rank].rows_needed


def fp8(world_size: int) -> Iterator[Case]:
    for i, hidden in enumerate(FP8_WIDTHS):
        common = Case(
            f"fp8_{hidden}",
            ragged(world_size, 9),
            hidden=hidden,
            num_experts=4 * world_size,
            dtype=(BF16, F16, F32)[i % 3],
            fp8=("tokens", "blockwise")[i % 2],
            fp8_backward="blockwise" if i % 2 else None,
        )
        yield common
        yield replace(common, layout="rank")
        yield replace(common, name=f"fp8_{hidden}_aligned", expert_alignment=(16, 128)[i % 2])
        yield replace(common, name=f"fp8_{hidden}_cut_off", max_recv_rows=20, num_biases=1)
        roomy = sum(common.tokens_by_rank) + 9
        yield replace(common, name=f"fp8_{hidden}_roomy", max_recv_rows=roomy, layout="rank")


def many_tokens(world_size: int) -> Iterator[Case]:
    """More than a grid holds at once, in short rows and in long ones; float32 rows, of which a window has room for half
    of what may be sent, all to one rank."""
    short_rows = Case(
        "many_short",
        ragged(world_size, 2500),
        hidden=16,
        num_experts=16 * world_size,
        num_topk=min(8, 16 * world_size),
        dtype=BF16,
        routing="masked",
    )
    long_rows = replace(short_rows, name="many_long", tokens_by_rank=ragged(world_size, 90), hidden=4096)
    to_one = replace(short_rows, name="many_to_one", dtype=F32, routing="one_rank", num_topk=4)
    for case in (short_rows, long_rows, replace(short_rows, name="many_float32", dtype=F32), to_one):
        yield case
        yield replace(case, layout="rank")


def ring_of_waits(world_size: int) -> Case:
    """Each rank's early tokens go to one peer and its late ones to another, in more rows than a window has room for.

    The next rank keeps every rank waiting for its second round until the one after has sent its own; a sender that
    waits for one peer must not keep its rows from another.
    """
    num_tokens, both, gap = 1000, 500, 300
    routing = []
    for rank in range(world_size):
        late, early = (rank + 1) % world_size, (rank + 2) % world_size
        tail = num_tokens - both - gap
        routing.append(((early, late),) * both + ((early, -1),) * gap + ((-1, late),) * tail)
    return Case(
        "ring_of_waits",
        (num_tokens,) * world_size,
        hidden=64,
        num_experts=world_size,
        num_topk=2,
        routing=tuple(routing),
    )


def no_tokens(world_size: int) -> Iterator[Case]:
    common = {"hidden": 7168, "num_experts": 4 * world_size, "num_topk": 4, "dtype": BF16}
    empty: list[Callable[[int], bool]] = [lambda _: True, lambda rank: rank == 0, lambda rank: rank % 2 == 1]
    for i, is_empty in enumerate(empty):
        tokens_by_rank = tuple(0 if is_empty(rank) else 5 for rank in range(world_size))
        for layout in LAYOUTS:
            yield Case(f"empty_ranks_{i}", tokens_by_rank, layout=layout, **common)
    for layout in EXPERT:
        yield Case("all_masked_wide", (5,) * world_size, routing="none", layout=layout, **common)
        yield Case(
            "all_masked_static", (5,) * world_size, routing="none", layout=layout, max_recv_rows=9, **common
        )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
