"""Packet records to OTLP log records in protobuf, by column; byte for byte what the official classes would serialise.

Field numbers are those of opentelemetry/proto/logs/v1/logs.proto (1.x, stable). Attributes stand in the order that
needs the fewest segments: first those that change with every packet, then those that stay with the connection.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import FLAG_NAMES, Flag, Mark
from tcpio_otel.encoding import names
from tcpio_otel.encoding.columns import Buffer, Bytes, Offsets, Rows, Table, column, narrow, windows
from tcpio_otel.encoding.endpoints import DIRECTIONS, address_text, columns, network_type, payload_text
from tcpio_otel.encoding.protobuf import bool_attribute, field, int_attribute, string_attribute, varint
from tcpio_otel.encoding.rows import Ends, RowStore
from tcpio_otel.payload import Items

CHUNK = 4096
"""Rows encoded at a time: what one pass touches stays in the processor's cache."""

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
        ("severity_tag", "u1"),
        ("severity", "u1"),
        ("severity_text", "V6"),
    ]
)
_HEAD_BYTES = 20
_TAIL_BYTES = _JOINT.itemsize - _HEAD_BYTES
_LENGTH_PREFIX = 3  # the record's tag and length are not part of its length

_SEVERITIES = np.array([INFO, WARN], np.uint8)
_SEVERITY_TEXTS = np.frombuffer(field(3, b"INFO") + field(3, b"WARN"), "V6")
_FLAG_TEXT_LENGTHS = np.array([len(name) + 2 for name in FLAG_NAMES], np.int64)
_IDS_BYTES = 28  # trace_id and span_id with their tags
_SPILL_BYTES = 96  # less than what stands between a connection's attributes and the joint


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
        self._connections = RowStore(_connection_rows, 3)
        self._prefixes = Table(_body_prefix, 16, 256 << 9)
        self._payload_texts = Table(lambda size: payload_text(size).encode(), 16, 1 << 18)
        self._payloads = Table(lambda size: int_attribute(names.PAYLOAD_SIZE, size), 32, 1 << 18)
        self._windows = Table(lambda window: int_attribute(names.WINDOW, window), 24, 1 << 16)
        self._flags = Table(_flags_and_cpu, 192, 256 << 8)
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
            ("severity_tag", 0x10),
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
        numbers = self._connections.numbers(records, slots, flows)
        if numbers is None:
            half = len(records) // 2
            for side in (slice(half), slice(half, None)):
                base = self._encode_chunk(
                    records[side], slots[side], flows, unix_offset_ns, observed_ns, base, ends[side]
                )
            return base
        store, n = self._connections, len(records)
        flags, payload_bytes, cpus = records["flags"], records["payload_bytes"], records["cpu"].astype(np.int64)
        seq, ack = records["seq"].astype(np.uint32), records["ack"].astype(np.uint32)

        text_lengths, attribute_lengths, id_lengths = (store.lengths(part, numbers) for part in range(3))
        size_rows, size_lengths = self._payload_texts.prepare(payload_bytes)
        flag_rows, flag_lengths = self._flags.prepare(cpus << 8 | flags)
        payload_rows, payload_lengths = self._payloads.prepare(payload_bytes)
        window_rows, window_lengths = self._windows.prepare(records["window"])
        body_lengths = text_lengths + size_lengths
        prefix_rows, prefix_lengths = self._prefixes.prepare(cpus << 9 | (body_lengths + _FLAG_TEXT_LENGTHS[flags]))
        optional = self._optional(records)
        short = np.nonzero((seq < 1 << 28) | (ack < 1 << 28))[0]
        short_seq_lengths, short_ack_lengths = _varint_lengths(seq[short]), _varint_lengths(ack[short])

        lengths = body_lengths
        for more in (flag_lengths, attribute_lengths, payload_lengths, window_lengths, id_lengths, prefix_lengths):
            lengths += more
        lengths += _HEAD_BYTES + self._block.shape[1] + _TAIL_BYTES
        lengths[short] -= 10 - short_seq_lengths - short_ack_lengths
        for rows, _, widths in optional:
            lengths[rows] += widths
        np.cumsum(lengths, out=ends)
        ends += base
        at = ends - lengths
        starts = at.copy()
        buffer = self._buffer.room(int(ends[-1]), base)

        def write(rows: Rows, where: Offsets) -> None:
            windows(buffer, rows.dtype.itemsize)[where] = rows

        at += _HEAD_BYTES
        write(self._prefixes.rows(prefix_rows, int(prefix_lengths.max())), at)
        at += prefix_lengths
        write(store.rows(0, numbers, int(text_lengths.max())), at)
        at += text_lengths
        write(self._payload_texts.rows(size_rows, int(size_lengths.max())), at)
        at += size_lengths
        write(self._flags.rows(flag_rows, int(flag_lengths.max())), at)
        at += flag_lengths
        for part, width in _by_width(attribute_lengths):
            write(store.rows(1, numbers[part], width), at[part])
        at += attribute_lengths
        self._seq.fill(seq)
        self._ack.fill(ack)
        write(self._block[:n].view(f"V{self._block.shape[1]}").ravel(), at)
        if len(short):
            self._short_seq.fill_short(seq[short], short_seq_lengths)
            self._short_ack.fill_short(ack[short], short_ack_lengths)
            width = len(self._seq.template)
            where = at[short]
            write(narrow(self._short_block[: len(short)].view(f"V{2 * width}").ravel(), width), where)
            where += width - 5 + short_seq_lengths
            write(self._short_block[: len(short), width:].copy().view(f"V{width}").ravel(), where)
            at[short] -= 10 - short_seq_lengths - short_ack_lengths
        at += self._block.shape[1]
        write(self._payloads.rows(payload_rows, int(payload_lengths.max())), at)
        at += payload_lengths
        write(self._windows.rows(window_rows, int(window_lengths.max())), at)
        at += window_lengths
        for where_rows, values, widths in optional:
            write(values, at[where_rows])
            at[where_rows] += widths
        if id_lengths.all():
            write(store.rows(2, numbers, _IDS_BYTES), at)
        else:
            identified = np.nonzero(id_lengths)[0]
            write(store.rows(2, numbers[identified], _IDS_BYTES), at[identified])
        self._write_joints(records, lengths, unix_offset_ns, observed_ns, buffer, starts, int(ends[-1]))
        return int(ends[-1])

    def _optional(self, records: NDArray[np.void]) -> list[tuple[NDArray[np.intp], Rows, Offsets]]:
        """Attributes that few records have: which records, the rows, and their lengths."""
        marks = records["marks"]
        found = []
        dropped = (marks & _DROPPED != 0) & (records["drop_reason"] != 0)
        for table, mask, name in (
            (self._segments, records["gso_segments"] > 1, "gso_segments"),
            (self._retransmits, marks & _RETRANSMIT != 0, "marks"),
            (self._drops, dropped, "drop_reason"),
        ):
            rows = np.nonzero(mask)[0]
            if len(rows):
                keys = records[name][rows]
                numbers, lengths = table.prepare(keys if name != "marks" else np.zeros(len(rows), np.int64))
                found.append((rows, table.rows(numbers, int(lengths.max())), lengths))
        return found

    def _write_joints(
        self,
        records: NDArray[np.void],
        lengths: Offsets,
        unix_offset_ns: int,
        observed_ns: int,
        buffer: Bytes,
        starts: Offsets,
        end: int,
    ) -> None:
        """The head of every record, with the tail of the one before it; one more for the tail of the last."""
        n = len(records)
        joints = self._joints[: n + 1]
        warn = ((records["flags"] & _WARN_FLAGS != 0) | (records["marks"] & _RETRANSMIT != 0)).astype(np.int64)
        content = lengths - _LENGTH_PREFIX
        joints["observed"] = observed_ns
        joints["record_length"][:n] = (content & 0x7F) | 0x80 | (content >> 7) << 8
        joints["time"][:n] = records["time_ns"] + np.uint64(unix_offset_ns)
        joints["severity"][:n] = _SEVERITIES[warn]
        joints["severity_text"][:n] = _SEVERITY_TEXTS[warn]
        where = np.append(starts, end)
        where -= _TAIL_BYTES
        windows(buffer, _JOINT.itemsize)[where] = joints.view(f"V{_JOINT.itemsize}")


def _by_width(lengths: Offsets) -> Iterator[tuple[slice | NDArray[np.intp], int]]:
    """Rows in groups of like length, with the width that serves each: what spills must not outrun what follows."""
    widest, narrowest = int(lengths.max()), int(lengths.min())
    if widest - narrowest <= _SPILL_BYTES:
        yield slice(None), widest
        return
    groups = lengths // _SPILL_BYTES
    for group in np.unique(groups).tolist():
        rows = np.nonzero(groups == group)[0]
        yield rows, int(lengths[rows].max())


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


def _connection_rows(ends: Ends) -> tuple[bytes, bytes, bytes]:
    """The parts of a record that belong to its connection and direction: columns of the body, attributes, ids."""
    text = columns(ends.local, ends.local_port, ends.peer, ends.peer_port, ends.direction)
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
    return text.encode(), b"".join(attributes), ids


_TRANSPORT = string_attribute(names.NETWORK_TRANSPORT, "tcp")
_DIRECTIONS = {int(direction): string_attribute(names.IO_DIRECTION, name) for direction, name in DIRECTIONS.items()}
