"""What V1's host does around the kernels, on a CPU: one rank, whose plans leave behind what csrc/nvlink's would."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cases import Case
from v1_exercise import assert_v1, run_v1

from moe_ep.backends.virtual import VirtualBackend
from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep import normal, normal_plan
from moe_ep.testing import run_ranks

ALONE = {"hidden": 4, "max_tokens_per_rank": 1, "num_experts": 1, "num_topk": 1}


def numbers_at(address: int, count: int, kind: type = ctypes.c_int32) -> ctypes.Array:
    return (kind * count).from_address(address)


@pytest.fixture(autouse=True)
def plans(monkeypatch) -> list[int]:
    """The tokens of each plan with notes, in order."""
    made: list[int] = []
    sources: dict[int, torch.Tensor] = {}
    plan_of_cpu = VirtualBackend.plan

    def plan(self, ids, spec, num_sms=None, meanwhile=None, notes=None):
        if notes is None:
            return plan_of_cpu(self, ids, spec, num_sms, meanwhile)
        num_tokens = len(ids)
        made.append(num_tokens)
        if spec.max_recv_rows is None:
            host = numbers_at(notes.host, 1 + notes.num_experts, ctypes.c_int64)
            host[0] = num_tokens
            host[1:] = numbers_at(notes.per_expert, notes.num_experts)[:]
        numbers_at(notes.before, 2)[:] = [0, numbers_at(notes.per_rank, 1)[0]]
        if num_tokens > notes.max_tokens:
            ids = ids[:0]
        goes = ids[:, 0] >= 0
        if len(ids):
            places = torch.where(goes, goes.cumsum(0) - 1, -1)
            numbers_at(notes.places, len(ids))[:] = places.tolist()
        state = plan_of_cpu(self, ids, spec, num_sms, meanwhile)
        table = torch.full((spec.max_tokens_per_rank,), -1, dtype=torch.int32)
        table[: int(goes.sum())] = goes.nonzero().flatten().int()
        sources[id(state[0])] = table
        return state

    monkeypatch.setattr(VirtualBackend, "plan", plan)
    monkeypatch.setattr(
        VirtualBackend,
        "table",
        lambda _self, name, state, length: {"sources": sources[id(state[0])]}[name][:length],
        raising=False,
    )
    monkeypatch.setattr(normal.NormalMode, "_has_kernels", lambda _self, _x: True)
    monkeypatch.setattr(normal_plan, "_pinned", lambda length: torch.zeros(length, dtype=torch.int64))
    kernels = SimpleNamespace(nvlink=SimpleNamespace(Notes=SimpleNamespace))
    monkeypatch.setattr(normal_plan, "_extension", SimpleNamespace(load=lambda: kernels))
    return made


@pytest.mark.parametrize("routing", ["uniform", "masked", "none"])
def test_every_mode(routing, plans):
    case = Case(
        "host",
        (7,),
        num_experts=8,
        num_topk=3,
        hidden=32,
        num_biases=2,
        dtype=torch.bfloat16,
        routing=routing,
        idx_dtype=torch.int32 if routing == "masked" else torch.int64,
    )
    assert_v1(case, run_ranks(1, lambda comm: run_v1(case, comm._impl.group), **ALONE))
    assert plans == [7, 7, 7]


def test_a_plan_of_too_many_tokens_is_made_again_with_more_room(plans):
    def fn(comm):
        buffer = deep_ep.Buffer(comm._impl.group)
        for num_tokens in (3, 500, 0, 20):
            x = torch.randn(num_tokens, 16).bfloat16()
            topk_idx = torch.rand(num_tokens, 8).topk(2, dim=1).indices
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 8)
            weights = torch.ones(num_tokens, 2)
            out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, topk_idx, weights)
            assert torch.equal(out[0], x) and sum(out[3]) == 2 * num_tokens

    run_ranks(1, fn, **ALONE)
    assert plans == [3, 500, 500, 0, 20]
