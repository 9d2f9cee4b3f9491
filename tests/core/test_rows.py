"""The primitives on rows: the CPU kernels and plain torch, bit for bit."""

import pytest
import torch
from cases import standard_cases
from exercise import assert_case, run_case

from moe_ep import _extension
from moe_ep.backends.rows import Terms, add_rows, expand, expand_blocks, fit, gather_rows
from moe_ep.testing import run_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernel", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_extension, "load_cpu", lambda: None)
    elif _extension.load_cpu() is None:
        pytest.skip("moe_ep._cpu is not built")
    return request.param


def random_terms(rows: torch.Tensor, num_sums: int, share: float, seed: int) -> Terms:
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num_sums, generator=generator) < share).nonzero().flatten()
    return Terms(rows, targets, torch.randint(len(rows), (len(targets),), generator=generator))


def sum_by_loop(lists, num_sums, width, dtype, biases=()) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(num_sums, width, dtype=dtype)
    for i in range(num_sums):
        terms = [bias[i] for bias in biases]
        for rows, targets, sources in lists:
            terms += [rows[source] for source in sources[targets == i]]
        if terms:
            total = terms[0].to(wide)
            for term in terms[1:]:
                total = total + term.to(wide)
            out[i] = total.to(dtype)
    return out


def assert_bits(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    both_nan = actual.isnan() & wanted.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert ((actual.view(integers) == wanted.view(integers)) | both_nan).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("width", [8, 520, 1040])
def test_sums_in_the_order_of_the_lists(implementation, dtype, num_biases, width):
    torch.manual_seed(width)
    num_sums = 40
    own, theirs = (torch.randn(50, width).to(dtype) for _ in range(2))
    own[3, 0], own[4, 1], theirs[5, 2] = float("nan"), float("inf"), -0.0
    theirs[6] = -0.0
    half = random_terms(own, num_sums, 0.5, 1)
    rest = torch.tensor(sorted(set(range(num_sums - 5)) - set(half.targets.tolist())), dtype=torch.int64)
    first = [half, Terms(theirs, rest, rest % 50)]  # the last sums have no first term
    more = [random_terms(theirs, num_sums - 5, share, 2 + i) for i, share in enumerate((0.7, 0.0, 1.0))]
    biases = [torch.randn(num_sums, width).to(dtype) for _ in range(num_biases)]
    out = torch.full((num_sums, width), float("nan")).to(dtype)
    add_rows(first, more, out, biases)
    assert_bits(out, sum_by_loop([*first, *more], num_sums, width, dtype, biases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_larger_than_the_caches(implementation, dtype):
    rows = torch.randn(6000, 1024).to(dtype)
    index = torch.randperm(6000)[:5000]
    out = torch.full((5000, 1024), float("nan")).to(dtype)
    gather_rows(rows, index, out)
    assert torch.equal(out, rows[index])
    every = torch.arange(5000)
    add_rows(
        [Terms(rows, every, index)], [Terms(rows, every[::3].contiguous(), index[::3].contiguous())], out
    )
    wanted = rows[index].float()
    wanted[::3] += rows[index[::3]].float()
    assert torch.equal(out, wanted.to(dtype))


@pytest.mark.parametrize("width", [1, 3, 100])
def test_gathers_rows_of_any_width(implementation, width):
    rows = torch.randn(20, width)
    index = torch.randint(20, (33,))
    out = torch.empty(33, width)
    gather_rows(rows, index, out)
    assert torch.equal(out, rows[index])
    gather_rows(rows, index[:0], out[:0])


def test_no_sums_and_no_terms(implementation):
    out = torch.full((3, 4), float("nan"))
    add_rows([], [], out)
    assert torch.equal(out, torch.zeros(3, 4))
    add_rows([], [], out[:0])


def test_blocks_place_what_expand_places(implementation):
    """Two local experts, two ranks: arrivals 0..2 from rank 0 and 3..4 from rank 1, with gaps of padding."""
    arrived = torch.randn(5, 4)
    row_arrivals = torch.tensor([0, 2, 3, -1, 1, 4, -1, -1])
    wanted = expand(arrived, row_arrivals, 7.0)
    places = torch.tensor([0, 2, 0, -1, 1, 1, -1, -1])
    shuffled = torch.tensor([2, 0, 1])  # rank 0's arrivals lie elsewhere
    elsewhere = torch.empty(3, 4)
    elsewhere[shuffled] = arrived[:3]
    sources = [(elsewhere, shuffled), (arrived[3:], None)]
    assert torch.equal(expand_blocks(sources, places, [2, 1, 1, 1], [4, 4], 7.0), wanted)


def test_fit_cuts_and_pads():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(fit(rows, 2), rows[:2])
    assert torch.equal(fit(rows, 4, 1.0), torch.cat([rows, torch.ones(1, 2)]))


def test_cases_without_the_kernels(monkeypatch):
    monkeypatch.setattr(_extension, "load_cpu", lambda: None)
    for case in standard_cases((4,)):
        assert_case(
            case, run_ranks(4, lambda comm, case=case: run_case(case, comm), **case.communicator_arguments)
        )
