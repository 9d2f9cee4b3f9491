"""Many calls in a row, in all sorts of company: no mismatch, no growth, no matter what runs beside them.

``STRESS_ITERATIONS`` shortens the long runs (default 10,000).
"""

import gc
import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, Case
from exercise import assert_results, expected, run_case
from processes import run_cuda

import moe_ep
from gpu.machine import group_of, groups_of_processes, needs_gpu
from moe_ep.testing import run_ranks

pytestmark = [*needs_gpu, pytest.mark.slow]

ITERATIONS = int(os.environ.get("STRESS_ITERATIONS", "10000"))
HIDDEN, MAX_TOKENS, NUM_TOPK, EXPERTS_PER_RANK = 256, 48, 4, 4
MIB = 1 << 20


def sizes(world_size: int) -> dict[str, float]:
    return {
        "hidden": HIDDEN,
        "max_tokens_per_rank": MAX_TOKENS,
        "num_experts": EXPERTS_PER_RANK * world_size,
        "num_topk": NUM_TOPK,
        "timeout_s": 30.0,
    }


# ---- one call and what it must give, by sorting; all on the GPU, nothing waits


def all_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


@dataclass(frozen=True)
class Draw:
    """One iteration's options, equal on all ranks, and the inputs of all ranks together.

    x [S, H] of small integers, so that every sum is exact; topk_idx [S, K]; weights [S, K]; S tokens in all.
    """

    layout: str
    dtype: torch.dtype
    fp8: str | None
    static: bool
    num_sms: int | None
    tokens_by_rank: list[int]
    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor

    def of_rank(self, rank: int) -> Iterator[torch.Tensor]:
        """x, topk_idx and weights of one rank."""
        start = sum(self.tokens_by_rank[:rank])
        end = start + self.tokens_by_rank[rank]
        return (values[start:end] for values in (self.x, self.topk_idx, self.weights))

    @property
    def max_recv_rows(self) -> int | None:
        """Room for everything."""
        return len(self.x) * (NUM_TOPK if self.layout == "expert" else 1) if self.static else None


def draws(world_size: int, seed: int) -> Iterator[Draw]:
    """Endless, and the same on all ranks."""
    options = random.Random(seed)
    numbers = torch.Generator("cuda").manual_seed(seed)
    num_experts = EXPERTS_PER_RANK * world_size
    share = all_sms() // world_size  # virtual ranks have no more
    while True:
        dtype = options.choice((torch.bfloat16, torch.float16, torch.float32))
        tokens_by_rank = [options.choice((0, 1, options.randint(0, MAX_TOKENS))) for _ in range(world_size)]
        total = sum(tokens_by_rank)
        popular = options.randint(NUM_TOPK, num_experts)
        scores = torch.rand(total, popular, device="cuda", generator=numbers)
        masked = torch.rand(total, NUM_TOPK, device="cuda", generator=numbers) < options.choice((0.0, 0.3))
        yield Draw(
            layout=options.choice(LAYOUTS),
            dtype=dtype,
            fp8=options.choice((None, None, "blockwise")),
            static=options.random() < 0.3,
            num_sms=options.choice((None, min(4, share), min(8, share), min(16, share))),
            tokens_by_rank=tokens_by_rank,
            x=torch.randint(-8, 9, (total, HIDDEN), device="cuda", generator=numbers).to(dtype),
            topk_idx=scores.argsort(dim=1)[:, :NUM_TOPK].masked_fill(masked, -1),
            weights=torch.rand(total, NUM_TOPK, device="cuda", generator=numbers),
        )


def wanted_rows(draw: Draw, rank: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows ``[N, H]`` that a rank receives, zeros behind them, and their weights, ``[N]`` or ``[N, K]``."""
    local = draw.topk_idx - rank * EXPERTS_PER_RANK
    is_local = (local >= 0) & (local < EXPERTS_PER_RANK)
    if draw.layout == "expert":
        key = torch.where(is_local, local, EXPERTS_PER_RANK).flatten()
        order = key.argsort(stable=True)[:num_rows]
        is_row = (key[order] < EXPERTS_PER_RANK).unsqueeze(1)
        return torch.where(is_row, draw.x[order // NUM_TOPK], 0), torch.where(
            is_row[:, 0], draw.weights.flatten()[order], 0
        )
    key = (~is_local.any(1)).int()
    order = key.argsort(stable=True)[:num_rows]
    is_row = (key[order] == 0).unsqueeze(1)
    return torch.where(is_row, draw.x[order], 0), torch.where(is_local[order], draw.weights[order], 0)


def wanted_sum(draw: Draw, rank: int) -> torch.Tensor:
    """What combine makes of the dispatched rows themselves: x as often as it was received."""
    x, topk_idx, _ = draw.of_rank(rank)
    if draw.layout == "expert":
        times = (topk_idx >= 0).sum(1)
    else:
        served = torch.where(topk_idx >= 0, topk_idx // EXPERTS_PER_RANK, -1).sort(dim=1).values
        times = ((served >= 0) & (served.diff(dim=1, prepend=served.new_full((len(x), 1), -1)) != 0)).sum(1)
    return x * times.unsqueeze(1).to(x.dtype)


def differences(actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return (actual != wanted).sum()


class Checker:
    """Runs draws on one rank and counts the elements that are wrong, on the GPU."""

    def __init__(self, comm: moe_ep.Communicator, old_handles: int = 8) -> None:
        self.comm = comm
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.alive: deque = deque(maxlen=old_handles)

    def step(self, draw: Draw, backward: bool) -> None:
        """A dispatch by a new routing, a combine, now and then their backward, and an old handle used again."""
        x, topk_idx, weights = draw.of_rank(self.comm.rank)
        x.requires_grad_(backward)
        out = self.dispatch(x, topk_idx, weights, draw)
        self.compare_rows(out, draw)
        y = self.combine(out, draw)
        times_x = wanted_sum(draw, self.comm.rank)
        self.wrong += differences(y, times_x)
        if backward:
            (grad,) = torch.autograd.grad(y, x, x.detach())
            self.wrong += differences(grad, times_x)
        self.alive.append((draw, out.handle))

    def reuse(self, index: int) -> None:
        """Rows, other than before, by the routing of a handle that is still alive."""
        draw, handle = self.alive[index % len(self.alive)]
        _, _, weights = draw.of_rank(self.comm.rank)
        negative = Draw(**{**vars(draw), "x": -draw.x.detach()})
        x, _, _ = negative.of_rank(self.comm.rank)
        out = self.dispatch(x, None, weights, negative, handle=handle)
        self.compare_rows(out, negative)
        self.wrong += differences(self.combine(out, negative), wanted_sum(negative, self.comm.rank))

    def dispatch(self, x, topk_idx, weights, draw: Draw, handle=None) -> moe_ep.DispatchOutput:
        options = {"fp8": draw.fp8, "num_sms": draw.num_sms, "handle": handle}
        if handle is None:
            options |= {"layout": draw.layout, "max_recv_rows": draw.max_recv_rows}
        return moe_ep.dispatch(x, topk_idx, weights, self.comm, **options)

    def combine(self, out: moe_ep.DispatchOutput, draw: Draw) -> torch.Tensor:
        return moe_ep.combine(plain(out.tokens, draw.dtype), out.handle, num_sms=draw.num_sms)

    def compare_rows(self, out: moe_ep.DispatchOutput, draw: Draw) -> None:
        rows, row_weights = wanted_rows(draw, self.comm.rank, out.tokens.shape[0])
        self.wrong += differences(plain(out.tokens, draw.dtype), rows)
        self.wrong += differences(out.weights, row_weights)


def plain(tokens: torch.Tensor | moe_ep.Fp8Tokens, dtype: torch.dtype) -> torch.Tensor:
    return tokens.dequantize(dtype) if isinstance(tokens, moe_ep.Fp8Tokens) else tokens


# ---- the long run


@dataclass(frozen=True)
class Memory:
    """Bytes that tensors hold, and bytes of the GPU in use beside what torch keeps for tensors."""

    allocated: int
    outside: int

    @staticmethod
    def now() -> "Memory":
        torch.cuda.current_stream().synchronize()
        gc.collect()
        free, total = torch.cuda.mem_get_info()
        return Memory(torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved())


def long_run(comm: moe_ep.Communicator, iterations: int) -> list[Memory]:
    """Random calls on one rank; the memory after a fifth of them, and every fifth from there on."""
    checker = Checker(comm)
    case = Case("among", (20,) * comm.size, hidden=HIDDEN, num_experts=EXPERTS_PER_RANK * comm.size)
    wanted = expected(case)[comm.rank]
    choose = random.Random(comm.size)
    memory = []
    for i, draw in enumerate(draws(comm.size, seed=iterations), start=1):
        checker.step(draw, backward=i % 4 == 0)
        if i % 3 == 0:
            checker.reuse(choose.randrange(100))
        if i % 500 == 0:
            assert_results(run_case(case, comm, "cuda"), wanted, f"iteration {i}, rank {comm.rank}")
            assert checker.wrong.item() == 0, f"up to iteration {i}, rank {comm.rank}"
        if i % max(1, iterations // 5) == 0:
            memory.append(Memory.now())
        if i == iterations:
            break
    assert checker.wrong.item() == 0
    return memory


def assert_flat(memory: list[Memory], ranks_here: int = 1) -> None:
    """What a rank holds at the moment it is looked at varies with the routing, so many megabytes do not count."""
    assert memory[-1].allocated - memory[0].allocated < 4 * MIB * ranks_here, memory
    assert memory[-1].outside - memory[0].outside < 64 * MIB, memory


@pytest.mark.parametrize(("world_size", "iterations"), [(2, ITERATIONS), (8, ITERATIONS // 10)])
def test_virtual_ranks_for_long(world_size, iterations):
    for memory in run_ranks(
        world_size, lambda comm: long_run(comm, iterations), device="cuda", **sizes(world_size)
    ):
        assert_flat(memory, ranks_here=world_size)


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_one_gpu=(2,), on_gpus=(2, 4, 8)))
def test_processes_for_long(world_size, one_gpu):
    iterations = ITERATIONS // 50 if one_gpu else ITERATIONS
    for memory in run_cuda(world_size, long_run_of_process, iterations, one_gpu=one_gpu):
        assert_flat(memory)


def long_run_of_process(iterations: int) -> list[Memory]:
    world_size = dist.get_world_size()
    with moe_ep.Communicator(backend="nvlink", **sizes(world_size)) as comm:
        return long_run(comm, iterations)


def test_a_communicator_leaves_nothing_behind():
    case = Case("brief", (20, 30), hidden=HIDDEN, num_experts=8, dtype=torch.bfloat16)

    def fn(comm):
        run_case(case, comm, "cuda")

    memory = []
    for i in range(30):
        run_ranks(2, fn, device="cuda", **case.communicator_arguments)
        if i % 6 == 5:
            memory.append(Memory.now())
    assert_flat(memory)


# ---- in company


def two_communicators(comm: moe_ep.Communicator, other: moe_ep.Communicator) -> None:
    """Each on its own stream; what they do on the GPU overlaps as it will."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    checkers = [Checker(comm), Checker(other)]
    sources = [draws(comm.size, seed=1), draws(comm.size, seed=2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        for stream, checker, source in zip(streams, checkers, sources, strict=True):
            with torch.cuda.stream(stream):
                # Half of the SMs at most, so that both fit at once whichever a rank starts first.
                draw = Draw(**{**vars(next(source)), "num_sms": 8})
                checker.step(draw, backward=False)
                checker.reuse(0)
    for stream, checker in zip(streams, checkers, strict=True):
        stream.synchronize()
        assert checker.wrong.item() == 0


def asynchronous(comm: moe_ep.Communicator) -> None:
    """dispatch_async and combine_async beside matrix products of the caller's stream."""
    source = draws(comm.size, seed=3)
    checker = Checker(comm)
    a = torch.eye(512, device="cuda") * 2
    warm_up_matmul(comm, a)
    for _ in range(200):
        draw = next(source)
        options = {"layout": draw.layout, "fp8": draw.fp8, "max_recv_rows": draw.max_recv_rows}
        out, dispatched = moe_ep.dispatch_async(*draw.of_rank(comm.rank), comm, **options)
        b = a @ a
        dispatched.wait()
        checker.compare_rows(out, draw)
        y, combined = moe_ep.combine_async(plain(out.tokens, draw.dtype), out.handle)
        del out
        c = b @ a
        combined.wait()
        checker.wrong += differences(y, wanted_sum(draw, comm.rank)) + differences(c, a * 4)
    torch.cuda.current_stream().synchronize()
    assert checker.wrong.item() == 0


def warm_up_matmul(comm: moe_ep.Communicator, a: torch.Tensor) -> None:
    """The library loads its kernels at their first use, for which a virtual rank would wait while others' kernels run
    that wait for it."""
    torch.equal(a @ a, a * 2)
    comm.barrier()


def changing_num_sms(comm: moe_ep.Communicator) -> None:
    """As few as one and as many as there are, from call to call, ranks alike."""
    most = all_sms() // comm.size if comm.backend == "virtual" else all_sms()
    source = draws(comm.size, seed=4)
    checker = Checker(comm)
    for num_sms in [1, most, 2, None, 3, 5, most - 1, 8, None, 1, 24, 7] * 3:
        draw = Draw(**{**vars(next(source)), "num_sms": min(num_sms, most) if num_sms else None})
        checker.step(draw, backward=True)
        checker.reuse(1)
    assert checker.wrong.item() == 0


def any_order(comm: moe_ep.Communicator) -> None:
    """A hundred handles alive, used in an order that has nothing to do with that of their making."""
    checker = Checker(comm, old_handles=100)
    source = draws(comm.size, seed=5)
    for _ in range(100):
        checker.step(next(source), backward=False)
    for i, index in enumerate(random.Random(6).choices(range(100), k=300)):
        checker.reuse(index)
        if i % 8 == 7:
            torch.cuda.current_stream().synchronize()  # a full queue holds up the launches of other virtual ranks
    assert checker.wrong.item() == 0


COMPANY = {each.__name__: each for each in (asynchronous, changing_num_sms, any_order)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_virtual_ranks_two_communicators_at_once(world_size):
    arguments = sizes(world_size)

    def fn(comm):
        with moe_ep.Communicator(group_of(comm), **arguments) as other:
            two_communicators(comm, other)

    run_ranks(world_size, fn, device="cuda", **arguments)


@pytest.mark.parametrize("name", COMPANY)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_virtual_ranks_in_company(world_size, name):
    run_ranks(world_size, COMPANY[name], device="cuda", **sizes(world_size))


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_gpus=(2, 4, 8)))
def test_processes_in_company(world_size, one_gpu):
    names = ["two_communicators", "with_nccl", *COMPANY]
    assert run_cuda(world_size, keep_company, names, one_gpu=one_gpu) == [names] * world_size


def keep_company(names: list[str]) -> list[str]:
    arguments = {**sizes(dist.get_world_size()), "backend": "nvlink"}
    done = []
    for name in names:
        with moe_ep.Communicator(**arguments) as comm:
            if name == "two_communicators":
                with moe_ep.Communicator(**arguments) as other:
                    two_communicators(comm, other)
            elif name == "with_nccl":
                with_nccl(comm)
            else:
                COMPANY[name](comm)
        done.append(name)
    return done


def with_nccl(comm: moe_ep.Communicator) -> None:
    """NCCL's collectives between, and at the same time as, dispatch and combine."""
    source = draws(comm.size, seed=7)
    checker = Checker(comm)
    mine = torch.full((1 << 20,), float(comm.rank + 1), device="cuda")
    total = comm.size * (comm.size + 1) / 2
    for i in range(200):
        # Few SMs, so that NCCL's kernels fit beside whichever a rank starts first.
        draw = Draw(**{**vars(next(source)), "num_sms": 16})
        reduced = mine.clone()
        work = dist.all_reduce(reduced, async_op=True)
        if i % 2:
            work.wait()
        checker.step(draw, backward=i % 4 == 0)
        gathered = torch.empty(comm.size * 16, device="cuda")
        dist.all_gather_into_tensor(gathered, mine[:16])
        checker.reuse(0)
        work.wait()
        ranks = torch.arange(1, comm.size + 1, device="cuda").repeat_interleave(16)
        checker.wrong += differences(reduced, torch.full_like(reduced, total)) + differences(gathered, ranks)
    assert checker.wrong.item() == 0
