"""V2: what handles promise beyond one call, arguments, sizes, and the services beside dispatch and combine."""

import pytest
import torch
from cases import Case
from elastic_cases import Mode, add, places
from exercise import assert_same_bits, settle
from processes import run_gloo

from moe_ep.backends.virtual import VirtualGroup
from moe_ep.compat.deep_ep import elastic_sizes
from moe_ep.compat.deep_ep.elastic import ElasticBuffer, EPHandle
from moe_ep.compat.deep_ep.utils.event import EventHandle, EventOverlap
from moe_ep.errors import InvalidInput, PeerTimeoutError
from moe_ep.testing import run_ranks

CASE = Case("handles", (9, 0, 6, 12), num_topk=3, routing="masked", dtype=torch.bfloat16)
MAX_TOKENS = 16
MIB = 1 << 20


def run(fn, case=CASE, **options):
    """``fn(buffer, case, rank)`` on virtual ranks."""

    def on_rank(comm):
        buffer = ElasticBuffer(
            comm._impl.group, num_max_tokens_per_rank=MAX_TOKENS, hidden=case.hidden, **options
        )
        return fn(buffer, case, comm.rank)

    return run_ranks(case.world_size, on_rank, timeout_s=20, **case.communicator_arguments)


def dispatch(buffer, case, rank, **options):
    inputs = case.inputs(rank)
    return buffer.dispatch(
        inputs.x, inputs.topk_idx, inputs.topk_weights, num_experts=case.num_experts, **options
    )


@pytest.mark.parametrize("expand", [False, True])
def test_metadata_may_be_replaced_before_combine(expand):
    """The caller has put the rows into another order and cut the tail off, and says so in the handle."""

    def fn(buffer, case, rank):
        recv, _, weights, handle, _ = dispatch(buffer, case, rank, do_expand=expand, do_cpu_sync=False)
        wanted = buffer.combine(recv, handle, topk_weights=weights)[:2]
        num_pairs = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        metadata = handle.recv_src_metadata[:num_pairs]
        order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(rank))
        if expand:
            rows = metadata[:, 2:][metadata[:, 2:] >= 0].long()
            new_row = torch.full((len(recv),), -1, dtype=torch.int32)
            row_order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(rank))]
            new_row[row_order] = torch.arange(len(rows), dtype=torch.int32)
            metadata = metadata.clone()
            metadata[:, 2:] = torch.where(metadata[:, 2:] < 0, -1, new_row[metadata[:, 2:].long()])
            recv, weights = recv[row_order], weights[row_order]
        else:
            recv, weights = recv[order], weights[order]
        handle.recv_src_metadata = metadata[order]
        return wanted, buffer.combine(recv, handle, topk_weights=weights)[:2]

    for wanted, actual in run(fn):
        assert_same_bits(actual[0], wanted[0], "sums")
        assert_same_bits(actual[1], wanted[1], "weights")


def test_rows_behind_the_last_token_may_be_left_out():
    def fn(buffer, case, rank):
        recv, _, _, handle, _ = dispatch(buffer, case, rank, do_cpu_sync=False)
        wanted = buffer.combine(recv, handle)[0]
        count = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        handle.recv_src_metadata = handle.recv_src_metadata[:count]
        return wanted, buffer.combine(recv[:count].contiguous(), handle)[0]

    for wanted, actual in run(fn):
        assert_same_bits(actual, wanted, "sums")


def test_handles_of_all_kinds_stay_good_while_others_are_made():
    options = [{}, {"do_expand": True, "expert_alignment": 4}, {"do_cpu_sync": False}]

    def fn(buffer, case, rank):
        made = [dispatch(buffer, case, rank, **each) for each in options]
        early = [buffer.combine(out[0], out[3])[0] for out in made]
        for out in made:
            out[1] is None or out[1].fill_(7)  # what was returned is the caller's
        expand = [bool(each.get("do_expand")) for each in options]
        again = [
            buffer.dispatch(case.inputs(rank).x, handle=out[3], do_expand=e)
            for out, e in zip(made, expand, strict=True)
        ]
        late = [buffer.combine(out[0], out[3])[0] for out in reversed(made)][::-1]
        return made, early, again, late

    for made, early, again, late in run(fn):
        for first, y, second, y_late in zip(made, early, again, late, strict=True):
            assert second[3] is first[3]
            assert_same_bits(second[0], first[0], "rows again")
            assert second[2] is None
            assert second[1] is None or not (second[1] == 7).any()
            assert_same_bits(y_late, y, "sums later")


def test_other_widths_and_dtypes_go_by_the_same_handle():
    def fn(buffer, case, rank):
        handle = dispatch(buffer, case, rank)[3]
        wide = case.values(rank, "wide", case.tokens_by_rank[rank], 48, dtype=torch.float32)
        rows = buffer.dispatch(wide, handle=handle)[0]
        return wide, rows, buffer.combine(rows, handle)[0], handle

    results = run(fn)
    for rank, (wide, rows, y, handle) in enumerate(results):
        found = places(CASE, Mode("plain"), rank)
        assert len(rows) == len(found) == handle.num_recv_tokens
        for row, place in zip(rows, found, strict=True):
            assert_same_bits(row, results[place.source][0][place.token], "row")
        per_token = [
            sum(p.source == rank and p.token == t for r in range(4) for p in places(CASE, Mode("plain"), r))
            for t in range(len(wide))
        ]
        for token, count in enumerate(per_token):
            wanted = add([wide[token]] * count) if count else torch.zeros(48)
            assert_same_bits(y[token], wanted, "sum")


def test_topk_idx_is_cloned_or_held():
    def fn(buffer, case, rank):
        topk_idx = case.topk_idx(rank)
        x = case.inputs(rank).x
        copies, holds = (
            buffer.dispatch(x, topk_idx, num_experts=case.num_experts, do_handle_copy=copy)[3]
            for copy in (1, 0)
        )
        return topk_idx, copies.topk_idx, holds.topk_idx

    for given, cloned, held in run(fn, case=Case("copies", (4, 5), num_topk=2)):
        assert held.data_ptr() == given.data_ptr() != cloned.data_ptr()
        assert torch.equal(cloned, given)


def test_inference_mode_and_tensors_of_it():
    def fn(buffer, case, rank):
        with torch.inference_mode():
            inputs = case.inputs(rank)
            stats = torch.zeros(case.experts_per_rank, dtype=torch.int32)
            recv, _, weights, handle, _ = dispatch(
                buffer, case, rank, cumulative_local_expert_recv_stats=stats
            )
            y = buffer.combine(recv, handle, topk_weights=weights, bias=inputs.x)[0]
        outside = buffer.combine(recv, handle, bias=inputs.x)[0]
        recv.requires_grad_()  # a tensor of inference mode refuses
        assert not y.requires_grad
        return y, outside, stats, handle

    for y, outside, stats, handle in run(fn):
        assert_same_bits(outside, y, "sums")
        assert torch.equal(stats, handle.num_unaligned_recv_tokens_per_expert)


def test_results_have_no_gradient_and_parameters_may_be_sent():
    def fn(buffer, case, rank):
        inputs = case.inputs(rank)
        recv, _, _, handle, _ = buffer.dispatch(
            inputs.x.requires_grad_(), inputs.topk_idx, num_experts=case.num_experts
        )
        return recv, buffer.combine(recv, handle)[0]

    for tensors in run(fn):
        assert not any(tensor.requires_grad for tensor in tensors)


REFUSED = {
    "no routing": (dict(topk_idx=None), "topk_idx is None"),
    "no number of experts": (dict(num_experts=None), "num_experts is None"),
    "too many tokens": (dict(num_max_tokens_per_rank=3), "num_max_tokens_per_rank=3"),
    "alignment": (dict(expert_alignment=0), "expert_alignment is 0"),
    "ids of a wrong shape": (dict(topk_idx=torch.zeros(3, 2, dtype=torch.int64)), "topk_idx is"),
    "ids of a wrong dtype": (dict(topk_idx=torch.zeros(4, 2)), "topk_idx is torch.float32"),
    "weights of a wrong dtype": (dict(topk_weights=torch.zeros(4, 2).double()), "topk_weights is"),
    "an odd width": (dict(x=torch.zeros(4, 3)), "12 bytes"),
    "rows with gaps": (dict(x=torch.zeros(4, 32)[:, ::2]), "not contiguous"),
    "scales of a wrong size": (dict(x=(torch.zeros(4, 16), torch.zeros(4, 2).half())), "the scales are"),
    "stats of a wrong dtype": (
        dict(cumulative_local_expert_recv_stats=torch.zeros(16)),
        "cumulative_local_expert_recv_stats is",
    ),
    "an event without the comm stream": (dict(previous_event=EventHandle()), "allocate_on_comm_stream"),
    "an expert twice": (dict(topk_idx=torch.zeros(4, 2, dtype=torch.int64)), "twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_of_dispatch(name):
    changes, message = REFUSED[name]
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=16)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1]])
    arguments = dict(x=torch.zeros(4, 16), topk_idx=ids, num_experts=16) | changes
    with pytest.raises(InvalidInput, match=message):
        buffer.dispatch(**arguments)


REFUSED_AGAIN = {
    "ids": (dict(topk_idx=torch.zeros(1, 2, dtype=torch.int64)), "both given"),
    "a sync": (dict(do_cpu_sync=True), "do_cpu_sync"),
    "stats": (dict(cumulative_local_expert_recv_stats=torch.zeros(16).int()), "cumulative"),
    "another layout": (dict(do_expand=True), "do_expand is True; this handle's dispatch had False"),
    "other experts": (dict(num_experts=32), "num_experts is 32"),
    "another alignment": (dict(expert_alignment=4), "expert_alignment is 4"),
    "other tokens": (dict(x=torch.zeros(3, 16)), "3 rows"),
}


@pytest.mark.parametrize("name", REFUSED_AGAIN)
def test_bad_arguments_beside_a_handle(name):
    changes, message = REFUSED_AGAIN[name]
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=16)
    handle = buffer.dispatch(torch.zeros(1, 16), torch.tensor([[0, 1]]), num_experts=16)[3]
    with pytest.raises(InvalidInput, match=message):
        buffer.dispatch(**dict(x=torch.zeros(1, 16), handle=handle) | changes)


def test_bad_arguments_of_combine():
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=16, explicitly_destroy=True)
    x, _, _, handle, _ = buffer.dispatch(torch.zeros(1, 16), torch.tensor([[0, 1]]), num_experts=16)
    for arguments, message in [
        (dict(x=x[:0]), "0 rows"),
        (dict(x=x.view(torch.uint8)), "uint8"),
        (dict(x=x, bias=torch.zeros(2, 16)), "bias 0"),
        (dict(x=x, topk_weights=torch.zeros(1)), "topk_weights"),
        (dict(x=x, previous_event=EventHandle()), "allocate_on_comm_stream"),
        (dict(x=x, handle=EPHandle(False, 16, 1, 8, 0, None, 1, 2, [], *[None] * 5)), "made by hand"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            buffer.combine(**{"handle": handle, **arguments})
    buffer.destroy()
    with pytest.raises(InvalidInput, match="destroyed"):
        buffer.combine(x, handle)


def test_a_rank_that_does_not_come_is_named():
    def fn(buffer, case, rank):
        if rank == 1:
            return None
        with pytest.raises(PeerTimeoutError) as caught:
            buffer.barrier()
        return caught.value.ranks

    assert run(fn, case=Case("late", (1, 1)), num_gpu_timeout_secs=1)[0] == (1,)


def test_constructor():
    with pytest.raises(InvalidInput, match="num_max_tokens_per_rank 0"):
        ElasticBuffer(None, hidden=16)
    with pytest.raises(InvalidInput, match="multiple of 2097152"):
        ElasticBuffer(None, num_bytes=5)
    with pytest.raises(InvalidInput, match="num_experts is 17"):
        two = ElasticBuffer(VirtualGroup.create(2)[0], num_max_tokens_per_rank=4, hidden=16)
        two.dispatch(torch.zeros(1, 16), torch.tensor([[0]]), num_experts=17)
    with pytest.raises(InvalidInput, match="group is a str"):
        ElasticBuffer("world", num_bytes=2 * MIB)
    buffer = ElasticBuffer(None, 2 * MIB)
    with pytest.raises(InvalidInput, match="explicitly_destroy"):
        buffer.destroy()
    x, topk_idx = torch.ones(2, 16), torch.tensor([[0], [1]])
    with pytest.raises(InvalidInput, match="num_max_tokens_per_rank is not set"):
        buffer.dispatch(x, topk_idx, num_experts=2)
    recv = buffer.dispatch(x, topk_idx, num_experts=2, num_max_tokens_per_rank=4)[0]
    assert torch.equal(recv, x)
    assert isinstance(ElasticBuffer.capture(), EventHandle)
    assert isinstance(buffer.dispatch(x, topk_idx, num_experts=2, num_max_tokens_per_rank=4)[4], EventOverlap)


def test_sizes_and_multiprocessors():
    for num_ranks, mib, num_sms in [(2, 114, 22), (4, 226, 16), (8, 452, 14)]:
        group = VirtualGroup.create(num_ranks)[0]
        num_bytes = ElasticBuffer.get_buffer_size_hint(group, 4096, 7168, 8)
        assert num_bytes == mib * MIB
        buffer = ElasticBuffer(group, num_max_tokens_per_rank=4096, hidden=7168, num_topk=8)
        assert buffer.num_bytes == num_bytes
        assert ElasticBuffer.get_buffer_size_hint(group, 4096, 7168) > num_bytes  # top-32
        h200 = (num_ranks, 256, 8, 0.9 * elastic_sizes.H200_LINK_GBS, 200, 50)
        assert elastic_sizes.theoretical_num_sms(*h200, overlapped=True, available=132) == num_sms
        assert elastic_sizes.theoretical_num_sms(*h200, overlapped=False, available=132) == 64
        assert elastic_sizes.theoretical_num_sms(*h200, overlapped=True, available=10) == 10
        assert buffer.get_logical_domain_size() == buffer.get_physical_domain_size() == (1, num_ranks)
        assert (buffer.rank_idx, buffer.num_ranks, buffer.scaleup_rank_idx) == (0, num_ranks, 0)
        assert [buffer.get_theoretical_num_qps(n) for n in (4, 64)] == [4, 9]
    one_by_one = ElasticBuffer.get_buffer_size_hint(group, 4096, 7168, 32, allow_multiple_reduction=False)
    assert one_by_one == elastic_sizes.align(32 * 4096 * (14336 + 256), 2 * MIB)


def test_what_there_is_not():
    buffer = ElasticBuffer(None, 2 * MIB)
    for name in ("get_engram_storage_size_hint", "engram_write", "engram_fetch"):
        with pytest.raises(NotImplementedError, match="engram"):
            getattr(buffer, name)(1, 2)
    for name in ("get_pp_buffer_size_hint", "pp_set_config", "pp_send", "pp_recv"):
        with pytest.raises(NotImplementedError, match="pipeline"):
            getattr(buffer, name)(1, 2)


GATHERED_SHAPES = [(3, 5), (7,), (2, 2), (0, 4)]


def gather_in_sessions(group, device: str = "cpu") -> list:
    """On one rank: gathers of all kinds, and what goes wrong."""
    shapes = GATHERED_SHAPES
    num_bytes = ElasticBuffer.get_agrs_num_max_session_bytes(group, shapes, torch.bfloat16)
    buffer = ElasticBuffer(
        group, ElasticBuffer.get_agrs_buffer_size_hint(group, num_bytes), explicitly_destroy=True
    )
    rank = buffer.rank_idx
    with pytest.raises(InvalidInput, match="agrs_set_config"):
        buffer.create_agrs_session()
    buffer.agrs_set_config(num_bytes, len(shapes))
    tensors = [
        torch.full(shape, 10.0 * rank + i, dtype=torch.bfloat16, device=device)
        for i, shape in enumerate(shapes)
    ]
    results = []
    with buffer.agrs_new_session(enabled=True):
        *gathered, wait = buffer.all_gather(tensors)
        wait()
        results.append([each.clone() for each in gathered])
        with pytest.raises(InvalidInput, match="agrs_set_config"):
            buffer.all_gather(torch.zeros(64, device=device))
    with buffer.agrs_new_session():
        mine = [buffer.agrs_get_inplace_tensor(shapes[0], torch.bfloat16)]
        mine += buffer.agrs_get_inplace_tensor(shapes[1:], torch.bfloat16)
        for own, tensor in zip(mine, tensors, strict=True):
            own.copy_(tensor)
        in_place = []
        for own in mine:
            everyone, wait = buffer.all_gather(own)
            wait()
            assert own.numel() == 0 or everyone[rank].data_ptr() == own.data_ptr()
            in_place.append(everyone.clone())
        results.append(in_place)
    with pytest.raises(InvalidInput, match="no session is open"):
        buffer.all_gather(tensors[0])
    with buffer.agrs_new_session(enabled=False):
        pass
    buffer.barrier(with_cpu_sync=True)
    settle(device)
    results = [[each.cpu() for each in gathered] for gathered in results]
    buffer.destroy()
    return results


def assert_gathered(by_rank: list) -> None:
    for results in by_rank:
        for gathered in results:
            for i, (everyone, shape) in enumerate(zip(gathered, GATHERED_SHAPES, strict=True)):
                of_rank = [
                    torch.full(shape, 10.0 * rank + i, dtype=torch.bfloat16) for rank in range(len(by_rank))
                ]
                assert_same_bits(everyone, torch.stack(of_rank), f"gathered tensor {i}")


def gather_on_process() -> list:
    return gather_in_sessions(torch.distributed.group.WORLD)


def test_all_gather_sessions():
    num_bytes = ElasticBuffer.get_agrs_num_max_session_bytes(None, GATHERED_SHAPES, torch.bfloat16)
    assert num_bytes == 32 + 32 + 32 + 0
    assert_gathered(run_gloo(2, gather_on_process))


def test_gaps_are_zeros():
    def fn(buffer, case, rank):
        recv, _, weights, handle, _ = dispatch(
            buffer, case, rank, do_expand=True, do_zero_padding=True, expert_alignment=16
        )
        return recv, weights, handle.psum_num_recv_tokens_per_expert, buffer.combine(recv, handle)[0]

    for recv, weights, ends, y in run(fn):
        for i, end in enumerate(ends.tolist()):
            gap = slice(end, elastic_sizes.align(end, 16))
            assert not recv[gap].any() and not weights[gap].any(), f"gap of expert {i}"
        assert not y.isnan().any()
