"""moe_ep's dispatcher against Megatron's all-to-all on GPUs, over NCCL and over NVLink, in bfloat16 and with FP8."""

import importlib.util

import pytest
import torch
from comparison import assert_as_near, assert_close, assert_equal
from megatron_on_cpu import call
from megatron_with_deep_ep import call_with_deep_ep_on_gpu
from processes import run_cuda


def missing(module: str) -> bool:
    return importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        missing("megatron.core"), reason="needs megatron-core: pip install 'moe_ep[megatron]'"
    ),
    pytest.mark.skipif(
        missing("transformer_engine"), reason="needs Transformer Engine: pip install 'moe_ep[te]'"
    ),
]
BACKENDS = ["collective", "nvlink"]
ROUNDING = 2**-6
"""Of the largest value of a tensor: sums of four bfloat16 rows, rounded at every addition or once."""


def run(world_size, path, *args):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
    return run_cuda(world_size, call, path, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_layers(world_size, backend):
    for results in run(world_size, "megatron_gpu_cases.run_layers", world_size, backend):
        for name, (stock, ours) in results.items():
            print(f"{world_size} ranks, {backend}: {name}")
            assert_equal(ours, stock, rtol=ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlap_gives_the_same_gradients(backend):
    for results in run(2, "megatron_gpu_cases.run_schedules", backend):
        for schedule in ("", ", overlap", ", overlap and delayed wgrad"):
            print(f"{backend}{schedule}")
            assert_as_near(results[f"moe_ep{schedule}"], results[f"stock{schedule}"], results["exact"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_fp8_experts_in_layers(world_size, backend):
    for results in run(world_size, "megatron_gpu_cases.run_own_experts", world_size, backend):
        for name, (stock, ours) in results.items():
            print(f"{world_size} ranks, {backend}: {name}")
            assert_close(ours, stock)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_experts_in_schedules(backend):
    for results in run(2, "megatron_gpu_cases.run_own_schedules", backend):
        in_turn = results.pop("in turn")
        for schedule, gradients in results.items():
            print(f"{backend}: {schedule}")
            assert_equal(gradients, in_turn, rtol=ROUNDING)
            experts = {gradient.dtype for name, gradient in gradients.items() if ".experts." in name}
            assert experts == {torch.float32 if schedule.startswith("fused") else torch.bfloat16}


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_flex_dispatcher_on_moe_eps_deep_ep(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there are {torch.cuda.device_count()}")
    path = "megatron_gpu_cases.run_flex"
    for results in run_cuda(2, call_with_deep_ep_on_gpu, path, (backend,)):
        for name, (stock, flex) in results.items():
            print(f"{backend}: {name}")
            assert_equal(flex, stock, rtol=ROUNDING)


def test_a_captured_dispatch_follows_its_inputs():
    for results in run(2, "megatron_gpu_cases.run_graph"):
        for got, wanted in results:
            torch.testing.assert_close(got, wanted)


def test_dispatcher():
    for rank, by_case in enumerate(run(2, "megatron_dispatcher_cases.run_all")):
        failed = {case: error for case, error in by_case.items() if error is not None}
        assert not failed, f"on rank {rank}:\n" + "\n".join(failed.values())
