"""Packet records to OTLP log records in protobuf, by column; byte for byte what the official classes would serialise.

Field numbers are those of opentelemetry/proto/logs/v1/logs.proto (1.x, stable). A record is this chain:

    head | body: prefix, connection, size, flags
         | attributes: flags, size, window, optional, seq and ack, connection | ids | tail

Attributes that change with every packet come first, so that those of the connection and its ids make one segment. That
one is the longest and varies most, so it is written first: it spills over the start of the next record, which is
written later. The two segments beside it, seq+ack before and the joint of tail and next head behind, are exact.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import FLAG_NAMES, Flag, Mark, hot
from tcpio_otel.encoding import endpoints, names
from tcpio_otel.encoding.columns import Buffer, Bytes, Offsets, Rows, Table, column, narrow, windows
from tcpio_otel.encoding.endpoints import DIRECTIONS, address_text, network_type, payload_text
from tcpio_otel.encoding.protobuf import bool_attribute, field, int_attribute, string_attribute, varint
from tcpio_otel.encoding.rows import Ends, RowStore
from tcpio_otel.payload import Items

CHUNK = 8192
"""Rows encoded at a time: fewer cost more in calls, more cost more in cache misses."""

INFO, WARN = 9, 13  # opentelemetry.proto.logs.v1.SeverityNumber
_WARN_FLAGS = int(Flag.RST)
_DROPPED, _RETRANSMIT = int(Mark.DROPPED), int(Mark.RETRANSMIT)  # NumPy converts an enum member at every use


_EVENT_NAME = field(12, names.PACKET_EVENT.encode())

# The tail of a record and the head of the next stand side by side and have one width: they are written together,
# last of all segments, so that nothing spills over them.
_JOINT = np.dtype(
    [
        ("observed_tag", "u1"),
        ("observed", "<u8"),
        ("event_name", f"V{len(_EVENT_NAME)}"),
        ("record_tag", "u1"),
        ("record_length", "<u2"),
        ("time_tag", "u1"),
        ("time", "<u8"),
        ("severity", "V8"),
    ]
)
_HEAD_BYTES = 20
_TAIL_BYTES = _JOINT.itemsize - _HEAD_BYTES
_LENGTH_PREFIX = 3  # the record's tag and length are not part of its length

_SEVERITIES = np.frombuffer(
    b"".join(b"\x10" + varint(number) + field(3, text) for number, text in ((INFO, b"INFO"), (WARN, b"WARN"))), "V8"
)
_FLAG_TEXT_LENGTHS = np.array([len(name) + 2 for name in FLAG_NAMES], np.int64)
_TRANSPORT = string_attribute(names.NETWORK_TRANSPORT, "tcp")
_CONNECTION_HEAD = np.frombuffer(_TRANSPORT[:8], "V8")  # every connection's attributes begin so
_SPILL_BYTES = 200  # less than what stands between a connection's attributes and those of the next record

_CONTINUATION = np.array([0, 0, 0x80, 0x8080, 0x808080, 0x80808080], np.uint32)
"""Continuation bits of the first four bytes of a varint of 0 to 5 bytes."""


class _SequenceAttribute:
    """`tcp.seq` or `tcp.ack`: a varint of five bytes in fifteen of sixteen cases, shorter ones made right apart."""

    def __init__(self, key: str, block: Bytes, at: int) -> None:
        self.template = int_attribute(key, (1 << 32) - 1)
        width = len(self.template)
        block[:, at : at + width] = np.frombuffer(self.template, np.uint8)
        self._attribute_length = column(block, at + 1, "u1")
        self._value_length = column(block, at + 5 + len(key), "u1")
        self._low = column(block, at + width - 5, "<u4")
        self._high = column(block, at + width - 1, "u1")

    def fill(self, numbers: NDArray[np.uint32]) -> None:
        """Spread the low 28 bits over four bytes, seven to each, with the continuation bit; the rest is the fifth."""
        n = len(numbers)
        self._low[:n] = _spread(numbers) | np.uint32(0x80808080)
        self._high[:n] = numbers >> 28

    def fill_short(self, numbers: NDArray[np.uint32], lengths: Offsets) -> None:
        """The same for varints of any length, and the two lengths that stand before them."""
        n = len(numbers)
        self._low[:n] = _spread(numbers) | _CONTINUATION[lengths]
        self._high[:n] = numbers >> 28
        self._attribute_length[:n] = len(self.template) - 7 + lengths
        self._value_length[:n] = 1 + lengths


def _spread(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    spread = numbers & np.uint32(0x7F)
    spread |= (numbers & np.uint32(0x3F80)) << np.uint32(1)
    spread |= (numbers & np.uint32(0x1FC000)) << np.uint32(2)
    spread |= (numbers & np.uint32(0xFE00000)) << np.uint32(3)
    return spread


def _varint_lengths(numbers: NDArray[np.uint32]) -> Offsets:
    lengths = np.ones(len(numbers), np.int64)
    for bits in (7, 14, 21, 28):
        lengths += numbers >= 1 << bits
    return lengths


class PacketLogEncoder:
    """Encodes packet records as `ScopeLogs.log_records`.

    Args:
        drop_reasons: the running kernel's names for `tcp.drop.reason`; a number it does not know stands for itself.
    """

    def __init__(self, drop_reasons: Mapping[int, str]) -> None:
        self._buffer = Buffer()
        self._connections = RowStore(_connection_rows, 2)
        self._prefixes = Table(_body_prefix, 16, 256 << 9)
        self._payload_texts = Table(lambda size: payload_text(size).encode(), 16, 1 << 18)
        self._payloads = Table(lambda size: int_attribute(names.PAYLOAD_SIZE, size), 32, 1 << 18)
        self._windows = Table(lambda window: int_attribute(names.WINDOW, window), 24, 1 << 16)
        self._flags = Table(_flags_and_cpu, 136, 256 << 8)
        self._segments = Table(lambda count: int_attribute(names.GSO_SEGMENTS, count), 32, 1 << 16)
        self._drops = Table(
            lambda reason: string_attribute(names.DROP_REASON, drop_reasons.get(reason, str(reason))), 128, 1 << 16
        )
        self._retransmits = Table(lambda _: bool_attribute(names.RETRANSMIT), 32, 1)
        width = len(int_attribute(names.SEQ, (1 << 32) - 1))  # both keys have one length
        self._block, self._short_block = (np.zeros((CHUNK, 2 * width), np.uint8) for _ in range(2))
        self._seq, self._ack = (
            _SequenceAttribute(key, self._block, at) for key, at in ((names.SEQ, 0), (names.ACK, width))
        )
        self._short_seq, self._short_ack = (
            _SequenceAttribute(key, self._short_block, at) for key, at in ((names.SEQ, 0), (names.ACK, width))
        )
        self._joints = np.zeros(CHUNK + 1, _JOINT)
        for name, value in (
            ("observed_tag", 0x59),
            ("event_name", np.frombuffer(_EVENT_NAME, f"V{len(_EVENT_NAME)}")[0]),
            ("record_tag", 0x12),
            ("time_tag", 0x09),
        ):
            self._joints[name] = value

    def encode(
        self,
        records: NDArray[np.void],
        slots: NDArray[np.int64],
        flows: NDArray[np.void],
        unix_offset_ns: int,
        observed_ns: int,
    ) -> Items:
        """Encode packet records.

        Args:
            records: dtype RECORD, shape (n,), contiguous, all of kind PACKET.
            slots: the slot of each record, int64, shape (n,).
            flows: dtype FLOW, indexed by slot.
            unix_offset_ns: what to add to the records' time for Unix time.
            observed_ns: Unix time of the drain.

        Returns:
            One item a record; the buffer is used again by the next call.
        """
        ends = np.empty(len(records), np.int64)
        size = _TAIL_BYTES  # the first joint begins before the first record
        for start in range(0, len(records), CHUNK):
            part = slice(start, start + CHUNK)
            size = self._encode_chunk(records[part], slots[part], flows, unix_offset_ns, observed_ns, size, ends[part])
        ends -= _TAIL_BYTES
        return Items(self._buffer.room(0).data[_TAIL_BYTES:size], ends)

    def _encode_chunk(
        self,
        records: NDArray[np.void],
        slots: NDArray[np.int64],
        flows: NDArray[np.void],
        unix_offset_ns: int,
        observed_ns: int,
        base: int,
        ends: Offsets,
    ) -> int:
        """Write a chunk behind the `base` bytes that are there, note the items' ends, return the new size."""
        columns = hot(records)
        numbers = self._connections.numbers(records, columns, slots, flows)
        if numbers is None:
            half = len(records) // 2
            for side in (slice(half), slice(half, None)):
                base = self._encode_chunk(
                    records[side], slots[side], flows, unix_offset_ns, observed_ns, base, ends[side]
                )
            return base
        store, n = self._connections, len(records)
        flags, payload_bytes, cpus = columns["flags"], columns["payload_bytes"], columns["cpu"].astype(np.int64)
        seq, ack = columns["seq"].astype(np.uint32), columns["ack"].astype(np.uint32)

        text_lengths, connection_lengths = store.lengths(0, numbers), store.lengths(1, numbers)
        size_rows, size_lengths = self._payload_texts.prepare(payload_bytes)
        flag_rows, flag_lengths = self._flags.prepare(cpus << 8 | flags)
        payload_rows, payload_lengths = self._payloads.prepare(payload_bytes)
        window_rows, window_lengths = self._windows.prepare(columns["window"])
        lengths = text_lengths + size_lengths
        prefix_rows, prefix_lengths = self._prefixes.prepare(cpus << 9 | (lengths + _FLAG_TEXT_LENGTHS[flags]))
        optional = self._optional(columns)
        short = np.nonzero((seq < 1 << 28) | (ack < 1 << 28))[0]
        short_seq_lengths, short_ack_lengths = _varint_lengths(seq[short]), _varint_lengths(ack[short])
        missing = 10 - short_seq_lengths - short_ack_lengths

        for more in (flag_lengths, connection_lengths, payload_lengths, window_lengths, prefix_lengths):
            lengths += more
        lengths += _HEAD_BYTES + self._block.shape[1] + _TAIL_BYTES
        lengths[short] -= missing
        for rows, _, widths in optional:
            lengths[rows] += widths
        np.cumsum(lengths, out=ends)
        ends += base
        buffer = self._buffer.room(int(ends[-1]), base)

        def write(rows: Rows, where: Offsets) -> None:
            windows(buffer, rows.dtype.itemsize)[where] = rows

        at = ends - connection_lengths
        at -= _TAIL_BYTES
        self._write_connections(write, numbers, connection_lengths, at)
        at = ends - lengths
        at += _HEAD_BYTES
        for pieces, piece_lengths in (
            (self._prefixes.rows(prefix_rows), prefix_lengths),
            (store.rows(0, numbers), text_lengths),
            (self._payload_texts.rows(size_rows), size_lengths),
            (self._flags.rows(flag_rows), flag_lengths),
            (self._payloads.rows(payload_rows), payload_lengths),
            (self._windows.rows(window_rows), window_lengths),
        ):
            write(pieces, at)
            at += piece_lengths
        for where, values, widths in optional:
            for width in np.unique(widths).tolist():
                chosen = widths == width
                write(narrow(values, width)[chosen], at[where[chosen]])
            at[where] += widths
        self._seq.fill(seq)
        self._ack.fill(ack)
        write(self._block[:n].view(f"V{self._block.shape[1]}").ravel(), at)
        if len(short):
            self._write_short(write, seq[short], ack[short], short_seq_lengths, short_ack_lengths, at[short])
        self._write_joints(records, columns, lengths, unix_offset_ns, observed_ns, write, ends, base)
        return int(ends[-1])

    def _write_connections(
        self, write: Callable[[Rows, Offsets], None], numbers: NDArray[np.int64], lengths: Offsets, at: Offsets
    ) -> None:
        """Attributes and ids of the connections; in groups of like length where they differ too much."""
        rows = self._connections.rows(1, numbers)
        if rows.dtype.itemsize - int(lengths.min()) <= _SPILL_BYTES:
            write(rows, at)
            return
        groups = lengths // _SPILL_BYTES
        for group in np.unique(groups).tolist():
            chosen = np.nonzero(groups == group)[0]
            write(narrow(rows, int(lengths[chosen].max()))[chosen], at[chosen])

    def _write_short(
        self,
        write: Callable[[Rows, Offsets], None],
        seq: NDArray[np.uint32],
        ack: NDArray[np.uint32],
        seq_lengths: Offsets,
        ack_lengths: Offsets,
        at: Offsets,
    ) -> None:
        """`tcp.seq` and `tcp.ack` where one takes fewer than five bytes, and what they spilled over behind them."""
        self._short_seq.fill_short(seq, seq_lengths)
        self._short_ack.fill_short(ack, ack_lengths)
        width = len(self._seq.template)
        halves = self._short_block[: len(at)].reshape(len(at), 2, width)
        for half, lengths in ((0, seq_lengths), (1, ack_lengths)):
            write(halves[:, half].copy().view(f"V{width}").ravel(), at)
            at = at + width - 5 + lengths
        write(_CONNECTION_HEAD, at)

    def _optional(self, columns: NDArray[np.void]) -> list[tuple[NDArray[np.intp], Rows, Offsets]]:
        """Attributes that few records have: which records, the rows, and their lengths."""
        marks, counts = columns["marks"], columns["gso_segments"]
        found = []
        wanted = [(self._segments, counts > 1, counts)]
        if (marks & (_RETRANSMIT | _DROPPED)).any():
            reasons = columns["drop_reason"]
            wanted += [
                (self._retransmits, marks & _RETRANSMIT != 0, np.zeros(len(columns), np.int64)),
                (self._drops, (marks & _DROPPED != 0) & (reasons != 0), reasons),
            ]
        for table, mask, keys in wanted:
            rows = np.nonzero(mask)[0]
            if len(rows):
                numbers, lengths = table.prepare(keys[rows])
                found.append((rows, table.rows(numbers), lengths))
        return found

    def _write_joints(
        self,
        records: NDArray[np.void],
        columns: NDArray[np.void],
        lengths: Offsets,
        unix_offset_ns: int,
        observed_ns: int,
        write: Callable[[Rows, Offsets], None],
        ends: Offsets,
        base: int,
    ) -> None:
        """The head of every record, with the tail of the one before it; one more for the tail of the last."""
        n = len(records)
        joints = self._joints[: n + 1]
        warn = ((columns["flags"] & _WARN_FLAGS) | (columns["marks"] & _RETRANSMIT)) != 0
        lengths -= _LENGTH_PREFIX
        joints["observed"] = observed_ns
        joints["record_length"][:n] = (lengths & 0x7F) | 0x80 | (lengths >> 7) << 8
        joints["time"][:n] = records["time_ns"] + np.uint64(unix_offset_ns)
        joints["severity"][:n] = _SEVERITIES[warn.view(np.int8)]
        where = np.empty(n + 1, np.int64)
        where[0], where[1:] = base, ends
        where -= _TAIL_BYTES
        write(joints.view(f"V{_JOINT.itemsize}"), where)


def _body_prefix(key: int) -> bytes:
    """The head of `LogRecord.body` and the CPU column: by CPU and by the length of the rest of the line."""
    cpu = f"{key >> 9} ".encode()
    text = varint((key & 0x1FF) + len(cpu))
    content = b"\x0a" + text
    return b"\x2a" + varint(len(content) + (key & 0x1FF) + len(cpu)) + content + cpu


def _flags_and_cpu(key: int) -> bytes:
    cpu, bits = key >> 8, key & 0xFF
    return (
        f"({FLAG_NAMES[bits]})".encode()
        + string_attribute(names.FLAGS, FLAG_NAMES[bits])
        + int_attribute(names.FLAGS_BITS, bits)
        + int_attribute(names.CPU, cpu)
    )


def _connection_rows(ends: Ends) -> tuple[bytes, bytes]:
    """What of a record belongs to its connection and direction: columns of the body; attributes and ids."""
    text = endpoints.columns(ends.local, ends.local_port, ends.peer, ends.peer_port, ends.direction)
    attributes = [
        _TRANSPORT,
        string_attribute(names.NETWORK_TYPE, network_type(ends.local)),
        string_attribute(names.LOCAL_ADDRESS, address_text(ends.local)),
        int_attribute(names.LOCAL_PORT, ends.local_port),
        string_attribute(names.PEER_ADDRESS, address_text(ends.peer)),
        int_attribute(names.PEER_PORT, ends.peer_port),
        _DIRECTIONS[ends.direction],
    ]
    if ends.translated:
        attributes += [
            string_attribute(names.SOCKET_LOCAL_ADDRESS, address_text(ends.socket_local)),
            int_attribute(names.SOCKET_LOCAL_PORT, ends.socket_local_port),
            string_attribute(names.SOCKET_PEER_ADDRESS, address_text(ends.socket_peer)),
            int_attribute(names.SOCKET_PEER_PORT, ends.socket_peer_port),
        ]
    if ends.pid:
        attributes.append(int_attribute(names.PID, ends.pid))
    if ends.process_name:
        attributes.append(string_attribute(names.EXECUTABLE_NAME, ends.process_name))
    ids = b""
    if ends.identified:
        attributes.append(string_attribute(names.CONNECTION_ID, ends.trace_id[:8].hex()))
        ids = field(9, ends.trace_id) + field(10, ends.span_id)
    return text.encode(), b"".join(attributes) + ids


_DIRECTIONS = {int(direction): string_attribute(names.IO_DIRECTION, name) for direction, name in DIRECTIONS.items()}
