"""As in tests/gpu: what kernels of virtual ranks need has to be set before any test module asks for a GPU."""

from gpu.conftest import working_cuda

__all__ = ["working_cuda"]
