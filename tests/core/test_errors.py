"""Bad input of every kind: InvalidInput before anything is sent, with the offending value in its message."""

import pickle
import re
import time

import pytest
import torch
from cases import LAYOUTS, Case
from exercise import assert_case, run_case

import moe_ep
from moe_ep import InvalidInput
from moe_ep.testing import run_ranks

T, H, E, K = 6, 16, 8, 3
ARGUMENTS = {"hidden": H, "max_tokens_per_rank": 10, "num_experts": E, "num_topk": K}


@pytest.fixture
def comm():
    with moe_ep.Communicator(**ARGUMENTS) as comm:
        yield comm


def good_inputs(num_tokens=T):
    case = Case("good", (num_tokens,), hidden=H, num_experts=E, num_topk=K)
    inputs = case.inputs(0)
    return {"x": inputs.x, "topk_idx": inputs.topk_idx, "topk_weights": inputs.topk_weights}


def with_id(value):
    idx = good_inputs()["topk_idx"].clone()
    idx[4, 1] = value
    return idx


def fp8_tokens(rows=T, hidden=H):
    return moe_ep.fp8.quantize(torch.ones(rows, hidden))


DUPLICATE = with_id(0)
DUPLICATE[4] = torch.tensor([5, 2, 5])

# name: (arguments that replace good ones, words that the message must have)
BAD_X = {
    "a list": ({"x": [[1.0] * H] * T}, ["x", "list"]),
    "one dimension": ({"x": torch.ones(H)}, ["x", "(16,)"]),
    "three dimensions": ({"x": torch.ones(T, 1, H)}, ["x", "(6, 1, 16)"]),
    "wrong width": ({"x": torch.ones(T, H + 4)}, ["x", "20", "16"]),
    "integers": ({"x": torch.ones(T, H).int()}, ["x", "int32", "bfloat16"]),
    "complex": ({"x": torch.ones(T, H, dtype=torch.complex64)}, ["x", "complex64"]),
    "transposed": ({"x": torch.ones(H, T).t()}, ["x", "contiguous"]),
    "strided": ({"x": torch.ones(T, 2 * H)[:, ::2]}, ["x", "contiguous"]),
    "too many tokens": (good_inputs(11), ["11", "max_tokens_per_rank", "10"]),
    "bare fp8 data": ({"x": torch.ones(T, H).to(torch.float8_e4m3fn)}, ["float8_e4m3fn", "Fp8Tokens"]),
    "fp8 tokens of the wrong width": ({"x": fp8_tokens(hidden=32)}, ["32", "16"]),
    "fp8 of float64": ({"x": torch.ones(T, H).double(), "fp8": "blockwise"}, ["float64"]),
}
BAD_TOPK_IDX = {
    "missing": ({"topk_idx": None}, ["topk_idx", "None"]),
    "a list": ({"topk_idx": [[0, 1, 2]] * T}, ["topk_idx", "list"]),
    "floats": ({"topk_idx": torch.zeros(T, K)}, ["topk_idx", "float32", "int64"]),
    "int16": ({"topk_idx": torch.zeros(T, K).short()}, ["topk_idx", "int16", "int64"]),
    "another K": ({"topk_idx": torch.zeros(T, K + 1).long()}, ["topk_idx", "(6, 4)", "3"]),
    "another T": ({"topk_idx": torch.zeros(T - 1, K).long()}, ["topk_idx", "(5, 3)", "6"]),
    "flat": ({"topk_idx": torch.zeros(T * K).long()}, ["topk_idx", "(18,)"]),
    "strided": ({"topk_idx": torch.full((T, 2 * K), -1)[:, ::2]}, ["topk_idx", "contiguous"]),
    "an id of E": ({"topk_idx": with_id(E)}, ["topk_idx[4, 1]", "8"]),
    "an id far above": ({"topk_idx": with_id(1 << 40)}, ["topk_idx[4, 1]", str(1 << 40)]),
    "an id of -2": ({"topk_idx": with_id(-2)}, ["topk_idx[4, 1]", "-2", "-1"]),
    "an int32 id outside": ({"topk_idx": with_id(99).int()}, ["topk_idx[4, 1]", "99"]),
    "an expert named twice": ({"topk_idx": DUPLICATE}, ["topk_idx[4]", "expert 5", "twice"]),
}
BAD_TOPK_WEIGHTS = {
    "bfloat16": ({"topk_weights": torch.ones(T, K).bfloat16()}, ["topk_weights", "bfloat16", "float32"]),
    "float64": ({"topk_weights": torch.ones(T, K).double()}, ["topk_weights", "float64", "float32"]),
    "another K": ({"topk_weights": torch.ones(T, K - 1)}, ["topk_weights", "(6, 2)", "(6, 3)"]),
    "another T": ({"topk_weights": torch.ones(T + 1, K)}, ["topk_weights", "(7, 3)", "(6, 3)"]),
    "strided": ({"topk_weights": torch.ones(K, T).t()}, ["topk_weights", "contiguous"]),
    "a list": ({"topk_weights": [[1.0] * K] * T}, ["topk_weights", "list"]),
}
BAD_OPTIONS = {
    "unknown layout": ({"layout": "token"}, ["layout", "'token'", "expert", "rank"]),
    "alignment 0": ({"expert_alignment": 0}, ["expert_alignment", "0"]),
    "alignment -4": ({"expert_alignment": -4}, ["expert_alignment", "-4"]),
    "fractional alignment": ({"expert_alignment": 2.5}, ["expert_alignment", "2.5"]),
    "alignment of ranks": ({"layout": "rank", "expert_alignment": 8}, ["expert_alignment", "8", "rank"]),
    "negative max_recv_rows": ({"max_recv_rows": -1}, ["max_recv_rows", "-1"]),
    "fractional max_recv_rows": ({"max_recv_rows": 1.5}, ["max_recv_rows", "1.5"]),
    "unknown fp8": ({"fp8": "tensorwise"}, ["fp8", "'tensorwise'", "blockwise"]),
    "a handle that is none": ({"topk_idx": None, "handle": "yesterday"}, ["handle", "str"]),
}
BAD_DISPATCH = {
    f"{argument}: {name}": bad
    for argument, group in (
        ("x", BAD_X),
        ("topk_idx", BAD_TOPK_IDX),
        ("topk_weights", BAD_TOPK_WEIGHTS),
        ("options", BAD_OPTIONS),
    )
    for name, bad in group.items()
}


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_bad_dispatch_is_refused(name, comm):
    replaced, words = BAD_DISPATCH[name]
    with pytest.raises(InvalidInput) as caught:
        moe_ep.dispatch(comm=comm, **(good_inputs() | replaced))
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, moe_ep.MoeEpError)


BAD_COMBINE = {
    "rows of the wrong number": ({"expert_rows": torch.ones(17, H)}, ["expert_rows", "17", "18"]),
    "rows of the wrong width": ({"expert_rows": torch.ones(18, 8)}, ["expert_rows", "8", "16"]),
    "rows of integers": ({"expert_rows": torch.ones(18, H).int()}, ["expert_rows", "int32"]),
    "rows strided": ({"expert_rows": torch.ones(H, 18).t()}, ["expert_rows", "contiguous"]),
    "rows as a list": ({"expert_rows": [[1.0] * H] * 18}, ["expert_rows", "list"]),
    "bias of another shape": ({"bias": torch.ones(T + 1, H)}, ["bias", "(7, 16)", "(6, 16)"]),
    "bias of another dtype": ({"bias": torch.ones(T, H).double()}, ["bias", "float64", "float32"]),
    "second bias of another shape": ({"bias": (torch.ones(T, H), torch.ones(T))}, ["bias 1", "(6,)"]),
    "a bias that is a number": ({"bias": (1.0,)}, ["bias", "float"]),
    "an unknown fp8_backward": ({"fp8_backward": "e5m2"}, ["fp8_backward", "'e5m2'", "blockwise"]),
    "fp8_backward of float64": (
        {"expert_rows": torch.ones(18, H).double(), "fp8_backward": "blockwise"},
        ["fp8_backward", "float64"],
    ),
    "another thing for the handle": ({"handle": (1, 2)}, ["handle", "tuple"]),
    "no handle": ({"handle": None}, ["handle", "None"]),
}


@pytest.mark.parametrize("name", BAD_COMBINE)
def test_bad_combine_is_refused(name, comm):
    replaced, words = BAD_COMBINE[name]
    inputs = good_inputs()
    inputs["topk_idx"] = torch.arange(K).expand(T, K).contiguous()
    handle = moe_ep.dispatch(comm=comm, **inputs).handle
    with pytest.raises(InvalidInput) as caught:
        moe_ep.combine(**({"expert_rows": torch.ones(18, H), "handle": handle} | replaced))
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


BAD_COMMUNICATOR = {
    "hidden 0": ({"hidden": 0}, ["hidden", "0"]),
    "negative max_tokens_per_rank": ({"max_tokens_per_rank": -1}, ["max_tokens_per_rank", "-1"]),
    "no experts": ({"num_experts": 0}, ["num_experts", "0"]),
    "K of 0": ({"num_topk": 0}, ["num_topk", "0"]),
    "K above E": ({"num_topk": 9}, ["num_topk", "9", "8"]),
    "a timeout of 0": ({"timeout_s": 0.0}, ["timeout_s", "0"]),
    "no SMs": ({"num_sms": 0}, ["num_sms", "0"]),
    "an unknown backend": ({"backend": "carrier pigeon"}, ["backend", "'carrier pigeon'", "collective"]),
    "a group of another kind": ({"group": 3}, ["group", "int"]),
}


@pytest.mark.parametrize("name", BAD_COMMUNICATOR)
def test_bad_communicator_is_refused(name):
    replaced, words = BAD_COMMUNICATOR[name]
    with pytest.raises(InvalidInput) as caught:
        moe_ep.Communicator(**(ARGUMENTS | replaced))
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_a_backend_asked_for_by_name_that_cannot_run_says_what_is_missing():
    with pytest.raises(moe_ep.BackendUnavailable, match="VirtualGroup"):
        moe_ep.Communicator(backend="virtual", **ARGUMENTS)


def test_experts_that_ranks_cannot_share_equally_are_refused():
    with pytest.raises(InvalidInput, match=r"num_experts is 8.*3"):
        run_ranks(3, lambda comm: None, **ARGUMENTS)


def test_ranks_that_disagree_are_refused():
    from moe_ep.backends.virtual import VirtualGroup

    groups = VirtualGroup.create(2)

    def fn(comm):
        group = groups[comm.rank]
        hidden = 16 + 16 * comm.rank
        with pytest.raises(InvalidInput) as caught:
            moe_ep.Communicator(group, **(ARGUMENTS | {"hidden": hidden}))
        return str(caught.value)

    for message in run_ranks(2, fn, **ARGUMENTS):
        assert "hidden" in message and "16" in message and "32" in message


@pytest.mark.parametrize(
    "hidden, dtype, multiple",
    [(6, torch.float32, 4), (12, torch.bfloat16, 8), (4, torch.float16, 8), (3, torch.float64, 2)],
)
def test_rows_that_are_no_multiple_of_16_bytes_are_refused(hidden, dtype, multiple):
    with (
        moe_ep.Communicator(**(ARGUMENTS | {"hidden": hidden})) as comm,
        pytest.raises(InvalidInput) as caught,
    ):
        moe_ep.dispatch(torch.ones(T, hidden, dtype=dtype), good_inputs()["topk_idx"], None, comm)
    for word in (f"{hidden * dtype.itemsize}", "16", f"multiple of {multiple}"):
        assert word in str(caught.value)


@pytest.mark.parametrize("as_input", [True, False])
def test_fp8_rows_that_are_no_multiple_of_16_bytes_are_refused(as_input):
    with moe_ep.Communicator(**(ARGUMENTS | {"hidden": 24})) as comm:
        x = torch.ones(T, 24)
        with pytest.raises(InvalidInput, match="24"):
            moe_ep.dispatch(
                fp8_tokens(hidden=24) if as_input else x, good_inputs()["topk_idx"], None, comm,
                fp8=None if as_input else "blockwise",
            )  # fmt: skip


def test_a_handle_with_topk_idx_is_refused(comm):
    inputs = good_inputs()
    handle = moe_ep.dispatch(comm=comm, **inputs).handle
    with pytest.raises(InvalidInput, match="topk_idx and handle"):
        moe_ep.dispatch(comm=comm, handle=handle, **inputs)


def test_a_handle_of_another_number_of_tokens_is_refused(comm):
    handle = moe_ep.dispatch(comm=comm, **good_inputs()).handle
    with pytest.raises(InvalidInput, match=r"5.*6"):
        moe_ep.dispatch(torch.ones(5, H), None, None, comm, handle=handle)


def test_a_handle_of_another_communicator_is_refused(comm):
    with moe_ep.Communicator(**ARGUMENTS) as other:
        handle = moe_ep.dispatch(comm=other, **good_inputs()).handle
        with pytest.raises(InvalidInput, match="another communicator"):
            moe_ep.dispatch(good_inputs()["x"], None, None, comm, handle=handle)


def test_a_closed_communicator_is_refused():
    comm = moe_ep.Communicator(**ARGUMENTS)
    out = moe_ep.dispatch(comm=comm, **good_inputs())
    comm.close()
    with pytest.raises(InvalidInput, match="closed"):
        moe_ep.dispatch(comm=comm, **good_inputs())
    with pytest.raises(InvalidInput, match="closed"):
        moe_ep.combine(out.tokens, out.handle)
    with pytest.raises(InvalidInput, match="closed"):
        comm.barrier()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_may_be_anything(layout, comm):
    """NaN, infinite and negative weights only travel."""
    inputs = good_inputs()
    inputs["topk_weights"] = torch.full((T, K), float("nan"))
    out = moe_ep.dispatch(comm=comm, layout=layout, **inputs)
    assert out.weights.isnan().sum() == T * K
    inputs["topk_weights"] = torch.full((T, K), -float("inf"))
    out = moe_ep.dispatch(comm=comm, layout=layout, **inputs)
    assert (out.weights == -float("inf")).sum() == T * K


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_bad_input_on_one_rank_ends_run_ranks_at_once(bad_rank):
    """The others wait for a rank that never sends; run_ranks raises its error, not their timeout."""

    def fn(comm):
        inputs = good_inputs()
        if comm.rank == bad_rank:
            inputs["topk_idx"] = with_id(77)
        moe_ep.dispatch(comm=comm, **inputs)

    start = time.monotonic()
    with pytest.raises(InvalidInput, match=re.escape("topk_idx[4, 1] is 77")):
        run_ranks(4, fn, timeout_s=60, **ARGUMENTS)
    assert time.monotonic() - start < 10


def test_nothing_is_sent_before_input_is_found_bad():
    """Some ranks make bad calls first; the messages of the good one must not meet leftovers of those."""
    case = Case("after", (T, 3, 0, 9), hidden=H, num_experts=E, num_topk=K, routing="masked")

    def fn(comm):
        for replaced, _ in BAD_DISPATCH.values():
            if comm.rank % 2 == 0:
                with pytest.raises(InvalidInput):
                    moe_ep.dispatch(comm=comm, **(good_inputs() | replaced))
        return run_case(case, comm)

    assert_case(case, run_ranks(4, fn, timeout_s=20, **ARGUMENTS))


def test_errors_survive_pickling():
    """They cross process borders: DataLoader workers, torch.multiprocessing, test runners."""
    error = pickle.loads(pickle.dumps(moe_ep.PeerTimeoutError([3, 1], "combine rows", "waited 2 s")))
    assert error.ranks == (1, 3) and error.phase == "combine rows"
    assert "1, 3" in str(error) and "waited 2 s" in str(error)
    assert "12" in str(pickle.loads(pickle.dumps(InvalidInput("x is 12"))))
