"""Connection keys to slots: a hash table in NumPy arrays, looked up for a whole batch at once by index.c."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.batch import KEY_BYTES, KEY_OFFSET, RECORD

WORDS = KEY_BYTES // 8
_EMPTY, _REMOVED = -1, -2
_SPARSE = 16  # buckets for each key, of four bytes

Keys = NDArray[np.uint64]
"""Keys by word: shape (n, 5)."""


def keys_of(records: NDArray[Any]) -> Keys:
    """The keys of records (dtype RECORD, shape (n,), contiguous): a view of shape (n, 5)."""
    words = records.view(np.uint64).reshape(len(records), RECORD.itemsize // 8)
    first = KEY_OFFSET // 8
    return words[:, first : first + WORDS]


def hashes_of(keys: Keys) -> NDArray[np.uint64]:
    """A hash of each key (uint64, shape (n,))."""
    hashes = np.empty(len(keys), np.uint64)
    native.library.tcpio_hash(keys, keys.strides[0], len(keys), hashes)
    return hashes


class Index:
    """Open addressing with linear probing; a slot holds one key, and every key has one slot.

    Slots are small integers that the caller hands out. Grows by itself; stays mostly empty, so that nearly every
    key is found at its first bucket.
    """

    def __init__(self, slots: int = 1024) -> None:
        self._keys: Keys = np.zeros((slots, WORDS), np.uint64)
        self._buckets = np.full(_SPARSE * slots, _EMPTY, np.int32)
        self._where = np.full(slots, _EMPTY, np.int64)  # the bucket of each slot
        self._used = 0  # buckets that are not empty, removed ones included

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The slot of each key (int64, shape (n,)), -1 where there is none."""
        slots = np.empty(len(keys), np.int64)
        buckets = self._buckets
        native.library.tcpio_find(keys, keys.strides[0], len(keys), buckets, len(buckets) - 1, self._keys, slots)
        return slots

    def insert(self, key: tuple[int, ...], slot: int) -> None:
        """Give a key that is not in the table its slot."""
        while slot >= len(self._keys):
            self._grow_slots()
        if _SPARSE // 2 * (self._used + 1) > len(self._buckets):
            self._rebuild()
        self._keys[slot] = key
        self._place(slot, int(hashes_of(self._keys[slot : slot + 1])[0]))

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
        self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)])
        self._where = np.concatenate([self._where, np.full_like(self._where, _EMPTY)])

    def _rebuild(self) -> None:
        """Sweep removed buckets out, and double the table if it is full of live ones."""
        live = np.nonzero(self._where != _EMPTY)[0]
        size = len(self._buckets)
        while _SPARSE * (len(live) + 1) > size:
            size *= 2
        self._buckets = np.full(size, _EMPTY, np.int32)
        self._used = 0
        for slot, hashed in zip(live.tolist(), hashes_of(self._keys[live]).tolist(), strict=True):
            self._place(slot, hashed)
