"""Micro-batches side by side: the forward of one beside the backward of the one before (DualPipe, arXiv:2412.19437,
section 3.2.1, on one pipeline stage).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_ep.streams import named_range

from .block_pass import BlockPass
from .lanes import Lanes
from .model import DeepSeekModel, token_loss
from .transformer import TransformerBlock
from .weight_gradients import WeightGradStore, add_to_grad


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch, as in ModelOutput; float32 scalars without a graph."""

    loss: torch.Tensor
    main_loss: torch.Tensor
    mtp_loss: torch.Tensor
    aux_loss: torch.Tensor


class MicroBatchSchedule:
    """Runs micro-batches through a model so that each one's communication lies beside another's computation.

    ::

        micro-batch 0   F F F B B B
        micro-batch 1         F F F B B B
        micro-batch 2               F F F B B B

    A letter is a block, and two above each other are a pair (`run_pair`). The first forward and the last backward have
    nobody beside them: there, the shared expert and the weight gradients are what communication runs beside.

    Results are those of ``(model(tokens, targets).loss / n).backward()`` for each of the n micro-batches in turn, with
    every gradient added in the same order. Collective: all ranks have as many micro-batches; their sizes may differ.

    ``overlap=False`` makes the same calls on one stream, as a CPU does anyway. Communication beside computation takes
    ``model.config.overlap_num_sms`` multiprocessors. A subclass may override `run_pair`.
    """

    def __init__(self, model: DeepSeekModel, *, overlap: bool = True) -> None:
        self.model, self.store = model, WeightGradStore(add_to_grad)
        self.lanes = Lanes(model.comm, model.head.weight.device, model.config, overlap=overlap)

    def step(self, micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Losses]:
        """Adds the gradients of the mean of the micro-batches' losses to ``.grad``; returns the losses.

        ``micro_batches``: tokens and targets of each, ``[B, S]``, as the model takes them. Raises InvalidInput.
        """
        passes = [self.make_pass(*each, share=len(micro_batches)) for each in micro_batches]
        for forward, backward in zip([*passes, None], [None, *passes], strict=True):
            self.run(forward, backward)
        return [each.losses for each in passes]

    def make_pass(self, tokens: torch.Tensor, targets: torch.Tensor, *, share: int) -> ModelPass:
        """A micro-batch that has yet to be run; its loss counts for 1 / ``share``. Raises InvalidInput."""
        self.model.check(tokens, targets)
        return ModelPass(self, tokens, targets, share)

    def run(self, forward: ModelPass | None, backward: ModelPass | None) -> None:
        """One micro-batch through the whole model forward, and beside it another backward; either may be missing."""
        if forward is not None:
            forward.begin()
        if backward is not None:
            backward.begin_backward()
        down = forward.blocks if forward is not None else [None] * len(backward.blocks)
        up = backward.blocks[::-1] if backward is not None else [None] * len(forward.blocks)
        for pair in zip(down, up, strict=True):
            self.run_pair(*pair)
        if backward is not None:
            backward.end_backward()
        if forward is not None:
            forward.end()

    def run_pair(self, forward: BlockPass | None, backward: BlockPass | None) -> None:
        """A block of one micro-batch forward, and beside it one of another backward; either may be missing. ::

            computing      | S' W  A    | S  E'  | W  E    | A'   W |
            communicating  | C'         | D      | D'      | C      |

        ``A`` attention and router, ``S`` shared expert, ``D`` dispatch, ``E`` experts, ``C`` combine; ``'`` marks the
        backward, and ``W`` weight gradients.

        NOTE: with exact sizes, ``forward.dispatch`` waits until the device has planned it; what computes beside it is
        launched before. All else returns at once.
        """
        f, b = forward, backward
        if b is not None:
            b.combine_backward()
            b.shared_expert_backward()
            self.run_weight_gradients()
        if f is not None:
            f.attend()
            f.shared_expert()
        if b is not None:
            b.experts_backward()
        if f is not None:
            f.dispatch()
        if b is not None:
            b.dispatch_backward()
            self.run_weight_gradients()
        if f is not None:
            f.experts()
            f.combine(beside=b is not None)
        if b is not None:
            b.attend_backward()
            self.run_weight_gradients()

    def run_weight_gradients(self) -> None:
        """Those that have been put off."""
        with named_range("weight gradients"):
            self.store.run()


class ModelPass:
    """One micro-batch's way through the model: its ends, and how its blocks are linked.

    ``blocks``: in the order of the forward, MTP modules' last. ``losses``: there after the forward.
    """

    def __init__(
        self, schedule: MicroBatchSchedule, tokens_BS: torch.Tensor, targets_BS: torch.Tensor, share: int
    ) -> None:
        model = schedule.model
        self._model, self._tokens, self._targets = model, tokens_BS, targets_BS
        scalar = torch.promote_types(model.head.weight.dtype, torch.float32)
        self._grad_loss = torch.ones((), dtype=scalar, device=tokens_BS.device) / share
        self._outputs: list[torch.Tensor] = []
        self._embedded: list[torch.Tensor] = []
        self._grad_embedded: list[torch.Tensor] = []
        self.blocks: list[BlockPass] = []
        rotary = model.rotary(tokens_BS.shape[1])
        self._shared = {
            "lanes": schedule.lanes,
            "store": schedule.store,
            "grad_aux_loss": self._grad_loss,
        }
        for layer in model.layers:
            self._add(layer, rotary, lambda h: h)
        for k, module in enumerate(model.mtp, start=1):
            length = tokens_BS.shape[1] - k

            def enter(h, embedding, module=module, length=length):
                return module.mix(h[:, :length], embedding)

            self._add(module.block, (rotary[0][:length], rotary[1][:length]), enter, embedding=k)

    def _add(
        self,
        block: TransformerBlock,
        rotary: tuple[torch.Tensor, torch.Tensor],
        enter: Callable[..., torch.Tensor],
        embedding: int | None = None,
    ) -> None:
        """``embedding``: which of the model's embeddings the block gets besides the output of the one before."""
        before = self.blocks[-1] if self.blocks else None

        def take() -> list[torch.Tensor]:
            if before is None:
                return [self._embedded[0]]
            self._outputs.append(before.output())
            return [self._outputs[-1], *([] if embedding is None else [self._embedded[embedding]])]

        def give(grads: Sequence[torch.Tensor]) -> None:
            if before is not None:
                before.receive(grads[0])
                grads = grads[1:]
            self._grad_embedded = [*grads, *self._grad_embedded]  # the last block's comes first

        self.blocks.append(BlockPass(block, rotary, take=take, enter=enter, give=give, **self._shared))

    def begin(self) -> None:
        self._embedded = self._model.embed(self._tokens, self._targets)

    def end(self) -> None:
        """From the last hidden states to the losses."""
        model = self._model
        self._outputs.append(self.blocks[-1].output())
        last, *deeper = (each.requires_grad_() for each in self._outputs[len(model.layers) - 1 :])
        main_loss = token_loss(model.predict(last, model.final_norm), self._targets)
        mtp_loss = model.mtp_loss(deeper, self._targets) if deeper else torch.zeros_like(main_loss)
        loss = main_loss + model.config.mtp_loss_weight * mtp_loss
        aux_losses = [block.aux_loss for block in self.blocks if block.aux_loss is not None]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else torch.zeros_like(main_loss)
        self._end, self._outputs = ([last, *deeper], loss), []
        self.losses = Losses(*(each.detach() for each in (loss + aux_loss, main_loss, mtp_loss, aux_loss)))

    def begin_backward(self) -> None:
        leaves, loss = self._end
        torch.autograd.backward([loss], [self._grad_loss])
        for block, leaf in zip(self.blocks[-len(leaves) :], leaves, strict=True):
            block.receive(leaf.grad)
        self._end = None

    def end_backward(self) -> None:
        torch.autograd.backward(self._embedded, self._grad_embedded)
        self._embedded, self._grad_embedded, self.blocks = [], [], []
