"""The collective backend over NCCL: the cases of every backend, bit for bit against the oracle."""

from pathlib import Path

import pytest
import torch
from cases import standard_cases
from exercise import assert_case, run_case

import moe_ep
from moe_ep import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_oracle(world_size, tmp_path):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
    launch.spawn(run_cases, world_size, world_size, str(tmp_path), timeout_s=280)
    results_by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for case in standard_cases((world_size,)):
        assert_case(case, [results[str(case)] for results in results_by_rank])


@pytest.mark.parametrize("fp8", [None, "blockwise"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_asynchronous_calls_give_the_same_bits(world_size, fp8):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
    launch.spawn(run_asynchronously, world_size, fp8, timeout_s=120)


def run_asynchronously(fp8: str | None) -> None:
    """Many calls whose inputs die at once; a second stream waits for the same events."""
    rank, _ = launch.init_process_group("cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(rank)
    sizes = {"hidden": 1024, "max_tokens_per_rank": 512, "num_experts": 8, "num_topk": 2}
    with moe_ep.Communicator(**sizes) as comm:
        for _ in range(20):
            x = torch.randn(512, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
            topk_idx = torch.rand(512, 8, device=device).topk(2, dim=1).indices
            weights = torch.rand(512, 2, device=device)
            wanted = moe_ep.dispatch(x, topk_idx, weights, comm, fp8=fp8)
            wanted_rows = rows_of(wanted.tokens).detach()
            wanted_y = moe_ep.combine(wanted_rows, wanted.handle)
            (wanted_grad,) = torch.autograd.grad(
                moe_ep.combine(rows_of(wanted.tokens), wanted.handle).sum(), x
            )

            out, event = moe_ep.dispatch_async(x.clone(), topk_idx.clone(), weights.clone(), comm, fp8=fp8)
            event.wait()
            y, combined = moe_ep.combine_async(rows_of(out.tokens), out.handle)
            other = torch.cuda.Stream()
            with torch.cuda.stream(other):
                combined.wait()
                copy = y.detach().clone()
            combined.wait()
            torch.cuda.current_stream().wait_stream(other)
            assert torch.equal(rows_of(out.tokens), wanted_rows)
            assert torch.equal(y, wanted_y) and torch.equal(copy, wanted_y)
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(grad, wanted_grad)
    torch.distributed.destroy_process_group()


def rows_of(tokens: torch.Tensor | moe_ep.Fp8Tokens) -> torch.Tensor:
    return tokens.dequantize() if isinstance(tokens, moe_ep.Fp8Tokens) else tokens


def run_cases(world_size: int, directory: str) -> None:
    """Every case on this rank's GPU; the results go to a file."""
    rank, _ = launch.init_process_group("cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    results = {}
    for case in standard_cases((world_size,)):
        with moe_ep.Communicator(backend="collective", **case.communicator_arguments) as comm:
            results[str(case)] = run_case(case, comm, device)
    torch.save(results, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
