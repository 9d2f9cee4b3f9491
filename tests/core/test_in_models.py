"""How models use dispatch and combine: stacked layers, branches, checkpointing, profiling; against dense math."""

import dataclasses

import pytest
import torch
from cases import LAYOUTS, Case
from torch.utils.checkpoint import checkpoint

import moe_ep
from moe_ep.testing import run_ranks

CASE = Case("model", (5, 0, 3, 6), hidden=8, num_experts=8, num_topk=3, routing="masked", dtype=torch.float64)


def run(fn):
    return run_ranks(CASE.world_size, fn, timeout_s=20, **CASE.communicator_arguments)


def expert_factor(num_experts):
    """What expert e multiplies its rows by."""
    return 0.5 + torch.arange(num_experts, dtype=torch.float64) / num_experts


def moe_layer(x, topk_idx, weights, comm, layout):
    """Expert e returns tanh(row) * factor_e * weight."""
    out = moe_ep.dispatch(x, topk_idx, weights, comm, layout=layout)
    factors = expert_factor(comm.num_experts).view(comm.size, -1)[comm.rank]
    if layout == "expert":
        factor_N = factors.repeat_interleave(out.tokens_per_expert) * out.weights
    else:
        factor_N = (torch.where(out.topk_idx >= 0, factors[out.topk_idx], 0.0) * out.weights).sum(dim=1)
    return moe_ep.combine(out.tokens.tanh() * factor_N.unsqueeze(1), out.handle)


def dense_layer(x, topk_idx, weights):
    """The same on one rank with all experts, without dispatch."""
    factor = torch.where(topk_idx >= 0, expert_factor(CASE.num_experts)[topk_idx], 0.0)
    return x.tanh() * (factor * weights).sum(dim=1, keepdim=True)


def stack(layer, x, topk_idx, weights):
    """Three layers in a row with residual connections, the middle one beside a second branch."""
    x = x + layer(x, topk_idx, weights)
    x = x + layer(x, topk_idx, weights) + layer(x.square(), topk_idx, weights.square())
    return x + layer(x, topk_idx, weights)


def loss_and_gradients(layer, rank):
    inputs = CASE.inputs(rank)
    x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
    loss = stack(layer, x, inputs.topk_idx, weights).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [x, weights])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacked_layers_equal_dense_ones(layout, checkpointed):
    """One backward pass through many collective calls: autograd must order them alike on all ranks."""

    def fn(comm):
        def layer(*args):
            return moe_layer(*args, comm, layout)

        def checkpointed_layer(*args):
            return checkpoint(layer, *args, use_reentrant=False)

        return loss_and_gradients(checkpointed_layer if checkpointed else layer, comm.rank)

    for rank, results in enumerate(run(fn)):
        for actual, wanted in zip(results, loss_and_gradients(dense_layer, rank), strict=True):
            torch.testing.assert_close(actual, wanted)


def test_gradients_accumulate_over_micro_batches():
    def fn(comm):
        inputs = CASE.inputs(comm.rank)
        x, weights = inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()
        for _ in range(3):
            moe_layer(x, inputs.topk_idx, weights, comm, "expert").sum().backward()
        return x.grad, weights.grad

    for rank, grads in enumerate(run(fn)):
        inputs = CASE.inputs(rank)
        sources = [inputs.x.requires_grad_(), inputs.topk_weights.requires_grad_()]
        dense = torch.autograd.grad(dense_layer(sources[0], inputs.topk_idx, sources[1]).sum(), sources)
        for actual, wanted in zip(grads, dense, strict=True):
            torch.testing.assert_close(actual, 3 * wanted)


def test_autocast_leaves_the_dtypes_alone():
    def fn(comm):
        inputs = CASE.inputs(comm.rank)
        with torch.autocast("cpu", torch.bfloat16):
            out = moe_ep.dispatch(inputs.x.float(), inputs.topk_idx, inputs.topk_weights.float(), comm)
            y = moe_ep.combine(out.tokens, out.handle)
        return out.tokens.dtype, out.weights.dtype, y.dtype

    assert set(run(fn)) == {(torch.float32,) * 3}


def test_a_handle_cannot_be_changed():
    with moe_ep.Communicator(hidden=4, max_tokens_per_rank=2, num_experts=2, num_topk=1) as comm:
        out = moe_ep.dispatch(torch.ones(2, 4), torch.tensor([[0], [1]]), None, comm)
    for frozen, name in ((out, "tokens"), (out.handle, "num_tokens")):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(frozen, name, None)


def test_profiles_show_the_calls_by_name():
    with (
        moe_ep.Communicator(hidden=4, max_tokens_per_rank=2, num_experts=2, num_topk=1) as comm,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        x = torch.ones(2, 4, requires_grad=True)
        out = moe_ep.dispatch(x, torch.tensor([[0], [1]]), None, comm)
        moe_ep.combine(out.tokens, out.handle).sum().backward()
    names = {event.key for event in profile.key_averages()}
    expected = {f"moe_ep.{call}{way}" for call in ("dispatch", "combine") for way in ("", ".backward")}
    assert expected <= names
