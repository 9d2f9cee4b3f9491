"""The router's kernels against its rule in plain torch, and their times."""

import pytest
import torch
from gpu.machine import needs_gpu
from launched import kernels_of

from moe_ep import _extension
from moe_ep.layers import ModelConfig, Router, router_kernels
from moe_ep.layers.routing import balance_loss, choose_experts, count_highest, scores_of, weigh_experts

DEVICE = "cuda"
pytestmark = needs_gpu

# (experts, groups, groups chosen, top-k)
SHAPES = [
    (8, 1, 1, 1),
    (8, 4, 2, 3),
    (8, 8, 8, 8),
    (32, 1, 1, 8),
    (32, 8, 4, 8),
    (32, 32, 9, 8),
    (40, 5, 2, 8),
    (256, 1, 1, 32),
    (256, 8, 4, 8),
    (256, 64, 16, 32),
    (1000, 1, 1, 8),
    (1000, 25, 3, 32),
    (1024, 8, 1, 1),
    (1024, 1024, 40, 32),
]
# With one expert, or all, some gradients are zero, and computed ones the rounding of that.
MIXED = [shape for shape in SHAPES if 1 < shape[3] < shape[0]]
SCORES = [("sigmoid", True), ("sigmoid", False), ("softmax", False)]
LAYER = {"hidden": 7168, "num_experts": 32, "num_topk": 8, "num_groups": 8, "topk_groups": 4}
DEEPSEEK_V3 = {**LAYER, "num_experts": 256}
NUM_TOKENS = 4096


@pytest.fixture(autouse=True)
def uses_the_kernels():
    torch.manual_seed(0)
    assert _extension.load() is not None, _extension.why_missing()


def make_router(shape=(32, 8, 4, 8), score_function="sigmoid", biased=True, **overrides):
    num_experts, num_groups, topk_groups, num_topk = shape
    changes = {
        "hidden": num_experts,
        "num_experts": num_experts,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "num_topk": num_topk,
        "score_function": score_function,
        "expert_bias": biased,
        "routed_scaling": 2.5,
        "seq_aux_loss_coeff": 0.1,
        "init_std": 0.05,
        **overrides,
    }
    return Router(ModelConfig(**changes), device=DEVICE)


def coarse(*shape, step):
    """Few different values, so that many are equal; exact in bfloat16."""
    return (torch.randn(*shape, device=DEVICE) / step).round() * step


def inputs_of(router, dtype=torch.bfloat16, num_tokens=NUM_TOKENS):
    x = torch.randn(num_tokens, router.config.hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    return x, torch.randn(num_tokens, router.config.num_topk, device=DEVICE), torch.tensor(0.7, device=DEVICE)


def exact_outputs(router, x, weight, topk_idx):
    """Weights and loss in float64, for experts that have been chosen, and the logits."""
    c = router.config
    logits = x.flatten(0, -2) @ weight.t()
    scores = scores_of(logits, c)
    scores_BSE = scores.unflatten(0, (-1, x.shape[-2]))
    loss = balance_loss(scores_BSE, count_highest(scores_BSE, c.num_topk), c.num_topk)
    return weigh_experts(scores, topk_idx, c), c.seq_aux_loss_coeff * loss, logits


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


def relative(got, wanted):
    return rms(got.double() - wanted) / rms(wanted)


@pytest.mark.parametrize(("score_function", "biased"), SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chooses_weighs_and_counts_by_the_rule(shape, score_function, biased, dtype):
    router = make_router(shape, score_function, biased)
    num_experts = shape[0]
    router.weight.data = torch.eye(num_experts, device=DEVICE)  # so that x are the logits
    if biased:
        router.expert_bias.copy_(coarse(num_experts, step=0.125))
    x = coarse(3, 13, num_experts, step=0.5).to(dtype)
    assert router_kernels.can_route(x, router.weight, router.config)
    got = router(x)
    load = router.tokens_per_expert.clone()
    wanted = router._route_torch(x)
    assert got.topk_idx.dtype == torch.int64
    assert torch.equal(got.topk_idx, wanted.topk_idx)
    torch.testing.assert_close(got.topk_weights, wanted.topk_weights, rtol=3e-6, atol=0)
    torch.testing.assert_close(got.aux_loss, wanted.aux_loss, rtol=3e-6, atol=0)
    assert torch.equal(router.tokens_per_expert, 2 * load)
    assert load.sum() == 39 * shape[3]
    router.eval()
    router(x)
    assert torch.equal(router.tokens_per_expert, 2 * load)


def test_ties_go_to_the_lower_number_and_masked_experts_are_never_chosen():
    router = make_router((256, 8, 4, 8))
    x = torch.zeros(20, 256, device=DEVICE, dtype=torch.bfloat16)
    assert router(x).topk_idx.tolist() == [list(range(8))] * 20
    router.expert_bias[:6] = -torch.inf
    assert router(x).topk_idx.tolist() == [[*range(6, 14)]] * 20
    router.expert_bias[:96] = -torch.inf  # three of eight groups
    assert router(x).topk_idx.tolist() == [[*range(96, 104)]] * 20


def test_large_and_small_logits():
    router = make_router((32, 1, 1, 8))
    router.weight.data = torch.eye(32, device=DEVICE)
    x = torch.full((3, 32), -1000.0, device=DEVICE)  # all scores are 0
    x[1] = 1000.0
    x[2, 7] = 1000.0
    out = router(x)
    assert out.topk_idx.tolist() == [[*range(8)], [*range(8)], [7, *range(7)]]
    torch.testing.assert_close(out.topk_weights, router._route_torch(x[None]).topk_weights)
    assert out.aux_loss.isfinite()


@pytest.mark.parametrize(("score_function", "biased"), SCORES)
@pytest.mark.parametrize("shape", MIXED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(shape, score_function, biased, dtype):
    router = make_router(shape, score_function, biased, hidden=64, init_std=0.1)
    x = torch.randn(2, 24, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    out = router(x)
    grads = torch.randn_like(out.topk_weights), torch.tensor(3.0, device=DEVICE)
    wide = [t.detach().double().requires_grad_() for t in (x, router.weight)]
    exact = exact_outputs(router, *wide, out.topk_idx)
    assert relative(out.topk_weights, exact[0]) < 2e-6
    assert relative(out.aux_loss, exact[1]) < 2e-6
    for chosen in ([0], [1], [0, 1]):
        outputs = [(out.topk_weights, out.aux_loss)[i] for i in chosen]
        of_outputs = [grads[i] for i in chosen]
        got = torch.autograd.grad(outputs, [x, router.weight], of_outputs, retain_graph=True)
        wanted = torch.autograd.grad(
            [exact[i] for i in chosen], wide, [g.double() for g in of_outputs], retain_graph=True
        )
        assert [g.dtype for g in got] == [dtype, torch.float32]
        # Sigmoid weights depend on their ratios only: what remains of large terms is less precise.
        assert relative(got[0], wanted[0]) < (2.0**-8 if dtype == torch.bfloat16 else 2e-5)
        assert relative(got[1], wanted[1]) < 2e-5


def test_gradients_of_one_input():
    router = make_router()
    x, grad_weights, grad_loss = inputs_of(router, num_tokens=100)
    both = torch.autograd.grad(router(x)[1:], [x, router.weight], [grad_weights, grad_loss])
    of_weight = torch.autograd.grad(router(x.detach())[1:], [router.weight], [grad_weights, grad_loss])
    router.weight.requires_grad_(False)
    of_x = torch.autograd.grad(router(x)[1:], [x], [grad_weights, grad_loss])
    assert torch.equal(both[0], of_x[0])
    assert torch.equal(both[1], of_weight[0])


def test_gradients_of_gradients_are_those_of_plain_torch():
    router = make_router()
    x, grad_weights, grad_loss = inputs_of(router, torch.float32, num_tokens=60)

    def second(out):
        grads = torch.autograd.grad(out[1:], [x, router.weight], [grad_weights, grad_loss], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, router.weight])

    for got, wanted in zip(second(router(x)), second(router._route_torch(x[None])), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * rms(wanted))


def test_parts_add_up_exactly():
    weight = torch.randn(24, 64, device=DEVICE) * torch.exp2(torch.randint(-60, 60, (24, 64), device=DEVICE))
    weight[0] = 0
    third, second, first, again = router_kernels.split_weight(weight).double()
    assert torch.equal(first, again)
    assert torch.equal(first + second + third, weight.double())
    assert torch.equal(first.float(), weight.bfloat16().float())


@pytest.mark.parametrize("shape", [LAYER, DEEPSEEK_V3], ids=["32 experts", "256 experts"])
def test_a_single_product_is_exact(shape):
    # Tokens with a single one: the logits are the weights themselves.
    router = Router(ModelConfig(**shape), device=DEVICE)
    picked = torch.randint(0, shape["hidden"], (300,), device=DEVICE)
    x = torch.zeros(300, shape["hidden"], device=DEVICE, dtype=torch.bfloat16)
    x[torch.arange(300), picked] = 1.0
    out = router(x)
    scores = router.weight.detach().t()[picked].sigmoid()
    topk_idx = choose_experts(scores, router.expert_bias, router.config)
    assert torch.equal(out.topk_idx, topk_idx)
    torch.testing.assert_close(out.topk_weights, weigh_experts(scores, topk_idx, router.config))
    pieces = router_kernels.logit_pieces(x, router.weight).unflatten(-1, (3, -1))
    logits = pieces[..., 2, :].sum(0) + (pieces[..., 0, :] + pieces[..., 1, :]).sum(0)
    assert torch.equal(logits, router.weight.detach().t()[picked])


@pytest.mark.parametrize("shape", [LAYER, DEEPSEEK_V3], ids=["32 experts", "256 experts"])
def test_products_lose_what_matrix_units_cut_off_and_no_more(shape):
    router = Router(ModelConfig(**shape, routed_scaling=2.5), device=DEVICE)
    x, grad_weights, grad_loss = inputs_of(router)
    wide = [t.detach().double().requires_grad_() for t in (x, router.weight)]

    pieces = router_kernels.logit_pieces(x.detach(), router.weight)
    logits = pieces.double().unflatten(-1, (3, -1)).sum((0, 2))
    in_float32 = x.detach().float() @ router.weight.detach().t()
    exact = wide[0] @ wide[1].t()
    ours, theirs = relative(logits, exact.detach()), relative(in_float32, exact.detach())
    print(f"logits: {ours:.1e}, float32 {theirs:.1e}")
    assert ours < shape["hidden"] / len(pieces) / 16 * 2.0**-23

    out = router(x)
    got = torch.autograd.grad(out[1:], [x, router.weight], [grad_weights, grad_loss])
    *outputs, logits = exact_outputs(router, *wide, out.topk_idx)
    grad_logits = torch.autograd.grad(outputs, logits, [grad_weights.double(), grad_loss.double()])[0]
    exact = grad_logits @ wide[1].detach(), grad_logits.t() @ wide[0].detach()
    in_float32 = grad_logits.float().t() @ x.detach().float()
    ours, theirs = relative(got[1], exact[1]), relative(in_float32, exact[1])
    print(f"grad_weight: {ours:.1e}, float32 {theirs:.1e}")
    assert ours < len(x.flatten(0, -2)) / 16 * 2.0**-23

    magnitude = grad_logits.abs() @ wide[1].detach().abs()
    limit = exact[0].abs() * 2.0**-8 + magnitude * 2.0**-14
    assert ((got[0].double() - exact[0]).abs() <= limit).all()
    print(f"grad_x: {relative(got[0], exact[0]):.1e}")
    assert relative(got[0], exact[0]) < 2.0**-9  # rounding's alone is 2^-8 / sqrt(12) or so


@pytest.mark.parametrize("shape", [LAYER, DEEPSEEK_V3], ids=["32 experts", "256 experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_repeats_itself(shape, dtype):
    router = Router(ModelConfig(**shape), device=DEVICE)
    x, grad_weights, grad_loss = inputs_of(router, dtype)

    def run():
        out = router(x.view(2, -1, x.shape[1]))
        return *out, *torch.autograd.grad(out[1:], [x, router.weight], [grad_weights, grad_loss])

    first = run()
    load = router.tokens_per_expert.clone()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    assert torch.equal(router.tokens_per_expert, 4 * load)


def test_odd_inputs():
    router = make_router((32, 8, 4, 8), hidden=64)
    x = torch.randn(6, 5, 64, device=DEVICE).bfloat16()
    whole = router(x)
    assert torch.equal(
        router(x.transpose(0, 1).contiguous().transpose(0, 1)).topk_weights, whole.topk_weights
    )
    assert torch.equal(router(x.flatten(0, 1)).topk_idx, whole.topk_idx)
    torch.testing.assert_close(router(x.half()).topk_weights, router._route_torch(x.half()).topk_weights)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(router(x).topk_weights, whole.topk_weights)
        torch.testing.assert_close(router(x.float()).topk_weights, whole.topk_weights)
    assert router(x[:0]).topk_idx.shape == (0, 8)
    for shape, hidden in (((32, 8, 4, 8), 36), ((33, 3, 2, 5), 64)):  # not in multiples of 8
        uneven = make_router(shape, hidden=hidden)
        x = torch.randn(50, hidden, device=DEVICE).bfloat16()
        torch.testing.assert_close(uneven(x).topk_weights, uneven._route_torch(x[None]).topk_weights)
    no_loss = make_router(seq_aux_loss_coeff=0.0)
    out = no_loss(torch.randn(9, 32, device=DEVICE).bfloat16())
    assert out.aux_loss == 0 and not out.aux_loss.requires_grad
    out.topk_weights.square().sum().backward()
    assert no_loss.weight.grad.abs().sum() > 0


def test_replays_in_a_graph():
    router = Router(ModelConfig(**LAYER), device=DEVICE)
    x, grad_weights, grad_loss = inputs_of(router)

    def run():
        out = router(x)
        return *out, *torch.autograd.grad(out[1:], [x, router.weight], [grad_weights, grad_loss])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.parametrize("shape", [LAYER, DEEPSEEK_V3], ids=["32 experts", "256 experts"])
def test_times(shape):
    router = Router(ModelConfig(**shape, routed_scaling=2.5), device=DEVICE)
    x, grad_weights, grad_loss = inputs_of(router)
    assert 0 < kernels_of("router forward", lambda: router(x)) <= 8
    out = router(x)
    wanted = out[1:], [x, router.weight], [grad_weights, grad_loss]
    launched = kernels_of("router backward", lambda: torch.autograd.grad(*wanted, retain_graph=True))
    assert 0 < launched <= 8
