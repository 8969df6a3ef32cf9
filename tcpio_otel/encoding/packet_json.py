"""Packet records to JSON, by column: OTLP/JSON log records for files and OTLP/HTTP, and flat lines for a terminal."""

import json
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names
from tcpio_otel.batch import FIRST_CONTEXT, FLAG_NAMES, INTERLEAVED, Contexts, Flag, Mark, Packets
from tcpio_otel.encoding.columns import Segment, Table, constant, decimals, nine_digits
from tcpio_otel.encoding.endpoints import payload_text
from tcpio_otel.encoding.rows import Ends, PeerNames, RowStore, SegmentEncoder, nobody

Render = Callable[[str, str | int | float | bool], str]
"""An attribute as JSON text."""

_RST, _RETRANSMIT, _DROPPED = int(Flag.RST), int(Mark.RETRANSMIT), int(Mark.DROPPED)
_DAY_NS = 86_400_000_000_000


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def otlp_attribute(key: str, value: str | float | bool) -> str:
    """An attribute as `KeyValue` in OTLP/JSON: 64-bit integers are strings there."""
    if isinstance(value, bool):
        return f'{{"key":"{key}","value":{{"boolValue":{json.dumps(value)}}}}}'
    if isinstance(value, int):
        return f'{{"key":"{key}","value":{{"intValue":"{value}"}}}}'
    if isinstance(value, float):
        return f'{{"key":"{key}","value":{{"doubleValue":{json.dumps(value)}}}}}'
    return f'{{"key":"{key}","value":{{"stringValue":{_quoted(value)}}}}}'


def flat_attribute(key: str, value: str | float | bool) -> str:
    """An attribute as a member of a flat object."""
    return f'"{key}":{_quoted(value) if isinstance(value, str) else json.dumps(value)}'


class _Attributes:
    """The attributes of packet records as segments; the first comes without a comma before it.

    `before_first` is text that stands in front of them, by flags; `after` is what stands behind them, by connection.
    """

    def __init__(
        self,
        render: Render,
        drop_reasons: Mapping[int, str],
        before_first: Callable[[int], str],
        text: Callable[[Ends], str],
        after: Callable[[Ends], str],
        peer_names: PeerNames = nobody,
    ) -> None:
        def number(key: str, width: int, limit: int) -> Table:
            return Table(lambda value: ("," + render(key, value)).encode(), width, limit)

        def flags_and_cpu(key: int) -> bytes:
            cpu, bits = key >> 8, key & 0xFF
            attributes = (
                render(names.FLAGS, FLAG_NAMES[bits]), render(names.FLAGS_BITS, bits), render(names.CPU, cpu)
            )  # fmt: skip
            return (before_first(bits) + ",".join(attributes)).encode()

        def sequence(key: str) -> tuple[Segment, Segment]:
            head, tail = ("," + render(key, 0)).encode().split(b"0", 1)
            return constant(head), constant(tail)

        def drop(reason: int) -> bytes:
            return ("," + render(names.DROP_REASON, drop_reasons.get(reason, str(reason)))).encode()

        self._render, self._text, self._after = render, text, after
        self._flags = Table(flags_and_cpu, 320, 256 << 8)
        self._payloads = number(names.PAYLOAD_SIZE, 80, 1 << 18)
        self._windows = number(names.WINDOW, 64, 1 << 16)
        self._segments = number(names.GSO_SEGMENTS, 72, 1 << 16)
        self._segment_sizes = number(names.GSO_SIZE, 72, 1 << 16)
        self._drops = Table(drop, 192, 1 << 16)
        self._retransmits = Table(lambda marked: marked * ("," + render(names.RETRANSMIT, True)).encode(), 64, 2)
        self._seq, self._ack = sequence(names.SEQ), sequence(names.ACK)
        self.connections = RowStore(self._rows, 3, peer_names)

    def _rows(self, ends: Ends) -> tuple[bytes, ...]:
        rendered = "".join("," + self._render(key, value) for key, value in ends.attributes)
        return self._text(ends).encode(), rendered.encode(), self._after(ends).encode()

    def segments(self, packets: Packets) -> tuple[Segment, list[Segment], Segment] | None:
        """The text of each connection, the attributes, and what is behind them; None as `RowStore.numbers` says it."""
        numbers = self.connections.numbers(packets)
        if numbers is None:
            return None
        records = packets.records
        marks = records["marks"]
        reasons = np.where(marks & _DROPPED != 0, records["drop_reason"], 0)
        counts = records["gso_segments"]
        text, attributes, after = (
            (self.connections.rows(part, numbers), self.connections.lengths(part, numbers)) for part in range(3)
        )
        flags = records["cpu"].astype(np.int64) << 8 | records["flags"]
        return (
            text,
            [
                self._flags.segment(flags),
                self._payloads.segment(records["payload_bytes"]),
                self._windows.segment(records["window"]),
                *(self._seq[0], decimals(records["seq"]), self._seq[1]),
                *(self._ack[0], decimals(records["ack"]), self._ack[1]),
                present(self._segments.segment(counts), counts > 1),
                present(self._segment_sizes.segment(records["gso_size"]), counts > 1),
                self._retransmits.segment((marks & _RETRANSMIT != 0).astype(np.int64)),
                present(self._drops.segment(reasons), reasons != 0),
                attributes,
            ],
            after,
        )


def present(segment: Segment, where: NDArray[np.bool_]) -> Segment:
    """A piece that some rows lack."""
    rows, lengths = segment
    return rows, np.where(where, lengths, 0)


class PacketJsonEncoder(SegmentEncoder):
    """Encodes packet records as OTLP/JSON log records, each with a comma behind it."""

    def __init__(self, drop_reasons: Mapping[int, str], peer_names: PeerNames = nobody) -> None:
        self._attributes = _Attributes(
            otlp_attribute,
            drop_reasons,
            before_first=lambda bits: f'({FLAG_NAMES[bits]})"}},"attributes":[',
            text=lambda ends: ends.columns,
            after=_ids,
            peer_names=peer_names,
        )
        super().__init__(self._attributes.connections)
        self._cpus = Table(lambda cpu: f"{cpu} ".encode(), 8, 1 << 16)
        self._sizes = Table(lambda size: payload_text(size).encode(), 16, 1 << 18)

    def _segments(self, packets: Packets) -> list[Segment] | None:
        found = self._attributes.segments(packets)
        if found is None:
            return None
        text, attributes, ids = found
        records = packets.records
        warn = ((records["flags"] & _RST != 0) | (records["marks"] & _RETRANSMIT != 0)).astype(np.int64)
        heads = [
            f'","observedTimeUnixNano":"{packets.observed_ns}","severityNumber":{number},"severityText":"{name}",'
            f'"body":{{"stringValue":"'.encode()
            for number, name in names.SEVERITIES
        ]
        rows = np.array(heads, f"S{max(map(len, heads))}").view(f"V{max(map(len, heads))}")
        return [
            constant(b'{"timeUnixNano":"'),
            decimals(packets.unix_ns),
            (rows[warn], np.array([len(head) for head in heads])[warn]),
            self._cpus.segment(records["cpu"]),
            text,
            self._sizes.segment(records["payload_bytes"]),
            *attributes,
            *(_in_contexts(packets.contexts, ids) if packets.contexts else [constant(b"]"), ids]),
            constant(f',"eventName":"{names.PACKET_EVENT}"}},'.encode()),
        ]


def _ids_text(trace_id: bytes, span_id: bytes) -> str:
    return f',"traceId":"{trace_id.hex()}","spanId":"{span_id.hex()}"'


def _ids(ends: Ends) -> str:
    return _ids_text(ends.trace_id, ends.span_id) if ends.identified else ""


def _in_contexts(contexts: Contexts, ids: Segment) -> list[Segment]:
    """The end of the attributes, and the ids: the context's where a packet has one, else its connection's span's."""
    distinct, inverse = np.unique(contexts.numbers, return_inverse=True)
    own = _texts(
        [
            _ids_text(row["trace_id"].tobytes(), row["span_id"].tobytes()) if number >= FIRST_CONTEXT else ""
            for number, row in zip(distinct.tolist(), contexts.ids[distinct], strict=True)
        ],
        inverse,
    )
    which = np.where(contexts.spans > 0, contexts.spans + 1, contexts.numbers == INTERLEAVED)
    sharing = ["]", "," + otlp_attribute(names.INTERLEAVED, True) + "]", *map(_set_text, contexts.sets)]
    return [_texts(sharing, which), own, (ids[0], np.where(contexts.numbers >= FIRST_CONTEXT, 0, ids[1]))]


def _set_text(contexts: tuple[tuple[bytes, bytes], ...]) -> str:
    values = ",".join(f'{{"stringValue":"{trace_id.hex()}-{span_id.hex()}"}}' for trace_id, span_id in contexts)
    return f',{{"key":"{names.CONTEXTS}","value":{{"arrayValue":{{"values":[{values}]}}}}}}]'


def _texts(texts: list[str], which: NDArray[np.integer[Any]]) -> Segment:
    """One of a few texts for each row."""
    encoded = [text.encode() for text in texts]
    width = max(1, *map(len, encoded))
    rows = np.array([text.ljust(width, b"\0") for text in encoded], f"S{width}").view(f"V{width}")
    return rows[which], np.array([len(text) for text in encoded])[which]


class JsonLines(SegmentEncoder):
    """Encodes packet records as flat JSON objects, one a line: `time`, and the log record's attributes by name."""

    def __init__(self, drop_reasons: Mapping[int, str]) -> None:
        self._attributes = _Attributes(
            flat_attribute, drop_reasons, before_first=lambda _: "", text=lambda _: "", after=lambda _: ""
        )
        super().__init__(self._attributes.connections)
        self._days = Table(lambda day: (date(1970, 1, 1) + timedelta(days=day)).isoformat().encode(), 16, 1 << 17)

    def _segments(self, packets: Packets) -> list[Segment] | None:
        found = self._attributes.segments(packets)
        if found is None:
            return None
        unix_ns = packets.unix_ns
        return [
            constant(b'{"time":"'),
            self._days.segment((unix_ns // np.uint64(_DAY_NS)).astype(np.int64)),
            constant(b"T"),
            *clock_time(unix_ns),
            constant(b'Z",'),
            *found[1],
            constant(b"}\n"),
        ]


_SECONDS = Table(lambda second: b"%02d:%02d:%02d." % (second // 3600, second // 60 % 60, second % 60), 16, 86_400)


def clock_time(unix_ns: NDArray[np.uint64]) -> list[Segment]:
    """The time of day, HH:MM:SS.nnnnnnnnn, of Unix nanoseconds."""
    seconds, nanoseconds = np.divmod(unix_ns % np.uint64(_DAY_NS), np.uint64(1_000_000_000))
    return [_SECONDS.segment(seconds.astype(np.int64)), (nine_digits(nanoseconds), np.full(len(unix_ns), 9))]
