"""A product of FP8 numbers as a module: `Linear` as FP8 experts multiply, for what every token visits."""

from __future__ import annotations

import torch

from moe_ep import Fp8Tokens, fp8

from .fp8_experts import fp8_matmul, fp8_swiglu
from .fp8_weights import QuantizedWeight
from .row_groups import RowGroups
from .weight_gradients import Linear


class Fp8Linear(Linear):
    """`Linear` whose products, forward and backward, are of FP8 numbers in blocks (docs/fp8.md).

    ``keep_fp8_weight``: the weight in FP8 is kept until it changes, as in `GroupedExperts`. On Hopper GPUs it is fast
    for rows in multiples of 16 and widths of 128.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        keep_fp8_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.fp8_weight = QuantizedWeight(keep_fp8_weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features]``, which may stand for FP8 tokens (`moe_ep.fp8.carry`) -> ``[..., out_features]``."""
        rows_MI = x.reshape(-1, x.shape[-1])
        arrived = fp8.carried(rows_MI)
        if arrived is None:
            tokens = fp8.quantize(rows_MI)
        else:
            tokens = Fp8Tokens(arrived.data, arrived.scale_inv, carrier=rows_MI)
        num_rows = rows_MI.shape[0]
        all_rows = RowGroups(torch.full((1,), num_rows, device=x.device), [num_rows], num_rows)
        out_MO = fp8_matmul(tokens, [self.weight], all_rows, self.fp8_weight)
        return out_MO.view(*x.shape[:-1], out_MO.shape[-1])


def fp8_activation(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``gate_up [..., 2F]``, quantised: a tensor ``[..., F]`` that stands for FP8 tokens."""
    tokens = fp8_swiglu(gate_up.reshape(-1, gate_up.shape[-1]), None)
    carrier = fp8.carry_differentiable(tokens, gate_up.dtype)
    return carrier.view(*gate_up.shape[:-1], carrier.shape[-1])
