"""The router on a GPU, by `csrc/router`: a few kernels around two matrix products, forward and backward.

For bfloat16 tokens these are products of bfloat16 numbers, though the weight is float32, and no copy of the tokens in
float32 is made. A float32 number has 24 bits and is the sum of three bfloat16 numbers of 8 bits each, so ``x W^T`` is
the sum of three products of bfloat16 matrices. Their single terms are exact, and added up in float32:

    logits      = x W1^T + x W2^T + x W3^T              W = W1 + W2 + W3
    grad_weight = G1^T x + G2^T x + G3^T x              G = G1 + G2 + G3, the gradient of the logits
    grad_x      = G1 W1 + G1 W2 + G2 W1, rounded once

Logits and grad_weight differ from products of float32 numbers in how sums are rounded only: matrix units add 16 terms
at a time and cut off, always towards zero, what float32 cannot hold, where a float32 product rounds. So n terms lose up
to ``n / 16 2^-23`` of their sum: with DeepSeek-V3's sizes, on an H200, 2e-6 to 2e-5 of the result, between float32's
1e-7 to 8e-7 and bfloat16's 2e-3. What grad_x leaves out is below ``2^-14 |G| |W|``, and its rounding to bfloat16 below
2^-8 of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_ep import _extension
from moe_ep.streams import named_range

from .config import ModelConfig
from .routing import balance_loss, scores_of, weigh_experts


def can_route(x: torch.Tensor, weight_EH: torch.Tensor, config: ModelConfig) -> bool:
    """Whether `route` takes these."""
    if not x.is_cuda or x.numel() == 0 or weight_EH.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    kernels = _extension.load_for(x.device)
    if kernels is None:
        return False
    return config.num_experts <= kernels.router.MAX_EXPERTS and config.num_topk <= kernels.router.MAX_TOPK


def route(
    x_BSH: torch.Tensor,
    weight_EH: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    load_E: torch.Tensor | None,
    config: ModelConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``topk_idx [T, K]`` int64, ``topk_weights [T, K]`` float32 and the auxiliary loss, a float32 scalar.

    ``load_E``: int64, raised by how often each expert is chosen; or None. Same inputs give the same bits. Gradients of
    higher order are plain torch's.
    """
    x_TH = x_BSH.flatten(0, 1).contiguous()
    # Matrices of bfloat16 numbers are multiplied fast where all their rows begin at 16-byte boundaries.
    aligned = weight_EH.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in weight_EH.shape)
    if x_TH.dtype != torch.bfloat16 or not aligned:
        x_TH = x_TH.to(torch.float32)
    topk_idx, topk_weights, *aux_loss = _Route.apply(
        x_TH, weight_EH, expert_bias_E, load_E, config, x_BSH.shape[1]
    )
    return topk_idx, topk_weights, aux_loss[0] if aux_loss else topk_weights.new_zeros(())


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_EH, expert_bias_E, load_E, config, seq_len):
        router = _extension.load().router
        num_tokens, num_experts = x_TH.shape[0], weight_EH.shape[0]
        routing = router.Routing(
            tokens=num_tokens,
            sequence_length=seq_len,
            experts=num_experts,
            topk=config.num_topk,
            softmax=config.score_function == "softmax",
            scaling=config.routed_scaling,
        )
        topk_idx_TK = x_TH.new_empty(num_tokens, config.num_topk, dtype=torch.int64)
        weights_TK = weight_EH.new_empty(num_tokens, config.num_topk)
        has_loss = config.seq_aux_loss_coeff > 0
        highest_BE = None
        if has_loss:
            highest_BE = x_TH.new_zeros(num_tokens // seq_len, num_experts, dtype=torch.int32)
        # sum over tokens of sum_i(highest_i s_i) / sum_i(s_i), times this, is the loss: see routing.balance_loss
        factor = config.seq_aux_loss_coeff * num_experts / (config.num_topk * num_tokens * seq_len)
        with named_range("moe_ep.router"), torch.cuda.device(x_TH.device):
            stream = torch.cuda.current_stream().cuda_stream
            pieces = logit_pieces(x_TH, weight_EH)
            in_parts = pieces.dim() == 3
            logits_TE = weight_EH.new_empty(num_tokens, num_experts) if in_parts else pieces
            router.choose(
                routing,
                pieces=pieces.data_ptr(),
                slices=pieces.shape[0] if in_parts else 1,
                parts=3 if in_parts else 1,
                bias=_address(expert_bias_E),
                groups=config.num_groups,
                topk_groups=config.topk_groups,
                logits=logits_TE.data_ptr() if in_parts else 0,
                topk_idx=topk_idx_TK.data_ptr(),
                topk_weights=weights_TK.data_ptr(),
                load=_address(load_E),
                highest=_address(highest_BE),
                stream=stream,
            )
            aux_loss = []
            if has_loss:
                terms = weight_EH.new_empty(-(-num_tokens // router.TOKENS_PER_TERM))
                router.balance(
                    routing,
                    logits=logits_TE.data_ptr(),
                    highest=highest_BE.data_ptr(),
                    factor=factor,
                    terms=terms.data_ptr(),
                    stream=stream,
                )
                aux_loss.append(terms.sum())
        ctx.save_for_backward(x_TH, weight_EH, logits_TE, topk_idx_TK, highest_BE)
        ctx.config, ctx.seq_len, ctx.routing, ctx.factor = config, seq_len, routing, factor
        ctx.mark_non_differentiable(topk_idx_TK)
        ctx.set_materialize_grads(False)
        return topk_idx_TK, weights_TK, *aux_loss

    @staticmethod
    def backward(ctx, _, grad_weights_TK, grad_loss=None):
        grads = [None, None]
        if grad_weights_TK is not None or grad_loss is not None:
            with torch.autocast("cuda", enabled=False), named_range("moe_ep.router.backward"):
                differentiate = _differentiate_torch if torch.is_grad_enabled() else _differentiate
                grads = differentiate(ctx, grad_weights_TK, grad_loss)
        return *grads, None, None, None, None


def _differentiate(
    ctx, grad_weights_TK: torch.Tensor | None, grad_loss: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """The gradients of x and of the weight."""
    x_TH, weight_EH, logits_TE, topk_idx_TK, highest_BE = ctx.saved_tensors
    num_tokens, num_experts = logits_TE.shape
    in_parts = x_TH.dtype == torch.bfloat16
    grad_TE = None if in_parts else torch.empty_like(logits_TE)
    parts_TPE = x_TH.new_empty(num_tokens, 4 * num_experts) if in_parts else None
    if grad_weights_TK is not None:
        grad_weights_TK = grad_weights_TK.contiguous()
    with torch.cuda.device(x_TH.device):
        _extension.load().router.differentiate(
            ctx.routing,
            logits=logits_TE.data_ptr(),
            topk_idx=topk_idx_TK.data_ptr(),
            grad_weights=_address(grad_weights_TK),
            highest=_address(highest_BE),
            grad_loss=_address(grad_loss),
            factor=ctx.factor,
            grad=_address(grad_TE),
            parts=_address(parts_TPE),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    if not in_parts:
        return [grad_TE @ weight_EH if wants_x else None, grad_TE.t() @ x_TH if wants_weight else None]
    grad_x, grad_weight = None, None
    if wants_x:  # [G1 | G1 | G2] of [W2; W1; W1]
        grad_x = parts_TPE[:, : 3 * num_experts] @ split_weight(weight_EH)[1:].flatten(0, 1)
    if wants_weight:
        of_parts = sliced_product(parts_TPE[:, num_experts:].t(), x_TH)
        grad_weight = of_parts.view(-1, *weight_EH.shape).sum(0)
    return [grad_x, grad_weight]


def _differentiate_torch(
    ctx, grad_weights_TK: torch.Tensor | None, grad_loss: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """The same, differentiable; the experts and counts are those that were chosen."""
    x_TH, weight_EH, _, topk_idx_TK, highest_BE = ctx.saved_tensors
    config = ctx.config
    scores_TE = scores_of(F.linear(x_TH.to(weight_EH.dtype), weight_EH), config)
    outputs, grads = [], []
    if grad_weights_TK is not None:
        outputs.append(weigh_experts(scores_TE, topk_idx_TK, config))
        grads.append(grad_weights_TK)
    if grad_loss is not None:
        scores_BSE = scores_TE.unflatten(0, (-1, ctx.seq_len))
        outputs.append(config.seq_aux_loss_coeff * balance_loss(scores_BSE, highest_BE, config.num_topk))
        grads.append(grad_loss)
    wanted = [i for i in range(2) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(outputs, [(x_TH, weight_EH)[i] for i in wanted], grads, create_graph=True)
    result = [None, None]
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


def logit_pieces(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Numbers that add up to the logits: ``[slices, T, 3E]`` for bfloat16 tokens, else ``[T, E]``, the logits."""
    if x_TH.dtype != torch.bfloat16:
        return F.linear(x_TH, weight_EH)
    return sliced_product(x_TH, split_weight(weight_EH)[:3].flatten(0, 1).t())


def split_weight(weight_EH: torch.Tensor) -> torch.Tensor:
    """The parts ``[W3, W2, W1, W1]`` of float32 numbers, in bfloat16."""
    weight_EH = weight_EH.detach().contiguous()
    parts = torch.empty(4, *weight_EH.shape, dtype=torch.bfloat16, device=weight_EH.device)
    with torch.cuda.device(weight_EH.device):
        _extension.load().router.split(
            x=weight_EH.data_ptr(),
            count=weight_EH.numel(),
            parts=parts.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return parts


def sliced_product(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """Products of bfloat16 matrices in float32, ``[slices, M, N]``, that add up to ``left right``.

    Few rows and columns make few tiles of 128 x 128, each on one multiprocessor; so K is cut where that gives more.
    Shorter sums are more precise, too.
    """
    (num_rows, length), num_columns = left_MK.shape, right_KN.shape[1]
    tiles = -(-num_rows // 128) * -(-num_columns // 128)
    slices = 1
    while slices < 4 and slices * tiles < 100 and length % (16 * slices) == 0:
        slices *= 2
    left = left_MK.view(num_rows, slices, -1).transpose(0, 1)
    return torch.bmm(left, right_KN.view(slices, -1, num_columns), out_dtype=torch.float32)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
