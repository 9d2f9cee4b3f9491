"""Overlapped MoE layers against the serial one, and the order of calls that lets them overlap on a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from overlap_cases import CONFIG, RowByRow, assert_close, make_input, run
from processes import run_gloo

import moe_ep
from moe_ep.errors import InvalidInput
from moe_ep.layers import ModelConfig, MoELayer, ParallelGroups, build_model, fp8_weights
from moe_ep.testing import run_ranks

CHUNKS = (1, 2, 3, 4)
HOW = {
    "exact": {},
    "rank": {"layout": "rank"},
    "static": {"max_recv_rows": 64, "expert_alignment": 4},
    "static, rank": {"max_recv_rows": 64, "expert_alignment": 4, "layout": "rank"},
    "no shared expert": {"shared_ffn_hidden": 0},
}
FP8 = {"fp8": "blockwise", "fp8_backward": "blockwise"}


def sizes(config):
    return {"hidden": config.hidden, "num_experts": config.num_experts, "num_topk": config.num_topk}


def ranks(config, ep_size, fn):
    return run_ranks(ep_size, fn, max_tokens_per_rank=8, **sizes(config))


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_equals_serial_layer(ep_size, how, dtype, relative):
    config = replace(CONFIG, **HOW[how])

    def fn(comm):
        layer, x = MoELayer(config, comm, seed=5, dtype=dtype), make_input(comm, config, dtype)
        (y, aux_loss), grads = run(layer, x, 0)
        assert all(grad is not None for grad in grads.values())
        for chunks in CHUNKS:
            (y_chunked, aux_loss_chunked), grads_chunked = run(layer, x, chunks)
            assert_close({"y": y_chunked}, {"y": y}, relative)
            assert torch.equal(aux_loss_chunked, aux_loss)
            assert_close(grads_chunked, grads, relative)

    ranks(config, ep_size, fn)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fp8", [{}, FP8], ids=["", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_serial_layer_bit_for_bit(ep_size, how, fp8, dtype):
    """With experts that work row by row, all but the sum over an expert's rows is taken in one order."""
    config = replace(CONFIG, **HOW[how], **fp8)

    def fn(comm):
        layer, x = MoELayer(config, comm, seed=5, dtype=dtype), make_input(comm, config, dtype)
        layer.experts = RowByRow(layer)
        outputs, grads = run(layer, x, 0)
        for chunks in CHUNKS:
            outputs_chunked, grads_chunked = run(layer, x, chunks)
            assert all(map(torch.equal, outputs_chunked, outputs))
            for name, grad in grads.items():
                if not name.startswith("experts."):
                    assert torch.equal(grads_chunked[name], grad), name
            scale = "experts.scale"
            assert_close({scale: grads_chunked[scale]}, {scale: grads[scale]}, 1e-6)

    ranks(config, ep_size, fn)


@pytest.mark.parametrize("fp8", [{}, FP8], ids=["", "fp8"])
def test_fp8_rows(fp8):
    config = replace(CONFIG, **fp8)

    def fn(comm):
        layer, x = MoELayer(config, comm, seed=5), make_input(comm, config, torch.float32)
        (y, _), grads = run(layer, x, 0)
        (y_chunked, _), grads_chunked = run(layer, x, 3)
        assert_close({"y": y_chunked}, {"y": y}, 1e-6)
        return grads, grads_chunked

    for grads, grads_chunked in ranks(config, 2, fn):
        assert_close(grads_chunked, grads, 1e-6)


@pytest.mark.parametrize("how", [{}, FP8, {**FP8, "max_recv_rows": 256}], ids=["", "fp8 rows", "static"])
def test_fp8_experts(how, monkeypatch):
    """They get the same rows and gradients, in FP8 if these travel so; weights are quantised once for all chunks."""
    quantized, original = [], fp8_weights.quantize_weight

    def watched(*weights, **how):
        quantized.append(threading.get_ident())
        return original(*weights, **how)

    monkeypatch.setattr(fp8_weights, "quantize_weight", watched)
    sizes_for_blocks = {
        "hidden": 128,
        "moe_ffn_hidden": 128,
        "fp8_experts": "blockwise",
        "expert_alignment": 16,
    }
    config = replace(CONFIG, **sizes_for_blocks, **how)

    def fn(comm):
        layer, x = MoELayer(config, comm, seed=5), make_input(comm, config, torch.float32)
        outputs, grads = run(layer, x, 0)
        outputs_overlapped, grads_overlapped = run(layer, x, 1)
        assert all(map(torch.equal, outputs_overlapped, outputs))
        for name, grad in grads.items():
            assert torch.equal(grads_overlapped[name], grad), name
        before = quantized.count(threading.get_ident())
        (y_chunked, _), _ = run(layer, x, 3)
        assert_close({"y": y_chunked}, {"y": outputs[0]}, 1e-6)
        assert quantized.count(threading.get_ident()) - before == 4  # two weights, forward and backward

    ranks(config, 2, fn)


def test_config_turns_it_on_in_a_model(monkeypatch):
    seen = []
    run_overlapped = moe_ep.layers.moe_layer.run_overlapped

    def spy(*args, num_chunks, **options):
        seen.append(num_chunks)
        return run_overlapped(*args, num_chunks=num_chunks, **options)

    monkeypatch.setattr(moe_ep.layers.moe_layer, "run_overlapped", spy)
    tokens = torch.arange(18).view(2, 9)

    def train(overlap_chunks):
        config = ModelConfig(num_layers=3, mtp_layers=1, max_seq_len=16, overlap_chunks=overlap_chunks)
        model = build_model(config, ParallelGroups.create(1), max_tokens_per_rank=16, dtype=torch.float64)
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        model.comm.close()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    serial = train(0)
    assert seen == []
    assert_close(train(3), serial, 1e-12)
    assert seen == [3, 3, 3]


def test_refuses_a_negative_number():
    def fn(comm):
        with pytest.raises(InvalidInput, match="overlap_chunks is -1; it must be 0"):
            MoELayer(CONFIG, comm)(torch.zeros(1, CONFIG.hidden), overlap_chunks=-1)

    ranks(CONFIG, 1, fn)


def gloo_rank():
    with moe_ep.Communicator(max_tokens_per_rank=8, **sizes(CONFIG)) as comm:
        layer = MoELayer(CONFIG, comm, seed=5, dtype=torch.float64)
        x = make_input(comm, CONFIG, torch.float64)
        return [run(layer, x, chunks) for chunks in (0, 1, 3)]


def test_processes():
    for (outputs, grads), *others in run_gloo(2, gloo_rank):
        for outputs_chunked, grads_chunked in others:
            torch.testing.assert_close(outputs_chunked, outputs, rtol=1e-12, atol=1e-12)
            assert_close(grads_chunked, grads, 1e-12)


FORWARD = {
    1: "U D0 wait-D0 E0 C0 S wait-C0",
    2: "U D0 wait-D0 E0 D1 C0 wait-D1 E1 C1 S wait-C0 wait-C1",
    3: "U D0 wait-D0 E0 D1 C0 wait-D1 E1 D2 C1 wait-D2 E2 C2 S wait-C0 wait-C1 wait-C2",
    4: "U D0 wait-D0 E0 D1 C0 wait-D1 E1 D2 C1 wait-D2 E2 D3 C2 wait-D3 E3 C3 S "
    "wait-C0 wait-C1 wait-C2 wait-C3",
}


@pytest.mark.parametrize("chunks", FORWARD)
@pytest.mark.parametrize("how", [{}, FP8, {"layout": "rank"}], ids=["", "fp8", "rank"])
def test_order_of_calls(chunks, how, monkeypatch):
    """Whatever lies between a call and the wait for it can run beside it; the backward is the same from its end."""
    calls = []
    handles = []  # in the order of the chunks, which they tell apart

    def logged(name, function, state_index):
        def call(*args):
            state = args[state_index]
            if not any(state is known for known in handles):
                handles.append(state)
            calls.append(f"{name}{next(i for i, known in enumerate(handles) if known is state)}")
            return function(*args)

        return call

    for name, letter, state_index in (
        ("dispatch", "D", 4),
        ("dispatch_fp8", "D", 5),
        ("dispatch_quantised", "D", 4),
        ("combine", "C", 5),
    ):
        monkeypatch.setattr(moe_ep.ops, name, logged(letter, getattr(moe_ep.ops, name), state_index))
    monkeypatch.setattr(moe_ep.Event, "wait", lambda event: calls.append(f"wait-{event.name}"))
    finish = moe_ep.functional.finish

    def named_finish(*args):
        event = finish(*args)
        event.name = calls[-1]
        return event

    monkeypatch.setattr(moe_ep.functional, "finish", named_finish)

    def log_module(module, name):
        module.register_forward_pre_hook(lambda *_: calls.append(name()))
        module.register_full_backward_pre_hook(lambda *_: calls.append(name()))

    def fn(comm):
        layer = MoELayer(replace(CONFIG, **how), comm, seed=5)
        count = iter([*range(chunks), *reversed(range(chunks))])
        log_module(layer.experts, lambda: f"E{next(count)}")
        log_module(layer.shared.gate_up, lambda: "U")
        log_module(layer.shared.down, lambda: "S")
        y, _ = layer(make_input(comm, CONFIG, torch.float32), overlap_chunks=chunks)
        forward = calls.copy()
        calls.clear()
        y.sum().backward()
        return forward, calls

    [(forward, backward)] = ranks(CONFIG, 1, fn)
    assert forward == FORWARD[chunks].split()
    # A dispatch's backward is a combine and the other way round.
    transposed = [call.translate(str.maketrans("CD", "DC")) for call in forward if "wait" not in call]
    assert backward == transposed[::-1]
