"""Router: selection, weights, balance loss and bias update against plain loops and worked examples."""

import dataclasses

import pytest
import torch

from moe_ep.layers import ModelConfig, Router
from moe_ep.layers.routing import sequence_balance_loss, stable_topk


def make_router(**overrides) -> Router:
    torch.manual_seed(0)
    return Router(ModelConfig(**{"num_experts": 16, "num_topk": 4, "init_std": 0.3, **overrides}))


def with_scores(router: Router, scores_TE: torch.Tensor) -> torch.Tensor:
    """Input for which a router with an identity weight gives these sigmoid scores."""
    router.weight.data = torch.eye(scores_TE.shape[1])
    return scores_TE.logit()


def loop_reference(router: Router, x_TH: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """The routing of the module's docstring, one token and one expert at a time."""
    c = router.config
    all_chosen, all_weights = [], []
    for x_H in x_TH:
        logits = (router.weight @ x_H).double()
        s = (logits.sigmoid() if c.score_function == "sigmoid" else logits.softmax(0)).tolist()
        bias = router.expert_bias.tolist() if router.expert_bias is not None else [0.0] * c.num_experts
        biased = [a + b for a, b in zip(s, bias, strict=True)]
        per_group = c.num_experts // c.num_groups
        best = 2 if c.score_function == "sigmoid" else 1
        group_scores = [
            sum(sorted(biased[g * per_group : (g + 1) * per_group])[-best:]) for g in range(c.num_groups)
        ]
        groups = sorted(range(c.num_groups), key=lambda g: -group_scores[g])[: c.topk_groups]
        eligible = [e for e in range(c.num_experts) if e // per_group in groups]
        chosen = sorted(eligible, key=lambda e: -biased[e])[: c.num_topk]
        total = sum(s[e] for e in chosen) if c.score_function == "sigmoid" else 1.0
        all_chosen.append(chosen)
        all_weights.append([s[e] / total * c.routed_scaling for e in chosen])
    return all_chosen, all_weights


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 4)])
def test_equals_loop_reference(score_function, groups):
    biased = score_function == "sigmoid"
    router = make_router(
        score_function=score_function,
        expert_bias=biased,
        num_groups=groups[0],
        topk_groups=groups[1],
        routed_scaling=2.5,
    )
    if biased:
        router.expert_bias.normal_(std=0.2)
    x_TH = torch.randn(50, router.config.hidden)
    out = router(x_TH)
    chosen, weights = loop_reference(router, x_TH)
    assert out.topk_idx.tolist() == chosen
    torch.testing.assert_close(out.topk_weights, torch.tensor(weights), rtol=1e-5, atol=1e-6)


def test_docstring_example():
    router = make_router(num_experts=4, num_topk=2, hidden=4)
    x = with_scores(router, torch.tensor([[0.5, 0.2, 0.4, 0.1]]))
    router.expert_bias.copy_(torch.tensor([0.0, 0.3, 0.0, 0.0]))
    out = router(x)
    assert out.topk_idx.tolist() == [[0, 1]]
    torch.testing.assert_close(out.topk_weights, torch.tensor([[0.5 / 0.7, 0.2 / 0.7]]))


def test_groups_keep_out_the_best_single_expert():
    # Expert 0 scores highest, but the two best of group 1 together beat the two best of group 0.
    router = make_router(num_experts=4, num_topk=2, num_groups=2, topk_groups=1, hidden=4)
    x = with_scores(router, torch.tensor([[0.9, 0.1, 0.6, 0.7]]))
    assert router(x).topk_idx.tolist() == [[3, 2]]


def test_ties_go_to_the_lower_number():
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]).expand(7, 5)
    assert stable_topk(scores, 4).tolist() == [[1, 2, 4, 0]] * 7
    router = make_router(num_groups=4, topk_groups=2)
    assert router(torch.zeros(3, router.config.hidden)).topk_idx.tolist() == [[0, 1, 2, 3]] * 3


def test_weights_pass_gradients_and_bias_gets_none():
    router = make_router(num_groups=4, topk_groups=2, seq_aux_loss_coeff=0.0).double()
    x = torch.randn(5, router.config.hidden, dtype=torch.float64, requires_grad=True)

    def weights(x, weight):
        router_weight = {"weight": weight}
        return torch.func.functional_call(router, router_weight, (x,)).topk_weights

    assert torch.autograd.gradcheck(weights, (x, router.weight))
    out = router(x)
    assert not router.expert_bias.requires_grad
    assert out.aux_loss.item() == 0.0


def test_balance_loss_value_by_hand():
    # One sequence of two tokens, E = 2, K = 1. Normalised scores (0.75, 0.25) and (0.6, 0.4): both choose
    # expert 0, so f = 2 / (1 * 2) * (2, 0) = (2, 0), P = (0.675, 0.325), sum f P = 1.35.
    scores = torch.tensor([[[0.75, 0.25], [0.3, 0.2]]])
    assert sequence_balance_loss(scores, 1).item() == pytest.approx(1.35)
    balanced = torch.tensor([[[0.6, 0.4], [0.4, 0.6]]])
    assert sequence_balance_loss(balanced, 1).item() == pytest.approx(1.0)


def test_balance_loss_is_a_mean_over_sequences_and_gradcheck():
    torch.manual_seed(1)
    scores = torch.rand(3, 6, 8, dtype=torch.float64, requires_grad=True)
    each = [sequence_balance_loss(s.unsqueeze(0), 2) for s in scores]
    torch.testing.assert_close(sequence_balance_loss(scores, 2), torch.stack(each).mean())
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2), (scores,))


def test_balance_loss_ignores_bias_and_is_scaled_by_its_coefficient():
    router = make_router(seq_aux_loss_coeff=0.01)
    x = torch.randn(2, 9, router.config.hidden)
    plain = router(x).aux_loss
    router.expert_bias.normal_()
    assert torch.equal(router(x).aux_loss, plain)
    scores = (x @ router.weight.T).sigmoid()
    torch.testing.assert_close(plain, 0.01 * sequence_balance_loss(scores, 4))
    plain.backward()
    assert router.weight.grad.abs().sum() > 0


def test_load_adds_up_over_micro_batches_and_moves_the_bias():
    router = make_router(bias_update_rate=0.01)
    outs = [router(torch.randn(n, router.config.hidden)) for n in (5, 3)]
    expected = torch.bincount(torch.cat([o.topk_idx.flatten() for o in outs]), minlength=16)
    assert torch.equal(router.tokens_per_expert, expected)
    router.eval()
    router(torch.randn(4, router.config.hidden))
    assert torch.equal(router.tokens_per_expert, expected)

    router.update_expert_bias(expected)
    direction = (expected.float().mean() - expected).sign()  # mean = 8 * 4 / 16 = 2
    torch.testing.assert_close(router.expert_bias, 0.01 * direction)
    assert router.tokens_per_expert.sum() == 0
    router.update_expert_bias(torch.full((16,), 7), rate=1.0)
    torch.testing.assert_close(router.expert_bias, 0.01 * direction)


def test_bias_balances_a_lopsided_router():
    router = make_router(num_topk=2, bias_update_rate=0.003)
    x = torch.randn(256, router.config.hidden) + 0.5
    imbalance = []
    for _ in range(300):
        router(x)
        load = router.tokens_per_expert.clone()
        imbalance.append((load.max() / load.float().mean()).item())
        router.update_expert_bias(load)
    assert imbalance[0] > 1.5
    assert imbalance[-1] < 1.15


def test_stays_float32_in_a_bfloat16_model():
    router = make_router(num_groups=4, topk_groups=2)
    x = torch.randn(6, router.config.hidden)
    expected = router(x.bfloat16().float())
    before = router.weight.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == router.expert_bias.dtype == torch.float32
    assert torch.equal(router.weight, before)
    out = router(x.bfloat16())
    assert out.topk_weights.dtype == torch.float32
    assert torch.equal(out.topk_weights, expected.topk_weights)
    assert router.double().weight.dtype == torch.float64


def test_no_tokens():
    router = make_router(num_groups=4, topk_groups=2)
    for shape in ((0, 64), (2, 0, 64), (0, 5, 64)):
        out = router(torch.zeros(shape, requires_grad=True))
        assert out.topk_idx.shape == out.topk_weights.shape == (0, 4)
        (out.topk_weights.sum() + out.aux_loss).backward()
    assert router.weight.grad.abs().sum() == 0


def test_without_bias_there_is_no_buffer():
    router = Router(dataclasses.replace(ModelConfig(), score_function="softmax", expert_bias=False))
    assert "expert_bias" not in router.state_dict()
    router.update_expert_bias(torch.arange(16))
    assert router.expert_bias is None
