"""Per-connection rows: what of a packet's encoding depends on its connection and direction only, kept by slot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import RECORD, Mark, pick
from tcpio_otel.encoding.columns import Offsets, Rows, narrow

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


Build = Callable[[Ends], tuple[bytes, ...]]


class RowStore:
    """One array of rows for each part that `build` returns, indexed by slot, direction, and whether NAT was at work.

    A row is made again when the flow's version says that it is stale, or NAT shows another tuple than before.

    Args:
        build: makes the parts of one row.
        widths: the bytes that each part may have at most.
    """

    def __init__(self, build: Build, widths: tuple[int, ...]) -> None:
        self._build = build
        self._versions: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._headers: NDArray[np.void] = np.zeros(0, "V36")
        self._rows: list[Rows] = [np.zeros(0, f"V{width}") for width in widths]
        self._lengths: list[Offsets] = [np.zeros(0, np.int64) for _ in widths]

    def numbers(
        self, records: NDArray[np.void], slots: NDArray[np.int64], flows: NDArray[np.void]
    ) -> NDArray[np.int64] | None:
        """The row number of each record (int64, shape (n,)), all made and fresh.

        None when two records of one connection and direction show different tuples in their headers: then no single
        row serves both, and the caller encodes them apart.
        """
        if 4 * len(flows) > len(self._versions):
            self._grow(4 * len(flows))
        translated = (records["marks"] & _TRANSLATED) != 0
        numbers: NDArray[np.int64] = slots * 4 + records["direction"] * 2 + translated
        stale = self._versions[numbers] != flows["version"][slots]
        some_translated = bool(translated.any())
        if some_translated:
            headers = _headers(records)
            stale |= translated & (headers != self._headers[numbers])
        if stale.any():
            rows = np.nonzero(stale)[0]
            numbers_made, first = np.unique(numbers[rows], return_index=True)
            self._make(records, slots, flows, rows[first], numbers_made)
            if some_translated and (translated & (headers != self._headers[numbers])).any():
                return None
        return numbers

    def _grow(self, size: int) -> None:
        def grown(array: NDArray[Any]) -> NDArray[Any]:
            # Zeroed pages cost nothing until they are written, copied ones do.
            larger = np.zeros(size, array.dtype)
            larger[: len(array)] = array
            return larger

        self._versions, self._headers = grown(self._versions), grown(self._headers)
        self._rows = [grown(rows) for rows in self._rows]
        self._lengths = [grown(lengths) for lengths in self._lengths]

    def _make(
        self,
        records: NDArray[np.void],
        slots: NDArray[np.int64],
        flows: NDArray[np.void],
        rows: NDArray[np.intp],
        numbers: NDArray[np.int64],
    ) -> None:
        chosen, flow = pick(records, rows), flows[slots[rows]]
        made = [
            self._build(
                Ends(
                    local.tobytes(), peer.tobytes(), local_port, peer_port, socket_local.tobytes(),
                    socket_peer.tobytes(), socket_local_port, socket_peer_port, direction, bool(marks & _TRANSLATED),
                    identified, trace_id.tobytes(), span_id.tobytes(), pid, process_name.decode("utf-8", "replace"),
                )
            )
            for (
                (local, peer, socket_local, socket_peer),
                (local_port, peer_port, socket_local_port, socket_peer_port),
                direction, marks, identified, trace_id, span_id, pid, process_name,
            ) in zip(
                zip(*(list(chosen[name]) for name in _ADDRESSES), strict=True),
                zip(*(chosen[name].tolist() for name in _PORTS), strict=True),
                chosen["direction"].tolist(), chosen["marks"].tolist(), flow["identified"].tolist(),
                list(flow["trace_id"]), list(flow["span_id"]), flow["pid"].tolist(), flow["process_name"].tolist(),
                strict=True,
            )
        ]  # fmt: skip
        for part, (store, lengths) in enumerate(zip(self._rows, self._lengths, strict=True)):
            width = store.dtype.itemsize
            store[numbers] = np.frombuffer(b"".join(row[part].ljust(width, b"\0") for row in made), store.dtype)
            lengths[numbers] = [len(row[part]) for row in made]
        self._versions[numbers] = flow["version"]
        self._headers[numbers] = _headers(chosen)

    def lengths(self, part: int, numbers: NDArray[np.int64]) -> Offsets:
        """The lengths of a part of rows (int64)."""
        return self._lengths[part][numbers]

    def whole(self, part: int, numbers: NDArray[np.int64]) -> Rows:
        """A part of rows, as wide as they are kept."""
        return self._rows[part][numbers]

    def rows(self, part: int, numbers: NDArray[np.int64], width: int) -> Rows:
        """The first `width` bytes of a part of rows (dtype V<width>)."""
        rows: Rows = narrow(self._rows[part], width)[numbers]
        return rows


def _headers(records: NDArray[np.void]) -> NDArray[np.void]:
    """The tuples in the headers as bytes, to compare (dtype V36)."""
    packed = np.empty(len(records), _PACKED)
    for name in _HEADER_TUPLE:
        packed[name] = records[name]
    return packed.view(f"V{_PACKED.itemsize}")
