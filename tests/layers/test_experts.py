"""Grouped experts against one row at a time; rank-layout rows against expert-layout rows."""

import pytest
import torch
import torch.nn.functional as F

import moe_ep
from moe_ep.layers import FeedForward, GroupedExperts, SharedExperts
from moe_ep.layers.grouped_matmul import grouped_matmul


def make_experts(num_experts=3, hidden=6, ffn_hidden=5, dtype=torch.float64) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(num_experts, hidden, ffn_hidden, init_std=0.5, dtype=dtype)


def one_row(experts, e, x_H, weight):
    gate, up = (experts.w_gate_up[e] @ x_H).chunk(2)
    return experts.w_down[e] @ (F.silu(gate) * up * weight)


@pytest.mark.parametrize("splits", [[2, 3, 1], [0, 6, 0], [0, 0, 0], [4, 0, 4]])
@pytest.mark.parametrize("on_host", [True, False])
def test_equals_row_loop(splits, on_host):
    experts = make_experts()
    num_rows = sum(splits)
    rows = torch.randn(num_rows, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_rows, dtype=torch.float64, requires_grad=True)
    owner = [e for e, n in enumerate(splits) for _ in range(n)]

    y = experts(rows, weights, torch.tensor(splits), splits if on_host else None)
    expected = [one_row(experts, e, rows[i], weights[i]) for i, e in enumerate(owner)]
    expected = torch.stack(expected) if expected else rows * 1.0
    torch.testing.assert_close(y, expected)

    inputs = [rows, weights, experts.w_gate_up, experts.w_down]
    got = torch.autograd.grad(y.sin().sum(), inputs)
    wanted = torch.autograd.grad(expected.sin().sum(), inputs, materialize_grads=True)
    torch.testing.assert_close(got, wanted)
    for e, n in enumerate(splits):
        assert n > 0 or not got[2][e].any()


def test_gradcheck():
    experts = make_experts()
    rows = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def run(rows, weights, w_gate_up, w_down):
        parameters = {"w_gate_up": w_gate_up, "w_down": w_down}
        return torch.func.functional_call(experts, parameters, (rows, weights, torch.tensor([2, 0, 3])))

    assert torch.autograd.gradcheck(run, (rows, weights, experts.w_gate_up, experts.w_down))


def test_rows_cut_off_by_a_static_size():
    weight = torch.randn(3, 4, 2)
    rows = torch.randn(5, 2)
    out = grouped_matmul(rows, weight, torch.tensor([2, 2, 4]))
    torch.testing.assert_close(out[4:], rows[4:] @ weight[2].T)
    tail = grouped_matmul(rows, weight, torch.tensor([1, 1, 1]))
    assert not tail[3:].any()


def test_without_router_weights():
    experts = make_experts()
    rows, counts = torch.randn(4, 6, dtype=torch.float64), torch.tensor([1, 1, 2])
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(experts(rows, None, counts), experts(rows, ones, counts))


def test_fp8_rows_are_dequantised_and_pass_gradients_straight():
    experts = make_experts(hidden=128, dtype=torch.float32)
    x = torch.randn(4, 128, requires_grad=True)
    counts = torch.tensor([1, 3, 0])
    y = experts(moe_ep.fp8.quantize(x), None, counts)
    rounded = moe_ep.fp8.quantize(x).dequantize(torch.float32).detach().requires_grad_()
    expected = experts(rounded, None, counts)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, rounded.grad)


def test_parameters_are_marked_and_bfloat16_keeps_dtype():
    experts = make_experts(dtype=torch.bfloat16)
    assert all(parameter.is_expert for parameter in experts.parameters())
    y = experts(torch.randn(4, 6, dtype=torch.bfloat16), torch.rand(4), torch.tensor([1, 1, 2]))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [FeedForward, SharedExperts])
def test_feed_forward(kind):
    ffn = kind(6, 5)
    x = torch.randn(2, 3, 6)
    gate, up = ffn.gate_up.weight.chunk(2)
    torch.testing.assert_close(ffn(x), (F.silu(x @ gate.T) * (x @ up.T)) @ ffn.down.weight.T)


def test_feed_forward_compiles_without_graph_breaks():
    ffn, x = FeedForward(6, 5), torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(ffn, backend="aot_eager", fullgraph=True)(x), ffn(x))
