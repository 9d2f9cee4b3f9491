"""The byte-bigram line against a count by hand."""

import math

import pytest
import torch

from moe_ep.recipes.bigram import ByteBigram, bits
from moe_ep.recipes.data import Text


def text_of(*strings: bytes) -> Text:
    return Text([torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in strings])


def test_against_a_count_by_hand():
    # "abab": ab twice, ba once; "ac" adds ac. Pairs don't span files: there is no "ba" from the join.
    bigram = ByteBigram.fit(text_of(b"abab", b"ac"))
    a, b, c = b"abc"
    assert bigram.log_probs[a, b].exp().item() == pytest.approx((2 + 1) / (3 + 256))
    assert bigram.log_probs[a, c].exp().item() == pytest.approx((1 + 1) / (3 + 256))
    assert bigram.log_probs[b, a].exp().item() == pytest.approx((1 + 1) / (1 + 256))
    assert bigram.log_probs[c, a].exp().item() == pytest.approx(1 / 256)
    # The windows "aba" and "bac", two predictions each.
    by_hand = -(math.log(3 / 259) + math.log(2 / 257) + math.log(2 / 257) + math.log(2 / 259)) / 4
    assert bigram.cross_entropy(text_of(b"ababac"), [0, 3], 2) == pytest.approx(by_hand)


def test_every_row_is_a_distribution_and_chunks_do_not_matter():
    text = text_of(bytes(range(256)) * 20)
    whole, pieces = ByteBigram.fit(text), ByteBigram.fit(text, chunk=37)
    assert torch.equal(whole.log_probs, pieces.log_probs)
    torch.testing.assert_close(whole.log_probs.exp().sum(1), torch.ones(256, dtype=torch.float64))


def test_tokens_wider_than_a_byte_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        ByteBigram.fit(Text([torch.arange(9, dtype=torch.int32)]))


def test_bits():
    assert bits(math.log(8)) == pytest.approx(3.0)
