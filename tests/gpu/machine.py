"""What tests need of the machine, and the skips with their reasons."""

import pytest
import torch

from moe_ep import Communicator
from moe_ep.backends.virtual import VirtualGroup

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def groups_of_processes(*, on_one_gpu: tuple[int, ...] = (), on_gpus: tuple[int, ...] = ()) -> list:
    """Parameters ``(world_size, one_gpu)``: ranks that share a GPU, and ranks with a GPU each."""
    params = [pytest.param(size, True, id=f"{size}-on-one-gpu") for size in on_one_gpu]
    for size in on_gpus:
        num_gpus = torch.cuda.device_count()
        enough = pytest.mark.skipif(num_gpus < size, reason=f"needs {size} GPUs, there are {num_gpus}")
        params.append(pytest.param(size, False, marks=enough, id=f"{size}-gpus"))
    return params


def group_of(comm: Communicator) -> VirtualGroup:
    """The virtual group that run_ranks made this communicator on, for another communicator."""
    return comm._impl.members.group
