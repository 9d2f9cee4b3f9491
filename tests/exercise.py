"""Runs a case through the public API and compares it bit for bit with what the oracle expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from cases import Case, RankInputs
from torch import Tensor

import moe_ep
import moe_ep.fp8
from moe_ep import reference

Results = dict[str, Tensor]

# Moved values keep their bits; a sum with a NaN in it is a NaN, but which one IEEE arithmetic leaves open.
SUMMED = ("y", "grad_x")


@dataclass(frozen=True)
class Received:
    """What follows a dispatch: the experts' rows [N, H], and gradients of the tokens [N, H] and of the weights."""

    rows: Tensor
    grad_tokens: Tensor
    grad_weights: Tensor | None


def received(case: Case, rank: int, num_rows: int, device: torch.device | str = "cpu") -> Received:
    """What the experts of ``rank`` and their backward make of ``num_rows`` rows."""
    shape = (num_rows,) if case.layout == "expert" else (num_rows, case.num_topk)
    settle(device)
    return Received(
        rows=case.expert_rows(rank, num_rows, device),
        grad_tokens=case.grad_tokens(rank, num_rows, device),
        grad_weights=case.grad_weights(rank, shape, device) if case.has_weights else None,
    )


def run_case(case: Case, comm: moe_ep.Communicator, device: torch.device | str = "cpu") -> Results:
    """One dispatch, one combine and their backward passes on this rank, every result by name, on the CPU."""
    results, _ = run_step(
        case,
        comm,
        case.inputs(comm.rank, device),
        lambda num_rows: received(case, comm.rank, num_rows, device),
    )
    return on_cpu(results)


def is_the_same_by_default_elsewhere(case: Case, group: object, rank: int) -> bool:
    """Whether a communicator and its calls give what they should where new tensors by default have no memory: what has
    to lie in the host's memory must say so.
    """
    inputs = case.inputs(rank)
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default), moe_ep.Communicator(group, **case.communicator_arguments) as comm:
            x = inputs.x.clone().requires_grad_()
            out = moe_ep.dispatch(x, inputs.topk_idx, inputs.topk_weights, comm, **case.dispatch_arguments)
            y = moe_ep.combine(out.tokens, out.handle)
            (grad,) = torch.autograd.grad(y, x, x.detach())
            comm.barrier()
            results.append([out.tokens, out.tokens_per_expert, y, grad])
    return all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def settle(device: torch.device | str) -> None:
    """Wait for the current stream, so that a copy to or from the host needn't wait inside the driver.

    There it could hold up the launches of other threads, virtual ranks that this stream waits for.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def run_step(
    case: Case,
    comm: moe_ep.Communicator,
    inputs: RankInputs,
    make_received: Callable[[int], Received],
) -> tuple[Results, moe_ep.DispatchHandle]:
    """The calls of ``run_case`` on tensors given by the caller; results stay on their device."""
    x = inputs.x.requires_grad_()
    weights = None if inputs.topk_weights is None else inputs.topk_weights.requires_grad_()
    biases = [bias.requires_grad_() for bias in inputs.biases]

    tokens_in = moe_ep.fp8.quantize(x) if case.fp8 == "tokens" else x
    fp8 = "blockwise" if case.fp8 == "blockwise" else None
    out = moe_ep.dispatch(tokens_in, inputs.topk_idx, weights, comm, fp8=fp8, **case.dispatch_arguments)
    results = dispatch_results(out)
    after = make_received(out.tokens.shape[0])

    rows = after.rows.requires_grad_()
    bias = None if not biases else biases[0] if len(biases) == 1 else tuple(biases)
    y = moe_ep.combine(rows, out.handle, bias=bias, fp8_backward=case.fp8_backward)
    results["y"] = y
    results["grad_rows"], *grad_biases = torch.autograd.grad(y, [rows, *biases], inputs.grad_y)
    results |= {f"grad_bias_{i}": grad for i, grad in enumerate(grad_biases)}

    outputs, grads, sources = [out.tokens.carrier if case.fp8 else out.tokens], [after.grad_tokens], [x]
    if weights is not None:
        outputs.append(out.weights)
        grads.append(after.grad_weights)
        sources.append(weights)
    results["grad_x"], *rest = torch.autograd.grad(outputs, sources, grads)
    if rest:
        results["grad_topk_weights"] = rest[0]
    return results, out.handle


def on_cpu(results: Results) -> Results:
    """Copies that nothing can change any more."""
    for device in {value.device for value in results.values()}:
        settle(device)
    return {name: value.detach().clone().cpu() for name, value in results.items()}


def dispatch_results(out: moe_ep.DispatchOutput) -> Results:
    """The parts of a dispatch's output by name."""
    results = {
        "tokens_per_expert": out.tokens_per_expert,
        "padded_tokens_per_expert": out.padded_tokens_per_expert,
    }
    if isinstance(out.tokens, Tensor):
        results["tokens"] = out.tokens
    else:
        results |= {"tokens.data": out.tokens.data, "tokens.scale_inv": out.tokens.scale_inv}
    if out.weights is not None:
        results["weights"] = out.weights
    if out.topk_idx is not None:
        results["topk_idx"] = out.topk_idx
    return results


def oracle_dispatch(case: Case, device: torch.device | str = "cpu") -> list[reference.Dispatched]:
    """The oracle's dispatch of a case."""
    inputs = [case.inputs(rank, device) for rank in range(case.world_size)]
    x_by_rank = [moe_ep.fp8.quantize(each.x) if case.fp8 else each.x for each in inputs]
    return reference.dispatch(
        x_by_rank,
        [each.topk_idx for each in inputs],
        [each.topk_weights for each in inputs] if case.has_weights else None,
        num_experts=case.num_experts,
        **case.dispatch_arguments,
    )


def expected(case: Case, device: torch.device | str = "cpu") -> list[Results]:
    """What ``run_case`` shall return on each rank, by the oracle."""
    inputs = [case.inputs(rank, device) for rank in range(case.world_size)]
    dispatched = oracle_dispatch(case, device)
    rows = [case.expert_rows(rank, each.num_rows, device) for rank, each in enumerate(dispatched)]
    grad_tokens = [case.grad_tokens(rank, each.num_rows, device) for rank, each in enumerate(dispatched)]
    grad_y = [each.grad_y for each in inputs]
    if case.fp8_backward:
        grad_y = [moe_ep.fp8.quantize(grad).dequantize(case.dtype) for grad in grad_y]

    y = reference.combine(rows, dispatched, [each.biases for each in inputs])
    grad_rows = reference.combine_backward(grad_y, dispatched)
    grad_x, _ = reference.dispatch_backward(grad_tokens, None, dispatched)
    results = []
    for rank, each in enumerate(dispatched):
        result = dispatch_results(each) | {"y": y[rank], "grad_rows": grad_rows[rank], "grad_x": grad_x[rank]}
        result |= {f"grad_bias_{i}": inputs[rank].grad_y for i in range(case.num_biases)}
        results.append(result)
    if case.has_weights:
        grad_weights = [
            case.grad_weights(rank, tuple(each.weights.shape), device) for rank, each in enumerate(dispatched)
        ]
        for result, grad in zip(results, reference.combine_weights(grad_weights, dispatched), strict=True):
            result["grad_topk_weights"] = grad
    return [{name: value.cpu() for name, value in result.items()} for result in results]


def assert_case(case: Case, results_by_rank: Sequence[Results]) -> None:
    """Every rank has the oracle's bits; else AssertionError names case, rank, tensor and element."""
    for rank, (actual, wanted) in enumerate(zip(results_by_rank, expected(case), strict=True)):
        assert_results(actual, wanted, f"{case}: rank {rank}")


def assert_results(actual: Results, wanted: Results, what: str) -> None:
    """Equal names and, tensor by tensor, bits."""
    assert sorted(actual) == sorted(wanted), f"{what} returned {sorted(actual)}, not {sorted(wanted)}"
    for name, value in actual.items():
        assert_same_bits(value, wanted[name], f"{what}: {name}", any_nan=name in SUMMED)


def assert_cases(cases: Sequence[Case], outcomes_by_rank: Sequence[dict[str, Results | str]]) -> None:
    """``assert_case`` of every case; one AssertionError tells all that is wrong.

    A rank's outcome of a case is its results, or text that says why there are none; a case not reached has none.
    """
    assert len({str(case) for case in cases}) == len(cases), "two cases have one name"
    wrong, not_run = [], 0
    for case in cases:
        outcomes = [each.get(str(case)) for each in outcomes_by_rank]
        texts = [
            f"{case}: rank {rank}: {each}" for rank, each in enumerate(outcomes) if isinstance(each, str)
        ]
        if None in outcomes:
            not_run += 1
        elif not texts:
            try:
                assert_case(case, outcomes)
            except AssertionError as error:
                texts = [str(error)]
        wrong += texts
    assert not wrong and not not_run, "\n".join([f"of {len(cases)} cases {not_run} did not run", *wrong])


def assert_same_bits(actual: Tensor, wanted: Tensor, what: str, *, any_nan: bool = False) -> None:
    """Equal shape, dtype and bits; with ``any_nan`` all NaNs are equal."""
    assert actual.shape == wanted.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}"
    )
    assert actual.dtype == wanted.dtype, f"{what}: dtype {actual.dtype}, expected {wanted.dtype}"
    differs = bits(actual) != bits(wanted)
    if any_nan:
        differs &= ~(actual.isnan() & wanted.isnan())
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ; the first at {at}: "
            f"{actual[at].item()}, expected {wanted[at].item()}"
        )


def bits(values: Tensor) -> Tensor:
    """The values as integers of the same width."""
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.detach().cpu().contiguous().view(as_integer)
