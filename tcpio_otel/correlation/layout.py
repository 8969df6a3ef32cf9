"""What `ContextTable` and contexts.c share: rows of the tables, and what a call passes; contexts.h has the meanings."""

import ctypes
from ctypes import c_uint64, c_void_p

import numpy as np
from numpy.typing import NDArray

Records = NDArray[np.void]

KEPT = 8
"""Of a connection's contexts, those that packets can still be joined to."""

CACHE_LINE_BYTES = 64

# `struct border`, `place`, `contexts` and `request` of contexts.h.
BORDER = np.dtype(
    [("seq", "<u4"), ("number", "<i4"), ("origin", "u1"), ("from_start", "u1"), ("open", "u1"), ("reserved", "u1")],
    align=True,
)
PLACE = np.dtype(
    [
        ("high", "<u4"), ("answer", "<u4"), ("answer_before", "<u4"), ("first", "<u4"), ("fin", "<u4", 2),
        ("sending", "u1"), ("receiving", "u1"), ("finished", "u1"), ("answers", "u1"), ("turns", "u1"),
        ("reserved", "u1"), ("serial", "<u2"), ("known", "<u4"), ("row", "<i4"), ("newest", BORDER, 2),
        ("born", "<u8"), ("unanswered", "<u4"), ("pass", "<u4"), ("first_waiting", "<i4"), ("last_waiting", "<i4"),
        ("pad", "u1", 40),
    ],
    align=True,
)  # fmt: skip
ROW = np.dtype(
    [("count", "<u4", 2), ("shared", "u1"), ("reserved", "u1", 7), ("borders", BORDER, (KEPT, 2)), ("pad", "u1", 48)],
    align=True,
)
REQUEST = np.dtype(
    [
        ("trace_id", "V16"), ("span_id", "V8"), ("slot", "<i8"), ("born", "<u8"), ("began_ns", "<u8"),
        ("superseded_ns", "<u8"), ("first_ns", "<u8", 2), ("acked_ns", "<u8", 2), ("begin", "<u4", 2),
        ("origin", "u1"), ("marks", "u1"), ("borders", "u1"), ("state", "u1"), ("pad", "u1", 28),
        ("last_ns", "<u8"), ("gap_ns", "<u8"), ("payload", "<u8", 2), ("packets", "<u4", 2), ("end", "<u4", 2),
        ("acked", "<u4", 2), ("retransmits", "<u4"), ("begun", "u1"), ("unplaced", "u1"), ("reserved", "<u2"),
    ],
    align=True,
)  # fmt: skip


class Table(ctypes.Structure):
    """`struct table` of contexts.h."""

    _fields_ = tuple((name, c_void_p) for name in ("places", "rows", "requests", "flows")) + tuple(
        (name, c_uint64) for name in ("flow_stride", "server_offset")
    )


class Joined(ctypes.Structure):
    """`struct joined` of join.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("numbers", "spans", "sets")),
        *((name, c_uint64) for name in ("room", "found", "joined")),
    )


class Exchange(ctypes.Structure):
    """`struct exchange` of contexts.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("earlier", "earlier_slots")),
        ("earlier_count", c_uint64),
        *((name, c_void_p) for name in ("numbers", "taken", "free_rows", "apart", "next", "places", "waits")),
        ("joined", Joined),
        *((name, c_uint64) for name in ("rows_used", "lost", "passes")),
    )


def lines(count: int, dtype: np.dtype[np.void]) -> Records:
    """So many rows of zeros, the first at the start of a cache line; so are the others, by the size of their dtype."""
    memory = np.zeros(count * dtype.itemsize + CACHE_LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return memory[start : start + count * dtype.itemsize].view(dtype)


def grown(rows: Records, count: int) -> Records:
    """The same rows, and zeros behind them, `count` in all."""
    more = lines(count, rows.dtype)
    more[: len(rows)] = rows
    return more


class Room:
    """Room for what there is to say of so many packets; used again, as fresh pages cost more than their contents."""

    def __init__(self, count: int) -> None:
        self.numbers, self.spans = np.empty(count, np.int64), np.empty(count, np.int32)
        self.sets = np.empty((count, KEPT), np.int64)
        self.waits, self._next, self._places = np.empty(count, np.bool_), *np.empty((2, count), np.int32)
        self.exchange = Exchange(
            next=self._next.ctypes.data,
            places=self._places.ctypes.data,
            waits=self.waits.ctypes.data,
            joined=Joined(numbers=self.numbers.ctypes.data, spans=self.spans.ctypes.data, sets=self.sets.ctypes.data),
        )

    def __len__(self) -> int:
        return len(self.numbers)
