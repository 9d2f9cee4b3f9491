"""NCCL communicators, of which moe_ep has none of its own."""

from __future__ import annotations

from typing import Any, NoReturn


def get_nccl_comm_handle(group: Any, force_new_comm: bool = False) -> NoReturn:
    raise NotImplementedError(
        "there is no NCCL communicator to hand out: moe_ep's kernels use symmetric memory, its other backends the "
        "torch.distributed group itself"
    )


def destroy_all_managed_nccl_comm() -> None:
    """Nothing: there are none."""
