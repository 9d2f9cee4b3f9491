"""One V1 dispatch with all that can follow it, and what it shall give, by the plainest of code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from cases import Case
from exercise import assert_same_bits, settle
from torch import Tensor

from moe_ep.compat import deep_ep

Results = dict[str, Tensor]

ALIGNMENT = 4
TAIL = 3
"""Rows more than arrive, in calls with num_worst_tokens."""


def make_scales(case: Case, rank: int) -> Tensor:
    """float32 ``[T, 3]``, column-major: scales of any number and strides are legal."""
    return case.values(rank, "scales", 3, case.tokens_by_rank[rank], dtype=torch.float32).t()


def make_bytes(case: Case, rank: int) -> Tensor:
    generator = case.generator(rank, "bytes")
    shape = case.tokens_by_rank[rank], 2 * case.hidden
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return raw.view(torch.float8_e4m3fn)


def weights_back(case: Case, rank: int, num_rows: int) -> Tensor:
    """For combine: not masked, as V1 adds up what it is given."""
    return case.values(rank, "weights back", num_rows, case.num_topk, dtype=torch.float32)


def run_v1(
    case: Case, group, async_finish: bool = False, config=None, device="cpu", **buffer_arguments
) -> Results:
    """On one rank; every result by name, on the CPU."""
    buffer = deep_ep.Buffer(group, 0, 0, explicitly_destroy=True, timeout_s=30, **buffer_arguments)
    settle(device)
    rank = buffer.rank
    mine = case.inputs(rank, device)
    options = {"config": config, "async_finish": async_finish}
    if async_finish:
        options |= {"previous_event": deep_ep.Buffer.capture(), "allocate_on_comm_stream": True}

    def done(event):
        assert isinstance(event, deep_ep.EventOverlap)
        assert (event.event is not None) == async_finish
        event.current_stream_wait() if async_finish else None
        settle(device)

    def scaled():
        return make_bytes(case, rank).to(device), make_scales(case, rank).to(device)

    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        mine.topk_idx, case.num_experts, **{k: v for k, v in options.items() if k != "config"}
    )
    done(event)
    assert per_node is None
    layout = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    results = {"per_rank": per_rank, "per_expert": per_expert, "in_rank": in_rank}

    topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
    out = buffer.dispatch(mine.x, **layout, **topk, expert_alignment=ALIGNMENT, **options)
    recv_x, recv_idx, recv_weights, counts, handle, event = out
    done(event)
    results |= {"recv_x": recv_x, "recv_idx": recv_idx, "recv_weights": recv_weights}
    results |= {"counts": torch.tensor(counts), "prefix": handle[0], "src_idx": handle[3]}

    rows = case.expert_rows(rank, len(recv_x), device)
    back_weights = weights_back(case, rank, len(rows)).to(device)
    for number, bias in enumerate((None, *_biases(mine.biases))):
        y, back, event = buffer.combine(rows, handle, back_weights, bias, **options)
        done(event)
        results |= {f"y{number}": y, f"weights_back{number}": back}
    y, back, event = buffer.combine(rows, handle, **options)
    done(event)
    assert back is None
    assert_same_bits(y, results["y0"], "combine without weights")

    # Again, by the handle: other values, another width and dtype.
    twice = torch.cat([mine.grad_y, mine.x], dim=1).float()
    again = buffer.dispatch(twice, handle=handle, **options)
    done(again[-1])
    assert again[1:5] == (None,) * 4
    results["again"] = again[0]
    (data, scales), *rest = buffer.dispatch(scaled(), handle=handle, **options)
    done(rest[-1])
    assert scales.is_contiguous()
    results |= {"again_bytes": data.view(torch.uint8), "again_scales": scales}

    # Without top-k, and with bytes and scales.
    (data, scales), *rest = buffer.dispatch(scaled(), **layout, **options)
    done(rest[-1])
    assert rest[0] is None and rest[1] is None
    results |= {
        "bytes": data.view(torch.uint8),
        "scales": scales,
        "counts_without_topk": torch.tensor(rest[2]),
    }

    # Fixed size; what lies in the tail must not matter.
    worst = sum(case.tokens_by_rank) + TAIL
    fixed = buffer.dispatch(mine.x, **layout, **topk, num_worst_tokens=worst, **options)
    done(fixed[-1])
    assert fixed[3] == [] and fixed[0].shape == (worst, case.hidden)
    arrived = len(recv_x)
    assert (fixed[1][arrived:].cpu() == -1).all() and (fixed[4][3][arrived:].cpu() == -1).all()
    results |= {
        "fixed_x": fixed[0][:arrived],
        "fixed_idx": fixed[1][:arrived],
        "fixed_weights": fixed[2][:arrived],
    }
    padded = torch.full((worst, case.hidden), float("nan"), dtype=case.dtype, device=device)
    padded[:arrived] = rows
    y, _, event = buffer.combine(padded, fixed[4], **options)
    done(event)
    results["fixed_y"] = y
    results |= {"places": handle[5], "before_channel": handle[2], "to_ranks": handle[1]}
    buffer.destroy()
    return {name: value.cpu() for name, value in results.items()}


def expected_v1(case: Case) -> list[Results]:
    """What `run_v1` shall return, by rank."""
    size, local = case.world_size, case.experts_per_rank
    inputs = [case.inputs(rank) for rank in range(size)]
    in_rank = [_in_rank(each.topk_idx, size, local) for each in inputs]
    # Of each rank: (source, token) of every row.
    rows_of = [
        [(s, t) for s in range(size) for t in range(len(in_rank[s])) if in_rank[s][t, rank]]
        for rank in range(size)
    ]
    expert_rows = [case.expert_rows(rank, len(rows_of[rank])) for rank in range(size)]
    row_weights = [weights_back(case, rank, len(rows_of[rank])) for rank in range(size)]
    prefix = torch.stack([mask.sum(0) for mask in in_rank]).cumsum(0).to(torch.int32)
    results = []
    for rank in range(size):
        mine = inputs[rank]
        taken = lambda values: _take(values, rows_of[rank])  # noqa: E731
        ids = taken([each.topk_idx for each in inputs]) - rank * local
        is_here = (ids >= 0) & (ids < local)
        ids = torch.where(is_here, ids, -1)
        weights = torch.where(is_here, taken([each.topk_weights for each in inputs]), 0.0)
        counts = torch.tensor([int((ids == e).sum()) for e in range(local)])
        result = {
            "per_rank": in_rank[rank].sum(0).to(torch.int32),
            "per_expert": torch.tensor(
                [int((mine.topk_idx == e).sum()) for e in range(case.num_experts)]
            ).int(),
            "in_rank": in_rank[rank],
            "recv_x": taken([each.x for each in inputs]),
            "recv_idx": ids,
            "recv_weights": weights,
            "counts": -(-counts // ALIGNMENT) * ALIGNMENT,
            "counts_without_topk": counts,
            "prefix": prefix,
            "places": in_rank[rank].cumsum(0, dtype=torch.int32).where(in_rank[rank], 0) - 1,
            "before_channel": torch.zeros((size, 1), dtype=torch.int32),
            "to_ranks": in_rank[rank].sum(0).to(torch.int32).unsqueeze(1),
            "src_idx": torch.tensor([t for _, t in rows_of[rank]], dtype=torch.int32),
            "again": taken([torch.cat([each.grad_y, each.x], dim=1).float() for each in inputs]),
            "bytes": taken([make_bytes(case, r).view(torch.uint8) for r in range(size)]),
            "scales": taken([make_scales(case, r) for r in range(size)]),
        }
        result |= {"again_bytes": result["bytes"], "again_scales": result["scales"]}
        result |= {f"fixed_{name}": result[f"recv_{name}"] for name in ("x", "idx", "weights")}
        for number, bias in enumerate((None, *_biases(mine.biases))):
            result[f"y{number}"] = _sums(case, rank, rows_of, expert_rows, bias)
            result[f"weights_back{number}"] = _weight_sums(case, rank, rows_of, row_weights)
        result["fixed_y"] = result["y0"]
        results.append(result)
    return results


def assert_v1(case: Case, results_by_rank: Iterable[Results]) -> None:
    for rank, (actual, wanted) in enumerate(zip(results_by_rank, expected_v1(case), strict=True)):
        assert sorted(actual) == sorted(wanted)
        for name, value in actual.items():
            assert_same_bits(value, wanted[name], f"{case}: rank {rank}: {name}")


def _biases(biases: tuple[Tensor, ...]) -> list:
    return [biases[0], biases]


def _in_rank(topk_idx: Tensor, size: int, local: int) -> Tensor:
    mask = torch.zeros((len(topk_idx), size), dtype=torch.bool)
    for token, ids in enumerate(topk_idx.tolist()):
        for expert in ids:
            if expert >= 0:
                mask[token, expert // local] = True
    return mask


def _take(values_by_rank: list[Tensor], rows: list[tuple[int, int]]) -> Tensor:
    if not rows:
        return values_by_rank[0][:0].contiguous()
    return torch.stack([values_by_rank[source][token] for source, token in rows])


def _sums(case: Case, owner: int, rows_of: list, expert_rows: list[Tensor], bias) -> Tensor:
    """float32: the biases, then ranks in ascending order; one rounding."""
    total = torch.zeros((case.tokens_by_rank[owner], case.hidden), dtype=torch.float32)
    if bias is not None:
        biases = bias if isinstance(bias, tuple) else (bias,)
        total = sum(each.float() for each in biases)
    started = torch.full((len(total),), bias is not None)
    for rank, rows in enumerate(rows_of):
        for row, (source, token) in enumerate(rows):
            if source == owner:
                value = expert_rows[rank][row].float()
                total[token] = total[token] + value if started[token] else value
                started[token] = True
    return total.to(case.dtype)


def _weight_sums(case: Case, owner: int, rows_of: list, row_weights: list[Tensor]) -> Tensor:
    total = torch.zeros((case.tokens_by_rank[owner], case.num_topk), dtype=torch.float32)
    for rank, rows in enumerate(rows_of):
        for row, (source, token) in enumerate(rows):
            if source == owner:
                total[token] += row_weights[rank][row]
    return total
