"""Validation loss over fixed held-out windows, shared among the ranks; the same number for any number of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_ep.layers import DeepSeekModel, ParallelGroups

from .data import Text


@torch.no_grad()
def evaluate(
    model: DeepSeekModel,
    text: Text,
    starts: Sequence[int],
    *,
    seq_len: int,
    micro_batch: int,
    groups: ParallelGroups,
    device: torch.device,
) -> float:
    """Mean nats per token of the next-token predictions in the windows [start, start + seq_len + 1); collective.

    Window i is rank i % world_size's. Every rank runs the same number of batches, since each takes part in every
    exchange: short ones are filled up with windows that don't count.
    """
    was_training = model.training
    model.eval()
    mine = list(starts[groups.rank :: groups.world_size])
    most = -(-len(starts) // groups.world_size)
    batches = -(-most // micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number in range(batches):
        chosen = mine[number * micro_batch : (number + 1) * micro_batch]
        filled = chosen + [starts[0]] * (micro_batch - len(chosen))
        windows = text.windows(filled, seq_len + 1).to(device)
        logits_BSV = model(windows[:, :-1]).logits[: len(chosen)]
        targets_BS = windows[: len(chosen), 1:]
        if chosen:
            wide = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
            loss = F.cross_entropy(wide, targets_BS.flatten(), reduction="sum")
            total += loss.double()
    if groups.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return total.item() / (len(starts) * seq_len)
