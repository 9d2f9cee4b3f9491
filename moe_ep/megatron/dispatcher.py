"""Megatron's token dispatcher, kept by moe_ep.

MoELayer calls, for every micro-batch: `dispatch_preprocess`, `token_dispatch`, `dispatch_postprocess`, its experts,
`combine_preprocess`, `token_combine`, `combine_postprocess`. Under 1F1B overlap these belong to different nodes of a
schedule: each with its own stream, its inputs detached, and the next micro-batch's forward between a forward and its
backward. Hence:

- computation uses the tensors that a method is given, never differentiable ones kept from another;
- what backward needs is in the autograd graph (a handle), and no activation is saved;
- everything runs on the current stream, and the host waits once: for the counts, in the forward dispatch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

import moe_ep
from moe_ep.layers.fp8_quantize import COLUMN_ALIGNMENT

from ..errors import InvalidInput
from .communicators import shared_communicator
from .options import DispatcherOptions, check_config
from .recompute import RecomputeCache
from .routing import TOO_MANY, block_order, fold_tensor_parallel, topk_indices


class MoeEpTokenDispatcher(MoETokenDispatcher):
    """Dispatch and combine of one MoELayer.

    Args:
        num_local_experts, local_expert_indices, config, pg_collection: as for Megatron's own dispatchers;
            ``pg_collection`` has ``ep``, ``expt_tp`` and ``tp_ep``.
        options: see DispatcherOptions; None for its defaults.

    The experts get one row for each (token, local expert), grouped by expert and inside an expert by (source rank,
    token): tokens ``[R, H]``, int64 rows of each expert ``[L]`` on the CPU, and probabilities ``[R]``.

    Raises InvalidInput for a setting of the config that it can't honour.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        options: DispatcherOptions | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if self.tp_ep_group is None:
            raise InvalidInput("pg_collection.tp_ep is None; it must be the group of expert-parallel ranks")
        options = options or DispatcherOptions()
        check_config(config, options)
        if options.num_sms is None:
            options = replace(options, num_sms=config.moe_flex_dispatcher_num_sms)
        self.options = options
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_topk = config.moe_router_topk
        self.comm: moe_ep.Communicator | None = None  # made, or found, by the first dispatch

        # Of the micro-batch between its dispatch_preprocess and its combine_postprocess.
        self.hidden_shape: torch.Size | None = None
        self.topk_idx: torch.Tensor | None = None
        self.tokens_per_expert: torch.Tensor | None = None
        self._probs_dtype: torch.dtype | None = None
        self._capacity: int | None = None  # rows of each expert, with moe_pad_expert_input_to_capacity
        self._known_handle: moe_ep.DispatchHandle | None = None
        self._handle: moe_ep.DispatchHandle | None = None

        self.cudagraph_attrs = ["topk_idx"]
        self._comm_manager = _ScheduleInterface(self)
        self._recompute: RecomputeCache | None = None

    def remember_handles_of(self, layer: MoELayer) -> None:
        """``layer`` runs its forward again in backward: use the first one's routing there."""
        self._recompute = RecomputeCache(layer)

    # -- before the experts

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[T, H]`` (a view) and the probabilities of their experts, float32 ``[T, K]``.

        Args: ``hidden_states [S / TP, B, H]``, ``routing_map`` bool ``[T, E]``, ``probs [T, E]``.
        """
        self.hidden_shape = hidden_states.shape
        self._probs_dtype = probs.dtype
        num_tokens = routing_map.shape[0]
        self._capacity = self._rows_per_expert(num_tokens)
        if self._capacity is not None:
            # The map names experts that the router has not chosen, to fill up their capacity. Fillers have probability
            # 0 and give 0; the rows they stand for come as zeros from the alignment of `token_dispatch`.
            routing_map = routing_map & (probs != 0)

        self._known_handle = None
        if self._recompute is not None:
            self.topk_idx, self._known_handle = self._recompute.take(hidden_states)
        if self._known_handle is None:
            self.topk_idx = topk_indices(routing_map, self.num_topk)
        weights = probs.gather(1, self.topk_idx.clamp(min=0))
        if weights.dtype in (torch.bfloat16, torch.float16):
            weights = weights.float()
        if self._recompute is not None:
            self._recompute.begin(hidden_states, self.topk_idx)
        return hidden_states.reshape(num_tokens, hidden_states.shape[-1]), weights

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send tokens ``[T, H]`` with ``probs [T, K]`` to their experts' ranks: rows ``[R, H]`` and ``[R]``.

        For ``fp8_experts``, rows that arrive in FP8 stay so: the tensor stands for them (`moe_ep.fp8.carried`).
        """
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        out = self._dispatch(hidden_states.contiguous(), probs)
        self._handle = out.handle
        self.tokens_per_expert = self._counts(out)
        rows = out.tokens
        if isinstance(rows, moe_ep.Fp8Tokens):
            # Rows that are yet to be rearranged can't be stood for.
            as_they_are = self.options.fp8_experts is not None and self._capacity is None
            give = moe_ep.fp8.carry_differentiable if as_they_are else moe_ep.Fp8Tokens.dequantize
            rows = give(rows, hidden_states.dtype)
        if self._recompute is not None:
            self._recompute.remember(out.handle)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states, wait_current_stream=False)
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, out.weights.to(self._probs_dtype)

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows ``[R, H]``, rows of each expert ``[L]``, probabilities ``[R]``."""
        if hidden_states.is_cuda:
            # They were made on the stream of `token_dispatch`; the experts keep them until their backward.
            stream = torch.cuda.current_stream()
            hidden_states.record_stream(stream)
            probs.record_stream(stream)
        if self._capacity:
            order = block_order(self._handle.padded_tokens_per_expert).argsort()
            hidden_states = self._select_blocks(hidden_states, order)
            probs = self._select_blocks(probs, order)
        return hidden_states, self.tokens_per_expert, probs

    # -- after the experts

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._capacity:
            return self._select_blocks(hidden_states, block_order(self._handle.padded_tokens_per_expert))
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows ``[R, H]`` back and add them up: ``[T, H]``."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        handle, self._handle = self._handle, None
        return moe_ep.combine(hidden_states.contiguous(), handle, fp8_backward=self.options.fp8_backward)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's output ``[S / TP, B, H]``."""
        self.tokens_per_expert = None
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
            hidden_states = hidden_states + self.shared_experts.get_output()
        return hidden_states.view(self.hidden_shape)

    # -- inside

    def _dispatch(self, x: torch.Tensor, probs: torch.Tensor) -> moe_ep.DispatchOutput:
        topk_idx, self.topk_idx = self.topk_idx, None
        if topk_idx.is_cuda:  # made on another stream under 1F1B overlap, and not kept
            topk_idx.record_stream(torch.cuda.current_stream())
        folded_idx, weights = topk_idx, probs
        if self.tp_size > 1:
            folded_idx, weights = fold_tensor_parallel(topk_idx, probs, self.num_local_experts, self.tp_size)
        if self.comm is None or self.comm.closed:
            self.comm = shared_communicator(
                self.tp_ep_group,
                x,
                self.tp_size * self.config.num_moe_experts,
                folded_idx.shape[1],
                self.options,
            )
        if x.shape[0] > self.comm.max_tokens_per_rank:
            raise InvalidInput(
                f"this micro-batch has {x.shape[0]} tokens on this rank, the communicator has room for "
                f"{self.comm.max_tokens_per_rank}; give install(model, max_tokens_per_rank=N) the most there will be"
            )
        if self._known_handle is not None:
            known, self._known_handle = self._known_handle, None
            return moe_ep.dispatch(x, None, weights, self.comm, fp8=self.options.fp8, handle=known)
        sizes = {"expert_alignment": max(1, self._alignment())}
        if self._capacity is not None:
            sizes["max_recv_rows"] = self.num_local_experts * self._capacity
        try:
            return moe_ep.dispatch(x, folded_idx, weights, self.comm, fp8=self.options.fp8, **sizes)
        except InvalidInput as error:
            if (topk_idx == TOO_MANY).any():
                raise InvalidInput(
                    f"the routing map gives a token more than moe_router_topk={self.num_topk} experts; raise "
                    "--moe-router-topk to the most that the router chooses"
                ) from error
            raise

    def _alignment(self) -> int:
        """Every expert's rows are a multiple of this.

        The config declares that experts need not pad for quantised matrix products; so this dispatcher does.
        """
        if self._capacity is not None:
            return self._capacity
        return self._quantization_alignment()

    def _rows_per_expert(self, num_tokens: int) -> int | None:
        """With moe_pad_expert_input_to_capacity, the rows that every local expert gets from all ranks together."""
        config = self.config
        if not config.moe_pad_expert_input_to_capacity:
            return None
        capacity = get_capacity(
            num_tokens * config.moe_router_topk, config.num_moe_experts, config.moe_expert_capacity_factor
        )
        alignment = self._quantization_alignment()
        return -(-capacity * self.tp_size * self.ep_size // alignment) * alignment

    def _quantization_alignment(self) -> int:
        """Rows to which Megatron's experts would pad, and those that FP8 experts need; 1 for none."""
        config, alignment = self.config, 1
        if config.fp8 or config.fp4 or config.moe_router_padding_for_quantization:
            alignment = max(1, get_align_size_for_quantization(config))
        return alignment if self.options.fp8_experts is None else math.lcm(alignment, COLUMN_ALIGNMENT)

    def _counts(self, out: moe_ep.DispatchOutput) -> torch.Tensor:
        """Rows of each local expert, on the host, where Megatron's experts read them."""
        if self._capacity is not None:
            return torch.full((self.num_local_experts,), self._capacity, device="cpu")
        return torch.tensor(out.splits, device="cpu")

    def _select_blocks(self, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Rows in blocks of one expert each, in another order."""
        if self.num_local_experts == 1:
            return rows
        return (
            rows.unflatten(0, (self.num_local_experts, self._capacity)).index_select(0, order).flatten(0, 1)
        )


class _ScheduleInterface:
    """What the 1F1B schedule reads and writes on a dispatcher declared as flex.

    It writes probabilities, which the dispatcher gets as arguments, too; they are not kept.
    """

    token_probs = property(lambda self: None, lambda self, value: None)
    dispatched_probs = property(lambda self: None, lambda self, value: None)

    def __init__(self, dispatcher: MoeEpTokenDispatcher) -> None:
        self._dispatcher = dispatcher

    def get_number_of_tokens_per_expert(self) -> torch.Tensor | None:
        return self._dispatcher.tokens_per_expert
