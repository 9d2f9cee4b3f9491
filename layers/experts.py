"""The routed experts that live on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moe_ep import Fp8Tokens

from .feed_forward import swiglu
from .grouped_matmul import grouped_matmul


class GroupedExperts(nn.Module):
    """``num_local_experts`` (L) SwiGLU experts, applied to rows sorted by expert.

    ``y = w_down[e] (silu(gate) * up * router_weight)`` with ``[gate; up] = w_gate_up[e] x``: the router
    weight comes after the activation and before the last product, where Megatron-Core has it too.

    Parameters, one row per local expert, global expert ``first_expert + e``:

    - ``w_gate_up [L, 2F, H]``, gate rows first
    - ``w_down [L, H, F]``

    Both have the attribute ``is_expert = True``, by which ``moe_ep.layers.parallel`` tells them from dense
    parameters.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        ffn_hidden: int,
        *,
        first_expert: int = 0,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.init_std = init_std
        factory = {"device": device, "dtype": dtype}
        self.w_gate_up = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_hidden, hidden, **factory))
        self.w_down = nn.Parameter(torch.empty(num_local_experts, hidden, ffn_hidden, **factory))
        self.w_gate_up.is_expert = True
        self.w_down.is_expert = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w_gate_up, std=self.init_std)
        nn.init.normal_(self.w_down, std=self.init_std)

    def forward(
        self,
        rows_NH: torch.Tensor | Fp8Tokens,
        weights_N: torch.Tensor | None,
        tokens_per_expert: torch.Tensor,
        splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """``rows_NH [N, H]`` -> ``[N, H]``, in the dtype of the parameters.

        ``weights_N [N]``: router weight of each row (None: 1). ``tokens_per_expert`` int64 ``[L]``:
        consecutive rows of each expert, padding included; ``splits``: the same on the host, if known.
        Fp8Tokens are dequantised first; their gradient passes straight through. Rows past the last expert's
        come out undefined.
        """
        if isinstance(rows_NH, Fp8Tokens):
            rows_NH = rows_NH.dequantize(self.w_gate_up.dtype)
        activation_NF = swiglu(grouped_matmul(rows_NH, self.w_gate_up, tokens_per_expert, splits))
        if weights_N is not None:
            activation_NF = (activation_NF * weights_N.unsqueeze(-1)).to(activation_NF.dtype)
        return grouped_matmul(activation_NF, self.w_down, tokens_per_expert, splits)

    def extra_repr(self) -> str:
        num_local_experts, hidden, ffn_hidden = self.w_down.shape
        return f"{num_local_experts=}, {hidden=}, {ffn_hidden=}, first_expert={self.first_expert}"
