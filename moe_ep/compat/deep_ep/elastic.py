"""ElasticBuffer: deep_ep's V2 interface.

Rows come in the order (source rank, token), expanded ones in (expert, source rank, token), whatever ``deterministic``
says: there is nothing to sort, and no pass over the rows after they have come. Arguments that mean nothing here are
accepted and ignored: ``num_cpu_bytes, allow_hybrid_mode, sl_idx, num_allocated_qps, num_cpu_timeout_secs, num_qps``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

from ...backends.virtual import VirtualGroup
from ...errors import InvalidInput
from . import all_gather, elastic_sizes
from .elastic_calls import Received, Shape, combine, dispatch, dispatch_again
from .elastic_checks import Event, check_again, check_beside, check_combine, check_events, check_new
from .elastic_handle import EPHandle
from .elastic_services import Services
from .streams import CommStream
from .transport import Communicators, Group, group_size, outside_autograd
from .utils.envs import get_nvlink_gbs
from .utils.event import EventHandle, EventOverlap

__all__ = ["EPHandle", "ElasticBuffer"]

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Bias = torch.Tensor | tuple[torch.Tensor | None, ...] | None

_QPS_OF_A_BUFFER = 17
_QPS_OF_A_CALL = 9

_streams: dict[int | None, CommStream] = {}
_lock = threading.Lock()
_nvlink_gbs = functools.cache(get_nvlink_gbs)  # it starts a process


class ElasticBuffer(Services):
    """Expert-parallel dispatch and combine among the ranks of ``group``.

    Its size is ``num_bytes``, or that of ``num_max_tokens_per_rank`` (T), ``hidden`` and ``num_topk``. Memory is
    allocated by the first call, which says the number of experts and makes a `moe_ep.Communicator`, as each call of a
    new shape does; that is collective, as the call is.

    ``allow_multiple_reduction=False``: combine of expanded rows adds up to K rows of a token and rounds once, instead
    of rounding the sum of each rank. ``prefer_overlap_with_compute``: asynchronous calls take few multiprocessors.
    ``num_gpu_timeout_secs``: after which a rank that does not answer is given up, with PeerTimeoutError.

    On a GPU, calls run on the current stream, with ``async_with_compute_stream`` on the communication stream, where the
    returned event tells their end. ``previous_event`` is what a call waits for; it needs ``allocate_on_comm_stream``.
    ``previous_event_before_epilogue`` is waited for before the call too: there is no epilogue.
    """

    def __init__(
        self,
        group: Group,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self._ranks = Communicators(group, num_gpu_timeout_secs)
        if num_bytes is None:
            if num_max_tokens_per_rank <= 0 or hidden <= 0:
                raise InvalidInput(
                    f"num_bytes is None, num_max_tokens_per_rank {num_max_tokens_per_rank} and hidden {hidden}; "
                    "give num_bytes, or the other two greater than 0"
                )
            num_bytes = elastic_sizes.buffer_bytes(
                self._ranks.size,
                num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
                allow_multiple_reduction,
            )
        elif num_bytes % elastic_sizes.ALIGNMENT:
            raise InvalidInput(
                f"num_bytes is {num_bytes}; it must be a multiple of {elastic_sizes.ALIGNMENT}, as "
                "get_buffer_size_hint() gives it"
            )
        self.group = self._ranks.group
        self.rank_idx = self._ranks.rank
        self.num_ranks = self._ranks.size
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps or _QPS_OF_A_BUFFER
        self.explicitly_destroy = explicitly_destroy
        self.num_scaleout_ranks = self.num_rdma_ranks = 1
        self.num_scaleup_ranks = self.num_nvlink_ranks = self.num_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self.runtime: Communicators | None = self._ranks
        self.nccl_comm_handle = None
        self._sessions = all_gather.AllGatherSessions(self._ranks)

    # --- what a buffer is ---

    @staticmethod
    def get_buffer_size_hint(
        group: Group,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """``num_bytes`` for a buffer, in steps of 2 MiB."""
        return elastic_sizes.buffer_bytes(
            group_size(group),
            num_max_tokens_per_rank,
            hidden,
            num_topk,
            use_fp8_dispatch,
            allow_multiple_reduction,
        )

    @staticmethod
    def capture() -> EventHandle:
        """What the current stream has been given so far."""
        return EventHandle()

    def destroy(self) -> None:
        """Free everything. Needs ``explicitly_destroy=True``; a second call does nothing. Not collective."""
        if not self.explicitly_destroy:
            raise InvalidInput("destroy() is for buffers made with explicitly_destroy=True")
        self._sessions.destroy()
        self._ranks.close()
        self.runtime = None

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """On the current stream, behind all that it has been given; ``with_cpu_sync``: the host waits as well."""
        self._check_alive()
        waits = with_cpu_sync and self._ranks.device.type == "cuda"
        if waits:
            torch.cuda.synchronize()
        self._ranks.barrier()
        if waits:
            torch.cuda.synchronize()

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream of asynchronous calls: one for all buffers of a process."""
        return _comm_stream(self.group).get()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(RDMA ranks, NVLink ranks): moe_ep treats the ranks of a group alike."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks)."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Multiprocessors by deep_ep's model, see `elastic_sizes.theoretical_num_sms`.

        Calls with ``num_sms=0`` ask moe_ep's model instead, or what `moe-ep tune` has measured.
        """
        return elastic_sizes.theoretical_num_sms(
            self.num_ranks,
            num_experts,
            num_topk,
            nvlink_gbs or _nvlink_gbs() or elastic_sizes.LINK_EFFICIENCY * elastic_sizes.H200_LINK_GBS,
            sm_read_gbs,
            sm_write_gbs,
            self.prefer_overlap_with_compute,
            elastic_sizes.available_sms(self._ranks.device),
        )

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs of a network card, which NVLink does without."""
        return min(num_sms, _QPS_OF_A_CALL, self.num_allocated_qps)

    # --- dispatch and combine ---

    @outside_autograd
    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event = None,
        previous_event_before_epilogue: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send every token once to each rank that has any of its experts.

        Args:
            x: ``[N, H]``, contiguous, rows of a multiple of 16 bytes; or such rows and their scales ``[N, packs]``,
                of a dtype of 4 bytes and any strides. N may differ by rank.
            topk_idx: ``[N, K]``, -1 for none; None with ``handle``. topk_weights: float32 ``[N, K]`` or None.
            cumulative_local_expert_recv_stats: int32 ``[L]``, to which the tokens of each local expert are added.
            num_max_tokens_per_rank: T, equal on all ranks; None: the constructor's.
            expert_alignment: of each expert's rows with ``do_expand``, else of the counts; None: 1, or the handle's.
            handle: of an earlier dispatch: the same routing again; rows come where they came then.
            do_handle_copy: the new handle holds a clone of ``topk_idx``, or ``topk_idx`` itself.
            do_cpu_sync: False: the host does not wait, and there are as many rows as there can be at most; those behind
                the last are zeros. None: True without ``handle``.
            do_expand: a row for each (token, local expert), by expert; else one for each token, by source rank.
            do_zero_padding: for expanded rows; the gaps between experts are zeros in any case.
            use_tma_aligned_col_major_sf: scales with strides (1, rows rounded up to 4).

        Returns: received x (and scales); local expert ids ``[n, K]``, -1 elsewhere (None if expanded); the weights of
        all of a row's experts, here or not, ``[n, K]`` (expanded: ``[rows]``), or None; the handle; the event.

        Raises InvalidInput before anything is sent, PeerTimeoutError when a rank does not answer.
        """
        self._check_alive()
        check_events(previous_event, allocate_on_comm_stream)
        x, scales = x if isinstance(x, tuple | list) else (x, None)
        stats = cumulative_local_expert_recv_stats
        max_tokens = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        shape = Shape(
            num_experts,
            max_tokens,
            room=max(max_tokens, self.num_max_tokens_per_rank),
            alignment=1 if expert_alignment is None else expert_alignment,
            expand=bool(do_expand),
            exact=do_cpu_sync is None or bool(do_cpu_sync),
            one_by_one=bool(do_expand) and not self.allow_multiple_reduction,
        )
        if handle is None:
            check_new(shape, x, topk_idx, stats, self.num_ranks)
        else:
            check_again(
                handle,
                x,
                topk_idx,
                do_cpu_sync,
                stats,
                num_experts=num_experts,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                expert_alignment=expert_alignment,
                do_expand=shape.expand,
            )
        check_beside(x, scales, topk_weights, (topk_idx if handle is None else handle.topk_idx).shape[1])
        overlapped = bool(async_with_compute_stream) and self.prefer_overlap_with_compute
        how = num_sms or None, overlapped

        by_columns = bool(use_tma_aligned_col_major_sf)

        def work() -> tuple[Received, EPHandle]:
            if handle is not None:
                return dispatch_again(self._ranks, x, scales, topk_weights, handle, by_columns, how), handle
            received, made = dispatch(
                self._ranks, x, scales, topk_idx, topk_weights, shape, bool(do_handle_copy), by_columns, how
            )
            if stats is not None:
                with torch.inference_mode(stats.is_inference()):  # such a tensor changes in that mode alone
                    stats.add_(made.routing().tokens_per_expert)
            return received, made

        (received, made), event = self._run(
            work,
            [x, scales, topk_idx, topk_weights, stats, handle],
            async_with_compute_stream,
            previous_event,
            previous_event_before_epilogue,
        )
        if handle is None:
            made.ready = event.event
        recv_x = received.rows if scales is None else (received.rows, received.scales)
        return recv_x, received.topk_idx, received.weights, made, event

    @outside_autograd
    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event = None,
        previous_event_before_epilogue: Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows back to their tokens' ranks and add them up, unweighted.

        Args:
            x: row for row what the dispatch gave ``[rows, H]``, bfloat16, float16 or float32. Gaps between experts and
                rows behind the last token are never read, and the latter may be left out.
            topk_weights: float32, ``[n, K]``, expanded ``[rows]``: each goes back to its token and k.
            bias: one or two ``[N, H]``, which the sums start from.

        Returns: sums ``[N, H]`` in x's dtype, the weights ``[N, K]``, 0 where ``topk_idx`` is -1, or None; the event.
        Expanded rows of one rank are added in float32 in ascending k and rounded; then the biases and the ranks' sums,
        in ascending order of the last k of each, in float32, and rounded once. Without multiple reduction all rows are
        added in ascending k, in float32, and rounded once.

        Raises InvalidInput before anything is sent, PeerTimeoutError when a rank does not answer.
        """
        self._check_alive()
        check_events(previous_event, allocate_on_comm_stream)
        biases = (bias,) if isinstance(bias, torch.Tensor) else bias or ()
        biases = [each for each in biases if each is not None]
        check_combine(x, topk_weights, biases, handle)
        overlapped = bool(async_with_compute_stream) and self.prefer_overlap_with_compute
        how = num_sms or handle.num_sms or None, overlapped
        (combined, weights), event = self._run(
            lambda: combine(self._ranks, x, topk_weights, biases, handle, how),
            [x, topk_weights, *biases, handle],
            async_with_compute_stream,
            previous_event,
            previous_event_before_epilogue,
        )
        return combined, weights, event

    def _run(
        self,
        work: Callable[[], tuple],
        inputs: list[object],
        is_async: bool,
        previous_event: Event,
        event_before_epilogue: Event,
    ) -> tuple[tuple, EventOverlap]:
        def call() -> tuple:
            if getattr(event_before_epilogue, "event", None) is not None:
                event_before_epilogue.current_stream_wait()
            return work()

        return _comm_stream(self.group).run(
            call,
            inputs[0].device,
            previous_event=previous_event,
            async_finish=bool(is_async),
            inputs=inputs,
        )

    def _check_alive(self) -> None:
        if self.runtime is None:
            raise InvalidInput("this buffer is destroyed; make a new one")


def _comm_stream(group: Group) -> CommStream:
    """One for all buffers of a process; virtual ranks, whose kernels wait for each other, have one each."""
    rank = group.rank if isinstance(group, VirtualGroup) else None
    with _lock:
        return _streams.setdefault(rank, CommStream())
