"""V2 dispatch and combine: cases, how one runs on a rank, and what deep_ep's contract says must come out of it.

What must come out is worked out pair by pair in plain loops, apart from moe_ep's own oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from exercise import settle
from torch import Tensor

from moe_ep.compat.deep_ep.elastic import ElasticBuffer
from moe_ep.compat.deep_ep.utils.event import EventHandle, EventOverlap

SPARE_TOKENS = 3
NAN = float("nan")
HANDLE_TENSORS = (
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "dst_buffer_slot_idx",
)
HANDLE_NUMBERS = ("num_recv_tokens", "num_expanded_tokens", "num_recv_tokens_per_expert_list")


@dataclass(frozen=True)
class Mode:
    """How a case is run. scales: None, "float32" or "int32" ones beside FP8 rows."""

    name: str
    expand: bool = False
    exact: bool = True
    alignment: int | None = None
    scales: str | None = None
    column_major: bool = False
    num_biases: int = 0
    one_by_one: bool = False
    weights: bool = True
    is_async: bool = False

    def __str__(self) -> str:
        return self.name


MODES = [
    Mode("plain"),
    Mode("plain, aligned counts, a bias", alignment=8, num_biases=1),
    Mode("plain, no sync", exact=False, num_biases=2, is_async=True),
    Mode("plain, no weights", weights=False),
    Mode("plain, scales", scales="float32"),
    Mode("plain, packed scales by columns", scales="int32", column_major=True, is_async=True),
    Mode("expand", expand=True),
    Mode("expand, aligned, two biases", expand=True, alignment=8, num_biases=2),
    Mode("expand, aligned, no sync", expand=True, alignment=4, exact=False),
    Mode("expand, scales by columns", expand=True, scales="float32", column_major=True, alignment=4),
    Mode("expand, no weights", expand=True, weights=False, exact=False),
    Mode("expand, one by one", expand=True, one_by_one=True, alignment=4),
    Mode("expand, one by one, a bias, no sync", expand=True, one_by_one=True, num_biases=1, exact=False),
]


def cases(world_size: int) -> list[Case]:
    def case(name: str, tokens: list[int], **options: Any) -> Case:
        return Case(name, tuple(tokens), dtype=torch.bfloat16, **options)

    ranks = range(world_size)
    return [
        case("uneven", [11 + 3 * (r % 3) for r in ranks], routing="masked"),
        case("odd ranks empty", [9 * (r % 2 == 0) for r in ranks], routing="zipf", num_topk=6),
        case("all empty", [0 for _ in ranks]),
        case("one expert", [7 for _ in ranks], routing="one_expert", idx_dtype=torch.int32),
        case("one rank", [5 + r for r in ranks], routing="one_rank", num_experts=32),
        case("no experts", [4 for _ in ranks], routing="none"),
        case("every expert", [6 for _ in ranks], num_experts=8, num_topk=8),
    ]


# ---- what goes in


def max_tokens(case: Case) -> int:
    return max(case.tokens_by_rank) + SPARE_TOKENS


def sent(
    case: Case, mode: Mode, rank: int, what: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """``what`` is sent: rows, and their scales."""
    num_tokens = case.tokens_by_rank[rank]
    if mode.scales is None:
        return case.values(rank, what, num_tokens, case.hidden).to(device), None
    generator = case.generator(rank, what)
    rows = torch.randint(0, 256, (num_tokens, case.hidden), generator=generator, dtype=torch.uint8)
    packs = torch.randint(-(2**31), 2**31, (2, num_tokens), generator=generator, dtype=torch.int32)
    scales = packs if mode.scales == "int32" else packs.view(torch.float32)
    # By columns, as some quantisers write them.
    return rows.view(torch.float8_e4m3fn).to(device), scales.to(device).t()


def weights(case: Case, rank: int, what: str) -> Tensor:
    return case.values(rank, what, case.tokens_by_rank[rank], case.num_topk, dtype=torch.float32)


def biases(case: Case, mode: Mode, rank: int) -> list[Tensor]:
    return [
        case.values(rank, f"bias {i}", case.tokens_by_rank[rank], case.hidden) for i in range(mode.num_biases)
    ]


# ---- on a rank


def run(case: Case, mode: Mode, group: Any, rank: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Dispatch, dispatch again by the handle with other values, combine; results by name, on the CPU."""
    buffer = ElasticBuffer(
        group,
        num_max_tokens_per_rank=max_tokens(case),
        hidden=case.hidden,
        num_topk=case.num_topk,
        allow_multiple_reduction=not mode.one_by_one,
        num_gpu_timeout_secs=30,
        explicitly_destroy=True,
    )
    layout = {"do_expand": mode.expand, "use_tma_aligned_col_major_sf": mode.column_major}
    call = {"async_with_compute_stream": mode.is_async}
    if mode.is_async:
        call |= {"previous_event": EventHandle(), "allocate_on_comm_stream": True}

    def finished(event: EventOverlap) -> None:
        assert (event.event is not None) == mode.is_async
        if mode.is_async:
            event.current_stream_wait()
        settle(device)

    stats = torch.full((case.experts_per_rank,), 5, dtype=torch.int32, device=device)
    rows, scales = sent(case, mode, rank, "x", device)
    recv, ids, row_weights, handle, event = buffer.dispatch(
        rows if scales is None else (rows, scales),
        topk_idx=case.topk_idx(rank).to(device),
        topk_weights=weights(case, rank, "weights").to(device) if mode.weights else None,
        cumulative_local_expert_recv_stats=stats,
        num_experts=case.num_experts,
        expert_alignment=mode.alignment,
        do_cpu_sync=mode.exact,
        **layout,
        **call,
    )
    finished(event)
    results = received("", recv, ids, row_weights, mode) | {"stats": stats}
    results |= {name: getattr(handle, name) for name in (*HANDLE_NUMBERS, *HANDLE_TENSORS)}

    rows, scales = sent(case, mode, rank, "x again", device)
    recv, ids, row_weights, same, event = buffer.dispatch(
        rows if scales is None else (rows, scales),
        topk_weights=weights(case, rank, "weights again").to(device) if mode.weights else None,
        handle=handle,
        **layout,
        **call,
    )
    finished(event)
    assert same is handle
    results |= received("again ", recv, ids, row_weights, mode)

    num_rows = (recv if scales is None else recv[0]).shape[0]
    x, back = expert_rows(case, mode, rank, num_rows)
    bias = [each.to(device) for each in biases(case, mode, rank)]
    y, topk_weights, event = buffer.combine(
        x.to(device),
        handle,
        topk_weights=back.to(device) if mode.weights else None,
        bias=None if not bias else bias[0] if len(bias) == 1 else tuple(bias),
        **call,
    )
    finished(event)
    results |= {"y": y, "topk_weights": topk_weights, "recv_src_metadata": handle.recv_src_metadata}
    settle(device)
    buffer.destroy()
    buffer.destroy()
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in results.items()}


def received(
    prefix: str,
    recv: Tensor | tuple[Tensor, Tensor],
    ids: Tensor | None,
    row_weights: Tensor | None,
    mode: Mode,
) -> dict[str, Any]:
    rows, scales = recv if mode.scales else (recv, None)
    if scales is not None and mode.column_major and len(scales):
        assert scales.stride() == (1, -(-len(scales) // 4) * 4)
    elif scales is not None and not mode.column_major:
        assert scales.is_contiguous()
    return {
        f"{prefix}x": rows,
        f"{prefix}scales": scales,
        f"{prefix}ids": ids,
        f"{prefix}weights": row_weights,
    }


def expert_rows(case: Case, mode: Mode, rank: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """What goes back: rows, and a number for each weight. NaN where there is no token: it must not be read."""
    x = case.values(rank, "expert rows", num_rows, case.hidden)
    shape = (num_rows,) if mode.expand else (num_rows, case.num_topk)
    back = case.values(rank, "back", *shape, dtype=torch.float32)
    holds_token = torch.zeros(num_rows, dtype=torch.bool)
    for place in places(case, mode, rank):
        holds_token[list(place.rows)] = True
    x[~holds_token] = NAN
    back[~holds_token] = NAN
    return x, back


# ---- what must come out


@dataclass(frozen=True)
class Place:
    """A (token, rank) pair on the rank: the token's columns ``ks`` whose experts are here, and their rows."""

    source: int
    token: int
    ks: tuple[int, ...]
    rows: tuple[int, ...]  # expand: one for each of ks; plain: one


def segments(case: Case, mode: Mode, rank: int) -> tuple[list[int], list[int], list[int]]:
    """Of each local expert: tokens, these aligned, and the aligned ones before it."""
    experts = range(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
    all_ids = torch.cat([case.topk_idx(source).flatten() for source in range(case.world_size)])
    counts = [int((all_ids == expert).sum()) for expert in experts]
    alignment = mode.alignment or 1
    aligned = [-(-count // alignment) * alignment for count in counts]
    return counts, aligned, [sum(aligned[:i]) for i in range(len(aligned))]


def places(case: Case, mode: Mode, rank: int) -> list[Place]:
    experts = range(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
    _, _, next_row = segments(case, mode, rank)
    found: list[Place] = []
    for source in range(case.world_size):
        for token, ids in enumerate(case.topk_idx(source).tolist()):
            ks = tuple(k for k, expert in enumerate(ids) if expert in experts)
            if not ks:
                continue
            rows = [len(found)]
            if mode.expand:
                rows = []
                for k in ks:
                    rows.append(next_row[ids[k] - experts[0]])
                    next_row[ids[k] - experts[0]] += 1
            found.append(Place(source, token, ks, tuple(rows)))
    return found


def expected(case: Case, mode: Mode) -> list[dict[str, Any]]:
    """What `run` must return on each rank."""
    results = [expected_dispatch(case, mode, rank) for rank in range(case.world_size)]
    returned = [expert_rows(case, mode, rank, result["x"].shape[0]) for rank, result in enumerate(results)]
    for rank, result in enumerate(results):
        result |= expected_combine(case, mode, rank, returned)
    return results


def expected_dispatch(case: Case, mode: Mode, rank: int) -> dict[str, Any]:
    num_ranks, num_local, num_topk, room = (
        case.world_size,
        case.experts_per_rank,
        case.num_topk,
        max_tokens(case),
    )
    counts, aligned, starts = segments(case, mode, rank)
    found = places(case, mode, rank)
    alignment = mode.alignment or 1
    most_rows = num_ranks * room * min(num_topk, num_local) + (alignment - 1) * num_local
    most_rows = -(-most_rows // alignment) * alignment
    num_rows = sum(aligned) if mode.expand else len(found)
    num_pairs = len(found)
    if not mode.exact:
        num_rows, num_pairs = most_rows if mode.expand else num_ranks * room, num_ranks * room
    metadata = torch.full((num_pairs, 2 + num_topk), -1, dtype=torch.int32)
    for i, place in enumerate(found):
        metadata[i, 0] = place.source * room + place.token
        metadata[i, 1] = place.source * num_topk + place.ks[-1]
        if mode.expand:
            metadata[i, [2 + k for k in place.ks]] = torch.tensor(place.rows, dtype=torch.int32)
    from_rank = torch.tensor([sum(p.source == s for p in found) for s in range(num_ranks)], dtype=torch.int32)
    ends = [start + count for start, count in zip(starts, counts, strict=True)] if mode.expand else [
        start + size for start, size in zip(starts, aligned, strict=True)
    ]  # fmt: skip
    return {
        **expected_rows(case, mode, rank, num_rows, "x", "weights", ""),
        **expected_rows(case, mode, rank, num_rows, "x again", "weights again", "again "),
        "stats": torch.tensor(counts, dtype=torch.int32) + 5,
        "num_recv_tokens": num_pairs,
        "num_expanded_tokens": sum(aligned) if mode.exact else most_rows,
        "num_recv_tokens_per_expert_list": aligned if mode.exact else [],
        "psum_num_recv_tokens_per_scaleup_rank": from_rank.cumsum(0).int(),
        "psum_num_recv_tokens_per_expert": torch.tensor(ends, dtype=torch.int32),
        "num_unaligned_recv_tokens_per_expert": torch.tensor(counts, dtype=torch.int32),
        "dst_buffer_slot_idx": expected_slots(case, rank),
        "recv_src_metadata": metadata,
    }


def expected_rows(
    case: Case, mode: Mode, rank: int, num_rows: int, rows_name: str, weights_name: str, prefix: str
) -> dict[str, Any]:
    rows_of, scales_of = zip(
        *(sent(case, mode, source, rows_name) for source in range(case.world_size)), strict=True
    )
    x = torch.zeros(num_rows, rows_of[0].element_size() * case.hidden, dtype=torch.uint8)
    scales = None if mode.scales is None else torch.zeros(num_rows, 2, dtype=scales_of[0].dtype)
    ids = torch.full((num_rows, case.num_topk), -1, dtype=case.idx_dtype)
    row_weights = torch.zeros((num_rows,) if mode.expand else (num_rows, case.num_topk))
    for place in places(case, mode, rank):
        of_token = weights(case, place.source, weights_name)[place.token]
        for i, row in enumerate(place.rows):
            x[row] = rows_of[place.source][place.token].view(torch.uint8)
            if scales is not None:
                scales[row] = scales_of[place.source][place.token]
            row_weights[row] = of_token[place.ks[i]] if mode.expand else of_token
        if not mode.expand:
            chosen = case.topk_idx(place.source)[place.token, list(place.ks)]
            ids[place.rows[0], list(place.ks)] = chosen - rank * case.experts_per_rank
    return {
        f"{prefix}x": x.view(rows_of[0].dtype),
        f"{prefix}scales": scales,
        f"{prefix}ids": None if mode.expand else ids,
        f"{prefix}weights": row_weights if mode.weights else None,
    }


def expected_slots(case: Case, rank: int) -> Tensor:
    slots = torch.full((case.tokens_by_rank[rank], case.num_topk), -1, dtype=torch.int32)
    so_far = [0] * case.world_size
    for token, ids in enumerate(case.topk_idx(rank).tolist()):
        last_k = {expert // case.experts_per_rank: k for k, expert in enumerate(ids) if expert >= 0}
        for destination, k in last_k.items():
            slots[token, k] = rank * max_tokens(case) + so_far[destination]
            so_far[destination] += 1
    return slots


def expected_combine(
    case: Case, mode: Mode, rank: int, returned: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """The numerics of V2: float32, in ascending k inside a rank, ranks by their last k."""
    num_tokens = case.tokens_by_rank[rank]
    terms: list[list[tuple[int, Tensor]]] = [[] for _ in range(num_tokens)]  # (order, term)
    back = torch.zeros(num_tokens, case.num_topk)
    for there in range(case.world_size):
        x, numbers = returned[there]
        for place in places(case, mode, there):
            if place.source != rank:
                continue
            for i, k in enumerate(place.ks):
                back[place.token, k] = numbers[place.rows[i]] if mode.expand else numbers[place.rows[0], k]
            rows = [x[row].float() for row in place.rows]
            if mode.one_by_one:
                terms[place.token] += zip(place.ks, rows, strict=True)
            else:
                terms[place.token].append((place.ks[-1], add(rows).to(case.dtype).float()))
    y = torch.zeros(num_tokens, case.hidden, dtype=case.dtype)
    for token in range(num_tokens):
        first = [bias[token].float() for bias in biases(case, mode, rank)]
        in_order = [term for _, term in sorted(terms[token], key=lambda pair: pair[0])]
        if first or in_order:
            y[token] = add([*first, *in_order]).to(case.dtype)
    return {"y": y, "topk_weights": back if mode.weights else None}


def add(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
