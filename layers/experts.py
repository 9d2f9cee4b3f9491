"""The routed experts that live on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from moe_ep import Fp8Tokens, fp8
from moe_ep.errors import InvalidInput

from .fp8_experts import fp8_experts
from .fp8_weights import Fp8Weights, SharedWeights
from .grouped_matmul import matmul_by_expert
from .row_groups import RowGroups
from .swiglu import weighted_swiglu


class GroupedExperts(nn.Module):
    """``num_local_experts`` (L) SwiGLU experts, applied to rows sorted by expert.

    ``y = w_down[e] (silu(gate) * up * router_weight)`` with ``[gate; up] = w_gate_up[e] x``: the router
    weight comes after the activation and before the last product, where Megatron-Core has it too.

    Parameters, one row per local expert, global expert ``first_expert + e``:

    - ``w_gate_up [L, 2F, H]``, gate rows first
    - ``w_down [L, H, F]``

    Both have the attribute ``is_expert = True``, by which ``moe_ep.layers.parallel`` tells them from dense
    parameters.

    ``fp8``: "blockwise": all products, forward and backward, are of FP8 numbers in blocks (docs/fp8.md); tokens that
    arrive as Fp8Tokens are multiplied as they are. On Hopper GPUs that is fast with Transformer Engine, rows of each
    expert a multiple of 16 and widths of 128. ``keep_fp8_weights``: weights in FP8 are kept until they change,
    instead of made anew in every forward and backward: less time, and twice the weights' memory.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        ffn_hidden: int,
        *,
        first_expert: int = 0,
        init_std: float = 0.02,
        fp8: str | None = None,
        keep_fp8_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if fp8 not in (None, "blockwise"):
            raise InvalidInput(f"fp8 is {fp8!r}; it must be None or 'blockwise'")
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.init_std = init_std
        self.fp8 = fp8
        self.fp8_weights: Fp8Weights | SharedWeights = Fp8Weights(keep_fp8_weights)
        factory = {"device": device, "dtype": dtype}
        self.w_gate_up = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_hidden, hidden, **factory))
        self.w_down = nn.Parameter(torch.empty(num_local_experts, hidden, ffn_hidden, **factory))
        self.w_gate_up.is_expert = True
        self.w_down.is_expert = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate_up, std=self.init_std)
        nn.init.normal_(self.w_down, std=self.init_std)

    def prepare_gate_up(self) -> None:
        """What `forward` does first and needs no rows for, here and now: its first weight in FP8. For a while in which
        the GPU would have nothing to do, as in ``meanwhile`` of `moe_ep.dispatch`.
        """
        if self.fp8 is not None:
            self.fp8_weights.gate_up.prepare(self.w_gate_up, trained=torch.is_grad_enabled())

    def prepare_down(self) -> None:
        """The same for the other weight."""
        if self.fp8 is not None:
            self.fp8_weights.down.prepare(self.w_down, trained=torch.is_grad_enabled())

    @contextmanager
    def sharing_fp8_weights(self, calls: int) -> Iterator[None]:
        """``calls`` of `forward` inside, whose backward runs in one, share what they need of FP8 weights. It lives from
        the first to the last of them.
        """
        own = self.fp8_weights
        if calls > 1 and not own.keep:
            self.fp8_weights = own.shared(calls)
        try:
            yield
        finally:
            self.fp8_weights = own

    def forward(
        self,
        rows_NH: torch.Tensor | Fp8Tokens,
        weights_N: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
        splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """``rows_NH [N, H]`` -> ``[N, H]``, in the dtype of the parameters.

        ``weights_N [N]``: router weight of each row (None: 1). ``tokens_per_expert`` int64 ``[L]``:
        consecutive rows of each expert, padding included; ``splits``: the same on the host, if known; without it
        FP8 experts wait for the device. Rows past the last expert's come out undefined.

        Without ``fp8``, Fp8Tokens are dequantised first; their gradient passes straight through. With it, rows that are
        not Fp8Tokens are quantised. Raises InvalidInput for float64 with ``fp8``.
        """
        groups = RowGroups(tokens_per_expert, splits, rows_NH.shape[0])
        if self.fp8 is not None:
            if self.w_down.dtype == torch.float64:
                raise InvalidInput("FP8 experts can't be float64; use float32 or bfloat16, or fp8=None")
            tokens = rows_NH if isinstance(rows_NH, Fp8Tokens) else fp8.quantize(rows_NH)
            return fp8_experts(tokens, weights_N, self.w_gate_up, self.w_down, groups, self.fp8_weights)
        if isinstance(rows_NH, Fp8Tokens):
            rows_NH = rows_NH.dequantize(self.w_gate_up.dtype)
        gate_up_NG = matmul_by_expert(rows_NH, self.w_gate_up, groups)
        return matmul_by_expert(weighted_swiglu(gate_up_NG, weights_N), self.w_down, groups)

    def extra_repr(self) -> str:
        num_local_experts, hidden, ffn_hidden = self.w_down.shape
        shown = f"{num_local_experts=}, {hidden=}, {ffn_hidden=}, first_expert={self.first_expert}"
        return shown if self.fp8 is None else f"{shown}, fp8={self.fp8}"
