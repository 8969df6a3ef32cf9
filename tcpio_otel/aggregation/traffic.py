"""Connections to series: what went between a workload and its peers, by role and the server's port.

A connection counts with what it has come to since it was last asked, so that at its end it has counted with exactly the
totals of its span: the kernel's own, whichever packets were recorded in between.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.aggregation.histogram import Example, Histogram
from tcpio_otel.attribution.naming import UNKNOWN, Workload
from tcpio_otel.batch import Names
from tcpio_otel.connections.events import NONE, CloseReason, Connection, Counts, Role, Start

IDLE_NS = 300_000_000_000
"""For how long a series is told after nothing has come to it any more: workloads and peers come and go."""

_FAILURES = (CloseReason.REFUSED, CloseReason.TIMEOUT, CloseReason.UNREACHABLE)


class Key(NamedTuple):
    """What a series is about.

    Attributes:
        workload: whose connections.
        peer: what is said of the other end.
        role: which end the workload is.
        server_port: 0: it is not known which end is the server.
    """

    workload: Workload
    peer: Names
    role: Role
    server_port: int


OVERFLOW = Key(UNKNOWN, (), Role.UNKNOWN, -1)
"""What is said of all that finds no place among the series."""


@dataclass(slots=True)
class Series:
    """What came to a series since `started_ns` (Unix nanoseconds).

    Attributes:
        changed_ns: when it was last added to.
        moved: bytes without retransmits, segments, and retransmits.
        opened: connections that were established.
        closed: connections that ended, by how.
        failed: connections that were not established, by `error.type`.
        resets: connections that a RST ended, by whose it was.
        drops: segments that were received and dropped, by the number of the reason.
        handshakes, round_trips: seconds.
    """

    started_ns: int
    changed_ns: int
    moved: list[int] = field(default_factory=lambda: [0] * len(Counts._fields))
    opened: int = 0
    closed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    drops: Counter[int] = field(default_factory=Counter)
    handshakes: Histogram = field(default_factory=Histogram)
    round_trips: Histogram = field(default_factory=Histogram)

    @property
    def counts(self) -> Counts:
        """What went over connections.

        The kernel's totals may take a little back of what records added up to; that makes nothing negative.
        """
        return Counts(*(max(0, count) for count in self.moved))


@dataclass(slots=True)
class _Told:
    """How much of a connection has been counted, and where last."""

    start_ns: int
    key: Key
    counts: Counts = NONE
    opened: bool = False


class Traffic:
    """The series of a host's connections, bounded in number.

    Args:
        limit: of series; what finds no place comes to `OVERFLOW`.
        like: what a workload is to series; those that are the same to them share theirs.
    """

    def __init__(self, limit: int, like: Callable[[Workload], Workload] = lambda workload: workload) -> None:
        self._limit, self._like = limit, like
        self._series: dict[Key, Series] = {}
        self._told: dict[int, _Told] = {}  # by slot of open connections

    def __iter__(self) -> Iterator[tuple[Key, Series]]:
        return iter(self._series.items())

    def add(self, connection: Connection, workload: Workload, peer: Names, now_ns: int) -> None:
        """Count what came to a connection since it was last given.

        Args:
            connection: as it is now, ended or not.
            workload: whose it is.
            peer: what is said of its other end.
            now_ns: Unix time.
        """
        key = Key(self._like(workload), peer, connection.role, _server_port(connection))
        told = self._told.get(connection.slot)
        if told is None or told.start_ns != connection.start_ns:
            told = _Told(connection.start_ns, key)
        told.key = key  # what comes from now on belongs to whom it is known to belong by now
        series = self._of(key, now_ns, connection.start_ns if connection.start is Start.OBSERVED else now_ns)
        counts = connection.counts
        for place, (now, before) in enumerate(zip(counts, told.counts, strict=True)):
            series.moved[place] += now - before
        told.counts = counts
        if connection.handshake_s is not None and connection.start is Start.OBSERVED and not told.opened:
            told.opened = True
            series.opened += 1
            series.handshakes.add(_example(connection, connection.handshake_s, now_ns))
        if connection.rtt_smoothed_s is not None:
            series.round_trips.add(_example(connection, connection.rtt_smoothed_s, now_ns))
        if connection.end is None:
            self._told[connection.slot] = told
            return
        self._told.pop(connection.slot, None)
        self._end(connection, series)

    def _end(self, connection: Connection, series: Series) -> None:
        reason = connection.close_reason
        series.closed[reason.value if reason else ""] += 1
        if connection.handshake_s is None and connection.start is Start.OBSERVED and reason in _FAILURES:
            series.failed[connection.error_type or ""] += 1
        if reason is CloseReason.RESET:
            series.resets[connection.close_initiator or ""] += 1

    def drop(
        self, records: NDArray[np.void], workloads: NDArray[np.int64], of: Callable[[int], Workload], now_ns: int
    ) -> None:
        """Count segments that were received and dropped.

        Args:
            records: they (dtype RECORD, shape (n,)).
            workloads: of each, by number.
            of: which workload a number stands for.
            now_ns: Unix time.
        """
        found = zip(workloads.tolist(), records["drop_reason"].tolist(), strict=True)
        for (number, reason), count in Counter(found).items():
            self._of(Key(self._like(of(number)), (), Role.UNKNOWN, 0), now_ns, now_ns).drops[reason] += count

    def tidy(self, now_ns: int) -> None:
        """Forget series to which nothing came for a while, and of which no connection is open."""
        used = {told.key for told in self._told.values()}
        for key, series in list(self._series.items()):
            if now_ns - series.changed_ns >= IDLE_NS and key not in used and key != OVERFLOW:
                del self._series[key]

    def _of(self, key: Key, now_ns: int, started_ns: int) -> Series:
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= self._limit:
                key = OVERFLOW
            series = self._series.setdefault(key, Series(started_ns, now_ns))
        series.changed_ns = now_ns
        return series


def _server_port(connection: Connection) -> int:
    ports = {Role.CLIENT: connection.peer.port, Role.SERVER: connection.local.port, Role.UNKNOWN: 0}
    return ports[connection.role]


def _example(connection: Connection, value: float, now_ns: int) -> Example:
    return Example(value, now_ns, connection.trace_id, connection.span_id)
