"""The stages behind the source, wired together: batches in, export requests out, every packet in the ledger.

Runs without privileges, and is imported only once they are gone. Everything the stages must know of each other is
here: they do not import one another.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import FLOW, Batch, Kind
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.connections.events import Connection
from tcpio_otel.connections.table import ConnectionTable
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.export.sender import Outcome, Sender
from tcpio_otel.ledger import Ledger
from tcpio_otel.payload import Items, Request, Signal

logger = logging.getLogger(__name__)

HELD_RECORDS_LIMIT = 1 << 16
"""Packet records whose logs may wait for a handshake to complete; beyond it the oldest go without ids."""


class Source(Protocol):
    """Where batches come from: the live probe, or a capture file."""

    paced: bool
    """Whether the source waits for its reader (a file does, a network does not)."""

    def __iter__(self) -> Iterator[Batch]: ...

    def now_ns(self) -> int:
        """The time on the records' clock."""

    def finish(self) -> Iterator[Batch]:
        """What is left once the source was told to stop."""

    def snapshot(self) -> NDArray[np.void] | None:
        """Every open socket as of now, where the source can tell."""

    def faults(self) -> dict[str, int]:
        """Counts of what went wrong without costing a packet its place in the ledger."""


class PacketEncoder(Protocol):
    """Turns packet records into items of a signal."""

    def encode(
        self,
        records: NDArray[np.void],
        slots: NDArray[np.int64],
        flows: NDArray[np.void],
        unix_offset_ns: int,
        observed_ns: int,
    ) -> Items: ...


@dataclass(frozen=True)
class Output:
    """The way of one signal from encoded items to a receiver."""

    batcher: Batcher
    sender: Sender

    def add(self, items: Items, now_ns: int, *, block: bool) -> int:
        """Queue items; returns how many were too large for any request."""
        added = self.batcher.add(items, now_ns)
        self._submit(added.requests, block=block)
        return added.too_large

    def poll(self, now_ns: int, *, block: bool) -> None:
        """Send what has become old enough."""
        self._submit(self.batcher.poll(now_ns), block=block)

    def flush(self) -> None:
        """Send everything."""
        self._submit(self.batcher.flush(), block=True)

    def _submit(self, requests: Iterable[Request], *, block: bool) -> None:
        for request in requests:
            self.sender.submit(request, block=block)


@dataclass(frozen=True)
class _Held:
    records: NDArray[np.void]
    slots: NDArray[np.int64]
    unix_offset_ns: int
    observed_ns: int
    deadline_ns: int
