"""Settings and presets: the published sizes, refusals in words, nothing lost in JSON."""

import dataclasses
import json

import pytest
import torch

from moe_ep.recipes.config import TrainConfig, with_seq_len
from moe_ep.recipes.errors import RecipeError
from moe_ep.recipes.fit import check_fits, estimate_memory
from moe_ep.recipes.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_whole(name):
    config = get_preset(name)
    assert config.preset == name
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.warmup < config.steps
    assert config.micro_batch(2) >= 1
    if name != "tiny":  # what FP8's blocks want
        assert config.model.hidden % 128 == 0 and config.model.moe_ffn_hidden % 128 == 0


def test_deepseek_v3_has_the_published_sizes():
    model = get_preset("deepseek-v3").model
    counts = model.parameter_counts()
    assert (model.num_layers, model.num_dense_layers, model.num_experts, model.num_topk) == (61, 3, 256, 8)
    # "671B total parameters with 37B activated for each token" (arXiv:2412.19437); its main model has 671.03 B.
    assert counts.main / 1e9 == pytest.approx(671.03, abs=0.05)
    assert counts.total / 1e9 == pytest.approx(682.6, abs=0.05)
    assert (counts.active + counts.embedding) / 1e9 == pytest.approx(37.55, abs=0.05)
    assert model.parameters_per_rank(64) / 1e9 == pytest.approx(27.9, abs=0.06)


@pytest.mark.parametrize(
    ("name", "total", "per_rank"), [("train-s", 0.51, 0.31), ("train-m", 2.8, 1.6), ("wide", 4.1, 2.7)]
)
def test_sizes_for_two_gpus(name, total, per_rank):
    model = get_preset(name).model
    assert model.parameter_counts().total / 1e9 == pytest.approx(total, rel=0.02)
    assert model.parameters_per_rank(2) / 1e9 == pytest.approx(per_rank, rel=0.02)


def test_expert_parallel_size():
    tiny = get_preset("tiny")  # 16 experts
    assert [tiny.ep_size(world) for world in (1, 2, 3, 4, 6, 24)] == [1, 2, 1, 4, 2, 8]
    assert dataclasses.replace(tiny, ep=2).ep_size(4) == 2
    with pytest.raises(
        RecipeError, match="--ep 3 must divide the 4 ranks and the 16 experts; possible here: 1, 2, 4"
    ):
        dataclasses.replace(tiny, ep=3).ep_size(4)


def test_batch_is_shared_evenly():
    config = dataclasses.replace(get_preset("tiny"), batch=12, accumulate=3)
    assert config.micro_batch(4) == 1
    with pytest.raises(RecipeError, match="nearest that is: --batch 15"):
        config.micro_batch(5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("beta2", 1.0),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("min_lr_ratio", 2.0),
        ("seq_len", 1000),
        ("keep_checkpoints", 0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(RecipeError, match=f"--{field.replace('_', '-')} is {value!r}"):
        dataclasses.replace(get_preset("tiny"), **{field: value})


def test_longer_sequences_raise_the_model_limit():
    config = with_seq_len(get_preset("tiny"), 512)
    assert config.seq_len == config.model.max_seq_len == 512
    with pytest.raises(RecipeError, match="--seq-len is 0"):
        with_seq_len(config, 0)


def test_too_large_a_model_is_refused_before_anything_is_allocated():
    cpu = {"dtype": torch.float32, "device": torch.device("cpu"), "local_ranks": 4}
    with pytest.raises(RecipeError, match=r"deepseek-v3 doesn't fit: with EP 4 .* TiB .*[Uu]se more ranks"):
        check_fits(get_preset("deepseek-v3"), world_size=4, **cpu)
    check_fits(get_preset("tiny"), world_size=4, **cpu)
    long = dataclasses.replace(with_seq_len(get_preset("tiny"), 1 << 16), batch=1 << 12)
    with pytest.raises(RecipeError, match="Raise --accumulate"):
        check_fits(long, world_size=4, **cpu)


def test_memory_counts_every_state():
    model = get_preset("tiny").model
    need = estimate_memory(model, ep_size=4, tokens=512, dtype=torch.bfloat16)
    assert need.states == 18 * model.parameters_per_rank(4)
    assert (
        estimate_memory(model, ep_size=4, tokens=1024, dtype=torch.bfloat16).activations
        == 2 * need.activations
    )
