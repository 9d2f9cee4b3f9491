"""The plan's traffic against counting by brute force and by simulation, and its table."""

import itertools
import random
from dataclasses import replace

import pytest

from moe_ep import cli
from moe_ep.layers import ModelConfig
from moe_ep.recipes.presets import get_preset
from moe_ep.recipes.wire import layer_traffic, rank_probability


@pytest.mark.parametrize(
    ("experts", "topk", "groups", "topk_groups", "ep"),
    [(8, 2, 1, 1, 4), (8, 2, 4, 2, 4), (8, 3, 4, 2, 2), (8, 2, 2, 1, 8), (12, 3, 4, 2, 6), (12, 2, 3, 2, 2)],
)
def test_probability_by_counting_every_routing(experts, topk, groups, topk_groups, ep):
    model = ModelConfig(num_experts=experts, num_topk=topk, num_groups=groups, topk_groups=topk_groups)
    size, local = experts // groups, experts // ep
    seen = routings = 0
    for drawn in itertools.combinations(range(groups), topk_groups):
        pool = [e for g in drawn for e in range(g * size, (g + 1) * size)]
        for chosen in itertools.combinations(pool, topk):
            routings += 1
            seen += len({expert // local for expert in chosen})
    assert rank_probability(model, ep) == pytest.approx(seen / routings / ep, rel=1e-12)


def test_deepseek_v3_by_simulation():
    model, draws = get_preset("deepseek-v3").model, random.Random(0)
    ranks = 0
    for _ in range(4000):
        groups = draws.sample(range(8), 4)
        chosen = draws.sample([e for g in groups for e in range(g * 32, (g + 1) * 32)], 8)
        ranks += len({expert // 4 for expert in chosen})
    assert 64 * rank_probability(model, 64) == pytest.approx(ranks / 4000, rel=0.005)


def test_two_ranks_without_groups_reach_the_floor_of_the_link():
    model = replace(get_preset("layer").model, num_experts=256, num_groups=1, topk_groups=1)
    traffic = layer_traffic(model, ep_size=2, tokens=4096)
    assert traffic.rows == pytest.approx(4096 * 0.9965, rel=1e-3)
    assert traffic.dispatch_bf16 == traffic.combine_bf16 == pytest.approx(traffic.rows * 2 * 7168)
    assert traffic.dispatch_fp8 == pytest.approx(traffic.rows * (7168 + 4 * 56))
    assert traffic.dispatch_bf16 / 366e3 == pytest.approx(160, abs=1)  # microseconds


def test_one_rank_sends_nothing():
    assert layer_traffic(get_preset("tiny").model, ep_size=1, tokens=100).rows == 0


def test_command_prints_the_plan(capsys):
    assert cli.main(["plan", "--preset", "deepseek-v3", "--nproc", "64", "--tokens", "4096"]) == 0
    shown = capsys.readouterr().out
    for text in ("683 B", "36.6 B", "4 experts a layer", "425.4 MB", "219.3 MB", "at 366 GB/s"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "--nproc is 0"),
        (["--nproc", "6", "--ep", "4"], "--ep 4 must divide"),
        (["--set", "nonsense=1"], "--set nonsense=1"),
        (["--set", "num_experts=many"], "is no number"),
        (["--set", "num_groups=3"], "num_groups"),
    ],
)
def test_command_explains_bad_arguments(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
