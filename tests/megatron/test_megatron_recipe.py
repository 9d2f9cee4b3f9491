"""recipes/megatron_deepseek_v3.py: Megatron's training loop on two ranks; its sizes are those of moe-ep train."""

import pytest

from moe_ep.recipes.presets import get_preset

RANK_WITH_LOG = -1
SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn_hidden",
    "moe_ffn_hidden_size": "moe_ffn_hidden",
    "moe_shared_expert_intermediate_size": "shared_ffn_hidden",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_topk",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "topk_groups",
    "moe_router_score_function": "score_function",
    "moe_router_topk_scaling_factor": "routed_scaling",
    "moe_router_enable_expert_bias": "expert_bias",
    "moe_router_bias_update_rate": "bias_update_rate",
    "moe_aux_loss_coeff": "seq_aux_loss_coeff",
    "rotary_scaling_factor": "rope_scaling_factor",
    "vocab_size": "vocab_size",
}


@pytest.fixture(scope="module")
def results(on_cpu_ranks):
    return on_cpu_ranks(2, "megatron_recipe_cases.run_all")[RANK_WITH_LOG]


def test_training_gives_the_losses_of_all_to_all(results):
    (losses, evaluation), (stock_losses, stock_evaluation) = results["moe_ep"], results["alltoall"]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    assert evaluation == pytest.approx(stock_evaluation, rel=1e-5)


@pytest.mark.parametrize("how", ["in FP8", "with FP8 experts"])
def test_training_in_fp8(results, how):
    losses, evaluation = results[f"moe_ep {how}"]
    assert losses == pytest.approx(results["alltoall"][0], rel=1e-2)
    assert evaluation == pytest.approx(results["alltoall"][1], rel=1e-2)
    assert losses != pytest.approx(results["alltoall"][0], rel=1e-5)


@pytest.mark.parametrize("size", ["tiny", "train-s", "train-m", "wide", "layer", "deepseek-v3"])
def test_sizes_are_those_of_the_presets(results, size):
    config, model = results["sizes"][size], get_preset(size).model
    differing = {name: config[name] for name, ours in SAME.items() if config[name] != getattr(model, ours)}
    assert not differing
    dense = model.num_dense_layers
    assert config["moe_layer_freq"] == [0] * dense + [1] * (model.num_layers - dense)
    assert (config["mtp_num_layers"] or 0) == model.mtp_layers


def test_deepseek_v3_has_the_published_layout(results):
    config = results["sizes"]["deepseek-v3"]
    parallel = {
        name: config[f"{name}_parallel_size"]
        for name in (
            "tensor_model",
            "pipeline_model",
            "virtual_pipeline_model",
            "expert_model",
            "expert_tensor",
        )
    }
    assert parallel == {
        "tensor_model": 2,
        "pipeline_model": 8,
        "virtual_pipeline_model": 4,
        "expert_model": 64,
        "expert_tensor": 1,
    }
    assert config["data_parallel_size"] == 64
    assert config["overlap_moe_expert_parallel_comm"] and config["delay_wgrad_compute"]
    assert config["fp8"] == "e4m3" and config["moe_router_padding_for_quantization"]


def test_arguments_for_another_script(results):
    words = results["printed"].split()
    assert words[:2] == ["--multi-latent-attention", "--qk-layernorm"]
    assert words[-2:] == ["--lr", "1e-6"]
    assert words[words.index("--num-experts") + 1] == "256"
    assert "--size" not in words and "--print-arguments" not in words
