"""What the host does around the NVLink kernels, on a CPU with kernels that do nothing.

A call that repeats a routing takes a GPU less time than most operators take the host to launch, so none but the
call's own kernel may be launched: outputs are allocated, nothing is filled, copied or converted.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cases import LAYOUTS
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ep
from moe_ep import sm_model
from moe_ep.backends import nvlink

TOKENS, HIDDEN, TOPK = 6, 256, 2
TOKENS_PER_EXPERT = [3, 2, 1, 0]
LAUNCH_NOTHING = {"aten.new_empty", "aten.empty", "aten.empty_strided", "aten.view", "aten.detach"}


class Log(TorchDispatchMode):
    """The operators that run, and the calls of kernels, in order."""

    def __init__(self):
        super().__init__()
        self.names, self.arguments = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))

    def names_between(self, first, last):
        start = self.names.index(first)
        return self.names[start + 1 : self.names.index(last, start)]


class Kernels:
    """`moe_ep._C.nvlink.Communicator`, as far as the backend calls it for one rank."""

    failed = bad_ids = False

    def __init__(self, log):
        for name in ("plan", "dispatch", "combine"):
            setattr(self, name, lambda name=name, **arguments: self._launch(name, arguments))
        self._log = log

    def _launch(self, name, arguments):
        self._log.names.append(name)
        self._log.arguments.append(arguments)

    def table_words(self, num_tokens):
        return 8 * num_tokens

    def wait_for_plan(self, _ticket, _timeout_s):
        self._log.names.append("wait")
        return True

    def bad_ranks(self):
        return []

    def read_plan(self, alignment, splits):
        (ctypes.c_int64 * len(TOKENS_PER_EXPERT)).from_address(splits)[:] = TOKENS_PER_EXPERT
        return sum(TOKENS_PER_EXPERT)


class Stream:
    def __init__(self, address, priority=0):
        self.cuda_stream, self.priority = address, priority
        self.waits = []

    def synchronize(self):
        pass

    def wait_stream(self, other):
        self.waits.append(other)


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def stream(monkeypatch):
    """Its ``current`` is the current stream."""
    state = SimpleNamespace(current=Stream(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.current)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: state.current.cuda_stream, raising=False
    )
    monkeypatch.setattr(nvlink, "_is_capturing", lambda stream: False)
    return state


@pytest.fixture
def comm(log, stream, monkeypatch):
    limits = SimpleNamespace(
        CHUNK=4,
        HOST_BYTES=8,
        window_bytes=lambda *_sizes: 0,
        workspace_bytes=lambda *_sizes: 8,
        Communicator=lambda **_numbers: Kernels(log),
    )
    kernels = SimpleNamespace(nvlink=limits, DType=SimpleNamespace(float32=0, bfloat16=1, float16=2))
    members = SimpleNamespace(
        rank=0, size=1, all_gather=lambda values: values.unsqueeze(0), close=lambda: None
    )

    def make_backend(_name, _group, timeout_s, shape, choose_num_sms):
        cpu = torch.device("cpu")
        memory = torch.zeros(1)
        with monkeypatch.context() as without_cuda:
            without_cuda.setattr(
                torch, "zeros", lambda size, pin_memory=False, **_options: memory.new_empty(size)
            )
            return nvlink.NvlinkBackend(
                name="nvlink",
                members=members,
                kernels=kernels,
                shape=shape,
                device=cpu,
                memory=memory,
                windows=[0],
                timeout_s=timeout_s,
                choose_num_sms=choose_num_sms,
            )

    monkeypatch.setattr(nvlink, "_count_sms", lambda device: 132)
    monkeypatch.setattr("moe_ep.communicator._make_backend", make_backend)
    with moe_ep.Communicator(
        hidden=HIDDEN, max_tokens_per_rank=TOKENS, num_experts=len(TOKENS_PER_EXPERT), num_topk=TOPK
    ) as comm:
        yield comm


def topk_idx():
    return torch.tensor([[0, 1]] * TOKENS)


def inputs(requires_grad):
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=requires_grad)
    return x, torch.ones(TOKENS, TOPK, requires_grad=requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("fp8", [None, "before", "on the way"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeated_dispatch_launches_its_kernel_alone(comm, log, layout, fp8, requires_grad):
    x, weights = inputs(requires_grad)
    tokens = moe_ep.fp8.quantize(x) if fp8 == "before" else x
    options = {"fp8": "blockwise"} if fp8 == "on the way" else {}
    handle = moe_ep.dispatch(tokens, topk_idx(), weights, comm, layout=layout, **options).handle
    log.names.clear()
    with log:
        out = moe_ep.dispatch(tokens, None, weights, comm, handle=handle, **options)
    assert log.names.count("dispatch") == 1
    assert set(log.names) <= {*LAUNCH_NOTHING, "dispatch"}
    rows = out.tokens.carrier if fp8 else out.tokens
    assert rows.requires_grad == out.weights.requires_grad == requires_grad


def test_with_few_multiprocessors_tokens_are_quantised_before_the_dispatch(comm, log):
    x, _ = inputs(requires_grad=False)
    few = sm_model.QUANTISING_SMS - 1
    with log:
        out = moe_ep.dispatch(x, topk_idx(), None, comm, fp8="blockwise", num_sms=few)
    assert log.names.count("dispatch") == 1 and not set(log.names) <= {
        *LAUNCH_NOTHING,
        "plan",
        "wait",
        "dispatch",
    }
    assert isinstance(out.tokens, moe_ep.Fp8Tokens)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_combine_launches_its_kernel_alone(comm, log, requires_grad):
    x, _ = inputs(requires_grad)
    out = moe_ep.dispatch(x, topk_idx(), None, comm)
    log.names.clear()
    with log:
        y = moe_ep.combine(out.tokens, out.handle)
    assert log.names.count("combine") == 1
    assert set(log.names) <= {*LAUNCH_NOTHING, "combine"}
    assert y.requires_grad == requires_grad


def test_the_backward_of_each_launches_its_kernel_alone(comm, log):
    x, weights = inputs(requires_grad=True)
    out = moe_ep.dispatch(x, topk_idx(), weights, comm)
    rows = out.tokens.detach().requires_grad_()
    y = moe_ep.combine(rows, out.handle)
    grads = torch.ones_like(rows), torch.ones_like(out.weights), torch.ones_like(y)
    log.names.clear()
    with log:
        torch.autograd.grad([out.tokens, out.weights], [x, weights], grads[:2])
        torch.autograd.grad(y, rows, grads[2])
    assert [name for name in log.names if not name.startswith("aten.")] == ["combine", "dispatch"]
    assert set(log.names) <= {*LAUNCH_NOTHING, "combine", "dispatch"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_sizes_little_is_done_between_the_counts_and_the_rows(comm, log, layout):
    x, weights = inputs(requires_grad=False)
    with log:
        out = moe_ep.dispatch(x, topk_idx(), weights, comm, layout=layout)
    between = [
        name
        for name in log.names_between("wait", "dispatch")
        if name not in ("aten.lift_fresh", "aten.detach")
    ]
    assert between == ["aten.slice" if layout == "rank" else "aten.new_empty"] + ["aten.new_empty"] * 2
    assert out.splits == TOKENS_PER_EXPERT and out.handle.num_rows == sum(TOKENS_PER_EXPERT)


def test_a_call_on_another_stream_waits_for_the_last(comm, stream):
    x, _ = inputs(requires_grad=False)
    handle = moe_ep.dispatch(x, topk_idx(), None, comm).handle
    first = stream.current
    moe_ep.dispatch(x, None, None, comm, handle=handle)
    assert first.waits == []
    stream.current = second = Stream(2)
    rows = moe_ep.dispatch(x, None, None, comm, handle=handle).tokens
    moe_ep.combine(rows, handle)
    assert second.waits == [first]


def test_calls_on_a_stream_with_priority_wait_on_one_multiprocessor(comm, stream, log):
    x, _ = inputs(requires_grad=False)
    normal, beside = stream.current, Stream(2, priority=-1)
    for stream.current in (normal, beside, normal):
        out = moe_ep.dispatch(x, topk_idx(), None, comm)
        moe_ep.combine(out.tokens, out.handle)
    launches = [(each["stream"], each["meets"]) for each in log.arguments]
    assert launches == [(1, False)] * 3 + [(2, True)] * 3 + [(1, False)] * 3


def test_forward_mode_is_refused(comm):
    """It must not go unnoticed where nothing requires a gradient."""
    x, _ = inputs(requires_grad=False)
    handle = moe_ep.dispatch(x, topk_idx(), None, comm).handle
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            moe_ep.dispatch(dual, None, None, comm, handle=handle)
        with pytest.raises(RuntimeError, match="jvp"):
            moe_ep.combine(dual, handle)  # as many rows as tokens


def test_a_barrier_is_the_kernels_not_the_hosts(comm, log, monkeypatch):
    """A wait for a late host breaks gloo's connections, which the next communicator needs."""

    def hosts_meet(_values):
        raise AssertionError("the hosts met")

    monkeypatch.setattr(comm._impl.members, "all_gather", hosts_meet)
    with log:
        comm.barrier()
    assert [name for name in log.names if name in ("plan", "wait")] == ["plan", "wait"]
    assert not {"dispatch", "combine"} & set(log.names)


def test_a_barrier_in_vain_names_the_late_rank_and_itself(comm, monkeypatch):
    kernels = comm._impl._communicator

    def wait_for_plan(_ticket, _timeout_s):
        kernels.failed = True
        return False

    monkeypatch.setattr(kernels, "wait_for_plan", wait_for_plan)
    monkeypatch.setattr(kernels, "failure", lambda: (1, 0, 3, 2), raising=False)
    monkeypatch.setattr(
        comm._impl.members,
        "give_up",
        lambda suspects, phase, cause: moe_ep.PeerTimeoutError(suspects, phase, cause),
        raising=False,
    )
    with pytest.raises(
        moe_ep.PeerTimeoutError, match=r"rank 0 did not answer during a barrier: its kernel waited"
    ) as caught:
        comm.barrier()
    assert (caught.value.ranks, caught.value.phase) == ((0,), "a barrier")
    with pytest.raises(
        moe_ep.PeerTimeoutError, match="dispatch routing"
    ):  # from now on, the call that failed
        comm.barrier()
