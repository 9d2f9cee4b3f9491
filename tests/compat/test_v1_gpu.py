"""V1's normal calls with virtual ranks on a GPU, bit for bit; and the kernels around them beside torch."""

import pytest
import torch
from cases import Case
from exercise import assert_same_bits, settle
from test_deep_ep_v1 import make_cases
from v1_exercise import assert_v1, run_v1

from moe_ep import _extension
from moe_ep.compat import deep_ep
from moe_ep.compat.deep_ep.layout import dispatch_layout, layout_by_torch
from moe_ep.compat.deep_ep.numbers import Column, fill, fill_by_torch
from moe_ep.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(_extension.load() is None, reason=f"needs moe_ep._C: {_extension.why_missing()}"),
]


def on_virtual_ranks(world_size, fn):
    """``fn(group)`` on each."""
    shape = {"hidden": 8, "max_tokens_per_rank": 1, "num_experts": world_size, "num_topk": 1}
    return run_ranks(world_size, lambda comm: fn(comm._impl.group), device="cuda", timeout_s=20, **shape)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", [case for size in (2, 4) for case in make_cases(size)], ids=str)
def test_every_mode(case, is_async):
    results = on_virtual_ranks(case.world_size, lambda group: run_v1(case, group, is_async, device="cuda"))
    assert_v1(case, results)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_one_rank_alone(is_async):
    case = Case("alone", (7,), num_experts=8, num_topk=3, hidden=32, num_biases=2, dtype=torch.bfloat16)
    assert_v1(case, on_virtual_ranks(1, lambda group: run_v1(case, group, is_async, device="cuda")))


def test_rooms_grow_on_all_ranks_when_one_needs_more():
    sizes = [(3, 5), (200, 0), (0, 7), (70, 900), (64, 64)]

    def fn(group):
        buffer = deep_ep.Buffer(group, timeout_s=20)
        kept = []
        for seed, by_rank in enumerate(sizes):
            settle("cuda")
            num_tokens = by_rank[buffer.rank]
            generator = torch.Generator().manual_seed(100 * seed + buffer.rank)
            x = torch.randn(num_tokens, 16, generator=generator).bfloat16().cuda()
            topk_idx = torch.rand(num_tokens, 8, generator=generator).topk(2, dim=1).indices.cuda()
            weights = torch.ones(num_tokens, 2, device="cuda")
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 8)
            out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, topk_idx, weights)
            kept.append((x, in_rank, out))
        sums = [(x, in_rank, buffer.combine(out[0], out[4])[0]) for x, in_rank, out in kept]
        settle("cuda")
        counts = [(out[3], out[0].shape[0]) for _, _, out in kept]
        return [[each.cpu() for each in step] for step in sums], counts

    by_rank = on_virtual_ranks(2, fn)
    for sums, _ in by_rank:
        for x, in_rank, y in sums:
            assert_same_bits(y, (x.float() * in_rank.sum(1, keepdim=True)).bfloat16(), "sums")
    for step in range(len(sizes)):
        for rank, (_, counts) in enumerate(by_rank):
            per_expert, rows = counts[step]
            assert len(per_expert) == 4 and sum(per_expert) >= rows
            arrived = sum(int(sums[step][1][:, rank].sum()) for sums, _ in by_rank)
            assert rows == arrived


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 24])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("num_tokens", [0, 1, 1000])
def test_the_layout_kernel_counts_as_torch_does(num_tokens, dtype, num_ranks):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-3, 99, (num_tokens, 6), generator=generator).to("cuda", dtype)
    by_torch = layout_by_torch(ids, 96, num_ranks)
    for name, wanted in by_torch._asdict().items():
        actual = getattr(dispatch_layout(ids, 96, num_ranks), name)
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert_same_bits(actual.int(), wanted.int(), name)
            assert actual.dtype == wanted.dtype and actual.is_contiguous()


def numbers(
    shape: tuple[int, int], dtype: torch.dtype, by_columns: bool, low: int, high: int
) -> torch.Tensor:
    rows, width = shape
    values = torch.randint(low, high, (width, rows) if by_columns else shape, device="cuda")
    values = (
        values.bool() if dtype == torch.bool else values.int().view(dtype) if dtype.itemsize == 4 else values
    )
    return values.t() if by_columns else values


@pytest.mark.parametrize("from_columns", [False, True])
@pytest.mark.parametrize("to_columns", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (33, 7), (300, 65)])
def test_columns_are_filled_as_torch_does(shape, to_columns, from_columns):
    torch.manual_seed(0)
    rows, width = shape
    travelled = numbers(shape, torch.int32, from_columns, 0, 30)
    here = {"first": 8, "count": 9}
    kinds = [
        (torch.float32, torch.float32, "copy", {}),
        (torch.int64, torch.int32, "copy", {}),
        (torch.int64, torch.int64, "copy", {}),
        (torch.int64, torch.int32, "next", {}),
        (torch.bool, torch.int32, "place", {}),
        (torch.int32, torch.int64, "local", here),
        (torch.int32, torch.int32, "local", here),
        (torch.float32, torch.float32, "masked", here | {"ids": travelled}),
        (torch.int32, torch.int32, "masked", here | {"ids": travelled}),
    ]
    pairs = []
    for source_dtype, target_dtype, how, options in kinds:
        source = numbers(shape, source_dtype, from_columns, -4, 2**30 if how == "copy" else 30)
        behind = rows + 3 if how == "copy" else rows
        # Between others' columns, which must stay as they are.
        whole_shape = (width + 4, behind) if to_columns else (behind, width + 4)
        filled = torch.full(whole_shape, 77, device="cuda")
        filled = filled if target_dtype == torch.int64 else filled.int().view(target_dtype)
        wholes = [filled.clone(), filled.clone()]
        columns = [
            Column(source, (whole.t() if to_columns else whole)[:, 2 : 2 + width], how, **options)
            for whole in wholes
        ]
        pairs.append((how, columns, wholes))
    fill([columns[0] for _, columns, _ in pairs])
    for _, columns, _ in pairs:
        fill_by_torch(columns[1])
    for how, _, (by_kernel, by_torch) in pairs:
        assert_same_bits(by_kernel, by_torch, how)
