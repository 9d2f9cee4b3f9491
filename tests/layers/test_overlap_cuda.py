"""Overlapped MoE layers on a GPU: which stream each call runs on, and the serial run's bits whatever the delays."""

import contextlib
import os
import random
import threading
from dataclasses import replace

import pytest
import torch
from exercise import settle
from overlap_cases import CONFIG, make_input, run

import moe_ep
from moe_ep.layers import MoELayer
from moe_ep.testing import run_ranks

# Kernels of virtual ranks wait for each other; CUDA has to know before its first call (moe_ep.testing).
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUM_RANKS = 2
STEPS = 40
LONGEST_DELAY = 200_000  # clock cycles, about 0.1 ms: more than any call here takes
HOW = {
    "bf16": {},
    "fp8": {"fp8": "blockwise", "fp8_backward": "blockwise"},
    "static": {"max_recv_rows": 64, "expert_alignment": 8},
}
"""Not the rank layout: its backward waits for the device, in the one thread that launches those of all ranks here."""


def ranks(config, fn):
    limit = {"max_tokens_per_rank": 8, "num_experts": config.num_experts, "num_topk": config.num_topk}
    return run_ranks(NUM_RANKS, fn, device="cuda", hidden=config.hidden, timeout_s=20.0, **limit)


def make_layer(comm, config):
    layer = MoELayer(config, comm, seed=5, device="cuda", dtype=torch.bfloat16)
    return layer, make_input(comm, config, torch.bfloat16, "cuda")


@contextlib.contextmanager
def before_each_call(monkeypatch, before):
    """``before(name)`` on the stream of every dispatch, combine and product of the experts, in both directions."""

    def wrapped(name, function):
        def call(*args):
            before(name)
            return function(*args)

        return call

    grouped_mm = torch.nn.functional.grouped_mm
    with monkeypatch.context() as patch:
        for name in ("dispatch", "combine"):
            patch.setattr(moe_ep.ops, name, wrapped(name, getattr(moe_ep.ops, name)))
        patch.setattr(
            torch.nn.functional,
            "grouped_mm",
            lambda *args, **options: (before("experts"), grouped_mm(*args, **options))[1],
        )
        yield


@pytest.mark.parametrize("chunks", [1, 3])
def test_streams(chunks, monkeypatch):
    seen = {"forward": set(), "backward": set()}
    direction = "forward"
    turn = threading.Barrier(NUM_RANKS)

    def before(name):
        seen[direction].add((name, torch.cuda.current_stream().cuda_stream))

    def fn(comm):
        nonlocal direction
        layer, x = make_layer(comm, CONFIG)
        y, _ = layer(x, overlap_chunks=chunks)
        turn.wait()
        direction = "backward"
        y.sum().backward()
        return comm.stream(x.device).cuda_stream, torch.cuda.current_stream().cuda_stream

    with before_each_call(monkeypatch, before):
        streams = ranks(CONFIG, fn)
    expected = set()
    for communication, computation in streams:
        assert communication != computation
        expected |= {("dispatch", communication), ("combine", communication), ("experts", computation)}
    assert seen == {"forward": expected, "backward": expected}


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
def test_delays_change_no_bit(how, chunks, monkeypatch):
    """Against the same calls on one stream, which can't overtake each other."""
    config = replace(CONFIG, **HOW[how])
    cycles = random.Random(0)

    def step(layer, x):
        outputs, grads = run(layer, x, chunks)
        settle("cuda")
        return [*outputs, *grads.values()]

    def fn(comm):
        layer, x = make_layer(comm, config)
        with monkeypatch.context() as patch:
            patch.setattr(comm, "stream", torch.cuda.current_stream)
            expected = step(layer, x)
        for _ in range(STEPS):
            got = step(layer, x)
            assert all(map(torch.equal, got, expected))

    with before_each_call(monkeypatch, lambda _: torch.cuda._sleep(cycles.randrange(LONGEST_DELAY))):
        ranks(config, fn)
