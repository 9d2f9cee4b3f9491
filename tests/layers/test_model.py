"""The language model: its losses, what MTP modules see, parameter counts, and that EP sizes agree."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe_ep.errors import InvalidInput
from moe_ep.layers import DeepSeekModel, ModelConfig
from moe_ep.testing import run_ranks

CONFIG = ModelConfig(
    vocab_size=40,
    hidden=32,
    num_heads=2,
    ffn_hidden=48,
    moe_ffn_hidden=16,
    shared_ffn_hidden=16,
    num_experts=8,
    num_topk=2,
    num_groups=4,
    topk_groups=2,
    mtp_layers=2,
    mtp_loss_weight=0.3,
    max_seq_len=16,
)


def ranks(fn, ep_size=1, config=CONFIG):
    sizes = {"hidden": config.hidden, "num_experts": config.num_experts, "num_topk": config.num_topk}
    return run_ranks(ep_size, fn, max_tokens_per_rank=64, **sizes)


def make_model(config=CONFIG, **kwargs) -> DeepSeekModel:
    [model] = ranks(lambda comm: DeepSeekModel(config, comm, **kwargs), config=config)
    return model


def on_one_rank(fn, config=CONFIG, **kwargs):
    """``fn(model)`` where the communicator is open."""
    [result] = ranks(lambda comm: fn(DeepSeekModel(config, comm, **kwargs)), config=config)
    return result


def text(batch=2, seq_len=9, seed=0):
    tokens = torch.randint(
        0, CONFIG.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    "change", [{}, {"q_lora_rank": None, "mtp_layers": 0}, {"shared_ffn_hidden": 0, "num_dense_layers": 0}]
)
def test_parameter_counts(change):
    config = dataclasses.replace(CONFIG, **change)
    model, counts = make_model(config), config.parameter_counts()
    assert sum(p.numel() for p in model.parameters()) == counts.total
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp.")) == counts.main
    local = ranks(lambda comm: sum(p.numel() for p in DeepSeekModel(config, comm).parameters()), 2, config)
    assert local == [config.parameters_per_rank(2)] * 2


def test_losses():
    def fn(model):
        tokens, targets = text()
        out = model(tokens, targets)
        assert out.logits.shape == (2, 9, CONFIG.vocab_size)
        torch.testing.assert_close(
            out.main_loss, F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        )
        torch.testing.assert_close(out.loss, out.main_loss + 0.3 * out.mtp_loss + out.aux_loss)
        assert abs(out.main_loss.item() - torch.tensor(40.0).log().item()) < 0.1
        assert out.aux_loss > 0
        assert torch.equal(model(tokens).logits, out.logits)
        assert model(tokens).loss is None
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    on_one_rank(fn)


def test_mtp_inputs_and_targets():
    def fn(model):
        seen = {}
        for k, module in enumerate(model.mtp, start=1):
            module.register_forward_hook(lambda m, args, out, k=k: seen.update({k: (*args, out[0])}))
        tokens, targets = text()
        whole = torch.cat((tokens, targets[:, -1:]), dim=1)  # t_0 ... t_9
        out = model(tokens, targets)
        losses = []
        for k, module in enumerate(model.mtp, start=1):
            h, embedding, rotary, result = seen[k]
            length = 9 - k
            assert h.shape == embedding.shape == (2, length, CONFIG.hidden)
            assert len(rotary[0]) == length
            # Position i sees token i + k and predicts token i + k + 1.
            assert torch.equal(embedding, model.embedding(whole[:, k : k + length]))
            if k > 1:
                assert torch.equal(h, seen[k - 1][-1][:, :length])
            logits = model.head(module.final_norm(result))
            losses.append(F.cross_entropy(logits.flatten(0, 1), whole[:, k + 1 :].flatten()))
        torch.testing.assert_close(out.mtp_loss, torch.stack(losses).mean())

    on_one_rank(fn)


def test_ignored_targets_do_not_count():
    def fn(model):
        tokens, targets = text()
        targets = targets.clone()
        targets[0] = -100
        out = model(tokens, targets)
        expected = F.cross_entropy(out.logits[1], targets[1])
        nothing = model(tokens, torch.full_like(targets, -100))
        return out.main_loss - expected, nothing.main_loss, nothing.mtp_loss

    difference, *nothing = on_one_rank(fn)
    assert abs(difference.item()) < 1e-6
    assert [loss.item() for loss in nothing] == [0.0, 0.0]


def test_no_future_leaks_into_the_logits():
    def fn(model):
        tokens, _ = text()
        changed = tokens.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % CONFIG.vocab_size
        return model(tokens).logits, model(changed).logits

    before, after = on_one_rank(fn)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("ep_size", [2, 4])
def test_every_ep_size_computes_the_same(ep_size):
    def logits(model, rank):
        return model(text(seed=rank)[0]).logits

    alone = on_one_rank(lambda model: [logits(model, r) for r in range(ep_size)], dtype=torch.float64)
    spread = ranks(lambda comm: logits(DeepSeekModel(CONFIG, comm, dtype=torch.float64), comm.rank), ep_size)
    torch.testing.assert_close(spread, alone)


def test_learns_a_repeated_sequence():
    def fn(model):
        tokens = torch.arange(9).repeat(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            out = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append((out.main_loss.item(), out.mtp_loss.item()))
        return losses

    losses = on_one_rank(fn)
    assert losses[-1][0] < 0.3 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_bfloat16():
    def fn(model):
        out = model(*text())
        out.loss.backward()
        return out

    out = on_one_rank(fn, dtype=torch.bfloat16)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    exact = on_one_rank(fn)
    assert abs(out.loss.item() - exact.loss.item()) < 0.01


def test_seed_decides_the_weights_and_global_random_state_does_not():
    torch.manual_seed(1)
    first = make_model(seed=4).state_dict()
    torch.manual_seed(2)
    second, other = make_model(seed=4).state_dict(), make_model(seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert first["head.weight"].std().item() == pytest.approx(CONFIG.init_std, rel=0.1)


def test_refuses_bad_input():
    def fn(model):
        tokens, targets = text()
        with pytest.raises(InvalidInput, match=r"tokens must have shape \[B, S\]; got \(9,\)"):
            model(tokens[0])
        with pytest.raises(InvalidInput, match="sequences of 17; allowed are up to max_seq_len = 16"):
            model(torch.zeros(1, 17, dtype=torch.int64))
        with pytest.raises(InvalidInput, match=r"targets must be shaped like tokens, \(2, 9\); got \(2, 8\)"):
            model(tokens, targets[:, 1:])
        with pytest.raises(InvalidInput, match="sequences of 2; 2 MTP modules need more"):
            model(tokens[:, :2], targets[:, :2])

    on_one_rank(fn)
