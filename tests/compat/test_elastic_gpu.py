"""V2 and HybridEPBuffer with virtual ranks on a GPU, bit for bit, and V2 in a CUDA graph."""

import elastic_cases
import hybrid_cases
import pytest
import torch
from cases import Case
from exercise import assert_same_bits, settle
from test_elastic import assert_results as assert_elastic
from test_hybrid import assert_results as assert_hybrid

from moe_ep.compat.deep_ep.elastic import ElasticBuffer
from moe_ep.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [case for world_size in (1, 2, 4) for case in elastic_cases.cases(world_size)]


def run(case, fn):
    return run_ranks(case.world_size, fn, device="cuda", timeout_s=20, **case.communicator_arguments)


@pytest.mark.parametrize("mode", elastic_cases.MODES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_elastic(case, mode):
    results = run(case, lambda comm: elastic_cases.run(case, mode, comm._impl.group, comm.rank, "cuda"))
    assert_elastic(case, mode, results)


@pytest.mark.parametrize("call", hybrid_cases.CALLS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hybrid(case, call):
    results = run(case, lambda comm: hybrid_cases.run(case, call, comm._impl.group, comm.rank, "cuda"))
    assert_hybrid(case, call, results)


@pytest.mark.parametrize("expand", [False, True])
def test_what_a_handle_works_out_it_reads_behind_an_asynchronous_dispatch(expand):
    case = CASES[len(elastic_cases.cases(1))]
    names = ("psum_num_recv_tokens_per_scaleup_rank", "recv_src_metadata", "psum_num_recv_tokens_per_expert")

    def fn(comm):
        buffer = ElasticBuffer(
            comm._impl.group, num_max_tokens_per_rank=elastic_cases.max_tokens(case), hidden=case.hidden
        )
        inputs = case.inputs(comm.rank, "cuda")
        options = {"num_experts": case.num_experts, "do_cpu_sync": False, "do_expand": expand}
        for _ in range(3):  # the first one makes what takes the host's time
            *_, handle, event = buffer.dispatch(
                inputs.x, inputs.topk_idx, async_with_compute_stream=True, **options
            )
            early = [getattr(handle, name) for name in names]
            event.current_stream_wait()
        settle("cuda")
        return [each.cpu() for each in early]

    mode = elastic_cases.Mode("early", expand=expand, exact=False)
    for rank, values in enumerate(run(case, fn)):
        wanted = elastic_cases.expected_dispatch(case, mode, rank)
        for name, value in zip(names, values, strict=True):
            assert_same_bits(value, wanted[name], name)


@pytest.mark.parametrize("expand", [False, True])
def test_graph_follows_its_inputs(expand):
    """A captured first dispatch and combine, replayed with another routing and other rows."""
    first, second = (
        Case("graph", (24,), num_experts=16, num_topk=4, dtype=torch.bfloat16, seed=seed, routing="masked")
        for seed in (0, 1)
    )
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=32, hidden=first.hidden)

    def call(inputs):
        recv, _, weights, handle, _ = buffer.dispatch(
            inputs.x,
            inputs.topk_idx,
            inputs.topk_weights,
            num_experts=16,
            do_cpu_sync=False,
            do_expand=expand,
        )
        y, back, _ = buffer.combine(recv, handle, topk_weights=weights)
        return y, back, handle.psum_num_recv_tokens_per_scaleup_rank, handle.recv_src_metadata

    inputs = first.inputs(0, "cuda")
    call(inputs)  # makes what can't be made in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(inputs)
    for case in (second, first):
        wanted = call(case.inputs(0, "cuda"))
        for name in ("x", "topk_idx", "topk_weights"):
            getattr(inputs, name).copy_(getattr(case.inputs(0, "cuda"), name))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for actual, value in zip(captured, wanted, strict=True):
            assert_same_bits(actual, value, str(case))
