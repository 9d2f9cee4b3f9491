"""MoELayer: router, dispatch, experts, combine, and the shared expert."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

import moe_ep
from moe_ep.errors import ReceiveOverflowError
from moe_ep.streams import named_range

from .config import ModelConfig
from .experts import GroupedExperts
from .feed_forward import SharedExperts
from .initialise import initialise_weights
from .overlap import run_overlapped
from .rank_layout import expand_rows, order_by_expert, reduce_rows
from .router import Router
from .token_dispatcher import TokenDispatcher


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward whose routed experts are spread over the ranks of ``comm``.

    ``seed``: initialise the weights so that all ranks, and all sizes of ``comm``, agree on them (``None``: as
    torch modules usually do, from the global random state). Every rank must call forward, and backward,
    equally often; a rank may have no tokens.

    Submodules: ``router``, ``dispatcher``, ``experts`` (this rank's), ``shared`` (None if shared_ffn_hidden
    is 0).
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: moe_ep.Communicator,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.router = Router(config, **factory)
        self.dispatcher = TokenDispatcher(config, comm)
        self.experts = GroupedExperts(
            comm.num_local_experts,
            config.hidden,
            config.moe_ffn_hidden,
            first_expert=comm.rank * comm.num_local_experts,
            init_std=config.init_std,
            fp8=config.fp8_experts,
            keep_fp8_weights=config.keep_fp8_weights,
            **factory,
        )
        self.shared = (
            SharedExperts(
                config.hidden,
                config.shared_ffn_hidden,
                fp8=config.fp8_shared,
                keep_fp8_weights=config.keep_fp8_weights,
                **factory,
            )
            if config.shared_ffn_hidden
            else None
        )
        self.register_buffer(
            "_rows_lacking", torch.zeros(1, dtype=torch.int64, device=device), persistent=False
        )
        if seed is not None:
            initialise_weights(self, seed=seed, std=config.init_std)

    def forward(
        self, x: torch.Tensor, *, overlap_chunks: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x [B, S, H]`` or ``[T, H]`` (one sequence) -> the same shape, and the auxiliary loss (see
        RouterOutput).

        ``overlap_chunks``: as in the config, which None leaves it to; the same on every rank.
        """
        if overlap_chunks is None:
            overlap_chunks = self.config.overlap_chunks
        overlaps, in_fp8 = overlap_chunks != 0, self.config.fp8_experts is not None
        if in_fp8 and not overlaps:  # the GPU has that to do while the host launches the router and the plan
            self.experts.prepare_gate_up()
        routed = self.router(x)
        x_TH = x.reshape(-1, x.shape[-1])
        if overlaps:
            with self.experts.sharing_fp8_weights(overlap_chunks) if in_fp8 else nullcontext():
                y_TH = run_overlapped(
                    x_TH,
                    routed.topk_idx,
                    routed.topk_weights,
                    dispatcher=self.dispatcher,
                    run_experts=self.run_experts,
                    prepare_experts=self.experts.prepare_gate_up if in_fp8 else None,
                    shared=self.shared,
                    num_chunks=overlap_chunks,
                )
            return y_TH.view_as(x), routed.aux_loss
        shared_TH: torch.Tensor | None = None

        def meanwhile() -> None:
            nonlocal shared_TH
            if in_fp8:
                self.experts.prepare_down()
            if self.shared is not None:
                with named_range("shared expert"):
                    shared_TH = self.shared(x_TH)

        out = self.dispatcher.dispatch(x_TH, routed.topk_idx, routed.topk_weights, meanwhile=meanwhile)
        y_TH = self.dispatcher.combine(self.run_experts(out), out.handle)
        if shared_TH is not None:
            y_TH = y_TH + shared_TH
        return y_TH.view_as(x), routed.aux_loss

    def run_experts(self, out: moe_ep.DispatchOutput) -> torch.Tensor:
        """What a dispatch gave -> the rows to combine, ``[N, H]``."""
        limit = out.handle.spec.max_recv_rows
        if limit is not None:
            self._note_lack(out.handle.rows_needed, limit)
        if out.handle.layout == "expert":
            return self.experts(out.tokens, out.weights, out.padded_tokens_per_expert, out.splits)
        max_rows = self.config.max_recv_rows
        order = order_by_expert(
            out.topk_idx,
            len(out.tokens_per_expert),
            alignment=self.config.expert_alignment,
            splits=out.splits,
            max_rows=max_rows,
        )
        if max_rows is not None:
            self._note_lack(order.tokens_per_expert.sum(), max_rows)
        rows, weights_M = expand_rows(out.tokens, out.weights, order)
        return reduce_rows(self.experts(rows, weights_M, order.tokens_per_expert, order.splits), order)

    def raise_if_overflow(self) -> None:
        """Raise ReceiveOverflowError if the config's ``max_recv_rows`` was too small in a forward since the last look.

        Waits for the device.
        """
        lacking = int(self._rows_lacking)
        if lacking > 0:
            self._rows_lacking.zero_()
            limit = self.config.max_recv_rows
            raise ReceiveOverflowError(
                f"max_recv_rows={limit} was too small by {lacking} rows, which were dropped. Raise it to at least "
                f"{limit + lacking}, or leave it out for exact sizes"
            )

    @torch.no_grad()
    def _note_lack(self, needed: torch.Tensor, limit: int) -> None:
        torch.maximum(
            self._rows_lacking, needed.to(self._rows_lacking.device) - limit, out=self._rows_lacking
        )
