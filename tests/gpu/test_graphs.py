"""Forward and backward as CUDA graphs: captured once, replayed with whatever the static inputs then hold."""

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case
from exercise import (
    Results,
    assert_results,
    expected,
    on_cpu,
    oracle_dispatch,
    received,
    run_case,
    run_step,
)
from processes import run_cuda

import moe_ep
from gpu.machine import groups_of_processes, needs_gpu
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

HIDDEN, NUM_TOPK, MAX_TOKENS = 256, 4, 40
TIMEOUT_S = 30.0

Together = Callable[[], object]
"""Returns when every rank has called it; where ranks are processes, at once."""


# ---- what every test runs on each rank: scenario(comm, together)


def new_routings(comm: moe_ep.Communicator, together: Together) -> None:
    """Dispatch, combine and their backwards give the oracle's bits for every routing put into the static inputs."""
    for case in static_cases(comm.size):
        static = Static(case, comm.rank)
        with Graph(lambda: run_step(case, comm, *static.step_arguments)[0], together) as graph:
            for each in routings_of(case):
                static.load(each)
                graph.replay()
                check(each, comm.rank, graph.results)
            for _ in range(50):  # nothing waits between these
                graph.replay()
            check(each, comm.rank, graph.results)


def whole_layer(comm: moe_ep.Communicator, together: Together) -> None:
    """Experts between dispatch and combine, and one backward through all, as the same calls without a graph."""
    for layout in LAYOUTS:
        case = static_case(comm.size, layout=layout, name="layer")
        static = Static(case, comm.rank)
        with Graph(lambda: layer(comm, case, static), together) as graph:
            for each in routings_of(case):
                static.load(each)
                graph.replay()
                actual = on_cpu(graph.results)
                assert_results(actual, on_cpu(layer(comm, case, static)), f"{each}: rank {comm.rank}")


def known_routing(comm: moe_ep.Communicator, together: Together) -> None:
    """A handle of exact sizes made before the capture serves inside it."""
    for layout in LAYOUTS:
        case = replace(static_case(comm.size, layout=layout, name="known"), max_recv_rows=None)
        inputs = case.inputs(comm.rank, "cuda")
        handle = moe_ep.dispatch(inputs.x, inputs.topk_idx, None, comm, **case.dispatch_arguments).handle
        static = Static(replace(case, max_recv_rows=handle.num_rows), comm.rank)
        with Graph(lambda: again(comm, handle, static), together) as graph:
            for seed in range(3):
                # The routing is that of the handle; all else is new.
                other = replace(case, seed=seed, max_recv_rows=handle.num_rows)
                static.load(other)
                graph.replay()
                actual = on_cpu(graph.results)
                assert_results(actual, on_cpu(again(comm, handle, static)), f"{other}: rank {comm.rank}")


def in_turns(comm: moe_ep.Communicator, together: Together) -> None:
    """Two graphs and plain calls share a communicator, in changing order."""
    expert, rank = (static_case(comm.size, layout=layout, name="turns") for layout in LAYOUTS)
    plain = replace(expert, name="plain", max_recv_rows=None, num_biases=1)
    wanted_plain = expected(plain)[comm.rank]
    statics = [Static(case, comm.rank) for case in (expert, rank)]
    with (
        Graph(lambda: run_step(expert, comm, *statics[0].step_arguments)[0], together) as first,
        Graph(lambda: run_step(rank, comm, *statics[1].step_arguments)[0], together) as second,
    ):
        for turn, (one, other) in enumerate(zip(routings_of(expert), routings_of(rank), strict=True)):
            statics[0].load(one)
            statics[1].load(other)
            order = [first.replay, second.replay]
            for replay in order if turn % 2 else order[::-1]:
                replay()
                if turn % 3:
                    actual = run_case(plain, comm, "cuda")
                    assert_results(actual, wanted_plain, f"{plain}: rank {comm.rank}, turn {turn}")
            check(one, comm.rank, first.results)
            check(other, comm.rank, second.results)


def overflow(comm: moe_ep.Communicator, together: Together) -> None:
    """The captured handle reports what the last replay left out."""
    case = static_case(comm.size, name="overflow", max_recv_rows=MAX_TOKENS // 2)
    static = Static(case, comm.rank)
    handles = []

    def step() -> Results:
        results, handle = run_step(case, comm, *static.step_arguments)
        handles[:] = [handle]
        return results

    with Graph(step, together) as graph:
        for routing in ("one_rank", "none", "same_experts"):
            each = replace(case, routing=routing)
            static.load(each)
            graph.replay()
            needed = oracle_dispatch(each)[comm.rank].placement.rows_needed
            if needed <= case.max_recv_rows:
                handles[0].raise_if_overflow()
            else:
                with pytest.raises(moe_ep.ReceiveOverflowError, match=str(needed)):
                    handles[0].raise_if_overflow()
            check(each, comm.rank, graph.results)


SCENARIOS = {each.__name__: each for each in (new_routings, whole_layer, known_routing, in_turns, overflow)}


# ---- where they run


def communicator_arguments(world_size: int) -> dict[str, int]:
    num_experts = 4 * world_size
    sizes = {"hidden": HIDDEN, "num_topk": NUM_TOPK, "max_tokens_per_rank": MAX_TOKENS}
    return {**sizes, "num_experts": num_experts, "timeout_s": TIMEOUT_S}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_virtual_ranks(world_size, scenario):
    barrier = threading.Barrier(world_size)

    def fn(comm):
        SCENARIOS[scenario](comm, lambda: barrier.wait(60))

    try:
        run_ranks(world_size, fn, device="cuda", **communicator_arguments(world_size))
    finally:
        barrier.abort()  # ranks that wait for one that failed


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_one_gpu=(2,), on_gpus=(2, 4, 8)))
def test_processes(world_size, one_gpu):
    scenarios = ["new_routings", "in_turns"] if one_gpu else list(SCENARIOS)
    done = run_cuda(world_size, run_scenarios, scenarios, one_gpu=one_gpu)
    assert done == [scenarios] * world_size


def run_scenarios(scenarios: list[str]) -> list[str]:
    world_size = torch.distributed.get_world_size()
    done = []
    for scenario in scenarios:
        with moe_ep.Communicator(backend="nvlink", **communicator_arguments(world_size)) as comm:
            SCENARIOS[scenario](comm, lambda: None)
        done.append(scenario)
    return done


# ---- what scenarios are made of


class Graph:
    """``fn()`` captured; ``replay()`` fills ``results`` anew. A context: inside, all work is on the graph's stream."""

    _beginning = threading.Lock()

    def __init__(self, fn: Callable[[], Results], together: Together) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                fn()
            self.stream.synchronize()
            gc.collect()
            together()
            # NOTE: torch.cuda.graph waits for the whole device before it begins, which is an error while another thread
            # captures. Virtual ranks therefore wait for each other, and then none waits for the device.
            with self._beginning:
                self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.results = {name: value.detach() for name, value in fn().items()}
            finally:
                self.graph.capture_end()
            together()

    def replay(self) -> None:
        self.graph.replay()

    def __enter__(self) -> "Graph":
        self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self.stream.synchronize()
        self._context.__exit__(*exc)


class Static:
    """The tensors of a case with ``max_recv_rows``, on the GPU, to be overwritten in place."""

    def __init__(self, case: Case, rank: int) -> None:
        self.rank = rank
        self.inputs = case.inputs(rank, "cuda")
        self.received = received(case, rank, case.max_recv_rows, "cuda")

    @property
    def step_arguments(self) -> tuple:
        return self.inputs, lambda _num_rows: self.received

    def load(self, case: Case) -> None:
        """The values of another case with the same shapes."""
        values = [case.inputs(self.rank), received(case, self.rank, case.max_recv_rows)]
        with torch.no_grad():
            for mine, theirs in zip(tensors([self.inputs, self.received]), tensors(values), strict=True):
                mine.copy_(theirs)


def tensors(groups: list) -> Iterator[torch.Tensor]:
    for group in groups:
        for value in vars(group).values():
            yield from value if isinstance(value, tuple) else [value]


def static_case(world_size: int, **options) -> Case:
    defaults = {"name": "static", "dtype": torch.bfloat16, "max_recv_rows": 3 * MAX_TOKENS}
    tokens_by_rank = tuple(MAX_TOKENS - 7 * (rank % 3) for rank in range(world_size))
    sizes = {"hidden": HIDDEN, "num_experts": 4 * world_size, "num_topk": NUM_TOPK}
    return Case(tokens_by_rank=tokens_by_rank, **{**defaults, **sizes, **options})


def static_cases(world_size: int) -> list[Case]:
    options = [
        {"name": "expert", "expert_alignment": 16, "num_biases": 1},
        {"name": "rank", "layout": "rank", "dtype": torch.float32},
        {"name": "fp8", "fp8": "blockwise", "fp8_backward": "blockwise", "expert_alignment": 16},
        {"name": "fp8_rank", "fp8": "tokens", "layout": "rank", "dtype": torch.float16},
    ]
    return [static_case(world_size, **each) for each in options]


def routings_of(case: Case) -> list[Case]:
    """The same shapes, other values and routings; ``one_rank`` sends more than there is room for."""
    routings = ("uniform", "one_rank", "none", "masked", "zipf", "last_rank_none", "uniform")
    return [replace(case, routing=routing, seed=1 + seed) for seed, routing in enumerate(routings)]


def check(case: Case, rank: int, results: Results) -> None:
    assert_results(on_cpu(results), expected(case)[rank], f"{case} ({case.routing}): rank {rank}")


def layer(comm: moe_ep.Communicator, case: Case, static: Static) -> Results:
    """An MoE layer with an elementwise expert, its output, and gradients of tokens and router weights."""
    x, weights = static.inputs.x.requires_grad_(), static.inputs.topk_weights.requires_grad_()
    out = moe_ep.dispatch(x, static.inputs.topk_idx, weights, comm, **case.dispatch_arguments)
    gate = out.weights if case.layout == "expert" else out.weights.sum(1)
    rows = F.silu(out.tokens) * gate.unsqueeze(1).to(out.tokens.dtype)
    y = moe_ep.combine(rows, out.handle)
    grad_x, grad_weights = torch.autograd.grad(y, [x, weights], static.inputs.grad_y)
    return {"y": y, "grad_x": grad_x, "grad_topk_weights": grad_weights}


def again(comm: moe_ep.Communicator, handle: moe_ep.DispatchHandle, static: Static) -> Results:
    """Dispatch and combine by a known routing, and their backwards."""
    x, weights = static.inputs.x.requires_grad_(), static.inputs.topk_weights.requires_grad_()
    out = moe_ep.dispatch(x, None, weights, comm, handle=handle)
    y = moe_ep.combine(out.tokens * 2, handle)
    (grad_x,) = torch.autograd.grad(y, [x], static.inputs.grad_y, retain_graph=True)
    (grad_weights,) = torch.autograd.grad(out.weights, [weights], static.received.grad_weights)
    return {
        "tokens": out.tokens,
        "weights": out.weights,
        "y": y,
        "grad_x": grad_x,
        "grad_topk_weights": grad_weights,
    }
