"""Decoding with two batches: while the rows of one travel, the other computes, by DeepEP's low-latency calls.

    python docs/examples/decode_two_batches.py --nproc 2

Each batch is a generator that stops wherever its rows are under way, and hands out the *hook* that puts them in place.
`side_by_side` takes turns. Runs on GPUs, and on CPUs with nothing changed (there, one after the other).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_ep import launch
from moe_ep.compat import deep_ep

LAYERS, HIDDEN, FFN, HEADS = 2, 128, 256, 4
EXPERTS, TOPK = 8, 2
SEQUENCES, STEPS = 4, 6  # of a batch on each rank; tokens decoded of each
MAX_TOKENS = SEQUENCES  # of a low-latency call, on any rank

Hook = Callable[[], None]
Pass = Generator[Hook, None, torch.Tensor]


class Layer:
    """Attention over the tokens so far, and experts of which this rank has its share."""

    def __init__(self, index: int, buffer: deep_ep.Buffer, device: torch.device) -> None:
        self.buffer = buffer
        local = EXPERTS // buffer.group_size
        generator = torch.Generator().manual_seed(index)

        def weight(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator) / shape[-2] ** 0.5
            return values.to(device, torch.bfloat16)

        self.qkv, self.router = weight(HIDDEN, 3 * HIDDEN), weight(HIDDEN, EXPERTS)
        mine = slice(buffer.rank * local, (buffer.rank + 1) * local)
        self.up, self.down = weight(EXPERTS, HIDDEN, FFN)[mine], weight(EXPERTS, FFN, HIDDEN)[mine]

    def attend(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        """``x [sequences, HIDDEN]``, one new token each; ``cache``: keys and values of those before."""
        q, *new = (x @ self.qkv).view(len(x), HEADS, 1, -1).chunk(3, dim=-1)
        cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, new, strict=True)] if cache else new
        return x + F.scaled_dot_product_attention(q, *cache).reshape(x.shape)

    def experts(self, x: torch.Tensor) -> Pass:
        weights, ids = (x @ self.router).float().softmax(-1).topk(TOPK)
        rows, _, handle, _, hook = self.buffer.low_latency_dispatch(
            x, ids, MAX_TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        yield hook
        rows = F.silu(rows @ self.up) @ self.down  # rows past an expert's own are noise, which nobody reads
        y, _, hook = self.buffer.low_latency_combine(rows, ids, weights, handle, return_recv_hook=True)
        yield hook
        return x + y


def one_token(layers: list[Layer], x: torch.Tensor, caches: list[list[torch.Tensor]]) -> Pass:
    """A batch's way through the model: ``x [sequences, HIDDEN]`` -> the same shape."""
    for layer, cache in zip(layers, caches, strict=True):
        x = yield from layer.experts(layer.attend(x, cache))
    return x


def side_by_side(passes: Iterable[Pass]) -> list[torch.Tensor]:
    """Lets each batch compute while the others' rows travel. All ranks must have as many, in one order."""
    running: list[tuple[int, Pass, Hook | None]] = [(i, each, None) for i, each in enumerate(passes)]
    results: list[torch.Tensor | None] = [None] * len(running)
    while running:
        i, each, hook = running.pop(0)
        if hook is not None:
            hook()
        try:
            running.append((i, each, next(each)))
        except StopIteration as end:
            results[i] = end.value
    return results


@torch.no_grad()
def decode(layers: list[Layer], batches: list[torch.Tensor], together: bool) -> list[torch.Tensor]:
    """``STEPS`` tokens of each batch, whose last outputs are returned; ``together`` or one batch after the other."""
    caches = [[[] for _ in layers] for _ in batches]
    for _ in range(STEPS):
        passes = [one_token(layers, *each) for each in zip(batches, caches, strict=True)]
        if together:
            batches = side_by_side(passes)
        else:
            batches = [side_by_side([each])[0] for each in passes]
        batches = [
            F.rms_norm(each, (HIDDEN,)) for each in batches
        ]  # in place of sampling a token and embedding it
    return batches


def main() -> None:
    rank, size = launch.init_process_group()
    on_gpu = dist.get_backend() != "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    room = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, size, EXPERTS)
    buffer = deep_ep.Buffer(
        dist.group.WORLD, 0, room, low_latency_mode=True, num_qps_per_rank=EXPERTS // size
    )
    layers = [Layer(i, buffer, device) for i in range(LAYERS)]
    generator = torch.Generator().manual_seed(rank)
    shape = SEQUENCES, HIDDEN
    batches = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(2)]

    together, in_turn = (decode(layers, batches, each) for each in (True, False))
    if not all(map(torch.equal, together, in_turn)):
        raise SystemExit(f"rank {rank}: two batches side by side differ from one after the other")
    if rank == 0:
        print(f"{size} ranks, 2 batches of {SEQUENCES} sequences, {STEPS} tokens: side by side as in turn")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, default=2, help="ranks to start (not with torchrun)")
    args = parser.parse_args()
    main() if launch.inside_launch() else launch.spawn(main, args.nproc)
