"""Per-connection rows: what of a packet's encoding depends on its connection and direction only, kept by slot."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names, native
from tcpio_otel.batch import RECORD, Mark, Names, Packets, pick
from tcpio_otel.encoding.columns import Buffer, Offsets, Rows, Scratch, Segment, assemble
from tcpio_otel.encoding.endpoints import DIRECTIONS, address_text, columns, network_type
from tcpio_otel.payload import Items

_TRANSLATED = int(Mark.TRANSLATED)
_ADDRESSES = ("header_local_address", "header_peer_address", "local_address", "peer_address")
_PORTS = ("header_local_port", "header_peer_port", "local_port", "peer_port")
_HEADER_TUPLE = (*_ADDRESSES[:2], *_PORTS[:2])
_PACKED = np.dtype([(name, RECORD[name]) for name in _HEADER_TUPLE])


class Ends(NamedTuple):
    """Everything that rows are made of: the tuple in the headers, the socket's own, and the flow."""

    local: bytes
    peer: bytes
    local_port: int
    peer_port: int
    socket_local: bytes
    socket_peer: bytes
    socket_local_port: int
    socket_peer_port: int
    direction: int
    translated: bool
    identified: bool
    trace_id: bytes
    span_id: bytes
    pid: int
    process_name: str
    peer_names: Names

    @property
    def columns(self) -> str:
        """Their part of a row of `tcpio.d`."""
        return columns(self.local, self.local_port, self.peer, self.peer_port, self.direction)

    @property
    def attributes(self) -> list[tuple[str, str | int]]:
        """What a log record says of them (docs/attributes.md)."""
        found: list[tuple[str, str | int]] = [
            (names.NETWORK_TRANSPORT, "tcp"),
            (names.NETWORK_TYPE, network_type(self.local)),
            (names.LOCAL_ADDRESS, address_text(self.local)),
            (names.LOCAL_PORT, self.local_port),
            (names.PEER_ADDRESS, address_text(self.peer)),
            (names.PEER_PORT, self.peer_port),
            (names.IO_DIRECTION, DIRECTIONS[self.direction]),
        ]
        if self.translated:
            found += [
                (names.SOCKET_LOCAL_ADDRESS, address_text(self.socket_local)),
                (names.SOCKET_LOCAL_PORT, self.socket_local_port),
                (names.SOCKET_PEER_ADDRESS, address_text(self.socket_peer)),
                (names.SOCKET_PEER_PORT, self.socket_peer_port),
            ]
        if self.pid:
            found.append((names.PID, self.pid))
        if self.process_name:
            found.append((names.EXECUTABLE_NAME, self.process_name))
        if self.identified:
            found.append((names.CONNECTION_ID, self.trace_id[:8].hex()))
        return [*found, *self.peer_names]


CHUNK = 8192
"""Rows that `SegmentEncoder` takes at a time: fewer cost more in calls, more cost more in cache misses."""

_TRIES = 4  # a batch may widen the rows twice before it can fill them

Build = Callable[[Ends], tuple[bytes, ...]]

PeerNames = Callable[[int], Names]
"""What is known of a peer, by its number, as attributes."""


def nobody(number: int) -> Names:
    """Of a peer nothing is known."""
    del number
    return ()


class RowStore:
    """One array of rows for each part that `build` returns, by slot, direction, and whether NAT was at work.

    A row is made again when the flow's version says that it is stale, or NAT shows another tuple than before. The
    store grows with the flows, and with the longest row; what it held is then made again when it is next seen.

    Args:
        build: makes the parts of one row.
        parts: how many these are.
        peer_names: what is known of peers.
    """

    def __init__(self, build: Build, parts: int, peer_names: PeerNames = nobody) -> None:
        self._build, self._peer_names = build, peer_names
        self._widths = [native.STEP] * parts
        self._scratches = [Scratch() for _ in range(parts)]
        self._reset(0)

    def forget(self) -> None:
        """Drop all rows; each is made again when it is next seen."""
        self._scratches = [Scratch() for _ in self._widths]
        self._reset(0)

    def _reset(self, slots: int) -> None:
        """Empty arrays, whose pages cost nothing until they are written."""
        self._slots = slots
        size = 4 * slots
        self._versions: NDArray[np.uint64] = np.zeros(size, np.uint64)
        self._headers: NDArray[np.void] = np.zeros(size, f"V{_PACKED.itemsize}")
        self._rows: list[Rows] = [np.zeros(size, f"V{width}") for width in self._widths]
        self._lengths: list[Offsets] = [np.zeros(size, np.int64) for _ in self._widths]

    def numbers(self, packets: Packets) -> NDArray[np.int64] | None:
        """The row number of each record (int64, shape (n,)), all made and fresh.

        None when two records of one connection and direction show different tuples in their headers: then no single
        row serves both, and the caller encodes them apart.
        """
        records, slots = packets.records, packets.slots
        if len(packets.flows) > self._slots:
            self._reset(len(packets.flows))
        numbers, stale = np.empty(len(records), np.int64), np.empty(len(records), np.bool_)
        versions = packets.flows["version"]
        for _ in range(_TRIES):
            found = native.library.tcpio_row_numbers(
                records, slots, len(records), versions, versions.strides[0], self._slots, self._versions, self._headers,
                numbers, stale,
            )  # fmt: skip
            if not found:
                return numbers
            self._make(packets, numbers, np.nonzero(stale)[0])
        return None

    def _make(self, packets: Packets, numbers: NDArray[np.int64], stale: NDArray[np.intp]) -> None:
        """Make the rows of stale records, or, if one of them is too long, room for it."""
        made_numbers, first = np.unique(numbers[stale], return_index=True)
        rows = stale[first]
        chosen, flow = pick(packets.records, rows), packets.flows[packets.slots[rows]]
        made = [self._build(ends) for ends in _ends(chosen, flow, self._peer_names)]
        lengths = [[len(row[part]) for row in made] for part in range(len(self._widths))]
        widest = [max(part) for part in lengths]
        if any(needed > width for needed, width in zip(widest, self._widths, strict=True)):
            self._widths = [
                max(width, native.padded(needed)) for needed, width in zip(widest, self._widths, strict=True)
            ]
            self._reset(self._slots)
            return
        for part, store in enumerate(self._rows):
            width = store.dtype.itemsize
            store[made_numbers] = np.frombuffer(b"".join([row[part].ljust(width, b"\0") for row in made]), store.dtype)
            self._lengths[part][made_numbers] = lengths[part]
        self._versions[made_numbers] = flow["version"]
        translated = (chosen["marks"] & _TRANSLATED) != 0
        if translated.any():
            self._headers[made_numbers[translated]] = _headers(chosen)[translated]

    def point(self, part: int, rows: native.Rows) -> None:
        """Let `rows` point to a part of the rows, by row number; good until `numbers` is called again."""
        native.point(rows, self._rows[part], self._lengths[part])

    def lengths(self, part: int, numbers: NDArray[np.int64]) -> Offsets:
        """The lengths of a part of rows (int64)."""
        return self._lengths[part][numbers]

    def rows(self, part: int, numbers: NDArray[np.int64]) -> Rows:
        """A part of rows, as wide as the longest that was seen; good until the next call."""
        return self._scratches[part].take(self._rows[part], numbers)


def halves(rows: slice) -> list[slice]:
    """Two slices for one, to be encoded apart; a stack takes the first one last."""
    middle = (rows.start + rows.stop) // 2
    return [slice(middle, rows.stop), slice(rows.start, middle)]


class SegmentEncoder:
    """Encodes packets as chains of segments, put together by NumPy: chunks, and rows that must be encoded apart."""

    def __init__(self, connections: RowStore) -> None:
        self._connections = connections
        self._buffer = Buffer()

    def forget(self) -> None:
        """Let go of memory that a burst took; what is still needed of it is made again."""
        self._connections.forget()
        self._buffer = Buffer()

    def encode(self, packets: Packets) -> Items:
        """Encode packet records, one item each."""
        packets, parts, ends, size = packets.arranged(), [], [], 0
        pending = [slice(start, min(start + CHUNK, len(packets))) for start in range(0, len(packets), CHUNK)][::-1]
        while pending:
            rows = pending.pop()
            segments = self._segments(packets.part(rows))
            if segments is None:
                pending += halves(rows)
                continue
            text, chunk_ends = assemble(self._buffer, segments, rows.stop - rows.start)
            parts.append(bytes(text))
            ends.append(chunk_ends + size)
            size += len(text)
        return Items(memoryview(b"".join(parts)), np.concatenate([np.empty(0, np.int64), *ends]))

    def _segments(self, packets: Packets) -> list[Segment] | None:
        """The segments of each record, from left to right; None as `RowStore.numbers` says it."""
        raise NotImplementedError


def _ends(records: NDArray[np.void], flows: NDArray[np.void], peer_names: PeerNames) -> Iterator[Ends]:
    """What rows are made of, for records and their flows."""
    for (
        (local, peer, socket_local, socket_peer),
        (local_port, peer_port, socket_local_port, socket_peer_port),
        direction, marks, identified, trace_id, span_id, pid, process_name, peer_number,
    ) in zip(
        zip(*(_bytes(records[name]) for name in _ADDRESSES), strict=True),
        zip(*(records[name].tolist() for name in _PORTS), strict=True),
        records["direction"].tolist(), records["marks"].tolist(), flows["identified"].tolist(),
        _bytes(flows["trace_id"]), _bytes(flows["span_id"]), flows["pid"].tolist(), flows["process_name"].tolist(),
        flows["peer"].tolist(),
        strict=True,
    ):  # fmt: skip
        yield Ends(
            local, peer, local_port, peer_port, socket_local, socket_peer, socket_local_port, socket_peer_port,
            direction, bool(marks & _TRANSLATED), identified, trace_id, span_id, pid,
            process_name.decode("utf-8", "replace"), peer_names(peer_number),
        )  # fmt: skip


def _bytes(values: NDArray[np.void]) -> list[bytes]:
    """Fields of raw bytes as bytes, zeros at their end included."""
    whole, width = values.tobytes(), values.dtype.itemsize
    return [whole[at : at + width] for at in range(0, len(whole), width)]


def _headers(records: NDArray[np.void]) -> NDArray[np.void]:
    """The tuples in the headers as bytes, to compare (dtype V36)."""
    packed = np.empty(len(records), _PACKED)
    for name in _HEADER_TUPLE:
        packed[name] = records[name]
    return packed.view(f"V{_PACKED.itemsize}")
