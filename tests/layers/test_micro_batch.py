"""The schedule of micro-batches against plain autograd, one micro-batch after the other."""

import weakref
from dataclasses import replace

import pytest
import torch

from moe_ep.errors import InvalidInput
from moe_ep.layers import MicroBatchSchedule, ModelConfig, WeightGradStore
from moe_ep.layers.block_pass import BlockPass
from moe_ep.layers.model import DeepSeekModel
from moe_ep.testing import run_ranks

CONFIG = ModelConfig(num_layers=3, num_dense_layers=1, mtp_layers=1, max_seq_len=16, seq_aux_loss_coeff=0.1)
SHAPES = ((2, 9), (1, 12), (3, 5))
"""Of the micro-batches' tokens."""
FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise"}
HOW = {
    "exact": {},
    "rank": {"layout": "rank"},
    "static": {"max_recv_rows": 400, "expert_alignment": 4},
    "fp8": FP8,
    "fp8 experts": {
        **FP8,
        "fp8_experts": "blockwise",
        "expert_alignment": 16,
        "hidden": 128,
        "moe_ffn_hidden": 128,
        "num_experts": 4,
        "num_topk": 2,
    },
    "no MTP, no dense block": {"mtp_layers": 0, "num_dense_layers": 0},
    "two MTP modules": {"mtp_layers": 2},
    "no shared expert, no auxiliary loss": {"shared_ffn_hidden": 0, "seq_aux_loss_coeff": 0.0},
    "dense": {"num_dense_layers": 3, "mtp_layers": 0},
}


def make(comm, config, dtype=torch.float32):
    model = DeepSeekModel(config, comm, seed=3, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32  # as the recipes' optimiser wants it
    return model


def micro_batches(rank, count=3):
    generator = torch.Generator().manual_seed(rank)
    tokens = [torch.randint(256, (b, s + 1), generator=generator) for b, s in SHAPES[:count]]
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


def in_turn(model, batches):
    losses = []
    for batch in batches:
        out = model(*batch)
        (out.loss / len(batches)).backward()
        losses.append([each.detach() for each in (out.loss, out.main_loss, out.mtp_loss, out.aux_loss)])
    return losses


def side_by_side(model, batches):
    losses = MicroBatchSchedule(model).step(batches)
    return [[each.loss, each.main_loss, each.mtp_loss, each.aux_loss] for each in losses]


def run(model, batches, step):
    """Losses, gradients and loads of experts."""
    model.zero_grad()
    losses = step(model, batches)
    loads = [router.tokens_per_expert.clone() for router in model.routers()]
    for router in model.routers():
        router.tokens_per_expert.zero_()
    return losses, {name: p.grad for name, p in model.named_parameters()}, loads


def assert_equal(got, expected):
    losses, grads, loads = got
    for ours, theirs in zip(losses, expected[0], strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert grads.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert grads[name].dtype == grad.dtype and torch.equal(grads[name], grad), name
    assert all(map(torch.equal, loads, expected[2]))


def ranks(config, size, fn):
    sizes = {"hidden": config.hidden, "num_experts": config.num_experts, "num_topk": config.num_topk}
    return run_ranks(size, fn, max_tokens_per_rank=20, **sizes)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [1, 2])
def test_equals_micro_batches_in_turn_bit_for_bit(how, size):
    config = replace(CONFIG, **HOW[how])

    def fn(comm):
        model, batches = make(comm, config), micro_batches(comm.rank)
        assert_equal(run(model, batches, side_by_side), run(model, batches, in_turn))

    ranks(config, size, fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_dtypes_and_numbers_of_micro_batches(dtype, count):
    def fn(comm):
        model, batches = make(comm, CONFIG, dtype), micro_batches(comm.rank, count)
        assert_equal(run(model, batches, side_by_side), run(model, batches, in_turn))

    ranks(CONFIG, 2, fn)


def test_order_of_calls(monkeypatch):
    """Of a pair of blocks in the midst; what lies between a call and the wait for it can run beside it."""
    calls = []
    names = {
        "combine_backward": "C'",
        "shared_expert_backward": "S'",
        "attend": "A",
        "shared_expert": "S",
        "experts_backward": "E'",
        "dispatch": "D",
        "dispatch_backward": "D'",
        "experts": "E",
        "combine": "C",
        "attend_backward": "A'",
    }

    def log(name, method):
        def call(self, *args, **options):
            calls.append(name)
            return method(self, *args, **options)

        return call

    for method, name in names.items():
        monkeypatch.setattr(BlockPass, method, log(name, getattr(BlockPass, method)))
    monkeypatch.setattr(WeightGradStore, "run", log("W", WeightGradStore.run))

    class Logged(MicroBatchSchedule):
        def run_pair(self, forward, backward):
            calls.append("|")
            super().run_pair(forward, backward)

    def fn(comm):
        config = replace(CONFIG, num_layers=2, num_dense_layers=0, mtp_layers=0)
        Logged(make(comm, config)).step(micro_batches(0, 2))

    ranks(CONFIG, 1, fn)
    forward, pair, backward = "A S D E C", "C' S' W A S E' D D' W E C A' W", "C' S' W E' D' W A' W"
    assert " ".join(calls) == " ".join(f"| {one} | {one}" for one in (forward, pair, backward))


def test_nothing_of_a_micro_batch_is_kept():
    def fn(comm):
        model = make(comm, CONFIG)
        schedule = MicroBatchSchedule(model)
        first, second = (schedule.make_pass(*each, share=2) for each in micro_batches(0, 2))
        schedule.run(first, None)
        block = first.blocks[1]
        rows = weakref.ref(block._experts[2])
        schedule.run(second, first)
        assert first.blocks == [] and len(schedule.store) == 0
        assert rows() is None
        schedule.run(None, second)

    ranks(CONFIG, 1, fn)


def test_bad_tokens_are_refused_before_anything_is_run():
    def fn(comm):
        model = make(comm, CONFIG)
        good, bad = micro_batches(0, 1)[0], torch.zeros(1, 17, dtype=torch.int64)
        with pytest.raises(InvalidInput, match="max_seq_len = 16"):
            MicroBatchSchedule(model).step([good, (bad, bad)])
        assert all(p.grad is None for p in model.parameters())
        return [router.tokens_per_expert.sum().item() for router in model.routers()]

    assert ranks(CONFIG, 1, fn) == [[0, 0, 0]]
