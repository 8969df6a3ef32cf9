"""Items to requests: gathered until they are many, large, or old enough."""

from collections.abc import Iterator

import numpy as np

from tcpio_otel.payload import Items, Request, Signal, Wrap

LENGTHS_BYTES = 8
"""By which the two lengths in an envelope can grow: protobuf's take one byte when nothing is in it, five at most."""


class Batcher:
    """Gathers the items of one signal.

    Args:
        signal: what the items are.
        wrap: puts the request around them.
        max_bytes: of a request, uncompressed and wrapped.
        max_items: of a request.
        max_age_ns: how long an item waits for others.
        packets: whether each item is a packet record of the ledger.
    """

    def __init__(
        self,
        signal: Signal,
        wrap: Wrap,
        *,
        max_bytes: int,
        max_items: int,
        max_age_ns: int,
        packets: bool = False,
    ) -> None:
        self._signal, self._wrap, self._packets = signal, wrap, packets
        self._room_bytes = max_bytes - len(wrap([], 0)) - LENGTHS_BYTES
        self._max_items, self._max_age_ns = max_items, max_age_ns
        self._runs: list[memoryview] = []
        self._bytes = self._items = 0
        self._since_ns = 0
        self.too_large = 0

    @property
    def held(self) -> int:
        """Items that wait for others."""
        return self._items

    def add(self, items: Items, now_ns: int) -> Iterator[Request]:
        """Take items in and yield the requests that are full; items too large for any request are counted and left.

        The items' buffer may be used again once the iterator is exhausted.
        """
        start, position, ends = 0, 0, items.ends
        while position < len(ends):
            if not self._items:
                self._since_ns = now_ns
            room = min(self._max_items - self._items, len(ends) - position)
            fits = int(
                np.searchsorted(ends[position : position + room], start + self._room_bytes - self._bytes, "right")
            )
            if fits:
                end = int(ends[position + fits - 1])
                self._runs.append(items.buffer[start:end])
                self._bytes += end - start
                self._items += fits
                start, position = end, position + fits
                if self._items == self._max_items:
                    yield self._request()
            elif self._items:
                yield self._request()
            else:
                start = int(ends[position])
                position += 1
                self.too_large += 1
        if self._runs:
            # Only what stays behind is copied; a full request was made from the buffer itself.
            self._runs = [memoryview(bytes(run)) if run.obj is items.buffer.obj else run for run in self._runs]

    def poll(self, now_ns: int) -> Iterator[Request]:
        """The request that is old enough, if there is one."""
        if self._items and now_ns - self._since_ns >= self._max_age_ns:
            yield self._request()

    def flush(self) -> Iterator[Request]:
        """Whatever is held."""
        if self._items:
            yield self._request()

    def _request(self) -> Request:
        body = self._wrap(self._runs, self._bytes)
        request = Request(self._signal, body, self._items, self._items if self._packets else 0)
        self._runs, self._bytes, self._items = [], 0, 0
        return request
