"""deep_ep V1's Buffer: normal calls, against V1's semantics written out."""

import pytest
import torch
from cases import Case
from processes import run_gloo
from v1_exercise import assert_v1, run_v1

import moe_ep
from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep.layout import dispatch_layout
from moe_ep.errors import BackendUnavailable, InvalidInput
from moe_ep.testing import run_ranks

_COMMON = {"hidden": 32, "num_biases": 2, "dtype": torch.bfloat16}
_UNEQUAL = {2: (11, 5), 4: (9, 0, 14, 3), 8: (6, 0, 3, 9, 1, 0, 12, 4)}


def make_cases(world_size: int) -> list[Case]:
    tokens = _UNEQUAL[world_size]
    common = {"num_experts": 32, "num_topk": 6} | _COMMON
    return [
        Case("uniform", tokens, **common),
        Case("zipf", tokens, routing="zipf", **common),
        Case("masked", tokens, routing="masked", idx_dtype=torch.int32, **common),
        Case("one_rank", tokens, routing="one_rank", **(common | {"num_topk": 4})),
        Case("all_masked", tokens, routing="none", **common),
        Case("all_empty", (0,) * world_size, **common),
        Case("one_token", (0,) * (world_size - 1) + (1,), **common),
        Case("top1_float32", tokens, **(common | {"num_topk": 1, "dtype": torch.float32})),
        Case("odd_width", tokens, **(common | {"hidden": 24, "num_topk": 8, "dtype": torch.float16})),
    ]


def on_virtual_ranks(world_size: int, fn):
    """``fn(group)`` on each."""
    shape = {"hidden": 4, "max_tokens_per_rank": 1, "num_experts": world_size, "num_topk": 1}
    return run_ranks(world_size, lambda comm: fn(comm._impl.group), **shape)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("async_finish", [False, True], ids=["sync", "async"])
def test_every_mode_on_virtual_ranks(world_size, async_finish):
    for case in make_cases(world_size):
        results = on_virtual_ranks(world_size, lambda group: run_v1(case, group, async_finish))
        assert_v1(case, results)


def test_one_rank_alone():
    case = Case("alone", (7,), num_experts=8, num_topk=3, **_COMMON)
    assert_v1(case, on_virtual_ranks(1, lambda group: run_v1(case, group)))


def test_the_room_said_beforehand_changes_no_result():
    case = make_cases(4)[0]
    results = on_virtual_ranks(4, lambda group: run_v1(case, group, max_tokens_per_rank=16))
    assert_v1(case, results)


def test_a_config_is_taken():
    case = make_cases(2)[0]
    config = deep_ep.Config(8, 6, 256)
    assert_v1(case, on_virtual_ranks(2, lambda group: run_v1(case, group, config=config)))


def run_over_gloo(cases: list[Case]) -> list[dict]:
    group = torch.distributed.new_group(list(range(torch.distributed.get_world_size())))
    return [run_v1(case, group) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_mode_over_gloo(world_size):
    cases = make_cases(world_size)
    if world_size == 8:
        cases = [case for case in cases if case.name in ("zipf", "masked", "all_empty")]
    by_rank = run_gloo(world_size, run_over_gloo, cases)
    for number, case in enumerate(cases):
        assert_v1(case, [results[number] for results in by_rank])


def dispatch_some(buffer, num_tokens: int, seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed + buffer.rank)
    x = torch.randn(num_tokens, 16, generator=generator).bfloat16()
    topk_idx = torch.rand(num_tokens, 8, generator=generator).topk(2, dim=1).indices
    weights = torch.rand(num_tokens, 2, generator=generator)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 8)
    out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, topk_idx, weights, **options)
    return x, in_rank, out


def test_handles_outlive_later_and_larger_dispatches():
    def fn(group):
        buffer = deep_ep.Buffer(group)
        kept = [dispatch_some(buffer, num_tokens, seed) for seed, num_tokens in enumerate((3, 200, 0, 70))]
        for x, in_rank, out in reversed(kept):
            y, _, _ = buffer.combine(out[0], out[4])
            times = in_rank.sum(1, keepdim=True)
            assert torch.equal(y, (x.float() * times).bfloat16())
            assert torch.equal(buffer.dispatch(x, handle=out[4])[0], out[0])
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_growing_rooms_and_bounds():
    def fn(group):
        buffer = deep_ep.Buffer(group)
        dispatch_some(buffer, 10, num_worst_tokens=100)
        dispatch_some(buffer, 50, num_worst_tokens=100)
        with pytest.raises(InvalidInput, match="max_tokens_per_rank"):
            dispatch_some(buffer, 101, num_worst_tokens=100)
        x, in_rank, out = dispatch_some(buffer, 101)  # exact sizes have no such limit
        y, _, _ = buffer.combine(out[0], out[4])
        assert torch.equal(y, (x.float() * in_rank.sum(1, keepdim=True)).bfloat16())
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_calls_work_under_inference_mode_and_in_a_backward():
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, buffer, handle):
            ctx.buffer, ctx.handle = buffer, handle
            return buffer.dispatch(x, handle=handle)[0]

        @staticmethod
        def backward(ctx, grad):
            return ctx.buffer.combine(grad, ctx.handle)[0], None, None

    def fn(group):
        buffer = deep_ep.Buffer(group)
        with torch.inference_mode():
            x, in_rank, out = dispatch_some(buffer, 9)
        x = x.clone().requires_grad_()
        rows = Moved.apply(x, buffer, out[4])
        assert torch.equal(rows.detach(), out[0].clone())
        (rows * rows.new_ones(1)).sum().backward()
        assert torch.equal(x.grad[:, 0].float(), in_rank.sum(1).float())
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_arguments_of_other_versions_are_accepted():
    def fn(group):
        buffer = deep_ep.Buffer(
            group,
            1 << 20,
            0,
            low_latency_mode=False,
            num_qps_per_rank=12,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=True,
            use_fabric=True,
            explicitly_destroy=True,
        )
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.group_size) == (1 << 20, 0, 2)
        assert buffer.group is group and buffer.runtime.is_available()
        assert buffer.runtime.get_num_rdma_ranks() == 1
        assert not buffer.low_latency_mode
        buffer.get_comm_stream()
        out = buffer.internode_dispatch(*_empty_dispatch())
        assert out[0].shape == (0, 16)
        buffer.destroy()
        assert buffer.runtime is None
        with pytest.raises(InvalidInput, match="destroyed"):
            buffer.dispatch(*_empty_dispatch())
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def _empty_dispatch():
    zeros = torch.zeros(2, dtype=torch.int32)
    mask = torch.zeros((0, 2), dtype=torch.bool)
    return torch.zeros(0, 16), None, zeros, None, mask, torch.zeros(4, dtype=torch.int32)


def run_with_mpi_communicator() -> str:
    class Communicator:  # as mpi4py's
        def Get_rank(self):
            return torch.distributed.get_rank()

        def Get_size(self):
            return torch.distributed.get_world_size()

    class Other(Communicator):
        def Get_size(self):
            return 17

    with pytest.raises(InvalidInput, match="of 17"):
        deep_ep.Buffer(None, comm=Other())
    x, in_rank, out = dispatch_some(buffer := deep_ep.Buffer(None, comm=Communicator()), 5)
    y = buffer.combine(out[0], out[4])[0]
    assert torch.equal(y, (x.float() * in_rank.sum(1, keepdim=True)).bfloat16())
    return "done"


def test_a_communicator_of_mpi4py_names_the_default_group():
    assert run_gloo(2, run_with_mpi_communicator) == ["done", "done"]


def test_a_buffer_needs_a_group():
    with pytest.raises(ValueError, match="comm"):
        deep_ep.Buffer(None)
    with pytest.raises(BackendUnavailable, match="init_process_group"):
        deep_ep.Buffer(
            None, comm=object.__new__(type("C", (), {"Get_rank": lambda _: 0, "Get_size": lambda _: 1}))
        )


def test_bad_arguments_are_told_before_anything_is_sent():
    def fn(group):
        buffer = deep_ep.Buffer(group)
        x, _, out = dispatch_some(buffer, 4)
        handle = out[4]
        bad = [
            ("handle, which", lambda: buffer.dispatch(x, handle=handle, topk_idx=torch.zeros(4, 2).long())),
            ("it must be what dispatch", lambda: buffer.dispatch(x, handle=tuple(handle))),
            ("had 4", lambda: buffer.dispatch(x[:3], handle=handle)),
            ("get_dispatch_layout", lambda: buffer.dispatch(x)),
            ("rows; the dispatch", lambda: buffer.combine(out[0][1:], handle)),
            ("bias 0", lambda: buffer.combine(out[0], handle, bias=x[:1])),
            ("up to 2", lambda: buffer.combine(out[0], handle, bias=(x, x, x))),
            ("topk_weights", lambda: buffer.combine(out[0], handle, topk_weights=x)),
            ("multiple of 2", lambda: buffer.get_dispatch_layout(torch.zeros(1, 1).long(), 7)),
            ("float", lambda: buffer.get_dispatch_layout(torch.zeros(1, 1), 8)),
            ("previous_event", lambda: buffer.combine(out[0], handle, allocate_on_comm_stream=True)),
            ("16 bytes", lambda: buffer.dispatch(*(x[:, :3].contiguous(), *_empty_dispatch()[1:]))),
            ("explicitly_destroy", buffer.destroy),
        ]
        for pattern, call in bad:
            with pytest.raises(InvalidInput, match=pattern):
                call()
        with pytest.raises(NotImplementedError, match="raw buffer"):
            buffer.get_local_buffer_tensor(torch.uint8)
        return True

    assert on_virtual_ranks(2, fn) == [True, True]


def test_a_late_rank_is_named():
    def fn(group):
        buffer = deep_ep.Buffer(group, timeout_s=1)
        if buffer.rank == 1:
            return None
        with pytest.raises(moe_ep.PeerTimeoutError) as raised:
            dispatch_some(buffer, 4)
        return raised.value.ranks

    assert on_virtual_ranks(2, fn) == [(1,), None]


@pytest.mark.parametrize("num_ranks", [2, 16])
def test_layout_counts_tokens_once_a_rank_and_a_node(num_ranks):
    ids = torch.tensor([[0, 1, -1], [31, 0, 16], [-1, -1, -1], [40, -7, 5]])
    layout = dispatch_layout(ids, 32, num_ranks)
    local = 32 // num_ranks
    holders = [{e // local for e in row if 0 <= e < 32} for row in ids.tolist()]
    assert layout.is_token_in_rank.tolist() == [[r in held for r in range(num_ranks)] for held in holders]
    assert layout.num_tokens_per_rank.tolist() == [
        sum(r in held for held in holders) for r in range(num_ranks)
    ]
    assert layout.num_tokens_per_expert.tolist() == [int((ids == e).sum()) for e in range(32)]
    if num_ranks == 2:
        assert layout.num_tokens_per_rdma_rank is None
    else:
        nodes = [{r // 8 for r in held} for held in holders]
        assert layout.num_tokens_per_rdma_rank.tolist() == [
            sum(n in held for held in nodes) for n in range(2)
        ]
