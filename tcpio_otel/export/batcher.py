"""Items to requests: gathered until they are many, large, or old enough."""

from collections.abc import Iterator

import numpy as np

from tcpio_otel.payload import Envelope, Items, Part, Request, Signal


class Batcher:
    """Gathers the items of one signal.

    Args:
        signal: what the items are.
        envelope: puts the request around them.
        max_bytes: of a request, uncompressed and wrapped.
        max_items: of a request.
        max_age_ns: how long an item waits for others.
        packets: whether each item is a packet record of the ledger.
    """

    def __init__(
        self,
        signal: Signal,
        envelope: Envelope,
        *,
        max_bytes: int,
        max_items: int,
        max_age_ns: int,
        packets: bool = False,
    ) -> None:
        self._signal, self._envelope, self._packets = signal, envelope, packets
        self._max_bytes, self._max_items, self._max_age_ns = max_bytes, max_items, max_age_ns
        self._parts: dict[int, Part] = {}  # by resource
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
        for resource, last in items.grouped():
            overhead = self._envelope.overhead_bytes(resource)
            while position < last:
                if not self._items:
                    self._since_ns = now_ns
                room = min(self._max_items - self._items, last - position)
                free = self._max_bytes - self._bytes - (0 if resource in self._parts else overhead)
                fits = int(np.searchsorted(ends[position : position + room], start + free, "right"))
                if fits:
                    end = int(ends[position + fits - 1])
                    self._take(resource, overhead, items.buffer[start:end], fits)
                    start, position = end, position + fits
                    if self._items == self._max_items:
                        yield self._request()
                elif self._items:
                    yield self._request()
                else:
                    start = int(ends[position])
                    position += 1
                    self.too_large += 1
        for part in self._parts.values():
            # Only what stays behind is copied; a full request was made from the buffer itself.
            part.runs[:] = [memoryview(bytes(run)) if run.obj is items.buffer.obj else run for run in part.runs]

    def _take(self, resource: int, overhead: int, run: memoryview, count: int) -> None:
        part = self._parts.get(resource)
        if part is None:
            part = Part(resource, [], 0)
            self._bytes += overhead
        part.runs.append(run)
        self._parts[resource] = part._replace(length=part.length + len(run))
        self._bytes += len(run)
        self._items += count

    def poll(self, now_ns: int) -> Iterator[Request]:
        """The request that is old enough, if there is one."""
        if self._items and now_ns - self._since_ns >= self._max_age_ns:
            yield self._request()

    def flush(self) -> Iterator[Request]:
        """Whatever is held."""
        if self._items:
            yield self._request()

    def _request(self) -> Request:
        body = self._envelope.wrap(list(self._parts.values()))
        request = Request(self._signal, body, self._items, self._items if self._packets else 0)
        self._parts, self._bytes, self._items = {}, 0, 0
        return request
