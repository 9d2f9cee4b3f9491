"""torch.compile traces around dispatch and combine without a graph break, and gives what eager mode gives."""

import pytest
import torch
from cases import LAYOUTS, Case
from exercise import assert_same_bits
from processes import run_gloo

import moe_ep
from moe_ep.testing import run_ranks

CASES = [
    Case(f"compile_{name}", (7,), num_experts=8, num_topk=3, routing="masked", layout=layout, **options)
    for name, options in {
        "exact": {},
        "static": {"max_recv_rows": 40},
        "overflow": {"max_recv_rows": 5},
        "aligned": {"expert_alignment": 4},
        "fp8": {"fp8": "blockwise", "fp8_backward": "blockwise", "hidden": 128},
        "bias": {"num_biases": 1, "dtype": torch.bfloat16},
    }.items()
    for layout in LAYOUTS
    if layout == "expert" or "expert_alignment" not in options
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Without the limit on recompilations of one function, which counts over all tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer(case, comm):
    """A function of tensors with one dispatch, an expert-like computation of its rows, and one combine."""

    def fn(x, topk_idx, topk_weights, *biases):
        out = moe_ep.dispatch(x, topk_idx, topk_weights, comm, fp8=case.fp8, **case.dispatch_arguments)
        tokens = out.tokens.dequantize(case.dtype) if case.fp8 else out.tokens
        weights = out.weights if case.layout == "expert" else out.weights.sum(dim=1)
        rows = torch.nn.functional.silu(tokens.float()) * weights.unsqueeze(1)
        bias = biases[0] if biases else None
        y = moe_ep.combine(rows.to(case.dtype), out.handle, bias=bias, fp8_backward=case.fp8_backward)
        return y, out.tokens_per_expert

    return fn


def forward_and_backward(fn, case, rank):
    inputs = case.inputs(rank)
    sources = [inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()]
    sources += [bias.requires_grad_() for bias in inputs.biases]
    y, counts = fn(sources[0], inputs.topk_idx, *sources[1:])
    grads = torch.autograd.grad(y, sources, inputs.grad_y)
    return [y.detach(), counts, *grads]


def assert_same_results(actual, wanted):
    for i, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        assert_same_bits(one, other, f"result {i}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager(case):
    with moe_ep.Communicator(**case.communicator_arguments) as comm:
        fn = layer(case, comm)
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        assert_same_results(forward_and_backward(compiled, case, 0), forward_and_backward(fn, case, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_routings_and_token_counts_need_no_new_graph(layout):
    """Exact sizes depend on the data: the second routing, also with other T, must run in the graph of the first."""
    cases = [Case("again", (n,), num_experts=8, num_topk=3, layout=layout, seed=n) for n in (7, 7, 12, 30)]
    arguments = {**cases[0].communicator_arguments, "max_tokens_per_rank": 32}
    with moe_ep.Communicator(**arguments) as comm:
        fn = layer(cases[0], comm)
        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
        for case in cases:
            inputs = case.inputs(0)
            actual = compiled(inputs.x, inputs.topk_idx, inputs.topk_weights)
            assert_same_results(actual, fn(inputs.x, inputs.topk_idx, inputs.topk_weights))
        assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("max_recv_rows", [None, 40])
def test_inductor_compiles_it(max_recv_rows):
    case = Case("inductor", (7,), num_experts=8, num_topk=3, max_recv_rows=max_recv_rows)
    with moe_ep.Communicator(**case.communicator_arguments) as comm:
        fn = layer(case, comm)
        actual = forward_and_backward(torch.compile(fn, fullgraph=True), case, 0)
        for one, other in zip(actual, forward_and_backward(fn, case, 0), strict=True):
            torch.testing.assert_close(one, other)  # inductor's silu may differ in the last bits


TWO_RANKS = [
    Case("two", (5, 8), num_experts=8, num_topk=3, routing="masked", layout=layout, max_recv_rows=limit)
    for layout in LAYOUTS
    for limit in (None, 30)
]


def compile_and_run(cases):
    results = []
    for case in cases:
        torch.compiler.reset()
        with moe_ep.Communicator(timeout_s=60, **case.communicator_arguments) as comm:
            compiled = torch.compile(layer(case, comm), fullgraph=True, backend="aot_eager")
            results.append(forward_and_backward(compiled, case, comm.rank))
    return results


def test_compiled_ranks_equal_eager_ranks():
    """Processes that compile, against virtual ranks that don't."""
    by_rank = run_gloo(2, compile_and_run, TWO_RANKS)
    for i, case in enumerate(TWO_RANKS):
        wanted = run_ranks(
            2,
            lambda comm, case=case: forward_and_backward(layer(case, comm), case, comm.rank),
            **case.communicator_arguments,
        )
        for rank in range(2):
            assert_same_results(by_rank[rank][i], wanted[rank])


@pytest.mark.parametrize("max_recv_rows", [None, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_keep_their_contract_with_torch(layout, max_recv_rows):
    """Schemas tell the truth about aliasing and mutation; fake kernels give the shapes that real ones give."""
    case = Case("opcheck", (7,), num_experts=8, num_topk=3, layout=layout, max_recv_rows=max_recv_rows)
    with moe_ep.Communicator(**case.communicator_arguments) as comm:
        inputs = case.inputs(0)
        handle = moe_ep.dispatch(
            inputs.x, inputs.topk_idx, inputs.topk_weights, comm, **case.dispatch_arguments
        ).handle
        state, num_rows = list(handle.state), handle.num_rows
        spec = (comm.id, None, 8, 8, 3, comm.max_tokens_per_rank, layout, 1, max_recv_rows)
        rows, row_weights = (
            torch.randn(num_rows, case.hidden),
            torch.randn(num_rows, *([3] if layout == "rank" else [])),
        )
        scale_inv = torch.rand(7, 2)
        calls = [
            (torch.ops.moe_ep.plan, (inputs.topk_idx, *spec)),
            (torch.ops.moe_ep.dispatch, ([inputs.x], [0.0], inputs.topk_weights, state, *spec)),
            (torch.ops.moe_ep.dispatch, ([inputs.x, scale_inv], [0.0, 1.0], None, state, *spec)),
            (torch.ops.moe_ep.combine, (rows, row_weights, [], state, *spec)),
            (torch.ops.moe_ep.combine, (rows, None, [inputs.x], state, *spec)),
        ]
        for op, args in calls:
            torch.library.opcheck(
                op.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
            )
