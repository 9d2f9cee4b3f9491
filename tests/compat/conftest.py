"""As in tests/gpu."""

from gpu.conftest import working_cuda

__all__ = ["working_cuda"]
