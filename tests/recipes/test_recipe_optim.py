"""The schedule's values, the decay groups, and AdamW on master weights."""

import math

import pytest
import torch
from torch import nn

from moe_ep.recipes.optim import MasterAdamW, learning_rate, make_optimizer
from moe_ep.recipes.presets import get_preset

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_schedule():
    rates = [learning_rate(s, peak=1.0, warmup=2, steps=6, min_ratio=0.0) for s in range(1, 9)]
    cosine = [0.5 * (1 + math.cos(math.pi * x)) for x in (0.25, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, *cosine, 0.0, 0.0])
    assert learning_rate(1, peak=2.0, warmup=0, steps=1, min_ratio=0.1) == pytest.approx(0.2)
    assert learning_rate(6, peak=2.0, warmup=2, steps=6, min_ratio=0.1) == pytest.approx(0.2)


def test_float32_is_torchs_adamw():
    torch.manual_seed(0)
    mine, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(mine.state_dict())
    ours = MasterAdamW(mine.parameters(), **OPTIONS)
    torchs = torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, optimizer in ((mine, ours), (theirs, torchs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(mine.weight, theirs.weight) and torch.equal(mine.bias, theirs.bias)


def test_bfloat16_keeps_small_updates_in_the_master():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], **{**OPTIONS, "lr": 1e-4, "weight_decay": 0.0})
    for _ in range(20):
        optimizer.zero_grad()
        weight.sum().backward()
        assert weight.grad.dtype == torch.float32
        optimizer.step()
    # Each update of 1e-4 is below bfloat16's step of 2^-8 at 1; twenty of them are not all lost in the master.
    assert optimizer.state[weight]["master"].mean().item() == pytest.approx(1 - 20e-4, rel=1e-5)
    assert torch.equal(weight.detach(), optimizer.state[weight]["master"].bfloat16())


def test_micro_batches_add_up_in_float32():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    MasterAdamW([weight], **OPTIONS)
    for value in (256.0, 1.0):
        (weight * value).sum().backward()
    assert weight.grad.item() == 257.0  # 256 in bfloat16


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, get_preset("tiny"))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model[0].weight)] == 0.1
    assert {decays[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)} == {0.0}
    optimizer.set_lr(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
