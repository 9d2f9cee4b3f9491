"""What a process has to set before its first CUDA call, and an end to the run when CUDA has broken down in it."""

import os

import pytest
import torch

# The kernels of virtual ranks wait for each other, so each must be able to start while others run. A kernel's first
# launch waits for running ones unless all are loaded beforehand; streams that share one of the 8 hardware queues
# that are the default run in turns.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@pytest.fixture(autouse=True)
def working_cuda(request):
    """After an error such as an illegal address every later call in this process fails: say whose it was and stop."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"CUDA is broken after {request.node.nodeid}: {error}", returncode=3)
