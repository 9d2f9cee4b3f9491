"""One MoE layer run with and without overlap, for the tests on virtual ranks, processes and GPUs."""

import torch
import torch.nn.functional as F
from torch import nn

from moe_ep.layers import ModelConfig, MoELayer

CONFIG = ModelConfig(
    hidden=32,
    moe_ffn_hidden=16,
    shared_ffn_hidden=24,
    num_experts=8,
    num_topk=3,
    routed_scaling=2.5,
    init_std=0.3,
    seq_aux_loss_coeff=0.1,
)
TOKENS = (7, 0, 5, 1)
"""T by rank: never a multiple of 2, 3 or 4, once less than any of them, and once nothing."""


class RowByRow(nn.Module):
    """Experts whose results for a row do not depend on the rows beside it, as those of a matrix product may."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        num_experts, hidden, _ = layer.experts.w_down.shape
        self.w_gate_up = layer.experts.w_gate_up  # of which MoELayer wants the dtype
        scale = torch.linspace(0.5, 2, num_experts * hidden, device=self.w_gate_up.device)
        self.scale = nn.Parameter(scale.view(num_experts, hidden))

    def forward(self, rows, weights, tokens_per_expert, splits=None):
        if not isinstance(rows, torch.Tensor):
            rows = rows.dequantize(self.w_gate_up.dtype)
        past = (len(rows) - tokens_per_expert.sum()).view(1)  # the last expert's: static sizes
        counts = torch.cat([tokens_per_expert, past])
        scale = F.pad(self.scale, (0, 0, 0, 1)).repeat_interleave(counts, dim=0, output_size=len(rows))
        return (rows * scale * weights.unsqueeze(-1)).to(rows.dtype)


def make_input(comm, config, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(TOKENS[comm.rank], config.hidden, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def run(layer, x, overlap_chunks):
    """The outputs, and the gradients by name."""
    y, aux_loss = layer(x, overlap_chunks=overlap_chunks)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y.sin().sum() + aux_loss, (x, *parameters), allow_unused=True)
    return (y.detach(), aux_loss.detach()), dict(zip(("x", *names), grads, strict=True))


def assert_close(got, expected, relative):
    for name, wanted in expected.items():
        assert (got[name] - wanted).norm() <= relative * wanted.norm(), name
