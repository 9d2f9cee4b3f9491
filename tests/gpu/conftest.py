"""An end to the run when CUDA has broken down in this process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def working_cuda(request):
    """After an error such as an illegal address every later call in this process fails: say whose it was and stop."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"CUDA is broken after {request.node.nodeid}: {error}", returncode=3)
