"""Connection keys to slots: a hash table in NumPy, looked up for a whole batch at once."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import KEY_BYTES, KEY_OFFSET, RECORD

WORDS = KEY_BYTES // 8
_MIXERS = (
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0xD6E8FEB86659FD93,
    0xFF51AFD7ED558CCD,
)
_EMPTY, _REMOVED = -1, -2
_SPARSE = 16  # buckets for each key, of four bytes

Keys = NDArray[np.uint64]
"""Keys by word: shape (5, n)."""


def keys_of(records: NDArray[Any]) -> Keys:
    """The keys of records (dtype RECORD, shape (n,), contiguous), as shape (5, n)."""
    words = records.view(np.uint64).reshape(len(records), RECORD.itemsize // 8)
    first = KEY_OFFSET // 8
    return np.ascontiguousarray(words[:, first : first + WORDS].T)


def hashes_of(keys: Keys) -> NDArray[np.uint64]:
    """A hash of each key (uint64, shape (n,))."""
    mixed: NDArray[np.uint64] = keys[0] * np.uint64(_MIXERS[0])
    for word, mixer in zip(keys[1:], _MIXERS[1:], strict=True):
        mixed ^= word
        mixed *= np.uint64(mixer)
        mixed ^= mixed >> np.uint64(29)
    return mixed


class Index:
    """Open addressing with linear probing; a slot holds one key, and every key has one slot.

    Slots are small integers that the caller hands out. Grows by itself; stays mostly empty, so that
    nearly every key is found at its first bucket, and a batch is not walked again for a few that are not.
    """

    def __init__(self, slots: int = 1024) -> None:
        self._keys: Keys = np.zeros((WORDS, slots), np.uint64)
        self._buckets = np.full(_SPARSE * slots, _EMPTY, np.int32)
        self._where = np.full(slots, _EMPTY, np.int64)  # the bucket of each slot
        self._used = 0  # buckets that are not empty, removed ones included

    def find(self, keys: Keys, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The slot of each key (int64, shape (n,)), -1 where there is none; `hashes` are those of the keys."""
        mask = len(self._buckets) - 1
        at = (hashes >> np.uint64(20)).astype(np.int64) & mask
        found: NDArray[np.int64] = self._buckets[at].astype(np.int64)
        wrong = np.zeros(len(at), np.uint64)
        slots = np.maximum(found, 0)
        for mine, theirs in zip(keys, self._keys, strict=True):
            wrong |= mine ^ theirs[slots]
        pending = np.nonzero((found != _EMPTY) & ((wrong != 0) | (found == _REMOVED)))[0]
        while len(pending):
            at[pending] = (at[pending] + 1) & mask
            candidates = self._buckets[at[pending]].astype(np.int64)
            found[pending] = candidates
            slots = np.maximum(candidates, 0)
            differs = (keys[:, pending] != self._keys[:, slots]).any(axis=0)
            pending = pending[(candidates != _EMPTY) & (differs | (candidates == _REMOVED))]
        return found

    def insert(self, key: tuple[int, ...], hashed: int, slot: int) -> None:
        """Give a key that is not in the table its slot."""
        while slot >= self._keys.shape[1]:
            self._grow_slots()
        if _SPARSE // 2 * (self._used + 1) > len(self._buckets):
            self._rebuild()
        self._keys[:, slot] = key
        self._place(slot, hashed)

    def remove(self, slot: int) -> None:
        """Forget the key of a slot; nothing happens when it has none."""
        bucket = int(self._where[slot])
        if bucket != _EMPTY:
            self._buckets[bucket] = _REMOVED
            self._where[slot] = _EMPTY

    def _place(self, slot: int, hashed: int) -> None:
        mask = len(self._buckets) - 1
        at = (hashed >> 20) & mask
        while self._buckets[at] >= 0:
            at = (at + 1) & mask
        self._used += int(self._buckets[at]) == _EMPTY
        self._buckets[at] = slot
        self._where[slot] = at

    def _grow_slots(self) -> None:
        added = self._keys.shape[1]
        self._keys = np.concatenate([self._keys, np.zeros((WORDS, added), np.uint64)], axis=1)
        self._where = np.concatenate([self._where, np.full(added, _EMPTY, np.int64)])

    def _rebuild(self) -> None:
        """Sweep removed buckets out, and double the table if it is full of live ones."""
        live = np.nonzero(self._where != _EMPTY)[0]
        size = len(self._buckets)
        while _SPARSE * (len(live) + 1) > size:
            size *= 2
        self._buckets = np.full(size, _EMPTY, np.int32)
        self._used = 0
        for slot, hashed in zip(live.tolist(), hashes_of(self._keys[:, live]).tolist(), strict=True):
            self._place(slot, hashed)
