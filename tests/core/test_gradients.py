"""Gradients by finite differences in float64, jointly over all ranks.

The output of one rank depends on the inputs of all, so a rank alone can't be checked. ``Joint`` makes one
differentiable function of the whole group: its inputs are the inputs of all ranks, its outputs those of all
ranks. Its forward runs the ranks as threads; its backward runs them again, with autograd inside each rank,
and is itself a ``Joint`` function, so second derivatives work the same way.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case
from torch.autograd import gradcheck, gradgradcheck

import moe_ep
from moe_ep.testing import run_ranks

pytestmark = pytest.mark.filterwarnings("error")


class Joint(torch.autograd.Function):
    """``fn(comm, *inputs) -> outputs`` of each rank as one function of all ranks' inputs, rank after rank."""

    @staticmethod
    def forward(ctx, fn, case, *inputs):
        ctx.fn, ctx.case = fn, case
        ctx.save_for_backward(*inputs)
        return run_jointly(fn, case, inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = by_rank(ctx.case, ctx.saved_tensors)
        with_grads = [[*ins, *outs] for ins, outs in zip(inputs, by_rank(ctx.case, grads), strict=True)]
        flat = itertools.chain.from_iterable(with_grads)
        return None, None, *Joint.apply(vector_jacobian_product(ctx.fn, len(inputs[0])), ctx.case, *flat)


def run_jointly(fn, case, inputs):
    """All outputs of all ranks, outside of autograd."""
    inputs = [[each.detach() for each in mine] for mine in by_rank(case, inputs)]
    results = run_ranks(
        case.world_size,
        lambda comm: fn(comm, *inputs[comm.rank]),
        timeout_s=20,
        **case.communicator_arguments,
    )
    return tuple(each.detach().clone() for each in itertools.chain.from_iterable(results))


def vector_jacobian_product(fn, num_inputs):
    """The function (inputs, gradients of the outputs) -> gradients of the inputs, differentiable in both."""

    def product(comm, *args):
        with torch.enable_grad():
            args = [each.requires_grad_() for each in args]
            inputs, grads = args[:num_inputs], args[num_inputs:]
            outputs = fn(comm, *inputs)
            return torch.autograd.grad(outputs, inputs, grads, create_graph=True, materialize_grads=True)

    return product


def by_rank(case, flat):
    """The tensors of each rank from those of all ranks in one sequence."""
    each = len(flat) // case.world_size
    return [list(flat[rank * each : (rank + 1) * each]) for rank in range(case.world_size)]


def swiglu(x, up, down):
    gate, value = (x @ up).chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down


def moe(case):
    """Softmax of logits at the chosen experts, SwiGLU experts, weights after them, a bias on the sum."""

    def fn(comm, x_TH, logits_TE, up_LHF, down_LFH, bias_TH):
        topk_idx = case.topk_idx(comm.rank)
        weights = logits_TE.softmax(dim=1).gather(1, topk_idx.clamp(min=0))
        weights = torch.where(topk_idx >= 0, weights, 0.0)
        out = moe_ep.dispatch(x_TH, topk_idx, weights, comm, **case.dispatch_arguments)
        experts = list(zip(up_LHF, down_LFH, strict=True))
        if case.layout == "expert":
            tail = out.tokens.shape[0] - sum(out.splits)
            *groups, rest = out.tokens.split([*out.splits, tail])
            rows = torch.cat([swiglu(x, *expert) for x, expert in zip(groups, experts, strict=True)] + [rest])
            rows = rows * out.weights.unsqueeze(1)
        else:
            rows = out.tokens * 0.0
            for local, expert in enumerate(experts):
                weight_N = torch.where(out.topk_idx == local, out.weights, 0.0).sum(dim=1)
                rows = rows + swiglu(out.tokens, *expert) * weight_N.unsqueeze(1)
        return (moe_ep.combine(rows, out.handle, bias=bias_TH),)

    return fn


def moe_inputs(case, ffn=2):
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    local, hidden = case.experts_per_rank, case.hidden
    return [
        tensor
        for num_tokens in case.tokens_by_rank
        for tensor in (
            normal(num_tokens, hidden),
            normal(num_tokens, case.num_experts),
            normal(local, hidden, 2 * ffn),
            normal(local, ffn, hidden),
            normal(num_tokens, hidden),
        )
    ]


def small_case(name, tokens_by_rank, **options):
    options = {"num_experts": 4, "num_topk": 2, "routing": "masked"} | options
    return Case(name, tokens_by_rank, hidden=2, dtype=torch.float64, **options)


CASES = [
    small_case("one_rank", (3,), routing="uniform"),
    small_case("two_ranks", (3, 2), routing="uniform", num_topk=3),
    small_case("unequal", (1, 0, 3, 2), num_topk=3),
    small_case("all_to_one_rank", (2, 1), routing="one_rank"),
    small_case("all_to_one_expert", (2, 2), routing="one_expert", num_topk=1),
    small_case("no_experts", (2, 1), routing="none"),
    small_case("static", (2, 2), max_recv_rows=9),
    small_case("static_overflow", (3, 2), routing="uniform", max_recv_rows=2),
    small_case("aligned", (2, 2), expert_alignment=3),
]
CASES = [
    Case(**{**vars(case), "layout": layout})
    for case in CASES
    for layout in LAYOUTS
    if layout == "expert" or case.expert_alignment == 1
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_router_weights_experts_and_combine(case):
    assert gradcheck(lambda *inputs: Joint.apply(moe(case), case, *inputs), moe_inputs(case))


def pair(case):
    """dispatch, something nonlinear in rows and weights, combine: cheap second derivatives."""

    def fn(comm, x_TH, weights_TK):
        out = moe_ep.dispatch(x_TH, case.topk_idx(comm.rank), weights_TK, comm, **case.dispatch_arguments)
        weight_N = out.weights if case.layout == "expert" else out.weights.square().sum(dim=1)
        return (moe_ep.combine(out.tokens.sin() * weight_N.square().unsqueeze(1), out.handle),)

    return fn


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "aligned"], ids=str)
def test_second_derivatives_of_the_pair(case):
    generator = torch.Generator().manual_seed(case.seed)
    inputs = [
        torch.randn(num_tokens, columns, dtype=torch.float64, generator=generator).requires_grad_()
        for num_tokens in case.tokens_by_rank
        for columns in (case.hidden, case.num_topk)
    ]
    assert gradgradcheck(lambda *inputs: Joint.apply(pair(case), case, *inputs), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_through_a_reused_handle(layout):
    """The same routing carries a second batch; gradients of both add up in what they share."""
    case = small_case("reused", (2, 3), layout=layout)

    def fn(comm, x_TH, weights_TK):
        first = moe_ep.dispatch(x_TH, case.topk_idx(comm.rank), weights_TK, comm, layout=layout)
        second = moe_ep.dispatch(x_TH.square(), None, weights_TK, comm, handle=first.handle)
        rows = first.tokens * second.tokens
        return moe_ep.combine(rows, first.handle), moe_ep.combine(second.tokens, second.handle)

    inputs = [
        torch.randn(num_tokens, columns, dtype=torch.float64).requires_grad_()
        for num_tokens in case.tokens_by_rank
        for columns in (case.hidden, case.num_topk)
    ]
    assert gradcheck(lambda *inputs: Joint.apply(fn, case, *inputs), inputs)
    assert gradgradcheck(lambda *inputs: Joint.apply(fn, case, *inputs), inputs)
