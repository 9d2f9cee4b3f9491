"""One micro-batch's way through one transformer block, in pieces that a schedule can put beside others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

import moe_ep
from moe_ep.fp8 import carry, quantize, takes_carried_gradient
from moe_ep.functional import combine_backward, dispatch_backward
from moe_ep.streams import named_range

from .lanes import Lanes
from .transformer import TransformerBlock
from .weight_gradients import WeightGradStore


class BlockPass:
    """Forward pieces, in this order::

        attend          what ``take`` and ``enter`` do, attention, norms and router
        shared_expert   of an MoE block; in a dense block its feed-forward
        dispatch        (communication)
        experts
        combine         (communication)
        output          waits for it; the sum of what the block adds to the residual stream

    and those of the backward, behind ``receive(gradient of the output)``::

        combine_backward    (communication)
        shared_expert_backward
        experts_backward
        dispatch_backward   (communication)
        attend_backward     waits for it

    Each piece of computation has an autograd graph of its own, from copies of its inputs that are leaves: the gradients
    that its backward leaves there are what the next piece needs. So pieces run when they are called, on the lane they
    are called for, and gradients add up as in one graph over the whole block, in the same order. Communication is given
    the mark that it waits for, so that it may be called later than what it runs beside. Dense blocks skip it.

    ``take`` returns the inputs of ``enter``, which makes the block's input ``[B, S, H]`` of them; ``give`` gets their
    gradients. Weight gradients of the matrix products go to ``store``, whose ``run`` the schedule calls;
    ``grad_aux_loss`` is the gradient of the router's auxiliary loss.
    """

    def __init__(
        self,
        block: TransformerBlock,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        take: Callable[[], Sequence[torch.Tensor]],
        enter: Callable[..., torch.Tensor],
        give: Callable[[Sequence[torch.Tensor]], None],
        lanes: Lanes,
        store: WeightGradStore,
        grad_aux_loss: torch.Tensor,
    ) -> None:
        self.aux_loss: torch.Tensor | None = None
        self._block, self._rotary, self._take, self._enter, self._give = block, rotary, take, enter, give
        self._lanes, self._store, self._grad_aux_loss = lanes, store, grad_aux_loss
        self._feed_forward = block.moe.shared if block.is_moe else block.ffn
        self._grad: torch.Tensor | None = None
        self._grad_normed: torch.Tensor | None = None

    # Forward.

    def attend(self) -> None:
        leaves = [_leaf(each) for each in self._take()]
        with named_range("attention"), self._store.collecting():
            residual, normed = self._block.attend(self._enter(*leaves), self._rotary)
            outputs = [residual, normed]
            if self._block.is_moe:
                routed = self._block.moe.router(normed)
                outputs += [routed.topk_weights, routed.aux_loss]
                self._routed, self.aux_loss = routed, routed.aux_loss.detach()
        self._attention, self._residual, self._normed = (leaves, outputs), residual.detach(), normed.detach()
        if self._block.is_moe:
            self._normed = self._normed.reshape(-1, normed.shape[-1]).contiguous()
        self._mark = self._lanes.mark()

    def shared_expert(self) -> None:
        self._shared = None
        if self._feed_forward is not None:
            leaf = _leaf(self._normed)
            with named_range("shared expert"), self._store.collecting():
                self._shared = leaf, self._feed_forward(leaf)

    def dispatch(self) -> None:
        if not self._block.is_moe:
            return
        x, routed, dispatcher = self._normed, self._routed, self._block.moe.dispatcher
        fp8 = dispatcher.config.fp8
        num_sms = self._num_sms("dispatch", x, fp8)

        def call():
            out = dispatcher.dispatch(x, routed.topk_idx, routed.topk_weights.detach(), num_sms=num_sms)
            tokens = [out.tokens] if fp8 is None else [out.tokens.data, out.tokens.scale_inv]
            return out, [*tokens, out.weights, *out.handle.state]

        reads = [x, routed.topk_idx, routed.topk_weights]
        self._arriving = self._lanes.communicate(call, after=self._mark, reads=reads)

    def experts(self) -> None:
        if not self._block.is_moe:
            return
        out = self._arriving.wait()
        tokens = out.tokens
        if isinstance(tokens, moe_ep.Fp8Tokens):
            leaf = _leaf(tokens.carrier)
            tokens = dataclasses.replace(tokens, carrier=leaf)
        else:
            tokens = leaf = _leaf(tokens)
        weights = _leaf(out.weights)
        with named_range("experts"), self._store.collecting():
            rows = self._block.moe.run_experts(dataclasses.replace(out, tokens=tokens, weights=weights))
        self._experts, self._handle, self._arriving = (leaf, weights, rows), out.handle, None
        self._mark = self._lanes.mark()

    def combine(self, *, beside: bool = True) -> None:
        """``beside``: computation runs meanwhile, so that few multiprocessors must do."""
        if not self._block.is_moe:
            return
        rows, handle, dispatcher = self._experts[2].detach(), self._handle, self._block.moe.dispatcher
        num_sms = self._num_sms("combine", rows) if beside else None

        def call():
            y = dispatcher.combine(rows, handle, num_sms=num_sms)
            return y, [y]

        self._returning = self._lanes.communicate(call, after=self._mark, reads=[rows])

    @torch.no_grad()
    def output(self) -> torch.Tensor:
        """``[B, S, H]``: what the next block gets."""
        added = None if self._shared is None else self._shared[1]
        if self._block.is_moe:
            y = self._returning.wait()
            added = y if added is None else y + added
        output = self._residual + added.view_as(self._residual)
        self._returning = self._residual = self._normed = None
        return output

    # Backward.

    def receive(self, grad: torch.Tensor) -> None:
        """A gradient of the output; several add up."""
        self._grad = (grad if self._grad is None else self._grad + grad).contiguous()

    def combine_backward(self) -> None:
        if not self._block.is_moe:
            return
        grad, handle = self._grad.flatten(0, -2), self._handle
        fp8 = self._block.moe.dispatcher.config.fp8_backward
        num_sms = self._num_sms("dispatch", grad, fp8)

        def call():
            grad_y = grad if fp8 is None else quantize(grad)
            rows = combine_backward(grad_y, handle, num_sms=num_sms)
            return rows, [rows] if fp8 is None else [rows.data, rows.scale_inv]

        # Not sooner: what was launched before leaves no room beside it.
        self._arriving = self._lanes.communicate(call, after=self._lanes.mark(), reads=[grad])

    def shared_expert_backward(self) -> None:
        if self._shared is None:
            return
        leaf, out = self._shared
        with named_range("shared expert.backward"):
            torch.autograd.backward([out], [self._grad.view_as(out)])
        self._grad_normed, self._shared = leaf.grad, None

    def experts_backward(self) -> None:
        if not self._block.is_moe:
            return
        grad = self._arriving.wait()
        leaf, weights, rows = self._experts
        with named_range("experts.backward"):
            if isinstance(grad, moe_ep.Fp8Tokens):
                as_it_is = takes_carried_gradient(rows)
                grad = carry(grad, rows.dtype) if as_it_is else grad.dequantize(rows.dtype)
            torch.autograd.backward([rows], [grad])
        self._grad_rows = leaf.grad.contiguous(), weights.grad.contiguous()
        self._experts = self._arriving = None
        self._mark = self._lanes.mark()

    def dispatch_backward(self) -> None:
        if not self._block.is_moe:
            return
        (grad_rows, grad_weights), handle = self._grad_rows, self._handle
        num_sms = self._num_sms("combine", grad_rows)

        def call():
            grads = dispatch_backward(grad_rows, grad_weights, handle, num_sms=num_sms)
            return grads, grads

        reads = [grad_rows, grad_weights]
        self._returning = self._lanes.communicate(call, after=self._mark, reads=reads)
        self._grad_rows = None

    def attend_backward(self) -> None:
        leaves, outputs = self._attention
        grads, grad_normed = [self._grad], self._grad_normed
        if self._block.is_moe:
            grad_x, grad_weights = self._returning.wait()
            grad_normed = grad_x if grad_normed is None else grad_normed + grad_x
            grads += [grad_normed.view_as(self._grad), grad_weights, self._grad_aux_loss]
        else:
            grads += [grad_normed]
        # An auxiliary loss of weight 0 is a constant.
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        with named_range("attention.backward"):
            torch.autograd.backward(*zip(*pairs, strict=True))
        self._attention = self._returning = self._grad = self._grad_normed = self._handle = self._routed = (
            None
        )
        self._give([leaf.grad for leaf in leaves])

    def _num_sms(self, op: str, rows: torch.Tensor, fp8: str | None = None) -> int:
        dtype = rows.dtype if fp8 is None else torch.float8_e4m3fn
        return self._lanes.num_sms(op, dtype=dtype, num_tokens=self._routed.topk_idx.shape[0])


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()
