"""Starting ranks as deep_ep's programs do, seeds, and what the machine can do."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist

from ....errors import InvalidInput
from ..transport import Group, group_size

_seeds = {"local": 0, "global": 0}
_local_rank: int | None = None


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple[int, int, dist.ProcessGroup]:
    """Join torch.distributed and return ``(rank, world_size, group)``.

    By deep_ep's convention WORLD_SIZE and RANK count *nodes*; MASTER_ADDR and MASTER_PORT are as usual. With a GPU for
    each local rank the group is NCCL (gloo for CPU tensors) and cuda the default device, else gloo and the CPU.
    Makes bfloat16 the default dtype and calls `init_seed`.
    """
    global _local_rank
    if not 0 <= local_rank < num_local_ranks:
        raise InvalidInput(
            f"local_rank is {local_rank}; it must be in [0, {num_local_ranks}), num_local_ranks"
        )
    nodes, node = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "8361")
    on_gpu = torch.cuda.device_count() >= num_local_ranks
    where: dict = {"backend": "gloo"}
    if on_gpu:
        torch.cuda.set_device(local_rank)
        where = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", local_rank)}
    dist.init_process_group(
        init_method=f"tcp://{address[0]}:{address[1]}",
        world_size=nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
        **where,
    )
    _local_rank = local_rank
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if on_gpu else "cpu")
    init_seed(seed)
    return dist.get_rank(), dist.get_world_size(), dist.new_group(list(range(dist.get_world_size())))


def init_seed(global_seed: int) -> None:
    """Seed torch and random, on each rank by another number: ``global_seed`` plus the rank."""
    local = global_seed + (dist.get_rank() if dist.is_initialized() else 0)
    _seeds.update({"local": local, "global": global_seed})
    torch.manual_seed(local)
    random.seed(local)


def get_local_seed() -> int:
    return _seeds["local"]


def get_global_seed() -> int:
    return _seeds["global"]


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Print, on every rank or on the first of each node; then a barrier."""
    if _local_rank is None:
        raise InvalidInput("dist_print is for programs that have called init_dist")
    if not once_in_node or _local_rank == 0:
        print(s, flush=True)
    dist.barrier()


def get_physical_domain_size(group: Group) -> tuple[int, int]:
    """(ranks by network, ranks by NVLink): moe_ep treats the ranks of a group alike, so (1, R)."""
    return 1, group_size(group)


def get_logical_domain_size(group: Group, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(scale-out, scale-up ranks): (1, R) in any mode."""
    return get_physical_domain_size(group)


def check_nvlink_connections(group: Group) -> None:
    """Nothing to check: moe_ep finds out by itself which ranks reach each other's memory, and needs none to."""


def check_torch_deterministic() -> None:
    """Nothing to refuse: calls are right with torch's deterministic mode and its filling of memory."""


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """GB/s of a GPU's NVLinks together, one direction, times ``factor``; 0 where nvidia-smi knows none."""
    command = ["nvidia-smi", "nvlink", "-s", "-i", "0"]
    try:
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return 0.0
    return factor * sum(float(rate) for rate in re.findall(r"Link \d+:\s*([\d.]+) GB/s", report))


def get_rdma_gbs(nic_name: str = "mlx5_0") -> float:
    """GB/s of a network card's first port; 0 where there is none."""
    rate = _read(f"/sys/class/infiniband/{nic_name}/ports/1/rate")  # such as "400 Gb/sec (4X NDR)"
    return float(rate.split()[0]) / 8 if rate else 0.0


def check_fast_rdma_atomic_support(nic_name: str = "mlx5_0") -> bool:
    """Whether the card is an MT4131 (ConnectX-8)."""
    return _read(f"/sys/class/infiniband/{nic_name}/hca_type") == "MT4131"


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).is_file() else ""
