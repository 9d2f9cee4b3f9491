"""TokenDispatcher: dispatch and combine with the settings of a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import moe_ep

from .config import ModelConfig


class TokenDispatcher(nn.Module):
    """Moves tokens to the ranks of their experts and results back; no parameters.

    ``layout``, ``expert_alignment``, ``fp8``, ``fp8_backward`` and ``max_recv_rows`` come from ``config``.
    ``num_sms`` of a call counts for its backward, too. One communicator may serve any number of dispatchers.
    """

    def __init__(self, config: ModelConfig, comm: moe_ep.Communicator) -> None:
        super().__init__()
        expected = {"hidden": config.hidden, "num_experts": config.num_experts, "num_topk": config.num_topk}
        for name, value in expected.items():
            if getattr(comm, name) != value:
                raise moe_ep.errors.InvalidInput(
                    f"comm has {name}={getattr(comm, name)}, the config has {value}; they must agree"
                )
        self.config = config
        self.comm = comm

    def dispatch(
        self,
        x_TH: torch.Tensor,
        topk_idx_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        *,
        num_sms: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> moe_ep.DispatchOutput:
        """``x_TH [T, H]``, ``topk_idx_TK [T, K]`` (-1: none), ``topk_weights_TK [T, K]`` -> see
        ``moe_ep.dispatch``.
        """
        tensors = x_TH.contiguous(), topk_idx_TK.contiguous(), topk_weights_TK.contiguous()
        options = {"num_sms": num_sms, "meanwhile": meanwhile, **self._dispatch_options}
        return moe_ep.dispatch(*tensors, self.comm, **options)

    def dispatch_async(
        self,
        x_TH: torch.Tensor,
        topk_idx_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        *,
        num_sms: int | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[moe_ep.DispatchOutput, moe_ep.Event]:
        """``dispatch`` on the communicator's stream; use the output after ``event.wait()``."""
        tensors = x_TH.contiguous(), topk_idx_TK.contiguous(), topk_weights_TK.contiguous()
        options = {"num_sms": num_sms, "meanwhile": meanwhile, **self._dispatch_options}
        return moe_ep.dispatch_async(*tensors, self.comm, **options)

    def combine(
        self, rows_NH: torch.Tensor, handle: moe_ep.DispatchHandle, *, num_sms: int | None = None
    ) -> torch.Tensor:
        """``rows_NH [N, H]``, one for each dispatched row -> ``[T, H]``, the sum for each token."""
        options = {"fp8_backward": self.config.fp8_backward, "num_sms": num_sms}
        return moe_ep.combine(rows_NH.contiguous(), handle, **options)

    def combine_async(
        self, rows_NH: torch.Tensor, handle: moe_ep.DispatchHandle, *, num_sms: int | None = None
    ) -> tuple[torch.Tensor, moe_ep.Event]:
        """``combine`` on the communicator's stream; use the result after ``event.wait()``."""
        options = {"fp8_backward": self.config.fp8_backward, "num_sms": num_sms}
        return moe_ep.combine_async(rows_NH.contiguous(), handle, **options)

    @property
    def _dispatch_options(self) -> dict[str, Any]:
        c = self.config
        alignment, max_recv_rows = c.expert_alignment, c.max_recv_rows
        if c.layout == "rank":  # where a row stands for one or more of the experts'
            alignment = 1
            if max_recv_rows is not None:
                max_recv_rows = min(max_recv_rows, self.comm.size * self.comm.max_tokens_per_rank)
        return {
            "layout": c.layout,
            "expert_alignment": alignment,
            "fp8": c.fp8,
            "max_recv_rows": max_recv_rows,
        }
