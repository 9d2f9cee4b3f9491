"""An MoE layer's way from routing to output with communication behind computation, forward and backward.

Tokens go through in chunks: ``D`` is a chunk's dispatch, ``E`` its experts, ``C`` its combine; ``U`` and ``S`` are
the shared expert up to its activation and its last product. Three chunks::

    current stream     | U  | E0    | E1       | E2    | S | sum
    the communicator's | D0 | D1    | C0   D2  | C1    | C2

One chunk is the case in which only the shared expert runs beside communication.

Chunks add up the experts' weight gradients in the products themselves. Otherwise the backward needs no code. Autograd
runs a node on the stream of its forward, lets it wait for its own gradients only, and among the nodes that could run
takes the one made last. Each of them can, when its turn comes, so the backward is the forward's sequence of calls from
its end: a pipeline, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import moe_ep
from moe_ep.errors import InvalidInput
from moe_ep.streams import named_range

from .feed_forward import SharedExperts
from .token_dispatcher import TokenDispatcher
from .weight_gradients import GradientSums


def run_overlapped(
    x_TH: torch.Tensor,
    topk_idx_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    dispatcher: TokenDispatcher,
    run_experts: Callable[[moe_ep.DispatchOutput], torch.Tensor],
    prepare_experts: Callable[[], object] | None,
    shared: SharedExperts | None,
    num_chunks: int,
) -> torch.Tensor:
    """``x_TH [T, H]`` to the experts ``topk_idx_TK [T, K]`` and back, plus the shared expert: ``[T, H]``.

    ``prepare_experts``: what `run_experts` would do first and needs no rows for.

    Collective: every rank gives the same ``num_chunks``; T may differ, and be smaller than that. Raises InvalidInput.
    """
    if num_chunks < 1:
        raise InvalidInput(
            f"overlap_chunks is {num_chunks}; it must be 0 for no overlap, or a number of chunks"
        )
    chunks = _split(num_chunks, x_TH, topk_idx_TK, topk_weights_TK)
    num_sms = dispatcher.config.overlap_num_sms
    stream = None
    if x_TH.is_cuda:
        stream = dispatcher.comm.stream(x_TH.device)
        stream.wait_stream(torch.cuda.current_stream(x_TH.device))

    def dispatch(chunk: tuple[torch.Tensor, ...], **options) -> tuple[moe_ep.DispatchOutput, moe_ep.Event]:
        # An asynchronous call waits for what the current stream has been given. Called from its own stream it waits
        # for nothing but the tokens, not for the experts that should run beside it.
        with torch.cuda.stream(stream):
            return dispatcher.dispatch_async(*chunk, num_sms=num_sms, **options)

    computing = torch.cuda.current_stream(x_TH.device) if x_TH.is_cuda else None
    activation_TF: torch.Tensor | None = None

    def meanwhile() -> None:
        nonlocal activation_TF
        with torch.cuda.stream(computing):
            if prepare_experts is not None:
                prepare_experts()
            if shared is not None:
                with named_range("shared expert"):
                    activation_TF = shared.activate(x_TH)

    combined, sums = [], GradientSums()
    arriving = dispatch(chunks[0], meanwhile=meanwhile)
    for following in [*chunks[1:], None]:
        out, arrived = arriving
        arrived.wait()
        with named_range("experts"), sums.collecting():
            rows_NH = run_experts(out)
        if following is not None:
            arriving = dispatch(following)
        combined.append(dispatcher.combine_async(rows_NH, out.handle, num_sms=num_sms))
    shared_TH = None
    if shared is not None:
        with named_range("shared expert"):
            shared_TH = shared.down(activation_TF)

    for _, returned in combined:
        returned.wait()
    y_TH = combined[0][0] if num_chunks == 1 else torch.cat([y for y, _ in combined])
    return y_TH if shared_TH is None else y_TH + shared_TH


def _split(num_chunks: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each tensor's rows in ``num_chunks`` runs, as equal as can be, the longer ones first."""
    if num_chunks == 1:
        return [tensors]
    short, longer = divmod(len(tensors[0]), num_chunks)
    sizes = [short + (i < longer) for i in range(num_chunks)]
    return list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))
