"""Packet records to OTLP log records in protobuf; byte for byte what the official classes would serialise.

Field numbers are those of opentelemetry/proto/logs/v1/logs.proto (1.x, stable). Every piece of a record that is not
a number is a row made here, once for each connection, flag combination or drop reason; otlp_logs.c joins them.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names, native
from tcpio_otel.batch import FLAG_NAMES, INTERLEAVED, Packets
from tcpio_otel.encoding.columns import Buffer
from tcpio_otel.encoding.protobuf import (
    bool_attribute,
    field,
    int_attribute,
    string_attribute,
    strings_attribute,
    varint,
)
from tcpio_otel.encoding.rows import Ends, PeerNames, RowStore, halves, nobody
from tcpio_otel.payload import Items

_REASONS = 1 << 16

_FLAG_TEXT = [f"({name})".encode() for name in FLAG_NAMES]
_ROWS: dict[str, list[bytes]] = {
    "flags": [
        text + string_attribute(names.FLAGS, name) + int_attribute(names.FLAGS_BITS, bits)
        for bits, (text, name) in enumerate(zip(_FLAG_TEXT, FLAG_NAMES, strict=True))
    ],
    "flag_text": _FLAG_TEXT,
    "severity": [b"\x10" + varint(number) + field(3, text.encode()) for number, text in names.SEVERITIES],
    "cpu": [int_attribute(names.CPU, 0)],
    "payload": [int_attribute(names.PAYLOAD_SIZE, 0)],
    "window": [int_attribute(names.WINDOW, 0)],
    "segments": [int_attribute(names.GSO_SEGMENTS, 0)],
    "segment_size": [int_attribute(names.GSO_SIZE, 0)],
    "retransmit": [bool_attribute(names.RETRANSMIT)],
    "seq": [int_attribute(names.SEQ, 0)],
    "ack": [int_attribute(names.ACK, 0)],
    "event_name": [field(12, names.PACKET_EVENT.encode())],
}
_OWN_BYTES = 128
"""More than a record has besides its rows: tags and lengths, times, digits of the body, varints of seven attributes."""


_WORDS = ("text", "attributes", "ids", "drops", "sharing", *_ROWS)


class _Words(ctypes.Structure):
    """`struct words` of otlp_logs.c."""

    _fields_ = tuple((name, native.Rows) for name in _WORDS)


class PacketLogEncoder:
    """Encodes packet records as `ScopeLogs.log_records`.

    Args:
        drop_reasons: the running kernel's names for `tcp.drop.reason`; a number it does not know stands for itself.
        peer_names: what is known of peers.
    """

    def __init__(self, drop_reasons: Mapping[int, str], peer_names: PeerNames = nobody) -> None:
        self._buffer = Buffer()
        self._connections = RowStore(_connection_rows, 3, peer_names)
        self._words, self._kept = _Words(), [native.rows_of(texts) for texts in _ROWS.values()]
        for name, (data, lengths) in zip(_ROWS, self._kept, strict=True):
            native.point(getattr(self._words, name), data, lengths)
        self._reasons = drop_reasons
        widest = max(map(len, drop_reasons.values()), default=0)
        width = native.padded(len(string_attribute(names.DROP_REASON, max("65535", "x" * widest, key=len))))
        # Most of it is never written, and so never takes memory.
        self._drops, self._drop_lengths = np.zeros((_REASONS, width), np.uint8), np.zeros(_REASONS, np.int64)
        native.point(self._words.drops, self._drops, self._drop_lengths)
        native.point(self._words.sharing, *_SHARING)

    def encode(self, packets: Packets) -> Items:
        """Encode packet records, one item each; the buffer is used again by the next call."""
        ends, size = np.empty(len(packets), np.int64), 0
        pending = [slice(0, len(packets))]
        while pending:
            rows = pending.pop()
            part = packets if len(packets) == rows.stop - rows.start else packets.part(rows)
            numbers = self._connections.numbers(part)
            if numbers is None:
                packets = packets.arranged()
                pending += halves(rows)
            elif len(part):
                ends[rows] = self._join(part, numbers, size)
                size = int(ends[rows.stop - 1])
        return Items(self._buffer.room(size, size).data[:size], ends)

    def forget(self) -> None:
        """Let go of memory that a burst took; what is still needed of it is made again."""
        self._connections.forget()
        self._buffer = Buffer()

    def _join(self, packets: Packets, rows: NDArray[np.int64], base: int) -> NDArray[np.int64]:
        """Write records behind the `base` bytes that are there; returns where each ends."""
        words, count = self._words, len(packets)
        self._connections.point(0, words.text)
        self._connections.point(1, words.attributes)
        self._connections.point(2, words.ids)
        contexts, sharing = packets.contexts, None
        numbers: NDArray[np.int64] | None = None
        if contexts:
            interleaved = contexts.numbers == INTERLEAVED
            if contexts.sets or interleaved.any():
                made = _sharing_rows(contexts.sets) if contexts.sets else _SHARING
                native.point(words.sharing, *made)
                sharing = np.where(contexts.spans > 0, contexts.spans + 1, interleaved).astype(np.int64)
            numbers = np.ascontiguousarray(contexts.numbers)
        longest = _OWN_BYTES + sum(getattr(words, name).width for name in _WORDS)
        out = self._buffer.room(base + count * longest, base)
        ends = np.empty(count, np.int64)
        done = 0
        while done < count:
            done = native.library.tcpio_encode_logs(
                ctypes.byref(words), packets.records, rows, _address(packets.order), _address(numbers),
                _address(sharing), _address(contexts.ids if contexts else None),
                contexts.ids.itemsize if contexts else 0, done, count, packets.unix_offset_ns % (1 << 64),
                packets.observed_ns, out[base:], ends,
            )  # fmt: skip
            if done < count:
                at = done if packets.order is None else packets.order[done]
                self._make_drop(int(packets.records["drop_reason"][at]))
        ends += base
        return ends

    def _make_drop(self, reason: int) -> None:
        made = string_attribute(names.DROP_REASON, self._reasons.get(reason, str(reason)))
        self._drops[reason, : len(made)] = np.frombuffer(made, np.uint8)
        self._drop_lengths[reason] = len(made)


_INTERLEAVED = bool_attribute(names.INTERLEAVED)
_SHARING = native.rows_of([b"", _INTERLEAVED])


def _sharing_rows(sets: tuple[tuple[tuple[bytes, bytes], ...], ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """What a record says of its context being one of several: nothing, that they interleave, or which they are."""
    return native.rows_of(
        [b"", _INTERLEAVED, *(strings_attribute(names.CONTEXTS, map(_joined, contexts)) for contexts in sets)]
    )


def _joined(ids: tuple[bytes, bytes]) -> str:
    return f"{ids[0].hex()}-{ids[1].hex()}"


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _connection_rows(ends: Ends) -> tuple[bytes, bytes, bytes]:
    """What of a record belongs to its connection and direction: columns of the body; attributes; ids."""
    attributes = [
        int_attribute(key, value) if isinstance(value, int) else string_attribute(key, value)
        for key, value in ends.attributes
    ]
    ids = field(9, ends.trace_id) + field(10, ends.span_id) if ends.identified else b""
    return ends.columns.encode(), b"".join(attributes), ids
