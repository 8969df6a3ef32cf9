"""Chains of byte strings, one chain a row, written for all rows at once.

A row's encoding is a chain of segments of varying length. The lengths give each segment its offset; then each
segment is written for all rows in one call, through a view of the buffer in which element i is the W bytes from
byte i on. Such a write is always W bytes wide: what goes beyond the segment's length is overwritten by the segments to
its right, which are written later. So they must together be long enough for that, and the last one must be exact.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Rows = NDArray[np.void]
Offsets = NDArray[np.int64]

SLACK = 1024
"""Room behind the last row for what the widest segment may spill."""


def windows(buffer: Bytes, width: int) -> Rows:
    """A view of a buffer in which element i is the `width` bytes from byte i on (overlapping)."""
    return np.ndarray((buffer.size - width + 1,), f"V{width}", buffer, 0, (1,))


class Buffer:
    """Scratch memory that grows and is used again: what was written is good until it is asked for again."""

    def __init__(self) -> None:
        self._bytes: Bytes = np.zeros(1 << 16, np.uint8)

    def room(self, size: int, keep: int = 0) -> Bytes:
        """At least `size` bytes and the slack, of which the first `keep` hold what they held."""
        if size + SLACK > len(self._bytes):
            grown = np.empty(2 * (size + SLACK), np.uint8)
            grown[:keep] = self._bytes[:keep]
            self._bytes = grown
        return self._bytes


class Scratch:
    """Where rows are gathered: memory that is used again, because fresh pages cost more than what is put there."""

    def __init__(self) -> None:
        self._rows: Rows = np.empty(0, "V1")

    def take(self, rows: Rows, numbers: NDArray[np.integer[Any]]) -> Rows:
        """Rows by number; good until the next call."""
        if self._rows.dtype != rows.dtype or len(self._rows) < len(numbers):
            self._rows = np.empty(2 * len(numbers), rows.dtype)
        # The numbers are known to be good; "clip" spares NumPy a copy that its own check would need.
        return np.take(rows, numbers, out=self._rows[: len(numbers)], mode="clip")


class Table:
    """Byte strings by small integer key, made when a key is first seen and kept.

    Keys from `limit` on are not kept but made each time, so that a rare huge key costs time and not memory.

    Args:
        build: makes the bytes of a key; no longer than `width`.
        width: bytes of a row.
        limit: keys below it are kept.
    """

    def __init__(self, build: Callable[[int], bytes], width: int, limit: int) -> None:
        self._build, self._width, self._limit = build, width, limit
        self._rows: Rows = np.zeros(0, f"V{width}")
        self._lengths = np.zeros(0, np.int64)  # -1: not made yet
        self._grow(min(limit, 1024))

    def _grow(self, size: int) -> None:
        added = size - len(self._rows)
        self._rows = np.concatenate([self._rows, np.zeros(added, self._rows.dtype)])
        self._lengths = np.concatenate([self._lengths, np.full(added, -1, np.int64)])

    def _make(self, at: int, key: int) -> None:
        made = self._build(key)
        self._rows[at] = np.frombuffer(made.ljust(self._width, b"\0"), self._rows.dtype)[0]
        self._lengths[at] = len(made)

    def segment(self, keys: NDArray[np.integer[Any]]) -> "Segment":
        """The rows of keys, whole, and their lengths; rows that are not there are made."""
        highest = int(keys.max(initial=0))
        if highest >= self._limit:
            keys = self._overflow(keys)
        elif highest >= len(self._rows):
            self._grow(min(self._limit, 2 * (highest + 1)))
        lengths: Offsets = self._lengths[keys]
        if len(lengths) and lengths.min() < 0:
            for key in np.unique(keys[lengths < 0]).tolist():
                self._make(key, key)
            lengths = self._lengths[keys]
        rows: Rows = self._rows[keys]
        return rows, lengths

    def _overflow(self, keys: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Make the keys beyond the limit, behind it, for this once."""
        numbers = keys.astype(np.int64)
        beyond = numbers >= self._limit
        rare, inverse = np.unique(numbers[beyond], return_inverse=True)
        if self._limit + len(rare) > len(self._rows):
            self._grow(self._limit + len(rare))
        for offset, key in enumerate(rare.tolist()):
            self._make(self._limit + offset, key)
        numbers[beyond] = self._limit + inverse
        return numbers


def narrow(rows: Rows, width: int) -> Rows:
    """A view of the first `width` bytes of each row."""
    return np.ndarray((len(rows),), f"V{width}", rows, 0, (rows.dtype.itemsize,))


Segment = tuple[Rows, Offsets]
"""One piece of every row: its bytes (dtype V<w>, shape (n,) or (1,) for the same everywhere) and its lengths (int64,
shape alike). A row that lacks the piece has length 0."""


def constant(text: bytes) -> Segment:
    """A piece that is the same in every row."""
    return np.frombuffer(text or b"\0", f"V{max(1, len(text))}"), np.array([len(text)])


def assemble(buffer: Buffer, segments: list[Segment], rows: int) -> tuple[memoryview, Offsets]:
    """Chain segments from left to right, for all rows.

    Takes care by itself of spills that what follows would not cover: such a segment is written in groups of one length.

    Returns:
        The bytes, and where each row ends (int64, shape (rows,)).
    """
    total = np.zeros(rows, np.int64)
    for _, lengths in segments:
        total += lengths
    ends = np.cumsum(total)
    at = ends - total
    if not rows:
        return memoryview(b""), ends
    size = int(ends[-1])
    memory = buffer.room(size)
    following = sum(int(lengths.min()) for _, lengths in segments)
    for pieces, lengths in segments:
        shortest, widest = int(lengths.min()), int(lengths.max())
        following -= shortest
        if widest and widest - shortest <= following:
            windows(memory, widest)[at] = narrow(pieces, widest)
        elif widest:
            everywhere = np.broadcast_to(lengths, (rows,))
            for length in np.unique(everywhere).tolist():
                if length:
                    chosen = np.nonzero(everywhere == length)[0]
                    piece = narrow(pieces, length)
                    windows(memory, length)[at[chosen]] = piece if len(piece) == 1 else piece[chosen]
        at += lengths
    return memory.data[:size], ends


_FOUR_DIGITS = np.frombuffer(b"".join(b"%04d" % number for number in range(10_000)), "<u4")


def decimals(numbers: NDArray[np.uint64]) -> Segment:
    """Numbers in decimal, without leading zeros."""
    digits = np.empty((len(numbers), 5), "<u4")
    rest = numbers.astype(np.uint64)
    for group in range(4, -1, -1):
        rest, low = np.divmod(rest, np.uint64(10_000))
        digits[:, group] = _FOUR_DIGITS[low]
    text = digits.view(np.uint8).reshape(len(numbers), 20)
    lengths = np.full(len(numbers), 20, np.int64)
    lengths -= np.argmax(text != ord("0"), axis=1)
    lengths[numbers == 0] = 1
    left = np.empty_like(text)
    for length in np.unique(lengths).tolist():
        chosen = lengths == length
        left[chosen, :length] = text[chosen, 20 - length :]
    return left.view("V20").ravel(), lengths


def nine_digits(numbers: NDArray[np.uint64]) -> Rows:
    """Numbers below 10^9 as nine digits each (dtype V9)."""
    high, low = np.divmod(numbers.astype(np.uint64), np.uint64(10_000))
    first, middle = np.divmod(high, np.uint64(10_000))
    text = np.empty((len(numbers), 9), np.uint8)
    text[:, 0] = first + ord("0")
    for at, part in ((1, middle), (5, low)):
        text[:, at : at + 4] = _FOUR_DIGITS[part].view(np.uint8).reshape(len(numbers), 4)
    return text.view("V9").ravel()
