"""Overlapped runs with random delays on both streams, against the same calls on one stream; for virtual ranks on a GPU
and for ranks with a GPU each.
"""

import contextlib
import random
from dataclasses import replace

import torch
from overlap_cases import CONFIG, make_input, run
from torch.nn.attention import SDPBackend, sdpa_kernel

import moe_ep
from moe_ep.layers import DeepSeekModel, MicroBatchSchedule, ModelConfig, MoELayer

LONGEST_DELAY = 200_000  # clock cycles, about 0.1 ms: more than any call here takes
MAX_TOKENS = 24
HOW = {
    "bf16": {},
    "fp8": {"fp8": "blockwise", "fp8_backward": "blockwise"},
    "static": {"max_recv_rows": 200, "expert_alignment": 8},
}
CHUNKS = {"shared expert": 1, "2 chunks": 2, "4 chunks": 4}
MODES = [*CHUNKS, "micro-batches"]
MODEL = ModelConfig(num_layers=3, num_dense_layers=1, mtp_layers=1, num_experts=8, num_topk=3, max_seq_len=16)


def sizes(mode):
    config = CONFIG if mode in CHUNKS else MODEL
    names = ("hidden", "num_experts", "num_topk")
    return {"max_tokens_per_rank": MAX_TOKENS, **{name: getattr(config, name) for name in names}}


@contextlib.contextmanager
def before_each_call(before):
    """``before(name)`` on the stream of every dispatch, combine and product of the experts, in both directions."""

    def wrapped(name, function):
        def call(*args, **options):
            before(name)
            return function(*args, **options)

        return call

    places = [
        (moe_ep.ops, "dispatch", "dispatch"),
        (moe_ep.ops, "dispatch_fp8", "dispatch"),
        (moe_ep.ops, "dispatch_quantised", "dispatch"),
        (moe_ep.ops, "combine", "combine"),
        (torch.nn.functional, "grouped_mm", "experts"),
    ]
    originals = [getattr(module, attribute) for module, attribute, _ in places]
    for (module, attribute, name), original in zip(places, originals, strict=True):
        setattr(module, attribute, wrapped(name, original))
    try:
        yield
    finally:
        for (module, attribute, _), original in zip(places, originals, strict=True):
            setattr(module, attribute, original)


@contextlib.contextmanager
def random_delays():
    """On both streams."""
    cycles = random.Random(0)
    with before_each_call(lambda _: torch.cuda._sleep(cycles.randrange(LONGEST_DELAY))):
        yield


def make_step(comm, mode, how):
    """``step(one_stream)`` -> all results and gradients."""
    if mode in CHUNKS:
        config = replace(CONFIG, **HOW[how])
        layer = MoELayer(config, comm, seed=5, device="cuda", dtype=torch.bfloat16)
        x = make_input(comm, config, torch.bfloat16, "cuda")

        def step(one_stream):
            with on_one_stream(comm) if one_stream else contextlib.nullcontext():
                outputs, grads = run(layer, x, CHUNKS[mode])
            return [*outputs, *grads.values()]

        return step

    model = DeepSeekModel(replace(MODEL, **HOW[how]), comm, seed=5, device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(comm.rank)
    tokens = [torch.randint(256, shape, generator=generator).cuda() for shape in ((2, 10), (1, 13), (3, 8))]
    batches = [(each[:, :-1], each[:, 1:]) for each in tokens]

    def step(one_stream):
        model.zero_grad()
        losses = MicroBatchSchedule(model, overlap=not one_stream).step(batches)
        return [loss for each in losses for loss in vars(each).values()] + [
            p.grad for p in model.parameters()
        ]

    return step


def count_differences(comm, mode, how, steps):
    """How many of ``steps`` steps with delays differ in any bit; called under `random_delays`."""
    # torch's other kernels of attention add up gradients in varying order. (A setting of the process, not the thread.)
    with sdpa_kernel(SDPBackend.MATH):
        step = make_step(comm, mode, how)
        expected = [tensor.clone() for tensor in step(one_stream=True)]
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(steps):
            got = step(one_stream=False)
            wrong = torch.stack([(a != b).any() for a, b in zip(got, expected, strict=True)]).any()
            different += wrong
            # The host, far ahead, would take all memory; and a launch that finds its stream's queue full holds up those
            # of other virtual ranks.
            torch.cuda.current_stream().synchronize()
        return different.item()


@contextlib.contextmanager
def on_one_stream(comm):
    """Asynchronous calls of ``comm`` run on the current stream."""
    device = torch.device("cuda", torch.cuda.current_device())
    own = comm.stream(device)
    comm._streams[device] = torch.cuda.current_stream()
    try:
        yield
    finally:
        comm._streams[device] = own
