"""Per-connection rows: what of a packet's encoding depends on its connection and direction only, kept by slot."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.batch import RECORD, Mark, pick
from tcpio_otel.encoding.columns import Offsets, Rows, Scratch

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


_WIDTH_STEP = 64
_TRIES = 4  # a batch may widen the rows twice before it can fill them

Build = Callable[[Ends], tuple[bytes, ...]]


class RowStore:
    """One array of rows for each part that `build` returns, by slot, direction, and whether NAT was at work.

    A row is made again when the flow's version says that it is stale, or NAT shows another tuple than before. The
    store grows with the flows, and with the longest row; what it held is then made again when it is next seen.

    Args:
        build: makes the parts of one row.
        parts: how many these are.
    """

    def __init__(self, build: Build, parts: int) -> None:
        self._build = build
        self._widths = [_WIDTH_STEP] * parts
        self._scratches = [Scratch() for _ in range(parts)]
        self._reset(0)

    def _reset(self, slots: int) -> None:
        """Empty arrays, whose pages cost nothing until they are written."""
        self._slots = slots
        size = 4 * slots
        self._versions: NDArray[np.uint64] = np.zeros(size, np.uint64)
        self._headers: NDArray[np.void] = np.zeros(size, f"V{_PACKED.itemsize}")
        self._rows: list[Rows] = [np.zeros(size, f"V{width}") for width in self._widths]
        self._lengths: list[Offsets] = [np.zeros(size, np.int64) for _ in self._widths]

    def numbers(
        self, records: NDArray[np.void], slots: NDArray[np.int64], flows: NDArray[np.void]
    ) -> NDArray[np.int64] | None:
        """The row number of each record (int64, shape (n,)), all made and fresh.

        None when two records of one connection and direction show different tuples in their headers: then no single
        row serves both, and the caller encodes them apart.
        """
        if len(flows) > self._slots:
            self._reset(len(flows))
        numbers, stale = np.empty(len(records), np.int64), np.empty(len(records), np.bool_)
        versions = flows["version"]
        for _ in range(_TRIES):
            found = native.library.tcpio_row_numbers(
                records, slots, len(records), versions, versions.strides[0], self._slots, self._versions, self._headers,
                numbers, stale,
            )  # fmt: skip
            if not found:
                return numbers
            self._make(records, slots, flows, numbers, np.nonzero(stale)[0])
        return None

    def _make(
        self,
        records: NDArray[np.void],
        slots: NDArray[np.int64],
        flows: NDArray[np.void],
        numbers: NDArray[np.int64],
        stale: NDArray[np.intp],
    ) -> None:
        """Make the rows of stale records, or, if one of them is too long, room for it."""
        made_numbers, first = np.unique(numbers[stale], return_index=True)
        rows = stale[first]
        chosen, flow = pick(records, rows), flows[slots[rows]]
        made = [self._build(ends) for ends in _ends(chosen, flow)]
        lengths = [[len(row[part]) for row in made] for part in range(len(self._widths))]
        widest = [max(part) for part in lengths]
        if any(needed > width for needed, width in zip(widest, self._widths, strict=True)):
            self._widths = [
                max(width, -(-needed // _WIDTH_STEP) * _WIDTH_STEP)
                for needed, width in zip(widest, self._widths, strict=True)
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


def _ends(records: NDArray[np.void], flows: NDArray[np.void]) -> Iterator[Ends]:
    """What rows are made of, for records and their flows."""
    for (
        (local, peer, socket_local, socket_peer),
        (local_port, peer_port, socket_local_port, socket_peer_port),
        direction, marks, identified, trace_id, span_id, pid, process_name,
    ) in zip(
        zip(*(_bytes(records[name]) for name in _ADDRESSES), strict=True),
        zip(*(records[name].tolist() for name in _PORTS), strict=True),
        records["direction"].tolist(), records["marks"].tolist(), flows["identified"].tolist(),
        _bytes(flows["trace_id"]), _bytes(flows["span_id"]), flows["pid"].tolist(), flows["process_name"].tolist(),
        strict=True,
    ):  # fmt: skip
        yield Ends(
            local, peer, local_port, peer_port, socket_local, socket_peer, socket_local_port, socket_peer_port,
            direction, bool(marks & _TRANSLATED), identified, trace_id, span_id, pid,
            process_name.decode("utf-8", "replace"),
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
