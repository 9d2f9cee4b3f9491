"""Overlap on a GPU: which stream each call runs on, and the serial run's bits whatever the delays.

``OVERLAP_STEPS`` shortens the long runs (default 2,000 steps for each mode between GPUs, a tenth on virtual ranks).
"""

import contextlib
import os
import threading
from dataclasses import replace

import pytest
import torch
from gpu.machine import needs_gpu
from overlap_cases import CONFIG, RowByRow, make_input, run
from overlap_stress import (
    HOW,
    MODES,
    before_each_call,
    count_differences,
    make_step,
    random_delays,
    sizes,
)
from processes import run_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

import moe_ep
from moe_ep.errors import PeerTimeoutError
from moe_ep.layers import MoELayer
from moe_ep.testing import run_ranks

# Kernels of virtual ranks wait for each other; CUDA has to know before its first call (moe_ep.testing).
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

pytestmark = needs_gpu

NUM_RANKS = 2
STEPS = int(os.environ.get("OVERLAP_STEPS", "2000"))


def ranks(mode, fn):
    return run_ranks(NUM_RANKS, fn, device="cuda", timeout_s=20.0, **sizes(mode))


@pytest.fixture(scope="module", autouse=True)
def loaded_libraries():
    """Libraries load kernels at their first use and wait for the device then: one rank, which waits for nobody, goes
    first; then all, whose other shapes may take other kernels, until no rank has waited for another in vain.

    Attention is plain products: cuDNN's prepares itself in every new thread, as ranks here are, and waits for the
    device each time.
    """
    with sdpa_kernel(SDPBackend.MATH):
        load_libraries()
        yield


def load_libraries():
    with random_delays():
        for mode in MODES:
            for how in HOW:
                run_ranks(1, lambda comm: run_once(comm, mode, how), device="cuda", **sizes(mode))
                for _ in range(3):
                    with contextlib.suppress(PeerTimeoutError):
                        arguments = {"device": "cuda", "timeout_s": 2.0, **sizes(mode)}
                        run_ranks(NUM_RANKS, lambda comm: run_once(comm, mode, how), **arguments)
                        break


def run_once(comm, mode, how):
    step = make_step(comm, mode, how)
    for one_stream in (True, False):
        step(one_stream=one_stream)
    torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("mode", MODES)
def test_streams(mode):
    """Communication has a stream of its own in both directions, and computation keeps the caller's."""
    seen = set()
    turn = threading.Barrier(NUM_RANKS)

    def before(name):
        seen.add((name, torch.cuda.current_stream().cuda_stream))

    def fn(comm):
        step = make_step(comm, mode, "bf16")
        step(one_stream=False)
        turn.wait(60)
        device = torch.device("cuda", torch.cuda.current_device())
        return comm.stream(device).cuda_stream, torch.cuda.current_stream().cuda_stream

    with before_each_call(before):
        streams = ranks(mode, fn)
    expected = set()
    for communication, computation in streams:
        assert communication != computation
        expected |= {("dispatch", communication), ("combine", communication), ("experts", computation)}
    assert seen == expected


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("how", HOW)
def test_equals_serial_layer_bit_for_bit(how, layout):
    """Whose rows travel in the expert layout; with experts that work row by row."""
    config = replace(CONFIG, **HOW[how])

    def fn(comm):
        def make_layer(layout):
            options = {"seed": 5, "device": "cuda", "dtype": torch.bfloat16}
            layer = MoELayer(replace(config, layout=layout), comm, **options)
            layer.experts = RowByRow(layer)
            return layer

        x = make_input(comm, config, torch.bfloat16, "cuda")
        outputs, grads = run(make_layer("expert"), x, 0)
        layer = make_layer(layout)
        for chunks in (1, 2, 3):
            outputs_chunked, grads_chunked = run(layer, x, chunks)
            assert all(map(torch.equal, outputs_chunked, outputs))
            for name, grad in grads.items():
                if not name.startswith("experts."):
                    assert torch.equal(grads_chunked[name], grad), name

    ranks("shared expert", fn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", HOW)
def test_delays_change_no_bit(how, mode):
    with random_delays():
        assert ranks(mode, lambda comm: count_differences(comm, mode, how, STEPS // 10)) == [0] * NUM_RANKS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_delays_change_no_bit_between_gpus():
    expected = {f"{mode}, {how}": 0 for mode in MODES for how in HOW}
    assert run_cuda(2, stress_all, STEPS, timeout_s=1700.0) == [expected] * 2


def stress_all(steps):
    """On one of the ranks with a GPU each."""
    different = {}
    for mode in MODES:
        for how in HOW:
            with (
                moe_ep.Communicator(timeout_s=20.0, backend="nvlink", **sizes(mode)) as comm,
                random_delays(),
            ):
                different[f"{mode}, {how}"] = count_differences(comm, mode, how, steps)
            if comm.rank == 0:
                print(f"{mode}, {how}: {different[f'{mode}, {how}']} of {steps} steps differ", flush=True)
    return different
