"""A low-latency dispatch and combine, and what they shall give, by the plainest of code."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from cases import Case, RankInputs
from exercise import assert_same_bits, settle
from torch import Tensor

from moe_ep.compat import deep_ep

Results = dict[str, Tensor]

FORMATS = {
    "bfloat16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8_rounded": {"use_fp8": True, "round_scale": True},
    "fp8_ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@dataclass(frozen=True)
class Way:
    """How the two are called. masked: ranks that take no part."""

    fmt: str = "bfloat16"
    hook: bool = False
    async_finish: bool = False
    zero_copy: bool = False
    out: bool = False
    masked: tuple[int, ...] = ()

    def without_masked(self, case: Case, rank: int) -> Tensor:
        """The experts [T, K] of a rank's tokens that are there."""
        ids = case.topk_idx(rank)
        if rank in self.masked:
            return torch.full_like(ids, -1)
        for gone in self.masked:
            ids = torch.where(ids // case.experts_per_rank == gone, -1, ids)
        return ids


WAYS = [
    Way(),
    Way("fp8", hook=True, out=True),
    Way("fp8_rounded", async_finish=True, zero_copy=True),
    Way("fp8_ue8m0", hook=True, zero_copy=True),
]


def room(case: Case) -> int:
    """T of the call: more than any rank has."""
    return max(case.tokens_by_rank) + 2


@functools.lru_cache(maxsize=16)
def experts_output(case: Case, rank: int) -> Tensor:
    shape = case.experts_per_rank, case.world_size * room(case), case.hidden
    return case.values(rank, "experts", *shape, dtype=torch.bfloat16)


def run_low_latency(case: Case, buffer: deep_ep.Buffer, way: Way = Way(), device: str = "cpu") -> Results:
    """One dispatch and combine of this rank. The results are on the CPU."""
    rank = buffer.rank
    mine = case.inputs(rank, device)
    # All copies to the device come first: they would hold up other virtual ranks.
    rows = experts_output(case, rank).to(device)
    settle(mine.x.device)
    results = call_low_latency(case, buffer, way, mine, rows)
    settle(mine.x.device)
    return {name: value.cpu() for name, value in results.items()}


def call_low_latency(
    case: Case, buffer: deep_ep.Buffer, way: Way, mine: RankInputs, experts_rows: Tensor
) -> Results:
    """The calls alone, whose host does not wait for a device."""
    device = mine.x.device
    stats = torch.full((case.experts_per_rank,), 7, dtype=torch.int32, device=device)
    finish = {"async_finish": way.async_finish, "return_recv_hook": way.hook}

    def received(event, hook):
        assert (hook is not None) == way.hook
        hook() if way.hook else None
        assert (event.event is not None) == way.async_finish
        event.current_stream_wait() if way.async_finish else None

    packed, counts, handle, event, hook = buffer.low_latency_dispatch(
        mine.x, mine.topk_idx, room(case), case.num_experts, stats, **FORMATS[way.fmt], **finish
    )
    received(event, hook)
    assert handle[2:] == (room(case), case.hidden, case.num_experts)
    results = {"counts": counts, "stats": stats, "src_info": handle[0], "layout_range": handle[1]}
    if way.fmt == "bfloat16":
        results["rows"] = packed
    else:
        data, scales = packed
        assert scales.stride(1) == 1 and scales.stride(2) == scales.shape[1]
        results |= {"rows": data.view(torch.uint8), "scales": scales}

    # What no token has must not be read.
    is_row = torch.arange(experts_rows.shape[1], device=device) < counts.unsqueeze(1)
    rows = torch.where(is_row.unsqueeze(2), experts_rows, float("nan"))
    if way.zero_copy:
        buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = rows
        rows = torch.full_like(rows, float("nan"))
    out = torch.empty(len(mine.x), case.hidden, dtype=torch.bfloat16, device=device) if way.out else None
    y, event, hook = buffer.low_latency_combine(
        rows, mine.topk_idx, mine.topk_weights, handle, zero_copy=way.zero_copy, out=out, **finish
    )
    received(event, hook)
    assert out is None or y.data_ptr() == out.data_ptr()
    results["y"] = y
    return results


def assert_low_latency(case: Case, by_rank: dict[int, Results], way: Way) -> None:
    """``by_rank``: of those that took part."""
    for rank, actual in by_rank.items():
        wanted = _expected(case, rank, way)
        counts = wanted["counts"].tolist()
        assert sorted(actual) == sorted(wanted)
        for name, value in actual.items():
            want = wanted[name]
            if name in ("rows", "scales", "src_info"):  # only the first rows of each expert mean anything
                value = torch.cat([value[e, :count] for e, count in enumerate(counts)])
                want = torch.cat([want[e, :count] for e, count in enumerate(counts)])
            assert_same_bits(value, want, f"{case} {way}: rank {rank}: {name}")


def _expected(case: Case, rank: int, way: Way) -> Results:
    size, local, capacity = case.world_size, case.experts_per_rank, case.world_size * room(case)
    rows_of = _places(case, rank, way)
    payload = [_payload(case.inputs(source).x, way.fmt) for source in range(size)]
    result = {"counts": torch.tensor([len(rows) for rows in rows_of], dtype=torch.int32)}
    result["stats"] = result["counts"] + 7
    result["src_info"] = torch.zeros((local, capacity), dtype=torch.int32)
    result["layout_range"] = torch.zeros((local, size), dtype=torch.int64)
    for part, name in enumerate(("rows", "scales")[: len(payload[0])]):
        result[name] = payload[0][part].new_zeros((local, capacity, payload[0][part].shape[1]))
    for expert, rows in enumerate(rows_of):
        for place, (source, token) in enumerate(rows):
            result["src_info"][expert, place] = token
            for part, name in enumerate(("rows", "scales")[: len(payload[0])]):
                result[name][expert, place] = payload[source][part][token]
        for source in range(size):
            mine = [place for place, (s, _) in enumerate(rows) if s == source]
            begin = sum(s < source for s, _ in rows)
            result["layout_range"][expert, source] = (begin << 32) | len(mine)
    result["y"] = _sums(case, rank, way)
    return result


def _places(case: Case, rank: int, way: Way) -> list[list[tuple[int, int]]]:
    """(source, token) of each row of each local expert: by source, then token."""
    rows_of = []
    for expert in range(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank):
        rows = []
        for source in range(case.world_size):
            ids = way.without_masked(case, source)
            rows += [(source, token) for token in range(len(ids)) if expert in ids[token].tolist()]
        rows_of.append(rows)
    return rows_of


def _sums(case: Case, owner: int, way: Way) -> Tensor:
    """A rank's rows weighted by ascending k in float32 and rounded; then ranks ascending in float32, and rounded."""
    mine = case.inputs(owner)
    ids = way.without_masked(case, owner)
    total = torch.zeros((len(ids), case.hidden), dtype=torch.float32)
    for rank in range(case.world_size):
        rows, places = experts_output(case, rank), _places(case, rank, way)
        for token, choices in enumerate(ids.tolist()):
            partial = torch.zeros(case.hidden)
            for k, expert in enumerate(choices):
                if expert >= 0 and expert // case.experts_per_rank == rank:
                    local = expert % case.experts_per_rank
                    row = rows[local, places[local].index((owner, token))]
                    partial += mine.topk_weights[token, k] * row.float()
            total[token] += partial.bfloat16().float()
    return total.bfloat16()


def _payload(x: Tensor, fmt: str) -> tuple[Tensor, ...]:
    """The row as it travels: by blocks of 128, amax at least 1e-4, scale amax / 448."""
    if fmt == "bfloat16":
        return (x,)
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty((len(x), x.shape[1] // 128), dtype=torch.float32)
    for block in range(scales.shape[1]):
        columns = slice(128 * block, 128 * (block + 1))
        amax = x[:, columns].float().abs().amax(1).clamp(min=1e-4)
        scale = amax * torch.tensor(1 / 448)
        inverse = torch.tensor(448.0) / amax
        if fmt != "fp8":
            scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
            inverse = 1 / scale
        data[:, columns] = (x[:, columns].float() * inverse.unsqueeze(1)).clamp(-448, 448).to(data.dtype)
        scales[:, block] = scale
    if fmt == "fp8_ue8m0":
        exponents = (torch.log2(scales) + 127).to(torch.int64).unflatten(1, (-1, 4))
        scales = (exponents << torch.tensor([0, 8, 16, 24])).sum(2).to(torch.int32)
    return data.view(torch.uint8), scales


def renamed(case: Case, seed: int) -> Case:
    """The same shapes with other numbers."""
    return replace(case, seed=seed)
