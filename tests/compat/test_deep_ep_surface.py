"""What can be imported as deep_ep; configurations, events and helpers."""

import importlib
import random
import subprocess
import sys

import pytest
import torch
from processes import run_gloo

from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep import Config, EventHandle, EventOverlap
from moe_ep.compat.deep_ep.config import low_latency_rdma_size_hint
from moe_ep.compat.deep_ep.fp8 import quantize
from moe_ep.compat.deep_ep.utils import comm, envs, gate, refs, semantic, testing
from moe_ep.compat.deep_ep.utils import math as ep_math
from moe_ep.errors import BackendUnavailable, InvalidInput

_PROGRAM = """
import sys
import moe_ep
assert not any(name.startswith("moe_ep.compat") for name in sys.modules), "imported by those who want it"
from moe_ep.compat.deep_ep import register
register()
register()
import deep_ep, deep_ep.utils.refs
from deep_ep import Buffer, Config, ElasticBuffer, EPHandle, EventHandle, EventOverlap, HybridEPBuffer, topk_idx_t
from deep_ep.buffers.elastic import ElasticBuffer as Elastic
from deep_ep.buffers.legacy import Buffer as Legacy
from deep_ep.utils import EventHandle as Handle, EventOverlap as Overlap
from deep_ep.utils.envs import init_dist
from deep_ep.utils.math import align
from deep_ep.utils.testing import bench, bench_kineto
from deep_ep._C import EventHandle as InExtension, is_sm90_compiled
from deep_ep_cpp import Config as InV1, get_low_latency_rdma_size_hint
from deep_ep.utils.gate import get_unbalanced_scores
import moe_ep.compat.deep_ep as ours
assert deep_ep is ours and Legacy is Buffer and Elastic is ElasticBuffer
assert InExtension is EventHandle and InV1 is Config and is_sm90_compiled()
assert Handle is EventHandle and Overlap is EventOverlap and align(5, 4) == 8
assert sys.modules["deep_ep.utils.math"] is sys.modules["moe_ep.compat.deep_ep.utils.math"]
"""


def test_registered_it_is_deep_ep():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_deep_ep_is_not_replaced_unasked(monkeypatch):
    other = type(sys)("deep_ep")
    monkeypatch.setattr(sys, "modules", sys.modules | {"deep_ep": other, "deep_ep.utils": other})
    with pytest.raises(InvalidInput, match="already"):
        deep_ep.register()
    assert deep_ep.register(replace=True) is deep_ep
    assert importlib.import_module("deep_ep.utils") is deep_ep.utils


def test_sizes_are_deep_eps():
    config = Config(20, 6, 256, 6, 128)
    sizes = [config.get_nvl_buffer_size_hint(2 * 7168, ranks) for ranks in (2, 4, 8)]
    assert [size >> 20 for size in sizes] == [80, 160, 320]
    assert all(size % 128 == 0 for size in sizes)
    assert config.get_rdma_buffer_size_hint(2 * 7168, 8) == 0
    # rdma_recv 128, rounded up to a multiple of 6, is 132.
    assert config.get_rdma_buffer_size_hint(2 * 7168, 16) == ep_math.align(
        10 * 2 * (144 + 2 * 132 * (2 * 7168 + 8 + 128 * 16 + 16)), 128
    )
    hints = [low_latency_rdma_size_hint(128, 7168, 8, experts) / 2**20 for experts in (256, 288)]
    assert [int(hint) for hint in hints] == [1820, 2047]


def test_configs_of_deep_ep_and_their_limits():
    assert deep_ep.topk_idx_t == torch.int64
    sends = [deep_ep.Buffer.get_dispatch_config(r).num_max_nvl_chunked_send_tokens for r in (2, 4, 8)]
    assert sends == [24, 6, 6]
    sends = [deep_ep.Buffer.get_combine_config(r).num_max_nvl_chunked_send_tokens for r in (2, 4, 8)]
    assert sends == [10, 9, 4]
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(24)
        assert deep_ep.Buffer.get_dispatch_config(8).num_sms == 24
        with pytest.raises(InvalidInput, match="even"):
            deep_ep.Buffer.set_num_sms(23)
    finally:
        deep_ep.Buffer.set_num_sms(before)
    with pytest.raises(InvalidInput, match="3 ranks"):
        deep_ep.Buffer.get_dispatch_config(3)
    for bad in [(-2,), (20, 0), (20, 8, 8), (20, 6, 256, 0)]:
        with pytest.raises(InvalidInput):
            Config(*bad)
    assert Config(20, 6, 256, 9, 10).num_max_rdma_chunked_recv_tokens == 18  # a multiple of what is sent


def test_events_wait_any_number_of_times_and_run_their_hook_once():
    runs = []
    event = EventOverlap(EventHandle(), extra_tensors=(torch.ones(1),))
    event.register_hook_after_wait(lambda: runs.append(1))
    with pytest.raises(InvalidInput, match="one at a time"):
        event.register_hook_after_wait(lambda: None)
    event.current_stream_wait()
    with event:
        assert runs == [1]
    assert runs == [1] and event.event is not None
    with event(release_handle=True) as same:
        assert same is event and event.event is not None
    assert event.event is None and event.extra_tensors is None
    with event:  # nothing to wait for, and no error
        pass
    with pytest.raises(InvalidInput, match="synchronous"):
        event.current_stream_wait()


def test_small_mathematics():
    assert (ep_math.ceil_div(7, 4), ep_math.align(8, 4), ep_math.safe_div(0, 0), ep_math.safe_div(3, 2)) == (
        2,
        8,
        0,
        1.5,
    )
    with pytest.raises(ZeroDivisionError):
        ep_math.safe_div(1, 0)
    pair = torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)
    assert ep_math.count_bytes(pair, None, [pair[0]]) == 12 + 4 + 12
    x = torch.randn(50)
    assert abs(ep_math.calc_diff(x, x)) < 1e-12 and ep_math.calc_diff(x, -x) > 0.1
    ids = torch.tensor([[3, 1, 3, -1], [-1, -1, -1, -1], [0, 2, 1, 0]])
    ep_math.inplace_unique(ids, 4)
    assert ids.tolist() == [[3, 1, -1, -1], [-1] * 4, [2, 1, 0, -1]]
    scores = ep_math.create_grouped_scores(torch.ones(2, 6), torch.tensor([[0, 2], [1, 1]]), 3)
    assert scores.tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]
    words = torch.tensor([1, 2, 3], dtype=torch.int32)
    assert ep_math.hash_tensor(words) == 6
    assert ep_math.hash_tensors(words, None, (words, words)) == 6


@pytest.mark.parametrize("width", [128, 512, 200])
def test_fp8_there_and_back(width):
    x = torch.randn(9, width, dtype=torch.bfloat16)
    x[0] = 0
    for data, scales in (
        ep_math.per_token_cast_to_fp8(x),
        quantize(x, rounded=False),
        quantize(x, rounded=True),
    ):
        assert data.shape == x.shape and scales.shape == (9, -(-width // 128))
        back = ep_math.per_token_cast_back(data, scales)
        assert ep_math.calc_diff(back, x) < 1e-3
        assert (back[0] == 0).all()
    assert (scales.frexp().mantissa == 0.5).all()
    if width == 512:
        packed = ep_math.pack_ue8m0(scales)
        assert packed.shape == (9, 1) and packed.dtype == torch.int32
        assert torch.equal(ep_math.unpack_ue8m0(packed), scales)
        assert torch.equal(ep_math.per_token_cast_back(data, packed), back)
    empty = torch.empty(0, width).to(torch.float8_e4m3fn)
    assert ep_math.per_token_cast_back(empty, torch.empty(0, 1)).shape == (0, width)


def assert_imbalance(tokens_by_rank, ratio):
    if len(tokens_by_rank) > 1:
        others = tokens_by_rank[1:]
        assert others.max() - others.min() <= 1
        assert abs(tokens_by_rank[0] / others.mean() - ratio) < 0.02


@pytest.mark.parametrize(("ratio", "ranks"), [(1.0, 8), (2.0, 8), (4.0, 4), (1.0, 1)])
def test_precise_imbalance(ratio, ranks):
    torch.manual_seed(3)
    tokens, experts, topk = 2000, 64, 6
    count = gate.generate_rank_count(tokens, experts, ranks, topk, ratio)
    assert (count.sum(1) == topk).all()
    assert_imbalance((count > 0).sum(0).float(), ratio)
    scores = gate.get_unbalanced_scores(tokens, experts, ranks, topk, ratio, True)
    chosen = scores.topk(topk, dim=1).indices // (experts // ranks)
    held = torch.zeros(tokens, ranks).scatter_(1, chosen, 1.0).sum(0)
    assert_imbalance(held, ratio)
    with pytest.raises(InvalidInput, match="at least 1"):
        gate.generate_rank_count(tokens, experts, ranks, topk, 0.5)
    with pytest.raises(InvalidInput, match="add up to"):
        gate.generate_topk_idx(count, tokens, experts, ranks, topk + 1)


def test_random_imbalance():
    torch.manual_seed(4)
    scores = gate.get_unbalanced_scores(4000, 64, 8, 6, 1.5, False)
    chosen = scores.topk(6, dim=1).indices // 8
    held = torch.zeros(4000, 8).scatter_(1, chosen, 1.0).sum(0)
    assert abs(held[0] / held[1:].mean() - 1.5) < 0.1


def test_bench_and_its_words():
    calls = []
    average, least, most = testing.bench(lambda: calls.append(1), num_warmups=2, num_tests=5)
    assert len(calls) == 7 and 0 <= least <= average <= most
    with pytest.raises(InvalidInput, match="num_tests"):
        testing.bench(lambda: None, num_tests=1)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="GPU"):
            testing.bench_kineto(lambda: None, "kernel")
    assert semantic.value_or(None, 3) == 3 and semantic.value_or(0, 3) == 0
    with pytest.raises(NotImplementedError, match="NCCL"):
        comm.get_nccl_comm_handle(None)


def test_weak_cache_keeps_nothing_alive():
    class Thing:
        calls = 0

        @semantic.weak_lru(maxsize=None)
        def double(self, x):
            Thing.calls += 1
            return 2 * x

    thing = Thing()
    assert [thing.double(2), thing.double(2), thing.double(3)] == [4, 4, 6] and Thing.calls == 2
    reference = __import__("weakref").ref(thing)
    del thing
    assert reference() is None


def use_references() -> dict:
    """On each rank: V2's references against what they say of themselves."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    envs.init_seed(5)
    assert (envs.get_local_seed(), envs.get_global_seed()) == (5 + rank, 5)
    assert envs.get_logical_domain_size(torch.distributed.group.WORLD) == (1, size)
    tokens, most, experts, topk, hidden = 3 + 2 * rank, 16, 8, 3, 8
    x = torch.randn(tokens, hidden, dtype=torch.float32).bfloat16()
    ids = torch.rand(tokens, experts).topk(topk).indices
    ids[0] = -1
    weights = torch.rand(tokens, topk)
    rows, local, row_weights, numbers, per_rank = refs.dispatch(x, ids, weights, most, experts)
    assert per_rank.sum() == len(rows) == len(numbers) and (local >= 0).any(1).all()
    assert torch.equal(numbers.sort().values, numbers)
    assert torch.equal(numbers.div(most, rounding_mode="floor").bincount(minlength=size).int(), per_rank)
    own = numbers.div(most, rounding_mode="floor") == rank
    kept = numbers[own] - rank * most
    assert torch.equal(rows[own], x[kept]) and torch.equal(row_weights[own], weights[kept])
    y = refs.generate_pre_combine_data(numbers, most, topk, hidden)
    assert y.shape == (len(rows), topk, hidden) and y.dtype == torch.bfloat16
    mine = refs.generate_pre_combine_data(torch.arange(tokens) + rank * most, most, topk, hidden)
    plain = refs.combine(mine, ids, 1, size, experts, None, False, False)
    in_order = (mine[:, 0].float() + mine[:, 1].float()) + mine[:, 2].float()
    assert torch.equal(plain, in_order.bfloat16())
    biased = refs.combine(mine, ids, 1, size, experts, (x, x), True, False)
    # By hand, for one token: ranks by the last k of each.
    holders = (ids[-1] // (experts // size)).tolist()
    total = x[-1].float() * 2
    for k, holder in enumerate(holders):
        if holder not in holders[k + 1 :]:
            group = sum(mine[-1, j].float() for j in range(k + 1) if holders[j] == holder)
            total = total + group.bfloat16().float()
    assert torch.equal(biased[-1], total.bfloat16())
    return {"rows": len(rows), "random": random.random()}


def test_references_over_gloo():
    results = run_gloo(2, use_references)
    assert results[0]["rows"] > 0 and results[0]["random"] != results[1]["random"]
