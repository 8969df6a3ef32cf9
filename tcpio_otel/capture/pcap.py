"""A capture file as a source: the batches that the probe would have made of the same packets, anywhere."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names
from tcpio_otel.batch import RECORD, Batch, Direction, Kind, Mark
from tcpio_otel.capture.control import Filters, Network
from tcpio_otel.capture.conversations import Conversations
from tcpio_otel.capture.frames import frames
from tcpio_otel.capture.headers import Segment, Skipped, decode
from tcpio_otel.capture.networks import Networks
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.errors import InputError
from tcpio_otel.ledger import Ledger

BATCH_SEGMENTS = 8192
HELD_SEGMENTS = 1024
"""Segments held back until later ones were read: captures of several queues or interfaces are not quite in order."""

# Plain numbers: NumPy takes an enum's members for objects, one by one.
_TRANSMIT, _RECEIVE, _RETRANSMIT = int(Direction.TRANSMIT), int(Direction.RECEIVE), int(Mark.RETRANSMIT)
_LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


class PcapSource:
    """Batches of a capture file, in time order, with only packets in them.

    Which end of a packet is local: what a cooked capture says of its direction; else `local`; else whoever sent the
    conversation's SYN, or, when none was captured, the end with the higher port. A packet between two local ends, and
    any on a loopback interface, makes two records, as on a live host: sent by one end, then received by the other.

    A capture knows of no process, CPU, namespace, cookie or state: these are zero. Packets sent are marked RETRANSMIT
    by sequence numbers seen before.

    Args:
        path: a pcap or pcapng file, which may be compressed with gzip.
        ledger: told what was seen and filtered.
        local: networks whose addresses are the captured host's; loopback addresses always are.
        filters: as for the probe.
        clock: Unix time, for when records were read.
    """

    paced = True
    older_told = False

    def __init__(
        self,
        path: Path,
        ledger: Ledger,
        *,
        local: Sequence[Network] = (),
        filters: Filters | None = None,
        clock: Nanoseconds = time.time_ns,
    ) -> None:
        self._path, self._ledger, self._clock = path, ledger, clock
        filters = filters or Filters()
        self._ports = frozenset(port for first, last in filters.ports for port in range(first, last + 1))
        self._networks = Networks(filters.networks)
        self._conversations = Conversations(Networks([*_LOOPBACK, *local]))
        self._seen = self._late = self._last_ns = 0
        self._filtered: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: the file is open while it is read."""

    def now_ns(self) -> int:
        """The time of the youngest packet read."""
        return self._last_ns

    def finish(self) -> Iterator[Batch]:
        """Nothing: a file has said all that it has to say."""
        return iter(())

    def look(self) -> NDArray[np.void]:
        """No socket: a file knows of none."""
        return np.empty(0, RECORD)

    def look_again(self) -> None:
        """Nothing, likewise."""

    def snapshot(self) -> None:
        """Nothing, likewise."""

    def faults(self) -> dict[str, int]:
        """Frames without a TCP segment, by why; and records that came out later than a younger one."""
        return {names.LATE: self._late} | {
            names.SKIPPED.replace("*", reason): count for reason, count in self._skipped.items()
        }

    def __iter__(self) -> Iterator[Batch]:
        """Read the file.

        Raises:
            InputError: as `frames` says, or there is no TCP packet in it; batches read until then were yielded.
        """
        held: list[tuple[int, Segment]] = []
        fault: InputError | None = None
        try:
            for frame in frames(self._path):
                try:
                    segment = decode(frame.link_type, frame.content, frame.wire_bytes)
                except Skipped as reason:
                    self._skipped[str(reason)] += 1
                    continue
                held.append((frame.unix_ns, segment))
                if len(held) == BATCH_SEGMENTS + HELD_SEGMENTS:
                    held.sort(key=itemgetter(0))
                    yield self._batch(held[:BATCH_SEGMENTS])
                    del held[:BATCH_SEGMENTS]
        except InputError as error:
            fault = error
        if held:
            held.sort(key=itemgetter(0))
            yield self._batch(held)
        if fault:
            raise fault
        if not self._seen:
            found = ", ".join(f"{count} {reason}" for reason, count in self._skipped.items()) or "no packet at all"
            raise InputError(f"{self._path} holds no TCP packet: {found}; capture again, with the filter tcp")

    def _batch(self, segments: list[tuple[int, Segment]]) -> Batch:
        rows: list[int] = []
        directions: list[int] = []
        marks: list[int] = []
        for row, (_, segment) in enumerate(segments):
            sender = self._conversations.sender(segment)
            repeats = sender.repeats(segment)
            both = sender.both_local or segment.loopback
            self._seen += 1 + both
            if reason := self._unwanted(segment):
                self._filtered[reason] += 1 + both
                continue
            if both or (sender.is_local if segment.outgoing is None else segment.outgoing):
                rows.append(row)
                directions.append(_TRANSMIT)
                marks.append(_RETRANSMIT if repeats else 0)
                if not both:
                    continue
            rows.append(row)
            directions.append(_RECEIVE)
            marks.append(0)
        records = _records(segments, rows, directions, marks)
        if len(records):
            times_ns = records["time_ns"]
            self._late += int(np.count_nonzero(times_ns < self._last_ns))
            self._last_ns = max(self._last_ns, int(times_ns[-1]))
        self._ledger.source(seen=self._seen, filtered=dict(self._filtered), dropped={}, pending=0)
        self._ledger.taken(len(records))
        return Batch(records, 0, self._clock(), self._last_ns)

    def _unwanted(self, segment: Segment) -> str | None:
        """The filter that a segment does not pass, if there is one."""
        if self._ports and segment.source_port not in self._ports and segment.destination_port not in self._ports:
            return "port"
        holds = self._networks.holds
        if self._networks and not holds(segment.source) and not holds(segment.destination):
            return "cidr"
        return None


def _records(
    segments: list[tuple[int, Segment]], rows: list[int], directions: list[int], marks: list[int]
) -> NDArray[np.void]:
    """A record for each of `rows`, which index `segments`; in both, times do not fall."""
    records = np.zeros(len(rows), RECORD)
    if not rows:
        return records
    times_ns, decoded = zip(*segments, strict=True)
    columns: dict[str, tuple[Any, ...]] = dict(zip(Segment._fields, zip(*decoded, strict=True), strict=True))
    taken = np.array(rows)
    records["kind"] = Kind.PACKET
    records["time_ns"] = np.array(times_ns, np.uint64)[taken]
    records["direction"] = directions
    records["marks"] = marks
    for name in ("seq", "ack", "payload_bytes", "window", "flags"):
        records[name] = np.array(columns[name], RECORD[name])[taken]
    sent = records["direction"] == Direction.TRANSMIT
    ends: dict[str, list[NDArray[Any]]] = {
        "address": [np.frombuffer(b"".join(columns[end]), "V16") for end in ("source", "destination")],
        "port": [np.array(columns[end], np.uint16) for end in ("source_port", "destination_port")],
    }
    for name, (source, destination) in ends.items():
        records[f"local_{name}"] = records[f"header_local_{name}"] = np.where(sent, source[taken], destination[taken])
        records[f"peer_{name}"] = records[f"header_peer_{name}"] = np.where(sent, destination[taken], source[taken])
    return records
