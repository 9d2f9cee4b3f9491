"""ParallelGroups: which ranks share experts, and which hold copies of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_ep.errors import InvalidInput


@dataclass(frozen=True)
class ParallelGroups:
    """All ranks as a grid ``(expert_dp, ep)``: a row shares one set of experts, a column holds copies of the
    same ones.

    Example, 4 ranks with ``ep_size=2``: expert-parallel groups {0, 1} and {2, 3}; ranks {0, 2} hold the first
    half of all experts, {1, 3} the second. Every rank has the dense parameters and data of its own.

    ``mesh`` is the grid as torch's DeviceMesh with dims ``("expert_dp", "ep")``; None for one process without
    torch.distributed.
    """

    rank: int
    world_size: int
    ep_size: int
    mesh: DeviceMesh | None

    @classmethod
    def create(cls, ep_size: int, *, device_type: str | None = None) -> ParallelGroups:
        """Splits the ranks of torch.distributed's default group (one rank if it is not initialised);
        collective.

        ``device_type``: of the tensors to be reduced, "cuda" or "cpu"; by default that of the default group's
        backend. Raises InvalidInput if ``ep_size`` does not divide the number of ranks.
        """
        initialised = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if initialised else 1
        if not 1 <= ep_size <= world_size or world_size % ep_size:
            raise InvalidInput(f"ep_size must divide the number of ranks ({world_size}); got {ep_size}")
        if not initialised:
            return cls(rank=0, world_size=1, ep_size=1, mesh=None)
        if device_type is None:
            device_type = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
        mesh = init_device_mesh(
            device_type, (world_size // ep_size, ep_size), mesh_dim_names=("expert_dp", "ep")
        )
        return cls(dist.get_rank(), world_size, ep_size, mesh)

    @property
    def ep_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.rank % self.ep_size

    @property
    def expert_dp_size(self) -> int:
        """How many ranks hold each expert."""
        return self.world_size // self.ep_size

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """The ranks among which this rank's tokens travel."""
        return self.mesh.get_group("ep") if self.mesh else None

    @property
    def expert_dp_group(self) -> dist.ProcessGroup | None:
        """The ranks with the same experts as this one."""
        return self.mesh.get_group("expert_dp") if self.mesh else None
