"""HybridEPBuffer: how a case runs on a rank, and what must come out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from elastic_cases import Mode, expected_combine, expert_rows, places, segments, sent, weights
from exercise import settle
from torch import Tensor

from moe_ep.compat.deep_ep.hybrid import HybridEPBuffer


@dataclass(frozen=True)
class Call:
    """by_map: routing as a map with probs, else ids with weights. room: rows beyond those needed, None for exact."""

    name: str
    permute: bool
    by_map: bool = True
    pad: int | None = None
    room: int | None = None
    scales: bool = False
    weights: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def mode(self) -> Mode:
        scales = "float32" if self.scales else None
        return Mode(self.name, expand=self.permute, alignment=self.pad, scales=scales, weights=self.weights)


CALLS = [
    Call("plain, map", permute=False),
    Call("plain, ids, scales", permute=False, by_map=False, scales=True),
    Call("plain, map, no probs", permute=False, weights=False),
    Call("permuted, map", permute=True),
    Call("permuted, map, padded", permute=True, pad=8),
    Call("permuted, ids, padded, scales", permute=True, by_map=False, pad=4, scales=True),
    Call("permuted, map, not blocking", permute=True, pad=4, room=8),
    Call("permuted, ids, no probs, not blocking", permute=True, by_map=False, room=5, weights=False),
]


def as_map(case: Case) -> Case:
    """The same routing with each token's experts in ascending order, as a map has them."""
    routing = []
    for rank in range(case.world_size):
        ids = case.topk_idx(rank).tolist()
        ascending = [sorted(e for e in row if e >= 0) for row in ids]
        routing.append([row + [-1] * (case.num_topk - len(row)) for row in ascending])
    return dataclasses.replace(case, routing=tuple(routing), idx_dtype=torch.int64)


def dense(case: Case, rank: int, values: Tensor) -> Tensor:
    """``[N, E]`` from ``values [N, K]``."""
    out = torch.zeros(case.tokens_by_rank[rank], case.num_experts, dtype=values.dtype)
    for token, ids in enumerate(case.topk_idx(rank).tolist()):
        for k, expert in enumerate(ids):
            if expert >= 0:
                out[token, expert] = values[token, k]
    return out


def routing_map(case: Case, rank: int) -> Tensor:
    return dense(case, rank, torch.ones(case.tokens_by_rank[rank], case.num_topk, dtype=torch.bool))


def run(case: Case, call: Call, group: Any, rank: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Dispatch, dispatch again by the handle, combine; results by name, on the CPU."""
    case = as_map(case) if call.by_map else case
    buffer = HybridEPBuffer(
        group=group,
        hidden_dim=case.hidden,
        max_num_of_tokens_per_rank=case.tokens_by_rank[rank],  # differs by rank
        num_local_experts=case.experts_per_rank,
    )
    routing = {"num_of_experts": case.num_experts, "topk_idx": case.topk_idx(rank).to(device)}
    if call.by_map:
        routing = {"routing_map": routing_map(case, rank).to(device)}
    results: dict[str, Any] = {}
    handle = None
    for what in ("x", "x again"):
        rows, scales = sent(case, call.mode, rank, what, device)
        rows = rows.view(torch.uint8) if call.scales else rows
        arguments = {"hidden": rows, "scaling_factor": scales, "handle": handle}
        if call.weights:
            of_tokens = weights(case, rank, what)
            values = dense(case, rank, of_tokens) if call.by_map else of_tokens
            arguments["probs" if call.by_map else "topk_weights"] = values.to(device)
        if handle is None:
            arguments |= routing
        prefix = "" if handle is None else "again "
        if call.permute:
            if handle is None and call.room is not None:
                arguments["num_permuted_tokens"] = num_rows(case, call, rank)
                arguments["non_blocking"] = True
            recv, probs, recv_scales, counts, handle = buffer.dispatch_with_permute(
                pad_multiple=call.pad, **arguments
            )
            results[f"{prefix}tokens_per_expert"] = counts
        else:
            recv, probs, recv_scales, handle = buffer.dispatch(**arguments)
        settle(device)
        results |= {f"{prefix}x": recv, f"{prefix}probs": probs, f"{prefix}scales": recv_scales}
    assert len(handle) == (11 if call.permute else 7)
    results["count"] = int(handle[3])
    results["local map"] = handle[4][: int(handle[3])]
    results["num_of_tokens_per_rank"] = handle[8 if call.permute else 5]
    if call.permute:
        results |= {"raw counts": handle[7], "overflow": handle[-1]}
    x, back = expert_rows(case, call.mode, rank, len(recv))
    back = None if not call.weights else back
    if call.permute:
        results["y"], results["combined probs"] = buffer.combine_with_unpermute(
            hidden=x.to(device),
            probs=None if back is None else back.to(device),
            handle=tuple(handle),
            pad_multiple=call.pad,
        )
    else:
        back = None if back is None else everyones(case, rank, back, len(recv)).to(device)
        results["y"], results["combined probs"] = buffer.combine(x.to(device), back, handle)
    settle(device)
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in results.items()}


def num_rows(case: Case, call: Call, rank: int) -> int:
    needed = sum(segments(case, call.mode, rank)[1]) if call.permute else len(places(case, call.mode, rank))
    return needed + (call.room or 0)


def everyones(case: Case, rank: int, back: Tensor, num_rows: int) -> Tensor:
    """``[n, E]`` with the numbers ``back [n, K]`` at the local experts of each row, and others elsewhere."""
    out = case.values(rank, "others", num_rows, case.num_experts, dtype=torch.float32)
    for i, place in enumerate(places(case, Mode("plain"), rank)):
        for k in place.ks:
            out[i, case.topk_idx(place.source)[place.token, k]] = back[i, k]
    return out


def expected(case: Case, call: Call) -> list[dict[str, Any]]:
    """What `run` must return on each rank."""
    case = as_map(case) if call.by_map else case
    ranks = range(case.world_size)
    returned = [expert_rows(case, call.mode, rank, num_rows(case, call, rank)) for rank in ranks]
    results = []
    for rank in ranks:
        found = places(case, call.mode, rank)
        counts, aligned, _ = segments(case, call.mode, rank)
        first = rank * case.experts_per_rank
        local_map = torch.zeros(len(found), case.experts_per_rank, dtype=torch.bool)
        for i, place in enumerate(found):
            local_map[i, case.topk_idx(place.source)[place.token, list(place.ks)].long() - first] = True
        result = {
            **expected_rows(case, call, rank, "x", ""),
            **expected_rows(case, call, rank, "x again", "again "),
            "count": len(found),
            "local map": local_map,
            "num_of_tokens_per_rank": case.tokens_by_rank[rank],
        }
        if call.permute:
            padded = torch.tensor(aligned, dtype=torch.int64)
            result |= {"tokens_per_expert": padded, "again tokens_per_expert": padded}
            result["raw counts"] = torch.tensor(counts, dtype=torch.int32)
            result["overflow"] = torch.zeros(1, dtype=torch.int32)
        combined = expected_combine(case, call.mode, rank, returned)
        result["y"] = combined["y"]
        result["combined probs"] = dense(case, rank, combined["topk_weights"]) if call.weights else None
        results.append(result)
    return results


def expected_rows(case: Case, call: Call, rank: int, what: str, prefix: str) -> dict[str, Any]:
    count = num_rows(case, call, rank)
    sources = [sent(case, call.mode, source, what) for source in range(case.world_size)]
    x = torch.zeros(count, sources[0][0].element_size() * case.hidden, dtype=torch.uint8)
    scales = torch.zeros(count, 2) if call.scales else None
    probs = torch.zeros((count,) if call.permute else (count, case.num_experts))
    for place in places(case, call.mode, rank):
        of_token = weights(case, place.source, what)
        for i, row in enumerate(place.rows):
            x[row] = sources[place.source][0][place.token].view(torch.uint8)
            if scales is not None:
                scales[row] = sources[place.source][1][place.token]
            all_of_token = dense(case, place.source, of_token)[place.token]
            probs[row] = of_token[place.token, place.ks[i]] if call.permute else all_of_token
    return {
        f"{prefix}x": x if call.scales else x.view(sources[0][0].dtype),
        f"{prefix}probs": probs if call.weights else None,
        f"{prefix}scales": scales,
    }
