"""Root-mean-square normalisation: torch's own, under the name the rest of the package uses."""

from torch.nn import RMSNorm

__all__ = ["RMSNorm"]
