"""MoELayer on virtual ranks against all experts evaluated densely in one place."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe_ep.errors import InvalidInput, ReceiveOverflowError
from moe_ep.layers import ModelConfig, MoELayer, TokenDispatcher
from moe_ep.testing import run_ranks

CONFIG = ModelConfig(
    hidden=16,
    moe_ffn_hidden=8,
    shared_ffn_hidden=12,
    num_experts=8,
    num_topk=3,
    num_groups=4,
    topk_groups=2,
    routed_scaling=2.5,
    init_std=0.3,
    seq_aux_loss_coeff=0.1,
)
FP8 = dict.fromkeys(("fp8", "fp8_backward", "fp8_experts"), "blockwise") | {"expert_alignment": 16}
NUM_RANKS = 4
TOKENS = [(2, 5), (1, 0), (3, 4), (1, 7)]
"""(B, S) of four batches; one is empty."""


def batches(dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(b, s, CONFIG.hidden, generator=generator, dtype=dtype) for b, s in TOKENS]


def ranks(config, ep_size, fn):
    limit = {"max_tokens_per_rank": 64, "num_experts": config.num_experts, "num_topk": config.num_topk}
    return run_ranks(ep_size, fn, hidden=config.hidden, **limit)


def loss_of(y, aux_loss):
    return y.sin().sum() + aux_loss


def run_layer(config, ep_size, dtype=torch.float64):
    """The four batches over ``ep_size`` ranks: outputs and input gradients by batch, and gradients by
    parameter name.
    """

    def fn(comm):
        layer = MoELayer(config, comm, seed=5, dtype=dtype)
        ys, grads = [], []
        for x in batches(dtype)[comm.rank * NUM_RANKS // ep_size : (comm.rank + 1) * NUM_RANKS // ep_size]:
            x.requires_grad_()
            y, aux_loss = layer(x)
            loss_of(y, aux_loss).backward()
            ys.append(y.detach())
            grads.append(x.grad)
        return ys, grads, {name: p.grad for name, p in layer.named_parameters()}

    results = ranks(config, ep_size, fn)
    ys = [y for r in results for y in r[0]]
    x_grads = [g for r in results for g in r[1]]
    by_name = {}
    for name in results[0][2]:
        grads = [r[2][name] for r in results]
        by_name[name] = torch.cat(grads) if name.startswith("experts.") else sum(grads)
    return ys, x_grads, by_name


def run_dense(config, dtype=torch.float64):
    """The same from every expert applied to every token, weighted by a dense matrix of router weights."""
    [layer] = ranks(config, 1, lambda comm: MoELayer(config, comm, seed=5, dtype=dtype))
    experts, ys, x_grads = layer.experts, [], []
    for x in batches(dtype):
        x.requires_grad_()
        routed = layer.router(x)
        flat = x.flatten(0, 1)
        weights_TE = flat.new_zeros(len(flat), config.num_experts).scatter(
            1, routed.topk_idx, routed.topk_weights
        )
        gate, up = torch.einsum("th,eoh->teo", flat, experts.w_gate_up).chunk(2, -1)
        y = torch.einsum("tef,ehf->th", F.silu(gate) * up * weights_TE[..., None], experts.w_down)
        y = (y + layer.shared(flat)).view_as(x)
        loss_of(y, routed.aux_loss).backward()
        ys.append(y.detach())
        x_grads.append(x.grad)
    return ys, x_grads, {name: p.grad for name, p in layer.named_parameters()}


@pytest.fixture(scope="module")
def dense():
    return run_dense(CONFIG)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("how", [{}, {"expert_alignment": 8}, {"max_recv_rows": 96}], ids=str)
def test_equals_dense_evaluation(ep_size, how, layout, dense):
    got = run_layer(dataclasses.replace(CONFIG, layout=layout, **how), ep_size)
    torch.testing.assert_close(got, dense)


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize(
    "how", [{}, FP8, {"max_recv_rows": 96, "expert_alignment": 4}], ids=["", "fp8", "static"]
)
def test_layouts_agree_bit_for_bit(ep_size, how):
    expert, rank = (
        run_layer(dataclasses.replace(CONFIG, layout=layout, **how), ep_size, torch.bfloat16)
        for layout in ("expert", "rank")
    )
    torch.testing.assert_close(rank[0], expert[0], rtol=0, atol=0)


def test_fp8_on_the_wire_stays_close():
    config = dataclasses.replace(CONFIG, hidden=128)

    def fn(config):
        def run(comm):
            x = torch.randn(
                1, 24, 128, generator=torch.Generator().manual_seed(comm.rank), requires_grad=True
            )
            y, _ = MoELayer(config, comm, seed=1)(x)
            y.square().sum().backward()
            return y.detach(), x.grad

        return run

    exact = ranks(config, 2, fn(config))
    for layout in ("expert", "rank"):
        fp8 = ranks(
            config,
            2,
            fn(dataclasses.replace(config, fp8="blockwise", fp8_backward="blockwise", layout=layout)),
        )
        for got, wanted in zip(fp8, exact, strict=True):
            for a, b in zip(got, wanted, strict=True):
                assert 0 < (a - b).norm() / b.norm() < 0.05


def test_two_dimensional_input_and_no_shared_expert():
    config = dataclasses.replace(CONFIG, shared_ffn_hidden=0)

    def fn(comm):
        layer = MoELayer(config, comm, seed=0)
        x = torch.randn(6, config.hidden, generator=torch.Generator().manual_seed(comm.rank))
        assert layer.shared is None
        return torch.equal(layer(x)[0], layer(x.unsqueeze(0))[0].squeeze(0))

    assert ranks(config, 2, fn) == [True, True]


def test_one_seed_gives_the_same_experts_for_every_size():
    def weights(ep_size):
        layers = ranks(CONFIG, ep_size, lambda comm: MoELayer(CONFIG, comm, seed=9))
        return torch.cat([layer.experts.w_gate_up for layer in layers]), layers[-1].router.weight

    one, four = weights(1), weights(4)
    assert torch.equal(one[0], four[0])
    assert torch.equal(one[1], four[1])
    assert len(one[0].flatten(1).unique(dim=0)) == CONFIG.num_experts


def test_dispatcher_refuses_another_communicator():
    def fn(comm):
        with pytest.raises(InvalidInput, match="comm has hidden=16, the config has 64"):
            TokenDispatcher(ModelConfig(num_experts=8, num_topk=3), comm)

    ranks(CONFIG, 1, fn)


@pytest.mark.parametrize("how", [{}, {"overlap_chunks": 1}, {"overlap_chunks": 2}], ids=str)
def test_rows_that_lack_room_are_reported_once(how):
    def fn(comm):
        layer = MoELayer(dataclasses.replace(CONFIG, max_recv_rows=room, **how), comm, seed=5)
        x = torch.randn(12, CONFIG.hidden, generator=torch.Generator().manual_seed(comm.rank))
        layer(x)
        layer(x[:1])  # has room, and does not hide that the first had not
        try:
            layer.raise_if_overflow()
        except ReceiveOverflowError as error:
            assert f"max_recv_rows={room}" in str(error)
            layer.raise_if_overflow()
            return True
        return False

    room = 2 * 12 * CONFIG.num_topk
    assert ranks(CONFIG, 2, fn) == [False, False]
    room = 9
    assert ranks(CONFIG, 2, fn) == [True, True]


def test_asynchronous_dispatch_has_the_configs_layout():
    def fn(comm):
        x = torch.randn(6, CONFIG.hidden)
        ids, weights = torch.rand(6, CONFIG.num_experts).argsort(1)[:, : CONFIG.num_topk], torch.rand(6, 3)
        outs = []
        for layout in ("expert", "rank"):
            dispatcher = TokenDispatcher(dataclasses.replace(CONFIG, layout=layout), comm)
            out, event = dispatcher.dispatch_async(x, ids, weights)
            event.wait()
            outs.append((out.handle.layout, out.weights.dim()))
        return outs

    assert ranks(CONFIG, 2, fn) == [[("expert", 1), ("rank", 2)]] * 2
