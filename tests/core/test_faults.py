"""Dead and late ranks: the others get PeerTimeoutError with the number, not a hang, and can go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import Case
from exercise import assert_case, run_case

import moe_ep
from moe_ep import launch
from moe_ep.backends import collective
from moe_ep.backends.virtual import VirtualGroup
from moe_ep.testing import run_ranks

CASE = Case("faults", (5, 8, 3), num_experts=6, num_topk=2)
TIMEOUT_S = 2.0
FAULTY = 1


class Absent(Exception):
    """Ends the part of a rank that is late."""


def call(comm, last, before_last=lambda: None):
    """The steps of training up to ``last``; ``before_last`` runs just before that one."""
    inputs = CASE.inputs(comm.rank)
    if last == "barrier":
        before_last()
        return comm.barrier()
    if last == "dispatch":
        before_last()
    out = moe_ep.dispatch(inputs.x.requires_grad_(), inputs.topk_idx, inputs.topk_weights, comm)
    if last == "combine":
        before_last()
    if last in ("combine", "backward"):
        y = moe_ep.combine(out.tokens, out.handle)
    if last == "backward":
        before_last()
        y.sum().backward()


def work_until_the_peer_dies(directory, shared_memory):
    """Two good rounds on every rank; then rank 1 dies by SIGKILL while the others call again."""
    collective.SHARED_MEMORY_MIN_BYTES = 1 if shared_memory else 1 << 62
    launch.init_process_group("cpu")
    comm = moe_ep.Communicator(timeout_s=TIMEOUT_S, **CASE.communicator_arguments)
    for _ in range(2):
        call(comm, "backward")
    if comm.rank == FAULTY:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        for _ in range(2):
            call(comm, "combine")
        outcome = {"raised": None}
    except moe_ep.PeerTimeoutError as error:
        outcome = {
            "raised": "PeerTimeoutError",
            "ranks": error.ranks,
            "phase": error.phase,
            "text": str(error),
        }
    except Exception as error:
        outcome = {"raised": f"{type(error).__name__}: {error}"}
    outcome["seconds"] = time.monotonic() - start
    comm.close()
    torch.save(outcome, f"{directory}/{comm.rank}.pt")
    os._exit(0)  # leaving the process group would wait for the dead rank


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_killed_process_is_named_by_the_others(tmp_path, shared_memory):
    with pytest.raises(Exception, match="SIGKILL"):
        launch.spawn(work_until_the_peer_dies, 3, str(tmp_path), shared_memory, timeout_s=60)
    for rank in (0, 2):
        outcome = torch.load(tmp_path / f"{rank}.pt")
        assert outcome["raised"] == "PeerTimeoutError", outcome
        assert FAULTY in outcome["ranks"] and rank not in outcome["ranks"], outcome
        assert "rank" in outcome["text"] and str(FAULTY) in outcome["text"] and outcome["phase"]
        assert outcome["seconds"] < TIMEOUT_S + 5, outcome
    # At least the one that noticed first blames the dead rank alone.
    assert any(torch.load(tmp_path / f"{rank}.pt")["ranks"] == (FAULTY,) for rank in (0, 2))


def sleep_if_faulty(rank):
    def sleep():
        if rank == FAULTY:
            time.sleep(TIMEOUT_S + 4)
            raise Absent

    return sleep


def work_while_a_peer_is_late(directory, step):
    """Rank 1 sleeps well beyond the timeout while the others call; it is alive all along."""
    rank, _ = launch.init_process_group("cpu")
    comm = moe_ep.Communicator(timeout_s=TIMEOUT_S, **CASE.communicator_arguments)
    call(comm, "backward")
    outcome = {"raised": None}
    start = time.monotonic()
    try:
        call(comm, step, before_last=sleep_if_faulty(rank))
    except moe_ep.PeerTimeoutError as error:
        outcome = {"raised": "PeerTimeoutError", "ranks": error.ranks, "text": str(error)}
    except Absent:
        pass
    outcome["seconds"] = time.monotonic() - start
    comm.close()
    comm.close()
    torch.save(outcome, f"{directory}/{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("step", ["dispatch", "backward"])
def test_a_late_process_is_named_by_the_others(tmp_path, step):
    launch.spawn(work_while_a_peer_is_late, 3, str(tmp_path), step, timeout_s=60)
    for rank in (0, 2):
        outcome = torch.load(tmp_path / f"{rank}.pt")
        assert outcome["raised"] == "PeerTimeoutError", outcome
        assert outcome["ranks"] == (FAULTY,), outcome
        assert TIMEOUT_S * 0.5 < outcome["seconds"] < TIMEOUT_S + 3, outcome


def test_an_exception_in_one_virtual_rank_is_raised_at_once():
    def fn(comm):
        if comm.rank == FAULTY:
            raise KeyError("broken expert")
        call(comm, "backward")

    start = time.monotonic()
    with pytest.raises(KeyError, match="broken expert"):
        run_ranks(3, fn, timeout_s=60, **CASE.communicator_arguments)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("step", ["dispatch", "combine", "backward", "barrier"])
def test_a_late_virtual_rank_is_named(step):
    release = threading.Event()
    caught = {}

    def fn(comm):
        def before_last():
            if comm.rank == FAULTY:
                release.wait(30)
                raise Absent

        start = time.monotonic()
        try:
            call(comm, step, before_last)
        except moe_ep.PeerTimeoutError as error:
            caught[comm.rank] = error.ranks, error.phase, str(error), time.monotonic() - start
        except Absent:
            return
        if len(caught) == 2:
            release.set()

    run_ranks(3, fn, timeout_s=0.5, **CASE.communicator_arguments)
    assert sorted(caught) == [0, 2]
    for ranks, phase, text, seconds in caught.values():
        assert ranks == (FAULTY,)
        assert phase and str(FAULTY) in text
        assert 0.3 < seconds < 5


def test_a_late_virtual_rank_ends_run_ranks_with_the_others_error():
    release = threading.Event()

    def fn(comm):
        if comm.rank == FAULTY:
            release.wait(30)
        else:
            call(comm, "dispatch")

    try:
        with pytest.raises(moe_ep.PeerTimeoutError) as caught:
            run_ranks(3, fn, timeout_s=0.5, **CASE.communicator_arguments)
    finally:
        release.set()
    assert caught.value.ranks == (FAULTY,)


def test_a_new_communicator_works_after_a_timeout():
    groups = VirtualGroup.create(3)
    results = [None] * 3

    def fn(rank):
        arguments = CASE.communicator_arguments
        broken = moe_ep.Communicator(groups[rank], timeout_s=0.5, **arguments)
        if rank != FAULTY:
            with pytest.raises(moe_ep.PeerTimeoutError):
                call(broken, "dispatch")
        broken.close()
        with moe_ep.Communicator(groups[rank], timeout_s=20, **arguments) as comm:
            results[rank] = run_case(CASE, comm)

    threads = [threading.Thread(target=fn, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(results), "a rank did not finish"
    assert_case(CASE, results)


def test_close_twice_and_by_context_manager():
    with moe_ep.Communicator(hidden=8, max_tokens_per_rank=4, num_experts=2, num_topk=1) as comm:
        assert not comm.closed
        comm.close()
        assert comm.closed
        comm.close()
    assert comm.closed


EXIT_PROGRAM = """
import torch, moe_ep
comm = moe_ep.Communicator(hidden=8, max_tokens_per_rank=4, num_experts=2, num_topk=1)
out = moe_ep.dispatch(torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), None, comm)
{end}
"""


@pytest.mark.parametrize(
    "end", ["", "comm.close(); comm.close()", "import atexit; atexit.register(comm.close)", "del comm"]
)
def test_a_process_ends_quietly_with_open_or_closed_communicators(end):
    done = subprocess.run(
        [sys.executable, "-c", EXIT_PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
