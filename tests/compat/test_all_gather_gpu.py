"""V2's all-gather sessions on GPUs: by copy engines, without a kernel."""

import time

import pytest
import torch
from exercise import assert_same_bits, settle
from gpu.machine import groups_of_processes, needs_gpu
from processes import run_cuda
from test_elastic_handle import assert_gathered, gather_in_sessions

from moe_ep.compat.deep_ep.elastic import ElasticBuffer

pytestmark = needs_gpu

_SIZE = 1 << 20
_SESSIONS = 30


def make_buffer(group) -> ElasticBuffer:
    num_bytes = 2 * ElasticBuffer.get_agrs_num_max_session_bytes(group, [(_SIZE,)], torch.int32)
    buffer = ElasticBuffer(
        group, ElasticBuffer.get_agrs_buffer_size_hint(group, num_bytes), explicitly_destroy=True
    )
    buffer.agrs_set_config(num_bytes, 2)
    assert buffer._sessions._engines is not None
    return buffer


def gather_many_times(group) -> bool:
    """Sessions one behind the other, with numbers of their own and ranks that are late by turns."""
    buffer = make_buffer(group)
    rank, size = buffer.rank_idx, buffer.num_ranks
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    ranks = torch.arange(size, device="cuda").unsqueeze(1)
    rows = [torch.full((_SIZE,), 1000 * i + rank, dtype=torch.int32, device="cuda") for i in range(_SESSIONS)]
    settle("cuda")
    for i in range(_SESSIONS):
        if i % (size + 1) == rank:
            time.sleep(0.01)
        with buffer.agrs_new_session():
            mine = buffer.agrs_get_inplace_tensor((_SIZE,), torch.int32)
            mine.copy_(rows[i])
            in_place, wait = buffer.all_gather(mine)
            copied, wait_too = buffer.all_gather(rows[i])
            wait()
            wait_too()
            for gathered in (in_place, copied):
                wrong += (gathered != 1000 * i + ranks).sum()
    settle("cuda")
    buffer.destroy()
    assert wrong.item() == 0, f"rank {rank}: {wrong.item()} numbers of {_SESSIONS} sessions are wrong"
    return True


def gather_on_process() -> tuple:
    """Results of all kinds, many sessions, and what one gather in place has a GPU do."""
    group = torch.distributed.group.WORLD
    results = gather_in_sessions(group, "cuda")
    gather_many_times(group)
    buffer = make_buffer(group)
    rank = buffer.rank_idx
    with buffer.agrs_new_session():
        mine = buffer.agrs_get_inplace_tensor((_SIZE,), torch.int32)
        mine.fill_(rank)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            everyone, wait = buffer.all_gather(mine)
            wait()
            torch.cuda.synchronize()
    wanted = torch.arange(buffer.num_ranks, dtype=torch.int32).unsqueeze(1).expand(-1, _SIZE)
    assert_same_bits(everyone.cpu(), wanted, "gathered in place")
    work = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    buffer.destroy()
    return results, work


@pytest.mark.parametrize(("world_size", "one_gpu"), groups_of_processes(on_gpus=(2, 4)))
def test_sessions_on_processes(world_size, one_gpu):
    by_rank = run_cuda(world_size, gather_on_process, one_gpu=one_gpu)
    assert_gathered([results for results, _ in by_rank])
    for rank, (_, work) in enumerate(by_rank):
        kernels = [name for name in work if not name.startswith(("Memcpy", "Memset"))]
        assert not kernels, f"rank {rank}: a gather in place launched {kernels}"
