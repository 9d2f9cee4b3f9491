"""HybridEPBuffer: the interface of DeepEP's hybrid-ep branch, which Megatron's ``hybridep`` backend calls.

Everything runs on the current stream. Rows come by (source rank, token), permuted ones by (expert, source rank, token).
Ranks may have any number of tokens each; a row is any multiple of 16 bytes.
"""

from __future__ import annotations

import torch

from ...backends.base import Routing
from ...errors import InvalidInput
from ...handle import DispatchHandle
from .hybrid_handles import (
    HybridEpConfigInstance,
    PermutedHandle,
    PlainHandle,
    config_of,
    padded_counts,
    permuted_handle,
    plain_handle,
)
from .hybrid_routing import TOO_MANY, Choice, Room, choose, to_experts, weigh
from .transport import (
    Communicators,
    Group,
    bring_back,
    check_numbers,
    check_rows,
    outside_autograd,
    plan,
    send,
)

__all__ = ["HybridEPBuffer", "HybridEpConfigInstance"]

_TIMEOUT_S = 100.0


class HybridEPBuffer:
    """Expert-parallel dispatch and combine among the ranks of ``group``.

    ``max_num_of_tokens_per_rank`` is a first guess and may differ by rank. Calls that may wait ask all ranks how much
    room is needed; one with ``non_blocking`` has to do with what there is, unless all ranks need more tokens or nothing
    has been called before. ``num_sms_dispatch_api`` and ``num_sms_combine_api`` are the calls'
    multiprocessors, None for moe_ep's choice. The other options are accepted and mean nothing here.
    """

    def __init__(
        self,
        group: Group,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = False,
        num_of_hybrid_ep_ranks_per_nvlink_domain: int | None = None,
        use_mnnvl: bool | None = None,
    ) -> None:
        self._ranks = Communicators(group, _TIMEOUT_S)
        self.group = self._ranks.group
        self.rank = self.local_rank = self._ranks.rank
        self.group_size = self._ranks.size
        self.node_rank, self.num_of_nodes = 0, 1
        self.num_of_hybrid_ep_ranks_per_nvlink_domain = self.group_size
        self.hidden_dim = hidden_dim
        self.num_local_experts = num_local_experts
        self.use_fp8 = use_fp8
        self.configurer = None
        self.runtime = self._ranks
        self._num_sms_dispatch = num_sms_dispatch_api
        self._num_sms_combine = num_sms_combine_api
        self._room = Room(self._ranks, max_num_of_tokens_per_rank)

    # --- rows as they are sent ---

    @outside_autograd
    def dispatch(
        self,
        hidden: torch.Tensor,
        scaling_factor: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_of_experts: int | None = None,
        probs: torch.Tensor | None = None,
        routing_map: torch.Tensor | None = None,
        num_dispatched_tokens_tensor: torch.Tensor | None = None,
        num_dispatched_tokens: int | None = None,
        handle: tuple | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, PlainHandle]:
        """Send every token once to each rank that has any of its experts.

        Args:
            hidden: ``[N, H]``; FP8 as uint8, with scaling_factor float32 ``[N, ceil(H / 128)]``.
            routing_map: bool ``[N, E]``, with probs float32 ``[N, E]`` or None. Or topk_idx ``[N, K]``, -1 for none,
                topk_weights float32 ``[N, K]`` or None, and num_of_experts.
            handle: of an earlier dispatch: the same routing again. The two numbers of dispatched tokens are not needed.

        Returns: rows ``[n, H]``; probs of all of a row's experts ``[n, E]``, or None; scales or None; the handle.
        """
        hidden = self._check_hidden(hidden, scaling_factor)
        if handle is None:
            choice, num_experts = self._choose(
                hidden, True, routing_map, probs, topk_idx, topk_weights, num_of_experts
            )
            routing = self._plan(hidden, choice, num_experts, "rank", 1, None)
            config = HybridEpConfigInstance(routing, choice.topk_idx, num_experts)
            handle = plain_handle(config, num_experts // self.group_size)
        else:
            config = config_of(handle, permuted=False)
            choice = weigh(config.topk_idx, config.num_experts, probs, topk_weights)
        beside = [part for part in (scaling_factor, choice.dense) if part is not None]
        rows, beside, _ = self._send(hidden, beside, None, config)
        scales = beside.pop(0) if scaling_factor is not None else None
        return rows, beside[0] if beside else None, scales, handle

    @outside_autograd
    def combine(
        self, hidden: torch.Tensor, probs: torch.Tensor | None = None, handle: tuple | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add up the rows ``[n, H]`` of each token, unweighted, in ascending order of the last expert of each rank.

        Returns: ``[N, H]``; of ``probs [n, E]`` those of each row's own experts, back at their tokens ``[N, E]``.
        """
        config = config_of(handle, permuted=False)
        weights = None
        if probs is not None:
            check_numbers("probs", probs, (config.routing.num_rows, config.num_experts), torch.float32)
            local = config.routing.state[Routing.ROWS]
            first = self.rank * (config.num_experts // self.group_size)
            weights = probs.gather(1, local.clamp(min=0) + first)
        return self._bring_back(hidden, weights, config)

    # --- rows by expert ---

    @outside_autograd
    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        scaling_factor: torch.Tensor | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, PermutedHandle]:
        """Send every token; a row for each (token, local expert), by expert.

        Args: as `dispatch`, and
            num_permuted_tokens: P, the rows of the result; None: as many as come, for which the host waits. What does
                not fit is dropped, and the handle's overflow_flag set. With a handle it is known already.
            pad_multiple: each expert's rows begin at a multiple of it; the gaps are zeros.
            non_blocking: the host waits for nothing; needs num_permuted_tokens.

        Returns: rows ``[P, H]``; probs ``[P]`` or None; scales or None; tokens_per_expert, int64 ``[L]``: rows of each
        expert in the result, gaps included, on the host unless the first dispatch was non_blocking; the handle.
        """
        hidden = self._check_hidden(hidden, scaling_factor)
        if handle is None:
            if non_blocking and num_permuted_tokens is None:
                raise InvalidInput(
                    "non_blocking is True and num_permuted_tokens None; give the number of rows"
                )
            if num_of_experts is None and num_of_experts_per_rank is not None:
                num_of_experts = num_of_experts_per_rank * self.group_size
            limit = None if num_permuted_tokens is None else int(num_permuted_tokens)
            alignment = pad_multiple or 1
            if limit is not None and limit % alignment:
                raise InvalidInput(
                    f"num_permuted_tokens is {limit}; it must be a multiple of pad_multiple={alignment}"
                )
            choice, num_experts = self._choose(
                hidden, not non_blocking, routing_map, probs, topk_idx, topk_weights, num_of_experts
            )
            routing = self._plan(hidden, choice, num_experts, "expert", alignment, limit)
            counts = padded_counts(routing, bool(non_blocking))
            config = HybridEpConfigInstance(routing, choice.topk_idx, num_experts, counts)
            first = self.rank * self._room.max_tokens + 1
            numbers = torch.arange(first, first + hidden.shape[0], dtype=torch.int32, device=hidden.device)
            beside = [numbers.unsqueeze(1)]
        else:
            config = config_of(handle, permuted=True)
            choice = weigh(config.topk_idx, config.num_experts, probs, topk_weights)
            beside = []
        if scaling_factor is not None:
            beside.insert(0, scaling_factor)
        rows, beside, row_probs = self._send(hidden, beside, choice.weights, config)
        scales = beside.pop(0) if scaling_factor is not None else None
        if handle is None:
            handle = permuted_handle(config, beside[0].squeeze(1), self.group_size * self._room.max_tokens)
        return rows, row_probs, scales, config.padded_tokens_per_expert, handle

    @outside_autograd
    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: torch.Tensor | None = None,
        handle: tuple | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add up the rows ``[P, H]`` of each token, unweighted; gaps are not read.

        A rank's rows of a token are added in ascending k and rounded, then ranks as `combine` has it.
        Returns: ``[N, H]``; of ``probs [P]`` each at its token and expert ``[N, E]``, 0 elsewhere.
        """
        config = config_of(handle, permuted=True)
        if probs is not None:
            check_numbers("probs", probs, (config.routing.num_rows,), torch.float32)
            probs = probs.contiguous()
        return self._bring_back(hidden, probs, config)

    # --- parts of them ---

    def _check_hidden(self, hidden: torch.Tensor, scaling_factor: torch.Tensor | None) -> torch.Tensor:
        hidden = hidden.contiguous()
        check_rows("hidden", hidden)
        if scaling_factor is not None:
            check_numbers("scaling_factor", scaling_factor, (hidden.shape[0], None), torch.float32)
        return hidden

    def _choose(
        self,
        hidden: torch.Tensor,
        may_wait: bool,
        routing_map: torch.Tensor | None,
        probs: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_experts: int | None,
    ) -> tuple[Choice, int]:
        """Who wants which experts, and E."""
        choice, num_experts = choose(
            hidden.shape[0], self._room, may_wait, routing_map, probs, topk_idx, topk_weights, num_experts
        )
        if num_experts % self.group_size:
            raise InvalidInput(
                f"there are {num_experts} experts, which {self.group_size} ranks can't share equally"
            )
        return choice, num_experts

    def _plan(
        self,
        hidden: torch.Tensor,
        choice: Choice,
        num_experts: int,
        layout: str,
        alignment: int,
        limit: int | None,
    ) -> DispatchHandle:
        comm = self._ranks.get(hidden.shape[1], self._room.max_tokens, num_experts, choice.topk_idx.shape[1])
        try:
            return plan(
                comm,
                choice.topk_idx,
                layout,
                alignment=alignment,
                max_recv_rows=limit,
                num_sms=self._num_sms_dispatch,
            )
        except InvalidInput as error:
            if not (choice.topk_idx == TOO_MANY).any():
                raise
            raise InvalidInput(
                f"a token of routing_map has more than {comm.num_topk} experts, for which there is no room; a call "
                "without non_blocking makes it"
            ) from error

    def _send(
        self,
        hidden: torch.Tensor,
        beside: list[torch.Tensor],
        weights: torch.Tensor | None,
        config: HybridEpConfigInstance,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        check_rows("hidden", hidden, config.routing.num_tokens)
        routing = self._ranks.at_width(config.routing, hidden.shape[1])
        return send(hidden, beside, weights, routing, self._num_sms_dispatch)

    def _bring_back(
        self, hidden: torch.Tensor, weights: torch.Tensor | None, config: HybridEpConfigInstance
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = hidden.contiguous()
        check_rows("hidden", hidden, config.routing.num_rows)
        routing = self._ranks.at_width(config.routing, hidden.shape[1])
        sums, topk_weights = bring_back(hidden, weights, (), routing, self._num_sms_combine)
        if topk_weights is not None:
            topk_weights = to_experts(topk_weights, config.topk_idx, config.num_experts)
        return sums, topk_weights
