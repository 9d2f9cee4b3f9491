"""FP8 experts in Megatron's layers and models on two ranks, in plain torch: close to bfloat16, and trainable."""

import pytest
import torch
from comparison import assert_close, assert_equal

THREE_ROUNDINGS = 3 * 2**-8
"""Of the largest value: gradients of three micro-batches, and sums of them, rounded to bfloat16."""

CASES = [
    "plain",
    "in spec",
    "travelling in bfloat16",
    "shared expert overlap",
    "recompute",
    "capacity",
    "padded to capacity",
]


@pytest.fixture(scope="module")
def results(on_cpu_ranks):
    return on_cpu_ranks(2, "megatron_fp8_cases.run_all")


@pytest.mark.parametrize("case", CASES)
def test_is_close_to_bfloat16(results, case):
    for by_name in results:
        stock, ours = by_name["layers"][case]
        assert_close(ours, stock)
        assert not ours["output"].equal(stock["output"])


def test_every_case_is_compared(results):
    assert set(results[0]["layers"]) == set(CASES)


def test_ways_in_and_recompute_give_the_same_bits(results):
    for by_name in results:
        plain = by_name["layers"]["plain"][1]
        assert_equal(by_name["layers"]["in spec"][1], plain, rtol=0)
        assert_equal(by_name["layers"]["recompute"][1], plain, rtol=0)


def test_what_arrives_in_fp8_is_multiplied_as_it_is(results):
    for by_name in results:
        counts = by_name["quantised in experts"]
        assert counts["plain"] == counts["recompute"] == counts["shared expert overlap"] == 0
        assert counts["travelling in bfloat16"] == 2  # the rows, and the gradient
        assert counts["padded to capacity"] == 2  # which are rearranged between dispatch and experts


def test_state_dicts_are_megatrons(results):
    for by_name in results:
        (stock, ours), (output, loaded, before) = (by_name["state"][part] for part in ("names", "outputs"))
        assert ours == stock
        assert any("local_experts.0.linear_fc1.weight" in name for name in ours[0])
        assert loaded.equal(output) and not before.equal(output)


def test_kept_weights_are_those_of_the_step(results):
    for by_name in results:
        first, unnoticed, noticed = by_name["kept"]
        assert unnoticed.equal(first) and not noticed.equal(first)


def test_hooks_before_the_forward_of_linears_run(results):
    """DDP waits in them for parameters that are being gathered."""
    for by_name in results:
        assert by_name["hooks"] == [0, 1, 2, 3] * 2


def test_refusals_name_the_flag(results):
    messages = results[0]["refused"]
    for name in ("activation_func", "activation_func_clamp_value"):
        assert "--swiglu" in messages.pop(name)
    assert "fp8_experts" in messages.pop("keep without FP8")
    assert "--fp8-format" in messages["keep_fp8_weights"]
    assert "--fp8-param-gather" in messages["fp8_param"]
    assert "TEGroupedMLP or SequentialMLP" in messages.pop("experts")
    for name, message in messages.items():
        assert name in message, message
        assert message != "no error"


def test_six_steps_of_training(results):
    for by_name in results:
        (stock, _), (ours, bias) = by_name["trained"]["stock"], by_name["trained"]["FP8"]
        assert ours[-1] < 0.5 * ours[0]
        assert ours == pytest.approx(stock, abs=0.03 * stock[0])  # both have learnt the text by heart
        assert bias.any()


def test_schedules_give_the_same_gradients(results):
    for by_name in results:
        gradients = by_name["gradients"]
        for schedule in ("FP8, overlap", "FP8, overlap and delayed wgrad"):
            assert_equal(without_embedding(gradients[schedule]), without_embedding(gradients["FP8"]), rtol=0)


def test_products_add_to_main_grad(results):
    """With --gradient-accumulation-fusion, where DDP, or the schedule's test, has made one; in float32."""
    for by_name in results:
        fused, unfused = by_name["fused"], by_name["gradients"]["FP8"]
        assert by_name["trained"]["fused"][0] == by_name["trained"]["FP8"][0]
        assert_equal(fused["without main_grad"], by_name["layers"]["plain"][1], rtol=0)
        for schedule in ("in turn", "overlap and delayed wgrad"):
            assert_equal(without_embedding(fused[schedule]), without_embedding(unfused), rtol=THREE_ROUNDINGS)
            experts = [name for name in unfused if ".experts." in name]
            assert {unfused[name].dtype for name in experts} == {torch.bfloat16}
            assert {fused[schedule][name].dtype for name in experts} == {torch.float32}


def without_embedding(gradients):
    """The schedules add up its gradients, the decoder's and MTP's, in different orders."""
    return {name: each for name, each in gradients.items() if "word_embeddings" not in name}


def test_slices_of_experts(on_cpu_ranks):
    for stock, ours in on_cpu_ranks(2, "megatron_fp8_cases.run_tensor_parallel"):
        assert_close(ours, stock)
        assert torch.count_nonzero(ours["input"])
