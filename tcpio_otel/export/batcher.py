"""Items to requests: gathered until they are many, large, or old enough."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tcpio_otel.payload import Envelope, Items, Part, Request, Signal, always

GROWTH_BYTES = 1 << 15
"""By which a Resource may grow while something waits for it."""


@dataclass(slots=True)
class _Waiting:
    """What waits about one resource: how many items it is, and what its Resource adds to them."""

    part: Part
    items: int
    overhead: int


class Batcher:
    """Gathers the items of one signal.

    Args:
        signal: what the items are.
        envelope: puts the request around them.
        max_bytes: of a request, uncompressed and wrapped.
        max_items: of a request.
        max_age_ns: how long an item waits for others.
        packets: whether each item is a packet record of the ledger.
        ready: whether a resource can be told; what is about another waits, while there is room for others.
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
        ready: Callable[[int], bool] = always,
    ) -> None:
        self._signal, self._envelope, self._packets, self._ready = signal, envelope, packets, ready
        self._max_bytes, self._max_items, self._max_age_ns = max_bytes, max_items, max_age_ns
        self._waiting: dict[int, _Waiting] = {}  # by resource
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
            overhead = self._overhead_bytes(resource)
            while position < last:
                if not self._items:
                    self._since_ns = now_ns
                room = min(self._max_items - self._items, last - position)
                free = self._max_bytes - self._bytes - (0 if resource in self._waiting else overhead)
                fits = int(np.searchsorted(ends[position : position + room], start + free, "right"))
                if fits:
                    end = int(ends[position + fits - 1])
                    self._take(resource, overhead, items.buffer[start:end], fits)
                    start, position = end, position + fits
                    if self._items == self._max_items:
                        yield self._full(now_ns)
                elif self._items:
                    yield self._full(now_ns)
                else:
                    start = int(ends[position])
                    position += 1
                    self.too_large += 1
        for waiting in self._waiting.values():
            # Only what stays behind is copied; a full request was made from the buffer itself.
            runs = waiting.part.runs
            runs[:] = [memoryview(bytes(run)) if run.obj is items.buffer.obj else run for run in runs]

    def _overhead_bytes(self, resource: int) -> int:
        """With room for what a Resource may be longer once more is known of it."""
        growth = 0 if self._ready(resource) else min(GROWTH_BYTES, self._max_bytes // 8)
        return self._envelope.overhead_bytes(resource) + growth

    def _take(self, resource: int, overhead: int, run: memoryview, count: int) -> None:
        if (waiting := self._waiting.get(resource)) is None:
            waiting = self._waiting[resource] = _Waiting(Part(resource, [], 0), 0, overhead)
            self._bytes += overhead
        part = waiting.part
        part.runs.append(run)
        waiting.part = part._replace(length=part.length + len(run))
        waiting.items += count
        self._bytes += len(run)
        self._items += count

    def poll(self, now_ns: int) -> Iterator[Request]:
        """The request that is old enough, if there is one."""
        if self._items and now_ns - self._since_ns >= self._max_age_ns:
            yield from self.release(now_ns)

    def release(self, now_ns: int) -> Iterator[Request]:
        """What is ready, however young it is."""
        if ready := self._ready_now():
            yield self._request(ready, now_ns)

    def flush(self) -> Iterator[Request]:
        """Whatever is held."""
        if self._items:
            yield self._request(list(self._waiting), self._since_ns)

    def _ready_now(self) -> list[int]:
        return [resource for resource in self._waiting if self._ready(resource)]

    def _full(self, now_ns: int) -> Request:
        """What is ready, if that makes a request worth its while; else all of it: there is no room to wait."""
        ready = self._ready_now()
        enough = 2 * sum(self._waiting[resource].items for resource in ready) >= self._items
        return self._request(ready if enough else list(self._waiting), now_ns)

    def _request(self, resources: list[int], now_ns: int) -> Request:
        self._since_ns = now_ns
        gone = [self._waiting.pop(resource) for resource in resources]
        count = sum(waiting.items for waiting in gone)
        self._items -= count
        self._bytes -= sum(waiting.part.length + waiting.overhead for waiting in gone)
        body = self._envelope.wrap([waiting.part for waiting in gone])
        return Request(self._signal, body, count, count if self._packets else 0)
