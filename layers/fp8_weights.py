"""Copies of weights in FP8: made for each product, kept until the weights change, or shared by some products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from moe_ep.streams import named_range

from .fp8_quantize import Fp8Weight, quantize_weight
from .weight_gradients import Weights

Value = TypeVar("Value")

Key = list[tuple[int, int]]
"""Address and version of each weight."""

_QUANTIZE = "moe_ep.experts.quantize_weight"

PIECE_BYTES = 256 << 20
"""Of weights in FP8 that are not kept, in the backward, which needs the most memory: as many experts at a time."""


class QuantizedWeight:
    """The weights of L experts in FP8, made when they are asked for.

    ``keep``: until a weight changes, which its version tells (changes through ``.data`` don't raise that: call
    `forget` then); FP8 copies for forward and backward take as much memory as the weights in bfloat16. Otherwise they
    are made for every product and dropped after it.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._key: Key | None = None
        self._kept: tuple[Fp8Weight | None, Fp8Weight | None] = (None, None)
        self._prepared: tuple[Key, Fp8Weight] | None = None

    def prepare(self, *weights: torch.Tensor, trained: bool) -> None:
        """Make what `for_forward` will be asked for next, on the current stream."""
        self._prepared = None  # memory first
        self._prepared = _key_of(weights), self.for_forward(*weights, trained=trained)

    def for_forward(self, *weights: torch.Tensor, trained: bool) -> Fp8Weight:
        """``[L, O, I]``; ``trained``: a backward will follow."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == _key_of(weights):
            return prepared[1]
        if self.keep:
            return self._kept_for(weights, 0, trained)
        with torch.no_grad(), named_range(_QUANTIZE):
            return quantize_weight(*weights)[0]

    def for_backward(self, *weights: torch.Tensor) -> Iterator[tuple[int, Fp8Weight]]:
        """``[L, I, O]`` in pieces: the number of each one's first expert, and their weights."""
        if self.keep:
            yield 0, self._kept_for(weights, 1, True)
            return
        matrices = weights[0] if weights[0].dim() == 3 else weights
        size = max(1, PIECE_BYTES // matrices[0].numel())
        for first in range(0, len(matrices), size):
            piece = matrices[first : first + size]
            piece = (piece,) if isinstance(piece, torch.Tensor) else piece
            with torch.no_grad(), named_range(_QUANTIZE):
                _, quantized = quantize_weight(*piece, rows=False, transposed=True)
            yield first, quantized
            del quantized  # memory first

    def forget(self) -> None:
        self._key, self._kept, self._prepared = None, (None, None), None

    def _kept_for(self, weights: Weights, which: int, both: bool) -> Fp8Weight:
        key = _key_of(weights)
        if key != self._key or self._kept[which] is None:
            self.forget()  # memory first
            with torch.no_grad(), named_range(_QUANTIZE):
                self._kept = quantize_weight(*weights, transposed=both)
            self._key = key
        return self._kept[which]


def _key_of(weights: Weights) -> Key:
    return [(weight.data_ptr(), weight._version) for weight in weights]


class SharedWeight:
    """A `QuantizedWeight` for ``uses`` products of one graph, which share its copies: one in the forward, from the
    first product to the last, and one in the backward.
    """

    def __init__(self, weight: QuantizedWeight, uses: int) -> None:
        self._weight = weight
        self._forward: _ForUses[Fp8Weight] = _ForUses(uses)
        self._backward: _ForUses[list[tuple[int, Fp8Weight]]] = _ForUses(uses)

    def prepare(self, *weights: torch.Tensor, trained: bool) -> None:
        """As `QuantizedWeight.prepare`."""
        self._forward.prepare(lambda: self._weight.for_forward(*weights, trained=trained))

    def for_forward(self, *weights: torch.Tensor, trained: bool) -> Fp8Weight:
        """As `QuantizedWeight.for_forward`."""
        self.prepare(*weights, trained=trained)
        return self._forward.take()

    def for_backward(self, *weights: torch.Tensor) -> Iterator[tuple[int, Fp8Weight]]:
        """As `QuantizedWeight.for_backward`."""
        self._backward.prepare(lambda: list(self._weight.for_backward(*weights)))
        return iter(self._backward.take())


class _ForUses(Generic[Value]):
    """A value that is dropped when it has been taken ``uses`` times; the next is made then."""

    def __init__(self, uses: int) -> None:
        self._uses, self._left = uses, 0
        self._value: Value | None = None

    def prepare(self, make: Callable[[], Value]) -> None:
        """``make`` it, unless it is there."""
        if self._left == 0:
            self._value, self._left = make(), self._uses

    def take(self) -> Value:
        value, self._left = self._value, self._left - 1
        if self._left == 0:
            self._value = None
        return value


AnyWeight = QuantizedWeight | SharedWeight


class Fp8Weights:
    """Both weights of a set of experts."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.gate_up, self.down = QuantizedWeight(keep), QuantizedWeight(keep)

    def shared(self, uses: int) -> SharedWeights:
        """For ``uses`` calls of the experts in one graph, and their backward."""
        return SharedWeights(SharedWeight(self.gate_up, uses), SharedWeight(self.down, uses))

    def forget(self) -> None:
        self.gate_up.forget()
        self.down.forget()


@dataclass(frozen=True)
class SharedWeights:
    """The same, shared by some calls."""

    gate_up: SharedWeight
    down: SharedWeight
