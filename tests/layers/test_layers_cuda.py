"""What the layers do differently on a GPU: torch's grouped matmul, activations in one kernel, ties in the router."""

import pytest
import torch
from gpu.machine import needs_gpu
from launched import kernels_of

from moe_ep.layers import GroupedExperts, ModelConfig, ParallelGroups, Router, build_model, swiglu
from moe_ep.layers.feed_forward import swiglu as activate
from moe_ep.layers.grouped_matmul import grouped_matmul, uses_grouped_mm

pytestmark = needs_gpu


@pytest.mark.parametrize("splits", [[128, 0, 77, 3], [0, 0, 0, 5], [0, 40, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(("hidden", "ffn_hidden"), [(128, 64), (72, 40), (36, 20)])
def test_grouped_matmul_equals_float32_loop(splits, hidden, ffn_hidden):
    torch.manual_seed(0)
    num_rows = sum(splits)
    rows = torch.randn(num_rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, ffn_hidden, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert uses_grouped_mm(rows, weight) == (num_rows > 0 and hidden % 8 == 0)
    counts = torch.tensor(splits, device="cuda")
    out = grouped_matmul(rows, weight, counts)
    wide_rows, wide_weight = (t.detach().float().requires_grad_() for t in (rows, weight))
    wide = grouped_matmul(wide_rows, wide_weight, counts, splits)
    torch.testing.assert_close(out.float(), wide, rtol=2e-2, atol=2e-2 * hidden**0.5)

    grad = torch.randn_like(out)
    out.backward(grad)
    wide.backward(grad.float())
    torch.testing.assert_close(rows.grad.float(), wide_rows.grad, rtol=2e-2, atol=2e-2 * ffn_hidden**0.5)
    torch.testing.assert_close(weight.grad.float(), wide_weight.grad, rtol=2e-2, atol=0.25)
    for e, n in enumerate(splits):
        assert n > 0 or not weight.grad[e].any()


def test_expanded_gradient_and_rows_past_the_end():
    experts = GroupedExperts(3, 64, 32, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(20, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(20, device="cuda", requires_grad=True)
    counts = torch.tensor([4, 0, 9], device="cuda")
    y = experts(rows, weights, counts)
    y[:13].sum().backward()
    expected = experts(rows[:13], weights[:13], counts)
    assert torch.equal(y[:13], expected)
    assert weights.grad[:13].isfinite().all()
    assert all(p.grad.isfinite().all() for p in experts.parameters())
    experts(rows[:13], weights[:13], counts).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 80), (2, 9, 4096), (0, 16), (3, 0, 16), (7, 20)], ids=str)
def test_activation_has_the_bits_of_its_formula(dtype, shape):
    torch.manual_seed(0)
    gate_up = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    rows = gate_up.detach().flatten(0, -2)
    y = activate(gate_up)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted = swiglu.activate_torch(rows, None)
    wanted_grad, _ = swiglu.differentiate_torch(rows, None, grad.flatten(0, -2))
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert y.dtype == dtype
    if shape[-1] % 16:  # no kernel: torch's own operations, each rounded
        epsilon = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), wanted.view(y.shape), rtol=epsilon, atol=epsilon)
    else:
        assert torch.equal(y, wanted.to(dtype).view(y.shape))
        assert torch.equal(gate_up.grad, wanted_grad.to(dtype).view(shape))


def test_activation_is_differentiable_twice():
    gate_up = torch.randn(6, 32, device="cuda", requires_grad=True)

    def second(y):
        [grad] = torch.autograd.grad(y.square().sum(), [gate_up], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [gate_up])[0]

    gate, up = gate_up.chunk(2, dim=-1)
    wanted = second(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(second(activate(gate_up)), wanted, rtol=1e-4, atol=1e-4)


def test_times_of_the_shared_experts_activation():
    gate_up = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert kernels_of("activation", lambda: activate(gate_up)) == 1
    y, grad = activate(gate_up), torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    of_grad = kernels_of("its gradient", lambda: torch.autograd.grad(y, gate_up, grad, retain_graph=True))
    assert of_grad == 1


def test_router_chooses_as_on_the_cpu():
    router = Router(ModelConfig(num_groups=4, topk_groups=2))
    x = torch.zeros(5, 64)
    tied = router(x).topk_idx
    assert torch.equal(router.cuda()(x.cuda()).topk_idx.cpu(), tied)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_bfloat16_model_is_close_to_float32_and_repeats_itself(layout):
    config = ModelConfig(max_seq_len=64, num_groups=4, topk_groups=2, mtp_layers=1, layout=layout)
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0)).cuda()

    def run(dtype):
        groups = ParallelGroups.create(1)
        model = build_model(config, groups, max_tokens_per_rank=128, device="cuda", dtype=dtype)
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        model.comm.close()
        return loss.detach(), [p.grad for p in model.parameters()]

    loss, gradients = run(torch.bfloat16)
    again, gradients_again = run(torch.bfloat16)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients[-20:], gradients_again[-20:], strict=True))
    assert abs(loss - run(torch.float32)[0]) < 0.02
