"""The dispatcher by itself, its experts being ``rows * probability``; every function is a case for two ranks."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoECudaGraphPartialCaptureSignal
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron_models import (
    EXPERTS,
    HIDDEN,
    begin,
    device,
    gpt_arguments,
    layer_config,
    layer_input,
    layer_upstream,
    make_gpt,
    make_layer,
    run_layer,
)

import moe_ep
from moe_ep.errors import InvalidInput
from moe_ep.megatron import DispatcherOptions, MoeEpLayer, MoeEpTokenDispatcher, install, use_in_spec

LOCAL = EXPERTS // 2
TOPK = 2


def run_all() -> dict[str, str | None]:
    """By case, the traceback of its failure or None."""
    begin(2)
    results = {}
    for case in CASES:
        try:
            with device():
                case()
            results[case.__name__] = None
        except Exception:
            results[case.__name__] = traceback.format_exc()
    return results


CASES: list[Callable[[], None]] = []


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def make_dispatcher(options: DispatcherOptions | None = None, **changes: Any) -> MoeEpTokenDispatcher:
    rank = dist.get_rank()
    groups = SimpleNamespace(
        ep=parallel_state.get_expert_model_parallel_group(),
        expt_tp=parallel_state.get_expert_tensor_parallel_group(),
        tp_ep=parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    local = list(range(rank * LOCAL, (rank + 1) * LOCAL))
    return MoeEpTokenDispatcher(LOCAL, local, layer_config(**changes), groups, options)


def random(*shape: int, seed: int) -> torch.Tensor:
    """Numbers in [0, 1), others on every rank and the same on every device."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    return torch.rand(*shape, generator=generator, device="cpu").to(device())


def routing(num_tokens: int, num_topk: int = TOPK, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A map ``[T, E]``, and probabilities that are not 0 where the map is False."""
    chosen = random(num_tokens, EXPERTS, seed=seed).topk(num_topk, dim=1).indices
    routing_map = torch.zeros(num_tokens, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    return routing_map, random(num_tokens, EXPERTS, seed=seed + 1000) + 0.1


def tokens(num_tokens: int) -> torch.Tensor:
    """``[T, 1, H]``."""
    return random(num_tokens, 1, HIDDEN, seed=5) - 0.5


def drive(
    dispatcher: MoeEpTokenDispatcher, x: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what the experts were given: rows, counts, probabilities."""
    h, p = dispatcher.dispatch_preprocess(x, routing_map, probs)
    h, p = dispatcher.token_dispatch(h, p)
    rows, counts, row_probs = dispatcher.dispatch_postprocess(h, p)
    y = dispatcher.combine_preprocess(rows * row_probs[:, None])
    y = dispatcher.combine_postprocess(dispatcher.token_combine(y))
    return y, rows, counts, row_probs


def wanted(x: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    return x * (probs * routing_map).sum(1)[:, None, None]


def assert_same_function(dispatcher: MoeEpTokenDispatcher, num_tokens: int) -> None:
    """Output and gradients of x and probabilities are those of `wanted`."""
    routing_map, probs = routing(num_tokens)
    results = []
    for function in (lambda *args: drive(dispatcher, *args)[0], wanted):
        x, p = tokens(num_tokens).requires_grad_(), probs.clone().requires_grad_()
        y = function(x, routing_map, p)
        (y * torch.linspace(-1, 1, HIDDEN)).sum().backward()
        results.append((y, x.grad, p.grad))
    torch.testing.assert_close(*results)


def assert_refused(message: str, **changes: Any) -> None:
    options = changes.pop("options", None)
    try:
        make_dispatcher(options, **changes)
    except InvalidInput as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{changes} were accepted")


@case
def test_only_experts_of_the_map() -> None:
    assert_same_function(make_dispatcher(), 10)


@case
def test_ranks_with_different_numbers_of_tokens() -> None:
    assert_same_function(make_dispatcher(), 7 * dist.get_rank())


@case
def test_no_tokens_anywhere() -> None:
    assert_same_function(make_dispatcher(), 0)


@case
def test_rows_are_in_the_order_of_source_and_token() -> None:
    dispatcher, num_tokens = make_dispatcher(), 9
    routing_map, probs = routing(num_tokens)
    x = torch.zeros(num_tokens, 1, HIDDEN)
    x[:, 0, 0] = 100 * dist.get_rank() + torch.arange(num_tokens)
    _, rows, counts, row_probs = drive(dispatcher, x, routing_map, probs)
    maps = [torch.empty_like(routing_map) for _ in range(2)]
    all_probs = [torch.empty_like(probs) for _ in range(2)]
    dist.all_gather(maps, routing_map)
    dist.all_gather(all_probs, probs)
    for expert, (segment, weights) in enumerate(
        zip(rows.split(counts.tolist()), row_probs.split(counts.tolist()), strict=True)
    ):
        column = dist.get_rank() * LOCAL + expert
        sources = [100 * rank + torch.arange(num_tokens)[m[:, column]] for rank, m in enumerate(maps)]
        assert segment[:, 0].tolist() == torch.cat(sources).tolist()
        assert weights.equal(
            torch.cat([p[m[:, column], column] for m, p in zip(maps, all_probs, strict=True)])
        )


@case
def test_rows_are_padded_for_quantised_products() -> None:
    dispatcher = make_dispatcher()
    dispatcher.config.fp8, dispatcher.config.fp8_recipe = "e4m3", "blockwise"
    routing_map, probs = routing(10)
    x = tokens(10) + 10  # nowhere 0
    y, rows, counts, row_probs = drive(dispatcher, x, routing_map, probs)
    assert len(rows) == counts.sum() and not (counts % 16).any()
    received = torch.stack([routing_map.sum(0)])
    dist.all_reduce(received)
    padding = rows[:, 0] == 0
    assert len(rows) - padding.sum() == received[0, dispatcher.local_expert_indices].sum()
    assert not rows[padding].any() and not row_probs[padding].any()
    torch.testing.assert_close(y, wanted(x, routing_map, probs))
    dispatcher.config.moe_expert_capacity_factor = 1.0
    dispatcher.config.moe_pad_expert_input_to_capacity = True
    _, rows, counts, _ = drive(dispatcher, x, routing_map, probs * routing_map)
    assert counts.tolist() == [16] * LOCAL and len(rows) == 16 * LOCAL


@case
def test_padding_to_capacity() -> None:
    dispatcher = make_dispatcher(moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True)
    capacity, num_tokens = 4, 10  # ceil(10 * 2 / 8 * 1.5)
    routing_map, probs = routing(num_tokens)
    probs = probs * routing_map
    routing_map[:, 1] = probs[:, 1] = 0  # an expert that nobody chooses
    chosen = probs.topk(capacity, dim=0).indices
    capacity_map = torch.zeros_like(routing_map).scatter(0, chosen, True)
    x = tokens(num_tokens)
    y, rows, counts, _ = drive(dispatcher, x, capacity_map, probs * capacity_map)
    assert capacity_map.sum(1).max() > TOPK
    assert counts.tolist() == [2 * capacity] * LOCAL and len(rows) == 2 * capacity * LOCAL
    if dist.get_rank() == 0:
        blocks = rows.view(LOCAL, 2 * capacity, HIDDEN)
        assert not blocks[1].any() and all(blocks[i].any() for i in (0, 2, 3))
    torch.testing.assert_close(y, wanted(x, capacity_map, probs))


@case
def test_tokens_travel_in_fp8() -> None:
    options = DispatcherOptions(fp8="blockwise", fp8_backward="blockwise")
    dispatcher = make_dispatcher(options)
    routing_map, probs = routing(10)
    x = tokens(10).requires_grad_()
    y = drive(dispatcher, x, routing_map, probs)[0]
    quantised = moe_ep.fp8.quantize(x.detach()[:, 0]).dequantize(torch.float32)[:, None]
    torch.testing.assert_close(y, wanted(quantised, routing_map, probs))
    assert not torch.allclose(y, wanted(x, routing_map, probs), rtol=1e-4)
    upstream = random(*y.shape, seed=1) - 0.5
    y.backward(upstream)
    arrived = moe_ep.fp8.quantize(upstream[:, 0]).dequantize(torch.float32)[:, None]
    torch.testing.assert_close(x.grad, wanted(arrived, routing_map, probs))


@case
def test_too_many_experts_of_a_token() -> None:
    routing_map, probs = routing(10)
    routing_map[4] = True
    try:
        drive(make_dispatcher(), tokens(10), routing_map, probs)
    except InvalidInput as error:
        assert "more than moe_router_topk=2 experts" in str(error), error
    else:
        raise AssertionError("accepted")


@case
def test_more_tokens_than_the_first_time() -> None:
    dispatcher = make_dispatcher(DispatcherOptions(timeout_s=50.0))
    drive(dispatcher, tokens(4), *routing(4))
    try:
        drive(dispatcher, tokens(5), *routing(5))
    except InvalidInput as error:
        assert "install(model, max_tokens_per_rank=N)" in str(error), error
    else:
        raise AssertionError("accepted")
    roomy = make_dispatcher(DispatcherOptions(timeout_s=50.0, max_tokens_per_rank=5))
    drive(roomy, tokens(4), *routing(4))
    drive(roomy, tokens(5), *routing(5))
    assert roomy.comm.max_tokens_per_rank == 5


@case
def test_settings_that_cannot_be_honoured() -> None:
    assert_refused("--moe-router-dtype fp32", moe_router_dtype="fp64")
    assert_refused("install(model, max_tokens_per_rank=N)", variable_seq_lengths=True)
    assert_refused(
        "moe_pad_expert_input_to_capacity",
        variable_seq_lengths=True,
        moe_expert_capacity_factor=1.0,
        moe_pad_expert_input_to_capacity=True,
        options=DispatcherOptions(max_tokens_per_rank=10),
    )
    assert_refused(
        "moe_expert_rank_capacity_factor",
        moe_flex_dispatcher_backend="hybridep",
        use_transformer_engine_op_fuser=True,
        moe_expert_rank_capacity_factor=1.5,
    )
    layer = make_layer(layer_config())
    layer.config.recompute_granularity, layer.config.recompute_modules = "selective", ["layernorm"]
    layer.config.cuda_graph_impl = "transformer_engine"
    layer.config.cuda_graph_modules = [module_named("moe_router"), module_named("moe_preprocess")]
    before = layer.token_dispatcher
    try:
        install(layer)
    except InvalidInput as error:
        assert "'layernorm'" in str(error) and "moe_preprocess" in str(error)
    else:
        raise AssertionError("accepted")
    assert layer.token_dispatcher is before and layer.config.moe_token_dispatcher_type == "alltoall"


def module_named(name: str) -> Any:
    from megatron.core.transformer.enums import CudaGraphModule

    return CudaGraphModule[name]


@case
def test_streaming_multiprocessors_come_from_the_config() -> None:
    assert make_dispatcher(moe_flex_dispatcher_num_sms=24).options.num_sms == 24
    assert make_dispatcher(DispatcherOptions(num_sms=8), moe_flex_dispatcher_num_sms=24).options.num_sms == 8
    dispatcher = make_dispatcher(moe_flex_dispatcher_num_sms=24)
    drive(dispatcher, tokens(4), *routing(4))
    assert dispatcher.comm.num_sms == 24


@case
def test_a_graph_of_the_preprocess_step_carries_all_it_must() -> None:
    """What Megatron takes out of a captured graph and puts back after a replay is enough to go on."""
    layer = install(make_layer(layer_config()))
    dispatcher = layer.token_dispatcher
    x, (routing_map, probs) = tokens(6), routing(6)
    h, p = dispatcher.dispatch_preprocess(x, routing_map, probs)
    signal = MoECudaGraphPartialCaptureSignal(layer, "preprocess", hidden_states=h, probs=p)
    h, p, *attributes = signal.get_early_return_outputs(x, None)
    dispatcher.dispatch_preprocess(tokens(6) + 1, *routing(6, seed=99))  # another micro-batch
    for name, value in zip(dispatcher.valid_cudagraph_attrs, attributes, strict=True):
        setattr(dispatcher, name, value)
    h, p = dispatcher.token_dispatch(h, p)
    rows, _, row_probs = dispatcher.dispatch_postprocess(h, p)
    y = dispatcher.combine_postprocess(dispatcher.token_combine(rows * row_probs[:, None]))
    torch.testing.assert_close(y, wanted(x, routing_map, probs))


@case
def test_recompute_exchanges_no_routing() -> None:
    """Also with two micro-batches between forward and backward, which end in the other order."""
    inputs = [layer_input(seed) for seed in (1, 50)]
    expected = [run_layer(make_layer(layer_config()), x)["input"] for x in inputs]
    config = layer_config(recompute_granularity="selective", recompute_modules=["moe"])
    layer = install(make_layer(config))
    exchanges = []
    original = moe_ep.ops.plan
    moe_ep.ops.plan = lambda *args: exchanges.append(args) or original(*args)
    try:
        xs = [x.clone().requires_grad_() for x in inputs]
        ys = [layer(x)[0] for x in xs]
        for y in reversed(ys):
            (y * layer_upstream(y)).sum().backward()
        layer.eval()
        with torch.no_grad():
            layer(inputs[0])
        layer(inputs[0].requires_grad_())
    finally:
        moe_ep.ops.plan = original
    assert len(exchanges) == 4  # two first forwards, and the two that are not recomputed
    for x, gradient in zip(xs, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    entries = layer.train().token_dispatcher._recompute._entries
    assert not entries
    with torch.no_grad():
        x = layer_input(seed=9)
        layer(x)
    assert len(entries) == 1
    del x  # no backward will come
    assert not entries


@case
def test_layers_share_a_communicator() -> None:
    from megatron_model_cases import deepseek_v3_config, dispatchers, text

    model = install([make_gpt(deepseek_v3_config()), torch.nn.Linear(2, 2)])[0]
    arguments, keywords = gpt_arguments(text(seed=1))
    model(*arguments, **keywords)
    comms = {id(dispatcher.comm) for dispatcher in dispatchers(model)}
    assert len(comms) == 1 and dispatchers(model)[0].comm.max_tokens_per_rank == 32
    assert model.config.moe_token_dispatcher_type == "flex"


@case
def test_specs_of_every_form() -> None:
    stock = get_moe_module_spec(use_te=False, num_experts=EXPERTS)
    options = {"timeout_s": 7.0}
    ours = use_in_spec(stock, **options)
    assert stock.func is MoELayer and ours.func is MoeEpLayer
    assert ours.keywords["options"] == DispatcherOptions(timeout_s=7.0)
    module = ModuleSpec(module=MoELayer, params={"layer_number": 3}, submodules=stock.keywords["submodules"])
    inner = use_in_spec(
        ModuleSpec(module=torch.nn.Linear, submodules=[module, stock, torch.nn.ReLU]), **options
    )
    assert inner.submodules[0].module is MoeEpLayer and inner.submodules[0].params["layer_number"] == 3
    assert inner.submodules[1].func is MoeEpLayer and inner.submodules[2] is torch.nn.ReLU
    outer = functools.partial(torch.nn.Sequential, mlp=MoELayer)
    assert use_in_spec(outer).keywords["mlp"].func is MoeEpLayer
    without = ModuleSpec(module=torch.nn.Linear, submodules=[torch.nn.ReLU])
    assert use_in_spec(without) is without and use_in_spec(None) is None
    layer = inner.submodules[0].module(
        layer_config(), submodules=module.submodules, **inner.submodules[0].params
    )
    assert layer.layer_number == 3 and layer.token_dispatcher.options.timeout_s == 7.0
