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
