"""Packet records to the table of `tcpio.d`, by column, with what flags add at its edges."""

from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import FLAG_NAMES, Packets
from tcpio_otel.encoding.columns import Segment, Table, constant, decimals
from tcpio_otel.encoding.endpoints import HEADER, payload_text
from tcpio_otel.encoding.packet_json import clock_time
from tcpio_otel.encoding.rows import Ends, RowStore, SegmentEncoder

_QUARTER_NS = 900_000_000_000


def printable(text: str) -> str:
    """Text with control characters escaped: a process may name itself what it likes, a terminal obeys."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


class PacketTable(SegmentEncoder):
    """The table, one line a record.

    Args:
        time: put the local time of day in front.
        process: append pid and name of the process.
        seq: append sequence number, acknowledgement and window.
    """

    def __init__(self, *, time: bool, process: bool, seq: bool) -> None:
        super().__init__(RowStore(self._rows, 2))
        self._time, self._process, self._seq = time, process, seq
        self._cpus = Table(lambda cpu: b" %3d " % cpu, 8, 1 << 16)
        self._sizes = Table(lambda size: payload_text(size).encode(), 16, 1 << 18)
        self._flags = Table(lambda bits: f"({FLAG_NAMES[bits]})".encode(), 40, 256)

    @staticmethod
    def _rows(ends: Ends) -> tuple[bytes, bytes]:
        process = f"  {ends.pid or '-'} {printable(ends.process_name) or '-'}"
        return ends.columns.encode(), process.encode()

    def header(self) -> bytes:
        """The heading, newline included."""
        titles = [f"{'TIME':<18}" * self._time, HEADER, "  SEQ ACK WIN" * self._seq, "  PID PROCESS" * self._process]
        return "".join(titles).encode() + b"\n"

    def _segments(self, packets: Packets) -> list[Segment] | None:
        numbers, records = self._connections.numbers(packets), packets.records
        if numbers is None:
            return None
        store = self._connections
        segments: list[Segment] = []
        if self._time:
            unix_ns = packets.unix_ns
            segments += clock_time(unix_ns + _local_offsets_ns(unix_ns))
        segments += [
            self._cpus.segment(records["cpu"]),
            (store.rows(0, numbers), store.lengths(0, numbers)),
            self._sizes.segment(records["payload_bytes"]),
            self._flags.segment(records["flags"]),
        ]
        if self._seq:
            for gap, name in ((b"  ", "seq"), (b" ", "ack"), (b" ", "window")):
                segments += [constant(gap), decimals(records[name])]
        if self._process:
            segments.append((store.rows(1, numbers), store.lengths(1, numbers)))
        segments.append(constant(b"\n"))
        return segments


def _local_offsets_ns(unix_ns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How far local time is ahead of UTC at each time, not negative: where it is behind, a day is added."""
    # Time zones change at whole quarters of an hour.
    quarters, which = np.unique(unix_ns // np.uint64(_QUARTER_NS), return_inverse=True)
    offsets: NDArray[np.uint64] = np.array([_local_offset_ns(quarter) for quarter in quarters.tolist()], np.uint64)
    return offsets[which]


@lru_cache(maxsize=1024)
def _local_offset_ns(quarter: int) -> int:
    offset = datetime.fromtimestamp(quarter * _QUARTER_NS // 1_000_000_000, UTC).astimezone().utcoffset()
    return int(offset.total_seconds() if offset else 0) % 86_400 * 1_000_000_000
