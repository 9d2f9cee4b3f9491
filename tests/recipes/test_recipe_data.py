"""The text: what is read, what is held out, which window a sample is."""

import itertools

import pytest
import torch

from moe_ep.recipes.data import (
    MIN_FILES_TO_SPLIT_BY_FILE,
    Text,
    evaluation_starts,
    load_corpus,
    read_standard_library,
    sample_start,
    split_held_out,
    training_batch,
)
from moe_ep.recipes.errors import DataError


def pieces_of(count, length=100):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator) for _ in range(count)]


def test_text_reads_across_pieces():
    text = Text([torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([4, 5], dtype=torch.uint8)])
    assert len(text) == 5
    assert text.window(1, 3).tolist() == [2, 3, 4]
    assert text.windows([0, 3], 2).tolist() == [[1, 2], [4, 5]]
    assert text.windows([], 2).shape == (0, 2)
    with pytest.raises(IndexError, match="outside a text of 5"):
        text.window(3, 3)


def test_files_are_held_out_whole_and_regardless_of_order():
    pieces = pieces_of(400)
    train, held_out = split_held_out(pieces, 0.1)
    assert len(train) + len(held_out) == 400
    assert 15 <= len(held_out) <= 70
    again = split_held_out(pieces[::-1], 0.1)[1][::-1]
    assert all(torch.equal(a, b) for a, b in zip(held_out, again, strict=True))


def test_few_files_give_their_tails():
    pieces = pieces_of(3, 1000)
    train, held_out = split_held_out(pieces, 0.05)
    for whole, front, tail in zip(pieces, train, held_out, strict=True):
        assert (len(front), len(tail)) == (950, 50)
        assert torch.equal(torch.cat([front, tail]), whole)


def test_copies_of_a_file_do_not_leak(tmp_path):
    for number, piece in enumerate(pieces_of(MIN_FILES_TO_SPLIT_BY_FILE * 2, 200)):
        for copy in range(2):
            (tmp_path / f"{number}-{copy}").write_bytes(bytes(piece.tolist()))
    corpus = load_corpus([str(tmp_path)], held_out_fraction=0.2, window=10)
    assert corpus.num_files == MIN_FILES_TO_SPLIT_BY_FILE * 2
    train = {bytes(piece.tolist()) for piece in corpus.train.pieces}
    assert not train & {bytes(piece.tolist()) for piece in corpus.held_out.pieces}
    assert len(corpus.held_out) > 0


def test_standard_library_skips_packages_caches_and_other_encodings(tmp_path):
    for name, content in {
        "b.py": b"b = 1\n",
        "a.py": b"a = 1\n",
        "latin.py": b"# \xe9\n",
        "empty.py": b"",
        "notes.txt": b"no\n",
        "site-packages/x.py": b"no\n",
        "__pycache__/y.py": b"no\n",
        "sub/c.py": b"c = 1\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    read = [bytes(piece.tolist()) for piece in read_standard_library(tmp_path)]
    assert read == [b"a = 1\n", b"b = 1\n", b"c = 1\n"]
    with pytest.raises(DataError, match="--data"):
        read_standard_library(tmp_path / "sub" / "nothing")


def test_default_corpus_is_real_and_repeatable():
    corpus = load_corpus(window=129, vocab_size=256)
    assert len(corpus.train) > 4_000_000
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.2
    assert "def " in bytes(corpus.held_out.window(0, 20_000).tolist()).decode("utf-8", errors="replace")
    assert load_corpus(window=129).fingerprint() == corpus.fingerprint()


def test_samples_depend_on_seed_step_and_index_only():
    text = Text(pieces_of(3, 5000))
    whole = training_batch(text, 9, seed=5, step=7, indices=range(8))
    shares = [training_batch(text, 9, seed=5, step=7, indices=range(r, 8, 2)) for r in range(2)]
    assert torch.equal(whole[0::2], shares[0]) and torch.equal(whole[1::2], shares[1])
    for other in ({"seed": 6, "step": 7}, {"seed": 5, "step": 8}):
        assert not torch.equal(training_batch(text, 9, indices=range(8), **other), whole)


def test_sample_starts_cover_the_text_evenly():
    starts = [sample_start(1009, 10, seed=0, step=s, index=i) for s in range(200) for i in range(50)]
    assert min(starts) == 0 and max(starts) == 999
    counts = torch.histc(torch.tensor(starts, dtype=torch.float32), bins=10, min=0, max=1000)
    assert counts.min() > 850 and counts.max() < 1150  # 1000 each, 5 standard deviations


def test_evaluation_windows_do_not_overlap():
    starts = evaluation_starts(1000, 17, 20)
    assert len(starts) == 20 and starts[0] == 0
    assert all(b - a >= 17 for a, b in itertools.pairwise(starts))
    assert starts[-1] + 17 <= 1000
    assert len(evaluation_starts(100, 17, 20)) == 5


def test_token_files(tmp_path):
    ids = torch.arange(1000, dtype=torch.int32) % 700
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(ids.to(torch.int16).view(torch.uint8).tolist()))
    corpus = load_corpus([str(path)], token_dtype="uint16", window=10, vocab_size=700)
    assert corpus.train.window(300, 5).tolist() == [300, 301, 302, 303, 304]
    with pytest.raises(DataError, match=r"token id 699.*\[0, 600\)"):
        load_corpus([str(path)], token_dtype="uint16", window=10, vocab_size=600)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda d: [d / "absent"], {}, "no such file"),
        (lambda d: [d], {}, "holds no file"),
        (lambda d: [_file(d, b"")], {}, "is empty"),
        (lambda d: [_file(d, b"abc")], {"token_dtype": "uint16"}, "no whole number of uint16"),
        (lambda d: [_file(d, b"abc" * 20)], {"window": 50}, "fewer than one window of 50"),
        (lambda d: [_file(d, b"abc" * 20)], {"held_out_fraction": 0.9}, "held_out_fraction is 0.9"),
        (lambda d: [_file(d, b"abc" * 20)], {"token_dtype": "int8"}, "uint8, uint16, int32"),
        (lambda d: [_file(d, b"abc" * 20)], {"vocab_size": 99}, "outside the vocabulary"),
        (lambda d: [], {"token_dtype": "int32"}, "needs --data"),
    ],
)
def test_bad_text_is_explained(tmp_path, make, options, message):
    with pytest.raises(DataError, match=message):
        load_corpus([str(path) for path in make(tmp_path)], **options)


def _file(folder, content):
    path = folder / "text"
    path.write_bytes(content)
    return path
