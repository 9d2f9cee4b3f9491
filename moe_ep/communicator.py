"""The ranks of an expert-parallel group, and how rows move between them."""

from __future__ import annotations

import itertools
import logging
import os
import weakref

import torch
import torch.distributed as dist

from . import _extension, env, sm_model
from .backends import nvlink, nvlink_shape, windows
from .backends.base import Backend
from .backends.collective import CollectiveBackend
from .backends.virtual import VirtualBackend, VirtualGroup
from .errors import BackendUnavailable, InvalidInput
from .tuning import Config

BACKENDS = ("auto", "collective", "nvlink", "virtual")
MAX_EXPERTS = 1 << 16
MAX_TOPK = 1 << 10

_DTYPE_OF_SIZE = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}

_log = logging.getLogger("moe_ep")
_ids = itertools.count()
# NOTE: not a WeakValueDictionary, which torch.compile can't trace.
_live: dict[int, weakref.ref[Communicator]] = {}


class Communicator:
    """The ranks of one expert-parallel group. Making one is collective: every rank of the group does, alike.

    Args:
        group: a torch.distributed ProcessGroup; a `VirtualGroup`; or None: torch.distributed's default group if it is
            initialised, else this process alone.
        hidden: H, the width of a token.
        max_tokens_per_rank: the largest T of any call.
        num_experts: E, the experts of all ranks together; rank r holds experts r * E/R to (r + 1) * E/R - 1.
        num_topk: K, the columns of topk_idx.
        backend: "nvlink": GPUs that reach each other's memory; "collective": any group; "virtual": a VirtualGroup's
            threads; "auto": nvlink for CUDA tensors where it can be, else collective.
        num_sms: streaming multiprocessors for communication kernels; None: as ``config`` or `moe_ep.sm_model` says
            for each call. Backends without kernels ignore it.
        config: what `moe-ep tune` measured: a `moe_ep.tuning.Config`, or its file; None: the file that the environment
            variable MOE_EP_CONFIG names, if any.
        timeout_s: seconds after which a rank that does not answer is given up, with PeerTimeoutError.

    Attributes: ``rank``, ``size`` (R), ``num_local_experts`` (L), ``closed``, and the arguments; ``backend`` is the
    name of the one chosen.

    Raises InvalidInput for bad numbers or when ranks disagree, BackendUnavailable when a backend asked for by name
    can't run here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | VirtualGroup | None = None,
        *,
        hidden: int,
        max_tokens_per_rank: int,
        num_experts: int,
        num_topk: int,
        backend: str = "auto",
        num_sms: int | None = None,
        config: Config | str | os.PathLike | None = None,
        timeout_s: float = 100.0,
    ) -> None:
        self.id = next(_ids)
        self.closed = False
        _check_positive(hidden=hidden, max_tokens_per_rank=max_tokens_per_rank, num_experts=num_experts)
        _check_positive(num_topk=num_topk, timeout_s=timeout_s)
        if num_sms is not None:
            _check_positive(num_sms=num_sms)
        if num_topk > min(num_experts, MAX_TOPK):
            raise InvalidInput(
                f"num_topk is {num_topk}; allowed are 1 to {min(num_experts, MAX_TOPK)} with num_experts={num_experts}"
            )
        if num_experts > MAX_EXPERTS:
            raise InvalidInput(f"num_experts is {num_experts}; allowed are up to {MAX_EXPERTS}")
        self._config = _load_config(config)
        shape = nvlink_shape.Shape(hidden, max_tokens_per_rank, num_experts, num_topk)
        self._impl = _make_backend(backend, group, timeout_s, shape, self._choose)
        self.hidden = hidden
        self.max_tokens_per_rank = max_tokens_per_rank
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.size
        self.num_topk = num_topk
        self.num_sms = num_sms
        self.timeout_s = timeout_s
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._check_agreement()
        _live[self.id] = weakref.ref(self)
        weakref.finalize(self, _live.pop, self.id, None)

    @property
    def rank(self) -> int:
        return self._impl.rank

    @property
    def size(self) -> int:
        return self._impl.size

    @property
    def backend(self) -> str:
        return self._impl.name

    @property
    def window_bytes(self) -> int:
        """Memory of this rank that the others' kernels write to; 0 for backends without kernels.

        ``(R - 1) * max_tokens_per_rank * (2 * hidden + 4 * num_topk)``, and a little for routing and signals.
        """
        return self._impl.window_bytes

    @property
    def available_sms(self) -> int | None:
        """Multiprocessors that a call can have on this rank's GPU; None for backends without kernels."""
        return self._impl.available_sms

    def choose_num_sms(
        self, op: str, *, layout: str, dtype: torch.dtype, num_tokens: int, overlapped: bool = False
    ) -> int:
        """Multiprocessors of a call that is not told how many.

        Args: op "dispatch" or "combine"; dtype of what travels (torch.float8_e4m3fn for FP8); overlapped: computation
        runs at the same time.
        """
        return self._choose(op, layout, dtype.itemsize, num_tokens, overlapped)

    def _choose(
        self, op: str, layout: str, element_size: int, num_tokens: int, overlapped: bool = False
    ) -> int:
        available = self.available_sms or 1
        if self.num_sms is not None:
            return min(self.num_sms, available)
        if self._config is not None:
            tuned = self._config.num_sms(
                op=op,
                layout=layout,
                dtype=_DTYPE_OF_SIZE[element_size],
                num_tokens=num_tokens,
                hidden=self.hidden,
                num_ranks=self.size,
                overlapped=overlapped,
            )
            if tuned is not None:
                return min(tuned, available)
        shape = nvlink_shape.Shape(self.hidden, self.max_tokens_per_rank, self.num_experts, self.num_topk)
        work = shape.work(op, layout, element_size, num_tokens, self.size)
        return sm_model.choose_num_sms(work, available, overlapped)

    def barrier(self) -> None:
        """Return when every rank has called it; with kernels, when this communicator's calls so far have ended, too.

        Raises PeerTimeoutError.
        """
        self.check_open()
        self._impl.barrier()

    def close(self) -> None:
        """Free the communicator's memory. Not collective; safe to call twice. Its handles become useless."""
        if not self.closed:
            self.closed = True
            _live.pop(self.id, None)
            self._impl.close()

    def check_open(self) -> None:
        if self.closed:
            raise InvalidInput("this communicator is closed; make a new one")

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of asynchronous calls on a CUDA device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        return self._streams[device]

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Communicator(rank {self.rank} of {self.size}, {self.backend}, hidden={self.hidden}, "
            f"num_experts={self.num_experts}, num_topk={self.num_topk})"
        )

    def _check_agreement(self) -> None:
        """Ranks made with different numbers would misread each other's messages."""
        names = ("hidden", "max_tokens_per_rank", "num_experts", "num_topk")
        mine = torch.tensor([getattr(self, name) for name in names], device="cpu")
        for rank, theirs in enumerate(self._impl.all_gather(mine).tolist()):
            for name, value in zip(names, theirs, strict=True):
                if value != getattr(self, name):
                    raise InvalidInput(
                        f"{name} is {getattr(self, name)} on rank {self.rank} but {value} on rank {rank}; "
                        "all ranks must make the communicator alike"
                    )


def find(communicator_id: int) -> Communicator:
    """The open communicator with this id."""
    reference = _live.get(communicator_id)
    comm = reference() if reference is not None else None
    if comm is None:
        raise InvalidInput(
            "the communicator that made this handle is closed or gone; keep it open while handles are in use"
        )
    return comm


def _load_config(config: Config | str | os.PathLike | None) -> Config | None:
    if config is None:
        config = env.config()
    return config if config is None or isinstance(config, Config) else Config.load(config)


def _make_backend(
    name: str, group: object, timeout_s: float, shape: nvlink_shape.Shape, choose_num_sms: nvlink.ChooseNumSms
) -> Backend:
    if name not in BACKENDS:
        raise InvalidInput(f"backend is {name!r}; allowed are {', '.join(BACKENDS)}")
    asked = name if name != "auto" else env.backend()
    if asked not in BACKENDS:
        raise InvalidInput(
            f"environment variable {env.BACKEND.name} is {asked!r}; allowed are {', '.join(BACKENDS)}"
        )
    if isinstance(group, VirtualGroup):
        if asked not in ("auto", "virtual"):
            raise BackendUnavailable(
                f"backend {asked!r} needs a torch.distributed group; group is a VirtualGroup"
            )
        backend = VirtualBackend(group, group.next_channel(), timeout_s)
        _check_shares(shape, backend.size)
        if group.device.type == "cpu":
            return backend
        return _make_virtual_on_gpu(backend, group, timeout_s, shape, choose_num_sms)
    if asked == "virtual":
        raise BackendUnavailable(
            "backend 'virtual' needs group=VirtualGroup, as moe_ep.testing.run_ranks makes for its threads; "
            f"group is {type(group).__name__ if group is not None else None}"
        )
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise InvalidInput(
            f"group is {type(group).__name__}; allowed are None, a torch.distributed ProcessGroup of which this "
            "process is a member, and a moe_ep.backends.virtual.VirtualGroup"
        )
    collective = CollectiveBackend(group, _next_channel(group), timeout_s)
    _check_shares(shape, collective.size)
    if asked == "collective" or (asked == "auto" and not collective.carries_cuda):
        _log_choice(
            collective, asked, "as asked" if asked == "collective" else "the group has no CUDA backend"
        )
        return collective
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    missing = windows.why_unavailable(collective, device)
    if missing is not None and asked == "nvlink":
        raise BackendUnavailable(f"backend 'nvlink' can't run here: {missing}")
    if missing is not None:
        _log_choice(collective, asked, f"not nvlink, since {missing}")
        return collective
    backend = _make_nvlink(
        collective, group, device, timeout_s, shape, choose_num_sms, for_cpu=asked == "auto"
    )
    _log_choice(backend, asked, "every pair of ranks has peer access")
    return backend


def _make_nvlink(
    members: CollectiveBackend,
    group: dist.ProcessGroup | None,
    device: torch.device,
    timeout_s: float,
    shape: nvlink_shape.Shape,
    choose_num_sms: nvlink.ChooseNumSms,
    for_cpu: bool,
) -> Backend:
    kernels = _extension.load()
    nvlink_shape.check_limits(shape, members.size, kernels)
    num_bytes = nvlink_shape.window_bytes(shape, members.size, kernels)
    memory, addresses = windows.symmetric(members, group, num_bytes, device, nvlink_shape.WINDOW_FORMULA)
    cpu = members if for_cpu else None
    return nvlink.NvlinkBackend(
        name="nvlink",
        members=members,
        kernels=kernels,
        shape=shape,
        device=device,
        memory=memory,
        windows=addresses,
        timeout_s=timeout_s,
        choose_num_sms=choose_num_sms,
        cpu=cpu,
    )


def _make_virtual_on_gpu(
    members: VirtualBackend,
    group: VirtualGroup,
    timeout_s: float,
    shape: nvlink_shape.Shape,
    choose_num_sms: nvlink.ChooseNumSms,
) -> Backend:
    device = group.device
    missing = windows.why_not_here(device)
    if missing is not None:
        raise BackendUnavailable(f"virtual ranks can't run on {device}: {missing}")
    kernels = _extension.load()
    nvlink_shape.check_limits(shape, members.size, kernels)
    num_bytes = nvlink_shape.window_bytes(shape, members.size, kernels)
    memory, addresses = windows.shared(group, members.channel, num_bytes, device, nvlink_shape.WINDOW_FORMULA)
    return nvlink.NvlinkBackend(
        name="virtual",
        members=members,
        kernels=kernels,
        shape=shape,
        device=device,
        memory=memory,
        windows=addresses,
        timeout_s=timeout_s,
        choose_num_sms=choose_num_sms,
    )


def _check_shares(shape: nvlink_shape.Shape, num_ranks: int) -> None:
    if shape.num_experts % num_ranks:
        raise InvalidInput(
            f"num_experts is {shape.num_experts}, which {num_ranks} ranks can't share equally; "
            f"use a multiple of {num_ranks}"
        )


def _log_choice(backend: CollectiveBackend | nvlink.NvlinkBackend, asked: str, why: str) -> None:
    _log.info(
        "backend %r (asked for %r; %s): %d ranks over %s",
        backend.name,
        asked,
        why,
        backend.size,
        backend.transport,
    )


_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, itertools.count] = weakref.WeakKeyDictionary()


def _next_channel(group: dist.ProcessGroup | None) -> int:
    """A number for the messages of one communicator, equal on all ranks since all make communicators in one order."""
    return next(_channels.setdefault(group, itertools.count())) if group is not None else 0


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise InvalidInput(f"{name} is {value!r}; it must be greater than 0")
