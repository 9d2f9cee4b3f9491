"""deep_ep's V1: `Buffer`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from ...backends.virtual import VirtualGroup
from ...errors import BackendUnavailable, InvalidInput
from . import config as configs
from .config import Config
from .layout import Layout, dispatch_layout
from .low_latency import LowLatencyMode
from .normal import Handle, NormalMode, Tokens, check_dispatch, check_tokens, tokens_of
from .streams import CommStream
from .transport import Communicators
from .utils.event import EventHandle, EventOverlap

_log = logging.getLogger("moe_ep")

TokensPerExpert = list[int]


class Buffer:
    """Dispatch and combine of deep_ep V1: many tokens (`dispatch`, `combine`) and few (`low_latency_*`).

    Making one is collective, and so are its calls but for `get_dispatch_layout` and the static methods.

    Args:
        group: a torch.distributed ProcessGroup (or a `moe_ep.backends.virtual.VirtualGroup`).
        num_nvl_bytes, num_rdma_bytes: sizes for deep_ep; kept as attributes. Memory is taken as calls need it.
        low_latency_mode, explicitly_destroy: as in deep_ep; `destroy` needs the latter.
        enable_shrink: the low-latency calls go on without ranks that are masked or don't answer.
        comm: an mpi4py communicator of the ranks of torch.distributed's default group, used if ``group`` is None.
        max_tokens_per_rank: not in deep_ep: the most tokens that any rank will ever dispatch at once. With it the
            ranks need not agree on it in calls without host synchronisation.
        timeout_s: not in deep_ep: seconds after which a rank that does not answer is given up.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted, and of no effect.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup | VirtualGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object | None = None,
        *,
        use_fabric: bool = False,
        max_tokens_per_rank: int | None = None,
        timeout_s: float = 100.0,
    ) -> None:
        if group is None:
            group = _default_group_of(comm)
        if max_tokens_per_rank is not None and max_tokens_per_rank < 1:
            raise InvalidInput(f"max_tokens_per_rank is {max_tokens_per_rank}; it must be None or at least 1")
        _log.debug(
            "deep_ep.Buffer: without effect are num_qps_per_rank=%s, allow_nvlink_for_low_latency_mode=%s, "
            "allow_mnnvl=%s, use_fabric=%s",
            num_qps_per_rank,
            allow_nvlink_for_low_latency_mode,
            allow_mnnvl,
            use_fabric,
        )
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._stream = CommStream()
        self._communicators = Communicators(group, timeout_s)
        self.rank, self.group_size = self._communicators.rank, self._communicators.size
        self._normal = NormalMode(self._communicators, max_tokens_per_rank)
        self._low_latency = LowLatencyMode(self._communicators, enable_shrink, timeout_s)
        self.runtime: Runtime | None = Runtime(self.rank, self.group_size)
        self._communicators.barrier()

    def destroy(self) -> None:
        """Free all memory. Collective; needs ``explicitly_destroy``. Handles become useless."""
        if not self.explicitly_destroy:
            raise InvalidInput("destroy() is for a Buffer made with explicitly_destroy=True")
        if self.runtime is not None:
            self.runtime = None
            self._low_latency.close()
            self._communicators.close()

    def __del__(self) -> None:
        # Nothing collective here: the memory is freed with the communicators.
        if getattr(self, "runtime", None) is not None and self.explicitly_destroy:
            warnings.warn(
                "a deep_ep.Buffer with explicitly_destroy=True was dropped without destroy()", ResourceWarning
            )

    # --- static ---

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether programs may use FP8: always, since moe_ep has it on every machine."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Multiprocessors of the configurations made from now on; an even number."""
        if new_num_sms % 2:
            raise InvalidInput(f"new_num_sms is {new_num_sms}; it must be even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """deep_ep's recommended configuration."""
        return configs.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """deep_ep's recommended configuration."""
        return configs.combine_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that deep_ep's low-latency mode needs; moe_ep needs a fraction, and takes it at the first call."""
        return configs.low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream of asynchronous calls."""
        return self._stream.get()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        raise NotImplementedError(
            "moe_ep's communication windows belong to its kernels, so that there is no raw buffer to look at; for "
            "combine without a copy use get_next_low_latency_combine_buffer"
        )

    # --- many tokens ---

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """How many tokens go where, by ``topk_idx [T, K]`` (-1 for none). Local.

        Returns int32 ``num_tokens_per_rank [R]``, ``num_tokens_per_rdma_rank [R / 8]`` (None for up to 8 ranks),
        ``num_tokens_per_expert [E]``, bool ``is_token_in_rank [T, R]``, and an event.
        """
        self._check_open()
        if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
            raise InvalidInput(
                f"topk_idx is {topk_idx.dtype} of shape {tuple(topk_idx.shape)}; it must be {configs.topk_idx_t} [T, K]"
            )
        if num_experts < 1 or num_experts % self.group_size:
            raise InvalidInput(
                f"num_experts is {num_experts}; it must be a multiple of {self.group_size}, the ranks"
            )
        layout, event = self._stream.run(
            lambda: dispatch_layout(topk_idx, num_experts, self.group_size),
            topk_idx.device,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            inputs=[topk_idx],
        )
        return *layout, event

    def dispatch(
        self,
        x: Tokens,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Tokens, torch.Tensor | None, torch.Tensor | None, TokensPerExpert | None, Handle | None, EventOverlap
    ]:
        """Send tokens to the ranks that `get_dispatch_layout` says, or again as an earlier call did.

        Args:
            x: ``[T, H]``, or float8_e4m3fn ``[T, H]`` and its scales ``[T, S]``, float32 or int32 with any strides.
                A row must have a multiple of 16 bytes.
            handle: of an earlier dispatch; then everything up to ``topk_weights`` is None.
            topk_idx, topk_weights: ``[T, K]``, `topk_idx_t` and float32; both or neither.
            expert_alignment: the numbers of tokens by expert are rounded up to a multiple of this. Rows are not padded.
            num_worst_tokens: if not 0, the result has this many rows, and the host does not wait.
            config: its ``num_sms`` is what counts; None: `get_dispatch_config`'s.

        Returns: ``recv_x [n, H]`` (with scales ``[n, S]``), by source rank and source token; ``recv_topk_idx [n, K]``
        with ids of this rank's experts, -1 elsewhere; ``recv_topk_weights [n, K]``, 0 elsewhere; tokens of each local
        expert, as a list; the handle; an event. With ``handle`` all between the rows and the event is None.
        """
        self._check_open()
        num_sms = Buffer.num_sms if config is None else config.num_sms
        options = dict(
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        inputs = [*(x if isinstance(x, tuple) else (x,)), topk_idx, topk_weights]
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InvalidInput(
                    "topk_idx and topk_weights are given with a handle, which has its routing already"
                )
            check_tokens(x)
            rows, event = self._stream.run(
                lambda: self._normal.repeat(x, handle, num_sms),
                tokens_of(x).device,
                inputs=[*inputs, handle],
                **options,
            )
            return rows, None, None, None, None, event
        if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
            raise InvalidInput(
                "num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert are needed without a handle: "
                "call get_dispatch_layout"
            )
        if expert_alignment < 1 or num_worst_tokens < 0:
            raise InvalidInput(
                f"expert_alignment is {expert_alignment}, which must be at least 1, and num_worst_tokens "
                f"{num_worst_tokens}, which must be at least 0"
            )
        if num_worst_tokens and topk_idx is None:
            raise InvalidInput("num_worst_tokens needs topk_idx: its -1 tell which rows hold no token")
        sent = Layout(num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank)
        check_dispatch(x, sent, topk_idx, topk_weights, self.group_size)
        received, event = self._stream.run(
            lambda: self._normal.dispatch(
                x, sent, topk_idx, topk_weights, expert_alignment, num_worst_tokens, num_sms
            ),
            tokens_of(x).device,
            inputs=[*inputs, *sent],
            **options,
        )
        return *received, event

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows ``x [n, H]`` back and add up each token's, unweighted.

        Sums are taken in float32, the biases first, then ranks in ascending order, and rounded once. A token that went
        nowhere gets the bias, or 0. ``topk_weights [n, K]`` are added up over ranks as they are.

        Returns: ``[T, H]``; ``[T, K]`` or None; an event.
        """
        self._check_open()
        num_sms = Buffer.num_sms if config is None else config.num_sms
        biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
        if len(biases) > 2:
            raise InvalidInput(f"bias has {len(biases)} tensors; it can have up to 2")
        sums, event = self._stream.run(
            lambda: self._normal.combine(x, handle, topk_weights, biases, num_sms),
            x.device,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            inputs=[x, topk_weights, *biases, handle],
        )
        return *sums, event

    def internode_dispatch(self, *args, **kwargs):
        """`dispatch`, which knows by itself how ranks are connected."""
        return self.dispatch(*args, **kwargs)

    def internode_combine(self, *args, **kwargs):
        """`combine`, which knows by itself how ranks are connected."""
        return self.combine(*args, **kwargs)

    # --- few tokens ---

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing: normal and low-latency calls share no memory that would have to be cleaned."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tokens, torch.Tensor, tuple, EventOverlap, Callable[[], None] | None]:
        """Send few tokens to their experts in results of fixed shapes; the host does not wait.

        Args:
            x: bfloat16 ``[N, H]``. topk_idx: ``[N, K]``, -1 for none.
            num_max_dispatch_tokens_per_rank: T, at least the N of every rank, and equal on all.
            cumulative_local_expert_recv_stats: int32 ``[L]``; the tokens of each local expert are added to it.
            dispatch_wait_recv_cost_stats: not there (NotImplementedError).
            use_fp8: quantise, by blocks of 128 channels: scale = amax / 448; round_scale: up to a power of two;
                use_ue8m0: give the scales as exponents, four to an int32.
            return_recv_hook: the results are there behind a call of the returned function. Not with async_finish.

        Returns: rows ``[L, R * T, H]`` of each local expert, with use_fp8 as a pair with scales
        ``[L, R * T, H / 128]`` (exponents: ``[L, R * T, H / 512]``), column-major in the last two dimensions; their
        numbers int32 ``[L]``; a handle; an event; the hook or None. Rows are by source rank and source token;
        those past the number are undefined.
        """
        self._check_open()
        return self._low_latency.dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            self._stream,
            stats=cumulative_local_expert_recv_stats,
            wait_stats=dispatch_wait_recv_cost_stats,
            fp8=_fp8_mode(use_fp8, round_scale, use_ue8m0),
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Bring the experts' rows ``x [L, R * T, H]`` (bfloat16) back and add up each token's, weighted.

        A rank adds up a token's rows in float32 by ascending k and sends one row, rounded to bfloat16; the token's
        owner adds these in float32 by ascending rank and rounds once.

        Args:
            topk_idx, topk_weights: ``[N, K]``: those of the dispatch, and float32 weights. An id of -1 leaves its row
                out.
            use_logfmt: not there (NotImplementedError). combine_wait_recv_cost_stats: neither.
            zero_copy: the rows lie in `get_next_low_latency_combine_buffer` already, and ``x`` is not read.
            out: ``[N, H]`` to write to, and what is returned.

        Returns: bfloat16 ``[N, H]``, an event, and the hook or None.
        """
        self._check_open()
        if use_logfmt:
            raise NotImplementedError(
                "use_logfmt, deep_ep's 10-bit format, is not there: combine travels as bfloat16, one row for each rank "
                "instead of each expert"
            )
        return self._low_latency.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            self._stream,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            wait_stats=combine_wait_recv_cost_stats,
        )

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> torch.Tensor:
        """bfloat16 ``[L, R * T, H]`` for the rows of the next `low_latency_combine` with ``zero_copy``."""
        self._check_open()
        return self._low_latency.next_combine_buffer(handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency calls from now on, or take it back. All ranks that go on say the same."""
        self._low_latency.update_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, else 0, to int32 ``mask_status [R]``."""
        self._low_latency.query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks back."""
        self._low_latency.clean_mask()

    def _check_open(self) -> None:
        if self.runtime is None:
            raise InvalidInput("this Buffer is destroyed; make a new one")


class Runtime:
    """What programs ask deep_ep's C++ object for."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks

    def is_available(self) -> bool:
        return True

    def get_num_rdma_ranks(self) -> int:
        return max(1, -(-self._num_ranks // configs.NVL_PEERS))

    def get_rdma_rank(self) -> int:
        return self._rank // configs.NVL_PEERS

    def get_local_device_id(self) -> int:
        """-1 without a GPU."""
        return torch.cuda.current_device() if torch.cuda.is_available() else -1


def _fp8_mode(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str | None:
    if use_ue8m0 and not round_scale:
        raise InvalidInput(
            "use_ue8m0 is set without round_scale; exponents need scales that are powers of two"
        )
    return None if not use_fp8 else "ue8m0" if use_ue8m0 else "rounded" if round_scale else "exact"


def _default_group_of(comm: object | None) -> dist.ProcessGroup:
    """torch.distributed's default group, of which ``comm`` (mpi4py's) must have the ranks."""
    if comm is None:
        raise ValueError("group is None, and so is comm; give one of them")
    mine = comm.Get_rank(), comm.Get_size()
    if not dist.is_initialized():
        raise BackendUnavailable(
            "comm is given without group; moe_ep moves tokens over torch.distributed: call init_process_group first"
        )
    if mine != (dist.get_rank(), dist.get_world_size()):
        raise InvalidInput(
            f"comm has this process as rank {mine[0]} of {mine[1]}, torch.distributed's default group as rank "
            f"{dist.get_rank()} of {dist.get_world_size()}; give the matching ProcessGroup as group"
        )
    return dist.group.WORLD
