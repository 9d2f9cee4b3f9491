"""Text for the recipes: which files, which part is held out, and which window a training sample is.

Three decisions are kept here and nowhere else:

- *Held out by file.* A file belongs to the training text or to the held-out text as a whole, decided by a hash of its
  first bytes and its size, so that the split depends on neither paths nor order. Identical files count once. With too
  few files for that, the tail of each file is held out instead. No window ever spans the two texts.
- *A sample is a function of (seed, step, index)*, index being its place in the global batch. The number of ranks, the
  micro-batches and a resumed run therefore see the same data in the same order.
- *Large files stay on disk*: `--data` files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import DataError

TOKEN_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32}
MIN_FILES_TO_SPLIT_BY_FILE = 40
_HEAD_BYTES = 4096


class Text:
    """Token ids of several pieces, read as if they were one: `len(text)` tokens, `text.window(start, length)`."""

    def __init__(self, pieces: Iterable[torch.Tensor]):
        self.pieces = [piece for piece in pieces if len(piece)]
        self._starts, total = [], 0
        for piece in self.pieces:
            self._starts.append(total)
            total += len(piece)
        self._len = total

    def __len__(self) -> int:
        return self._len

    def window(self, start: int, length: int) -> torch.Tensor:
        """Tokens [start, start + length) as int64 [length]. Raises IndexError outside the text."""
        if start < 0 or length < 0 or start + length > self._len:
            raise IndexError(f"window [{start}, {start + length}) is outside a text of {self._len} tokens")
        parts = []
        for piece, first in zip(self.pieces, self._starts, strict=True):
            low, high = max(start, first), min(start + length, first + len(piece))
            if low < high:
                parts.append(piece[low - first : high - first].to(torch.int64))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def windows(self, starts: Sequence[int], length: int) -> torch.Tensor:
        """One row per start: int64 [len(starts), length]."""
        if not starts:
            return torch.empty(0, length, dtype=torch.int64)
        return torch.stack([self.window(start, length) for start in starts])

    def fingerprint(self) -> str:
        """16 hex digits from the sizes and the first bytes of the pieces: says whether two runs read the same text."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(f"{len(piece)};".encode())
            digest.update(bytes(piece[:65536].to(torch.int32).view(torch.uint8).tolist()))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """A text in two parts that share no file (or, with few files, no position)."""

    name: str
    train: Text
    held_out: Text
    num_files: int

    def fingerprint(self) -> str:
        return f"{self.train.fingerprint()}-{self.held_out.fingerprint()}"

    def describe(self) -> str:
        return (
            f"{self.name}: {self.num_files} files, {len(self.train):,} tokens to train on, "
            f"{len(self.held_out):,} held out"
        )


def load_corpus(
    files: Sequence[str] = (),
    *,
    token_dtype: str = "uint8",
    held_out_fraction: float = 0.05,
    window: int = 1,
    vocab_size: int | None = None,
) -> Corpus:
    """The corpus of a run.

    files: paths of one's own text; folders are searched for files of any name. Empty: the running Python's own
      standard-library sources, which are on every machine.
    token_dtype: "uint8" reads bytes as they are; "uint16" or "int32" read raw little-endian token ids.
    held_out_fraction: share of the text kept for validation, in (0, 0.5].
    window: tokens of one sample; each part must hold at least one.
    vocab_size: ids must be below it (not checked where None).

    Raises DataError for a missing, empty or too small text, and for ids outside the vocabulary.
    """
    if token_dtype not in TOKEN_DTYPES:
        raise DataError(f"token_dtype is {token_dtype!r}; use one of {', '.join(TOKEN_DTYPES)}")
    if not 0.0 < held_out_fraction <= 0.5:
        raise DataError(f"held_out_fraction is {held_out_fraction}; it must be above 0 and at most 0.5")
    if files:
        name, pieces = "your files", [_map_file(path, token_dtype) for path in _expand(files)]
    else:
        if token_dtype != "uint8":
            raise DataError(f"token_dtype {token_dtype!r} needs --data FILES: the default text is bytes")
        name = f"standard library of Python {platform.python_version()}"
        pieces = read_standard_library()
    pieces = _drop_duplicates(pieces)
    train, held_out = split_held_out(pieces, held_out_fraction)
    if not files:  # Many small pieces in memory: one tensor each makes windows cheap to cut.
        train, held_out = [torch.cat(train)], [torch.cat(held_out)]
    corpus = Corpus(name, Text(train), Text(held_out), len(pieces))
    for part, text in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(text) < window:
            raise DataError(
                f"the {part} text of {name} has {len(text)} tokens, fewer than one window of {window}: "
                "give more text with --data, or a smaller --seq-len"
            )
        _check_vocabulary(text, vocab_size)
    return corpus


def read_standard_library(folder: str | os.PathLike | None = None) -> list[torch.Tensor]:
    """Every UTF-8 `.py` file under the running Python's standard library, sorted by path, as uint8 tensors.

    Installed packages and caches are left out. Files that aren't UTF-8 (some of the library's own tests) are too.
    Raises DataError where the interpreter ships without sources.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    pieces = []
    for directory, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped)
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            try:
                content = (Path(directory) / name).read_bytes()
                content.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if content:
                pieces.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    if not pieces:
        raise DataError(f"no Python sources under {root}: name text files with --data FILES")
    return pieces


def split_held_out(
    pieces: Sequence[torch.Tensor], fraction: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(training pieces, held-out pieces); see the module's docstring for the rule."""
    if len(pieces) >= MIN_FILES_TO_SPLIT_BY_FILE:
        sides: tuple[list, list] = ([], [])
        for piece in pieces:
            draw = int.from_bytes(_head_digest(piece)[:8], "big") / 2.0**64
            sides[draw < fraction].append(piece)
        # A few huge files can make the draw lopsided; then tails are the better split.
        share = sum(map(len, sides[1])) / max(1, sum(map(len, pieces)))
        if fraction / 3 <= share <= fraction * 3:
            return sides
    cuts = [len(piece) - int(len(piece) * fraction) for piece in pieces]
    return (
        [piece[:cut] for piece, cut in zip(pieces, cuts, strict=True)],
        [piece[cut:] for piece, cut in zip(pieces, cuts, strict=True)],
    )


def sample_start(text_len: int, window: int, *, seed: int, step: int, index: int) -> int:
    """Where the window of sample `index` of step `step` starts: uniform over [0, text_len - window]."""
    state = seed
    for value in (step, index):
        state = _mix64(state ^ _mix64(value + 0x9E3779B97F4A7C15))
    return state % (text_len - window + 1)


def training_batch(text: Text, window: int, *, seed: int, step: int, indices: Sequence[int]) -> torch.Tensor:
    """Windows of the samples `indices` of the global batch of `step`: int64 [len(indices), window]."""
    starts = [sample_start(len(text), window, seed=seed, step=step, index=index) for index in indices]
    return text.windows(starts, window)


def evaluation_starts(text_len: int, window: int, count: int) -> list[int]:
    """At most `count` starts of windows that don't overlap, spread evenly over the text: the same in every run."""
    available = text_len // window
    count = min(count, available)
    return [(i * available // count) * window for i in range(count)]


def _mix64(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that mixes well."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _expand(files: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for file in files:
        path = Path(file)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
            if not inside:
                raise DataError(f"--data {file}: the folder holds no file with content")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"--data {file}: no such file or folder")
    return paths


def _map_file(path: Path, token_dtype: str) -> torch.Tensor:
    dtype = TOKEN_DTYPES[token_dtype]
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"--data {path}: the file is empty")
    if size % dtype.itemsize:
        raise DataError(f"--data {path}: {size} bytes is no whole number of {token_dtype} tokens")
    return torch.from_file(str(path), shared=False, size=size // dtype.itemsize, dtype=dtype)


def _head_digest(piece: torch.Tensor) -> bytes:
    head = piece[:_HEAD_BYTES].to(torch.int32)
    return hashlib.sha256(f"{len(piece)};".encode() + bytes(head.view(torch.uint8).tolist())).digest()


def _drop_duplicates(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One of each set of equal pieces: a copy on the other side of the split would leak."""
    kept: dict[bytes, list[torch.Tensor]] = {}
    result = []
    for piece in pieces:
        same_head = kept.setdefault(_head_digest(piece), [])
        if not any(torch.equal(piece, other) for other in same_head):
            same_head.append(piece)
            result.append(piece)
    return result


def _check_vocabulary(text: Text, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    for piece in text.pieces:
        if piece.dtype == torch.uint8 and vocab_size >= 256:
            continue
        low, high = _extremes(piece)
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"the text holds token id {high if high >= vocab_size else low}, outside the vocabulary "
                f"[0, {vocab_size}): check --token-dtype and --vocab-size"
            )


def _extremes(piece: torch.Tensor, chunk: int = 1 << 24) -> tuple[int, int]:
    lows, highs = [], []
    for part in piece.split(chunk):
        part = part.to(torch.int64)
        lows.append(int(part.min()))
        highs.append(int(part.max()))
    return min(lows), max(highs)
