"""The line to beat: a byte-bigram model, counted, smoothed, and measured on the windows the model is measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .data import Text

VOCABULARY = 256


class ByteBigram:
    """p(next byte b | byte a) = (count(a, b) + 1) / (count(a) + 256): counts with add-one smoothing.

    log_probs: float64 [256, 256], natural logarithms, row = the byte before.
    """

    def __init__(self, counts: torch.Tensor):
        """counts: int64 [256, 256], how often byte b follows byte a."""
        smoothed = counts.to(torch.float64) + 1.0
        self.log_probs = (smoothed / smoothed.sum(dim=1, keepdim=True)).log()

    @classmethod
    def fit(cls, text: Text, chunk: int = 1 << 22) -> ByteBigram:
        """Count every adjacent pair inside the pieces of `text` (uint8 tokens)."""
        counts = torch.zeros(VOCABULARY * VOCABULARY, dtype=torch.int64)
        for piece in text.pieces:
            if piece.dtype != torch.uint8:
                raise ValueError(f"a byte-bigram needs uint8 tokens, the text has {piece.dtype}")
            for first in range(0, len(piece) - 1, chunk):
                part = piece[first : first + chunk + 1].to(torch.int64)
                counts += torch.bincount(part[:-1] * VOCABULARY + part[1:], minlength=VOCABULARY * VOCABULARY)
        return cls(counts.view(VOCABULARY, VOCABULARY))

    def cross_entropy(self, text: Text, starts: Sequence[int], seq_len: int) -> float:
        """Mean nats per byte over the windows [start, start + seq_len + 1): seq_len predictions in each.

        These are the predictions the model's validation loss averages, so that the two numbers compare.
        """
        total = 0.0
        for start in starts:
            window = text.window(start, seq_len + 1)
            total -= float(self.log_probs[window[:-1], window[1:]].sum())
        return total / (len(starts) * seq_len)


def bits(nats: float) -> float:
    """Nats per byte as bits per byte."""
    return nats / math.log(2.0)
