"""Starting ranks: processes by spawn, threads by run_ranks, and the environment that chooses a backend."""

import os
import time

import pytest
import torch

import moe_ep
from moe_ep import env, launch
from moe_ep.testing import run_ranks

ARGUMENTS = {"hidden": 4, "max_tokens_per_rank": 2, "num_experts": 2, "num_topk": 1}


def report(directory):
    rank, world_size = launch.init_process_group("cpu")
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)
    torch.save((rank, world_size, int(total), os.environ["LOCAL_RANK"]), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_spawned_ranks_form_a_group(tmp_path):
    launch.spawn(report, 2, str(tmp_path), timeout_s=60)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(0, 2, 3, "0"), (1, 2, 3, "1")]


def fail_on_rank_1():
    rank, _ = launch.init_process_group("cpu")
    if rank == 1:
        raise KeyError("no such preset")
    time.sleep(60)


def test_an_exception_of_a_spawned_rank_is_raised_and_ends_the_others():
    start = time.monotonic()
    with pytest.raises(Exception, match="no such preset"):
        launch.spawn(fail_on_rank_1, 2, timeout_s=50)
    assert time.monotonic() - start < 40


def sleep_long():
    time.sleep(60)


def test_ranks_that_do_not_end_in_time_are_ended():
    with pytest.raises(moe_ep.MoeEpError, match="timeout_s=1"):
        launch.spawn(sleep_long, 1, timeout_s=1)


def test_bad_arguments_are_refused():
    with pytest.raises(moe_ep.InvalidInput, match="nproc is 0"):
        launch.spawn(sleep_long, 0)
    with pytest.raises(moe_ep.InvalidInput, match="'tpu'"):
        launch.init_process_group("tpu")
    with pytest.raises(moe_ep.InvalidInput, match="'meta'"):
        run_ranks(2, lambda comm: None, device="meta", **ARGUMENTS)


def test_without_a_launcher_a_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.init_process_group() == (0, 1)
    assert not torch.distributed.is_initialized()


def test_run_ranks_returns_results_by_rank_and_closes_its_communicators():
    comms = run_ranks(3, lambda comm: comm, **(ARGUMENTS | {"num_experts": 3}))
    assert [comm.rank for comm in comms] == [0, 1, 2]
    assert all(comm.closed for comm in comms)


@pytest.mark.parametrize("enabled", [True, False])
def test_run_ranks_keeps_the_callers_grad_mode(enabled):
    with torch.set_grad_enabled(enabled):
        assert run_ranks(2, lambda comm: torch.is_grad_enabled(), **ARGUMENTS) == [enabled] * 2


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, "collective")
    with moe_ep.Communicator(**ARGUMENTS) as comm:
        assert comm.backend == "collective"
    monkeypatch.setenv(env.BACKEND.name, "virtual")
    with pytest.raises(moe_ep.BackendUnavailable, match="VirtualGroup"):
        moe_ep.Communicator(**ARGUMENTS)
    monkeypatch.setenv(env.BACKEND.name, "smoke signals")
    with pytest.raises(moe_ep.InvalidInput, match=r"MOE_EP_BACKEND.*smoke signals.*collective"):
        moe_ep.Communicator(**ARGUMENTS)


def test_variables_of_the_environment_are_documented():
    for variable in env.VARIABLES:
        assert variable.name.startswith("MOE_EP_") and variable.meaning and variable.default is not None


@pytest.mark.parametrize("flag", ["extension"])
def test_flags_are_0_or_1(monkeypatch, flag):
    name = f"MOE_EP_{flag.upper()}"
    for value in ("0", "1"):
        monkeypatch.setenv(name, value)
        assert getattr(env, flag)() is (value == "1")
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(moe_ep.InvalidInput, match=f"{name}.*'maybe'"):
        getattr(env, flag)()
