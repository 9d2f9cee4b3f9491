"""Dead and late ranks on the nvlink backend: the others get PeerTimeoutError, and CUDA goes on working."""

import os
import re
import threading
import time

import pytest
import torch
from cases import Case
from exercise import assert_case, run_case
from processes import join, run_cuda

import moe_ep
from gpu.machine import group_of, groups_of_processes, needs_gpu
from moe_ep import launch
from moe_ep.testing import run_ranks

pytestmark = needs_gpu

TIMEOUT_S = 2.0
FAULTY = 1
STEPS = [
    "dispatch",
    "static dispatch",
    "asynchronous static dispatch",
    "combine",
    "asynchronous combine",
    "backward",
    "barrier",
]


class Absent(Exception):
    """Ends the part of a rank that is late."""


def case_of(world_size: int) -> Case:
    return Case("faults", (30,) * world_size, hidden=512, num_experts=4 * world_size, dtype=torch.bfloat16)


def call(case: Case, comm: moe_ep.Communicator, last: str, before_last=lambda: None) -> None:
    """The steps of training up to ``last``, and a wait for them; ``before_last`` runs just before that one."""
    inputs = case.inputs(comm.rank, "cuda")
    x, topk_idx = inputs.x.requires_grad_(), inputs.topk_idx
    if "dispatch" in last or last == "barrier":
        before_last()
    if last != "barrier":
        room = 200 if "static" in last else None
        dispatch = (
            moe_ep.dispatch_async if last == "asynchronous static dispatch" else at_once(moe_ep.dispatch)
        )
        out, dispatched = dispatch(x, topk_idx, inputs.topk_weights, comm, max_recv_rows=room)
        dispatched.wait()
    if "combine" in last:
        before_last()
    if "combine" in last or last == "backward":
        combine = moe_ep.combine_async if last == "asynchronous combine" else at_once(moe_ep.combine)
        y, combined = combine(out.tokens, out.handle)
        combined.wait()
    if last == "backward":
        torch.cuda.current_stream().synchronize()
        before_last()
        y.sum().backward()
    # What a kernel found is raised by the next call that has a rank wait.
    torch.cuda.current_stream().synchronize()
    comm.barrier()


def at_once(function):
    """The same as if it were asynchronous."""
    return lambda *args, **options: (function(*args, **options), moe_ep.Event())


def outcome_of(case: Case, comm: moe_ep.Communicator, last: str, before_last=lambda: None) -> dict:
    """What ``call`` raised, after how long, and whether CUDA still works here."""
    outcome: dict = {"raised": None}
    start = time.monotonic()
    try:
        call(case, comm, last, before_last)
    except moe_ep.PeerTimeoutError as error:
        outcome = {"raised": "PeerTimeoutError", "ranks": error.ranks, "phase": error.phase}
        outcome |= {"text": str(error), "detail": error.detail}
    except Absent:
        outcome["raised"] = "Absent"
    outcome["seconds"] = time.monotonic() - start
    torch.cuda.current_stream().synchronize()
    outcome["cuda works"] = int(torch.ones(8, device="cuda").sum()) == 8
    return outcome


def check_outcomes(outcomes: dict[int, dict], slack_s: float) -> None:
    """``outcomes`` of the ranks that were there."""
    for rank, outcome in outcomes.items():
        assert outcome["raised"] == "PeerTimeoutError", (rank, outcome)
        assert FAULTY in outcome["ranks"] and rank not in outcome["ranks"], (rank, outcome)
        assert outcome["phase"] and re.search(rf"\brank.*\b{FAULTY}\b", outcome["text"]), (rank, outcome)
        assert TIMEOUT_S * 0.5 < outcome["seconds"] < TIMEOUT_S + slack_s, (rank, outcome)
        assert outcome["cuda works"], (rank, outcome)
    # A survivor that gives up first may look late to another, but not all can have been second.
    assert any(outcome["ranks"] == (FAULTY,) for outcome in outcomes.values()), outcomes


# ---- ranks as threads


@pytest.mark.parametrize("last", STEPS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_late_virtual_rank_is_named(world_size, last):
    case = case_of(world_size)
    given_up = threading.Barrier(world_size)

    def fn(comm):
        call(case, comm, "backward")

        def before_last():
            if comm.rank == FAULTY:
                given_up.wait(30)
                raise Absent

        outcome = outcome_of(case, comm, last, before_last)
        if comm.rank != FAULTY:
            with pytest.raises(moe_ep.PeerTimeoutError):  # it stays broken
                call(case, comm, "combine")
            given_up.wait(30)
        return outcome

    try:
        arguments = {**case.communicator_arguments, "timeout_s": TIMEOUT_S}
        results = run_ranks(world_size, fn, device="cuda", **arguments)
    finally:
        given_up.abort()
    check_outcomes({rank: each for rank, each in enumerate(results) if rank != FAULTY}, slack_s=4)
    if "combine" in last:
        assert all("combine" in results[r]["phase"] for r in range(world_size) if r != FAULTY), results
    torch.cuda.synchronize()
    arguments["timeout_s"] = 20.0
    assert_case(
        case,
        run_ranks(world_size, lambda comm: run_case(case, comm, "cuda"), device="cuda", **arguments),
    )


def test_a_new_communicator_on_the_same_virtual_group_works():
    case = case_of(3)

    def fn(broken):
        if broken.rank != FAULTY:
            assert outcome_of(case, broken, "dispatch")["raised"] == "PeerTimeoutError"
        broken.close()
        with moe_ep.Communicator(group_of(broken), timeout_s=20, **case.communicator_arguments) as comm:
            return run_case(case, comm, "cuda")

    arguments = {**case.communicator_arguments, "timeout_s": TIMEOUT_S}
    assert_case(case, run_ranks(3, fn, device="cuda", **arguments))


def beside_an_absent_rank(case: Case, fn):
    """``fn(comm)`` of one rank of two, while the other calls nothing."""
    given_up = threading.Event()

    def run(comm):
        if comm.rank == FAULTY:
            given_up.wait(30)
            return None
        try:
            return fn(comm)
        finally:
            given_up.set()

    arguments = {**case.communicator_arguments, "timeout_s": TIMEOUT_S}
    return run_ranks(2, run, device="cuda", **arguments)[1 - FAULTY]


def test_the_message_tells_what_was_awaited_and_what_was_there():
    case = case_of(2)
    outcome = beside_an_absent_rank(case, lambda comm: outcome_of(case, comm, "static dispatch"))
    assert outcome["raised"] == "PeerTimeoutError", outcome
    expected, seen = re.search(r"signal (\w+) and saw (\w+)", outcome["detail"]).groups()
    assert int(expected, 0) > int(seen, 0)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_failed_dispatch_of_fixed_size_leaves_no_rows(layout):
    """Torch's grouped products end the CUDA context on counts that nobody wrote."""
    case, room = case_of(2), 50

    def fn(comm):
        inputs = case.inputs(comm.rank, "cuda")
        torch.full((4096,), 1 << 40, device="cuda")  # what freed memory may hold
        outs = [
            moe_ep.dispatch(inputs.x, inputs.topk_idx, None, comm, layout=layout, max_recv_rows=room)
            for _ in range(2)  # the second call finds the group broken
        ]
        torch.cuda.current_stream().synchronize()
        with pytest.raises(moe_ep.PeerTimeoutError):
            comm.barrier()
        found = []
        for out in outs:
            found.append((out.tokens_per_expert.tolist(), out.padded_tokens_per_expert.tolist()))
            assert layout == "expert" or (out.topk_idx == -1).all()
        return found

    empty = [0] * (case.num_experts // 2)
    assert beside_an_absent_rank(case, fn) == [(empty, empty)] * 2


# ---- ranks as processes


PROCESSES = pytest.mark.parametrize(
    ("world_size", "one_gpu"), groups_of_processes(on_one_gpu=(2, 3), on_gpus=(2, 4))
)


@PROCESSES
def test_a_late_process_is_named_and_a_new_communicator_works(world_size, one_gpu):
    lasts = ["dispatch", "backward"] if one_gpu else STEPS
    results = run_cuda(world_size, be_late, lasts, one_gpu=one_gpu, timeout_s=200)
    for i in range(len(lasts)):
        outcomes = {rank: result[i][0] for rank, result in enumerate(results) if rank != FAULTY}
        check_outcomes(outcomes, slack_s=10 if one_gpu else 4)
        assert_case(case_of(world_size), [result[i][1] for result in results])


def be_late(lasts: list[str]) -> list[tuple]:
    """For each step: rank 1 sleeps well beyond the timeout while the others call; then all try again."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    case = case_of(world_size)

    def before_last():
        if rank == FAULTY:
            time.sleep(TIMEOUT_S + 3)
            raise Absent

    results = []
    for last in lasts:
        arguments = {**case.communicator_arguments, "backend": "nvlink"}
        broken = moe_ep.Communicator(timeout_s=TIMEOUT_S, **arguments)
        call(case, broken, "backward")
        outcome = outcome_of(case, broken, last, before_last)
        broken.close()
        broken.close()
        torch.cuda.synchronize()
        with moe_ep.Communicator(timeout_s=30, **arguments) as comm:
            results.append((outcome, run_case(case, comm, "cuda")))
    return results


@pytest.mark.parametrize("last", ["dispatch", "combine"])
@PROCESSES
def test_a_killed_process_is_named_by_the_others(world_size, one_gpu, last, tmp_path, monkeypatch):
    if one_gpu:
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    where = "one gpu" if one_gpu else "cuda"
    launch.spawn(die, world_size, where, last, str(tmp_path), timeout_s=120)
    others = [rank for rank in range(world_size) if rank != FAULTY]
    outcomes = {rank: torch.load(tmp_path / f"{rank}.pt") for rank in others}
    check_outcomes(outcomes, slack_s=10 if one_gpu else 4)


def die(where: str, last: str, directory: str) -> None:
    """Two good rounds on every rank; then rank 1 ends without a word while the others call again."""
    rank = join(where)
    case = case_of(torch.distributed.get_world_size())
    arguments = {**case.communicator_arguments, "backend": "nvlink"}
    comm = moe_ep.Communicator(timeout_s=TIMEOUT_S, **arguments)
    for _ in range(2):
        call(case, comm, "backward")

    def before_last():
        if rank == FAULTY:
            os._exit(0)

    outcome = outcome_of(case, comm, last, before_last)
    torch.cuda.synchronize()
    comm.close()
    torch.save(outcome, f"{directory}/{rank}.pt")
    os._exit(0)  # leaving the process group would wait for the dead rank
