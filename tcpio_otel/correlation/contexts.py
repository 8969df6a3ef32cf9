"""Trace contexts to packets: which application's span each packet served, by connection, direction and sequence number.

The probe tells where contexts begin. What lies between there and the next one belongs to it, whenever it is sent: so
retransmits and segments over several requests fall out right, and nothing is asked of a packet but a comparison or two.
contexts.c does what is done to every record; this keeps the tables, and settles what has ended.
"""

import ctypes
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.batch import FIRST_CONTEXT, FLOW, RAW, RECORD, Batch, ContextMark, Contexts, Direction, Kind, Origin
from tcpio_otel.correlation.events import Link, Range, Request

Records = NDArray[np.void]
Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]

KEPT = 8
LINKS = 128
"""Contexts that a connection's span links to; more are counted."""

ANSWERING_LIMIT = 4096
"""Listeners that are remembered for tagging what they accept."""

SWEEP_NS = 100_000_000
SETTLE_NS = 1_000_000_000
"""How long a request that was followed by another may still be acknowledged, or its retransmits arrive."""

_PLACE = np.dtype(
    [
        ("born", "<u8"), ("row", "<i4"), ("high", "<u4"), ("answer", "<u4"), ("fin", "<u4", 2), ("sending", "u1"),
        ("answers", "u1"), ("finished", "u1"), ("reserved", "u1"), ("pass", "<u4"), ("first_waiting", "<i4"),
        ("last_waiting", "<i4"),
    ],
    align=True,
)  # fmt: skip
_BORDER = np.dtype(
    [("seq", "<u4"), ("number", "<i4"), ("origin", "u1"), ("from_start", "u1"), ("open", "u1"), ("reserved", "u1")],
    align=True,
)
_ROW = np.dtype(
    [
        ("borders", _BORDER, (2, KEPT)), ("count", "<u4", 2), ("known", "<u4"), ("serial", "<u2"), ("shared", "u1"),
        ("reserved", "u1"),
    ],
    align=True,
)  # fmt: skip
REQUEST = np.dtype(
    [
        ("trace_id", "V16"), ("span_id", "V8"), ("slot", "<i8"), ("born", "<u8"), ("began_ns", "<u8"),
        ("superseded_ns", "<u8"), ("first_ns", "<u8", 2), ("last_ns", "<u8"), ("acked_ns", "<u8"), ("gap_ns", "<u8"),
        ("payload", "<u8", 2), ("packets", "<u8", 2), ("begin", "<u4", 2), ("end", "<u4", 2), ("acked", "<u4", 2),
        ("retransmits", "<u4"), ("origin", "u1"), ("marks", "u1"), ("borders", "u1"), ("state", "u1"),
        ("unplaced", "u1"), ("reserved", "u1", 3),
    ],
    align=True,
)  # fmt: skip
"""`struct request` of contexts.h: one context, and what was seen of its packets."""

_FREE, _LIVE, _TOLD, _SETTLED = range(4)
"""States of a request: told means that its figures were reported, and more may come; settled that nothing will."""

_TRANSMIT, _RECEIVE = int(Direction.TRANSMIT), int(Direction.RECEIVE)


class _Table(ctypes.Structure):
    """`struct table` of contexts.c."""

    _fields_ = tuple((name, c_void_p) for name in ("places", "rows", "requests", "flows")) + tuple(
        (name, c_uint64) for name in ("flow_stride", "born_offset", "server_offset")
    )


class _Joined(ctypes.Structure):
    """`struct joined`."""

    _fields_ = (("numbers", c_void_p), ("spans", c_void_p), ("sets", c_void_p), ("found", c_uint64))


class _Exchange(ctypes.Structure):
    """`struct exchange`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "numbers", "taken", "free_rows", "left_rows", "left_lives", "next", "waits", "expecting", "apart",
        )),
        ("joined", _Joined),
        *((name, c_uint64) for name in ("rows_used", "rows_left", "lost", "pass")),
    )  # fmt: skip


@dataclass(frozen=True)
class Followed:
    """What became of packets: whether each still waits for its context (bool, shape (n,)), and what others have."""

    waits: Mask
    contexts: Contexts


_LINK = np.dtype([(name, REQUEST[name]) for name in (
    "trace_id", "span_id", "began_ns", "last_ns", "begin", "end", "origin", "marks", "unplaced",
)])  # fmt: skip
"""What is kept of a request for the link of its connection's span."""


class _Served:
    """What one connection has served: numbers of its requests, and packed rows of `_LINK` of those that were let go."""

    __slots__ = ("dropped", "numbers", "packed")

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.packed = bytearray()
        self.dropped = 0


class ContextTable:
    """Every context that an open connection serves.

    A slot is that of the connection table; `flows` (dtype FLOW) says which life of the slot is meant.

    Args:
        quiet_ns: an answered request of which nothing was heard for so long is summed up.
    """

    def __init__(self, *, quiet_ns: int) -> None:
        self._quiet_ns = quiet_ns
        self._places = np.zeros(0, _PLACE)
        self._rows = np.zeros(64, _ROW)
        self._free_rows = np.arange(len(self._rows), dtype=np.int32)
        self._requests = np.zeros(256, REQUEST)
        self._free = np.arange(FIRST_CONTEXT, len(self._requests), dtype=np.int32)
        self._flows: Records = np.zeros(0, FLOW)
        self._served: dict[int, _Served] = {}  # by the life of a connection
        self._answering: dict[tuple[int, int], None] = {}
        self._due: list[Request] = []
        self._swept_ns = 0
        self._table = _Table(born_offset=FLOW.fields["born"][1], server_offset=FLOW.fields["server"][1])  # type: ignore[index]
        self._passes = 0
        self.begun = 0
        self.lost = 0

    # A batch.

    def follow(
        self, batch: Batch, slots: Slots, flows: Records, apart: Mask | None, waiting: tuple[Records, Slots] | None
    ) -> Followed:
        """Take a batch in, after the connection table has.

        Args:
            batch: records in time order.
            slots: the slot of each record, of whatever kind (int64, shape (records,)); -1: none.
            flows: the connection table's (dtype FLOW).
            apart: which packets wait for something else, and are left to `join` (bool, shape (packets,)); None: none.
            waiting: packets of earlier batches that still wait for their context, in time order, and their slots.

        Returns:
            What became of those that waited, and of the packets of the batch behind them.
        """
        contexts = np.flatnonzero(batch.records["kind"] == Kind.CONTEXT)
        self._fit(flows)
        self._reserve(len(contexts))
        ahead = len(waiting[0]) if waiting else 0
        records, all_slots = np.ascontiguousarray(batch.records), slots
        if waiting:
            records = np.concatenate([waiting[0].view(RAW), records.view(RAW)]).view(RECORD)
            all_slots = np.concatenate([waiting[1], slots])
        count = len(records)
        taken = np.zeros(len(contexts), np.bool_)
        left, lives = np.empty(count, np.int32), np.empty(count, np.uint64)
        waits, after = np.zeros(count, np.bool_), np.empty(count, np.int32)
        skipped, expecting = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        if apart is not None:
            skipped[ahead:][batch.is_packet] = apart
        if self._answering:
            self._expect(batch.records, slots, expecting[ahead:])
        joined, arrays = _room(count)
        self._passes = (self._passes + 1) % (1 << 32)
        exchange = _Exchange(joined=joined, rows_used=0, rows_left=0, lost=0)
        for name, array in (
            ("numbers", self._free), ("taken", taken), ("free_rows", self._free_rows), ("left_rows", left),
            ("left_lives", lives),
            ("next", after), ("waits", waits), ("expecting", expecting), ("apart", skipped),
        ):  # fmt: skip
            setattr(exchange, name, array.ctypes.data)
        setattr(exchange, "pass", self._passes)
        native.library.tcpio_follow(ctypes.byref(self._table), records, all_slots, count, ahead, ctypes.byref(exchange))
        self._settle_rows(exchange.rows_used, left[: exchange.rows_left], lives[: exchange.rows_left])
        self.lost += exchange.lost
        if len(contexts):
            self._take(taken)
            self._remember_listeners(batch.records[contexts], slots[contexts])
        self._sweep(batch)
        found = self._contexts(exchange.joined.found, *arrays)
        if ahead + len(batch.packets) == count:
            return Followed(waits, found)
        packets = np.concatenate([np.ones(ahead, np.bool_), batch.is_packet])
        return Followed(waits[packets], found.where(packets))

    def _contexts(self, found: int, numbers: NDArray[np.int64], spans: NDArray[np.int32], sets: Slots) -> Contexts:
        """What C has found, with the ids of the sets."""
        ids = self._requests
        named = tuple(
            tuple((ids["trace_id"][number].tobytes(), ids["span_id"][number].tobytes())
                  for number in row if number >= FIRST_CONTEXT)
            for row in sets[:found].tolist()
        )  # fmt: skip
        return Contexts(numbers, spans, named, ids)

    def _fit(self, flows: Records) -> None:
        if len(flows) > len(self._places):
            grown = np.zeros(len(flows), _PLACE)
            grown["row"] = -1
            grown[: len(self._places)] = self._places
            self._places = grown
        self._flows = flows
        table = self._table
        table.places, table.rows = self._places.ctypes.data, self._rows.ctypes.data
        table.requests, table.flows = self._requests.ctypes.data, flows.ctypes.data
        table.flow_stride = flows.strides[0]

    def _reserve(self, contexts: int) -> None:
        """Make room for so many contexts, and as many connections that had none."""
        while contexts > len(self._free):
            size = len(self._requests)
            self._requests = np.concatenate([self._requests, np.zeros(size, REQUEST)])
            self._free = np.concatenate([self._free, np.arange(size, 2 * size, dtype=np.int32)])
        while contexts > len(self._free_rows):
            size = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros(size, _ROW)])
            self._free_rows = np.concatenate([self._free_rows, np.arange(size, 2 * size, dtype=np.int32)])
        self._fit(self._flows)

    def _take(self, taken: Mask) -> None:
        numbers = self._free[: len(taken)]
        used, requests = numbers[taken], self._requests
        requests["state"][used] = _LIVE
        for number, born in zip(used.tolist(), requests["born"][used].tolist(), strict=True):
            if (served := self._served.get(born)) is None:
                served = self._served[born] = _Served()
            served.numbers.append(number)
        self.begun += len(used)
        self._free = np.concatenate([numbers[~taken], self._free[len(taken) :]])

    def _settle_rows(self, used: int, left: NDArray[np.int32], lives: NDArray[np.uint64]) -> None:
        """Rows were used, and others left by connections that are gone."""
        if used or len(left):
            self._release_rows(left)
            for born in lives.tolist():
                self._served.pop(born, None)
            self._free_rows = np.concatenate([self._free_rows[used:], left])

    def _release_rows(self, rows: NDArray[np.int32]) -> None:
        """Let go of the contexts that rows name."""
        for row in self._rows[rows]:
            for direction in (_RECEIVE, _TRANSMIT):
                numbers = row["borders"][direction][: row["count"][direction]]["number"]
                np.subtract.at(self._requests["borders"], numbers[numbers >= FIRST_CONTEXT], 1)

    def _remember_listeners(self, records: Records, slots: Slots) -> None:
        for netns, port, slot, origin in zip(
            records["netns"].tolist(), records["local_port"].tolist(), slots.tolist(), records["origin"].tolist(),
            strict=True,
        ):  # fmt: skip
            if origin == Origin.TAG and slot >= 0 and self._places["answers"][slot]:
                if len(self._answering) >= ANSWERING_LIMIT:
                    self._answering.pop(next(iter(self._answering)))
                self._answering[netns, port] = None

    def _expect(self, records: Records, slots: Slots, expecting: Mask) -> None:
        """New connections of listeners whose connections have been tagged will be tagged too."""
        known = np.flatnonzero(slots >= 0)
        fresh = known[self._places["born"][slots[known]] != self._flows["born"][slots[known]]]
        for row in fresh.tolist():
            expecting[row] = (int(records["netns"][row]), int(records["local_port"][row])) in self._answering

    def join(self, records: Records, slots: Slots) -> Contexts:
        """The contexts of packets that were left apart, now that nothing else keeps them.

        Args:
            records: packets (dtype RECORD, shape (n,)), each given once.
            slots: of each.
        """
        joined, arrays = _room(len(records))
        native.library.tcpio_join(
            ctypes.byref(self._table), np.ascontiguousarray(records), slots, len(records), ctypes.byref(joined)
        )
        return self._contexts(joined.found, *arrays)

    # Ends.

    def _sweep(self, batch: Batch) -> None:
        """Sum up requests that are over, and let go of what nobody names any more."""
        if batch.now_ns - self._swept_ns < SWEEP_NS:
            return
        self._swept_ns = batch.now_ns
        requests = self._requests
        state = requests["state"]
        now_ns = np.uint64(batch.now_ns)
        gone = self._flows["born"][requests["slot"]] != requests["born"]
        live = state == _LIVE
        done = (requests["begin"] != requests["end"]) & ((requests["acked"] - requests["end"]).astype(np.int32) >= 0)
        superseded = requests["superseded_ns"]
        over = (superseded != 0) & (done.all(axis=1) | (superseded + np.uint64(SETTLE_NS) <= now_ns))
        heard = np.maximum(requests["last_ns"], requests["began_ns"])
        quiet = done.all(axis=1) & (heard + np.uint64(self._quiet_ns) <= now_ns)
        # One of several has no bytes of its own: there is nothing to wait for.
        shared = live & (requests["marks"] & ContextMark.SHARED != 0)
        for number in np.flatnonzero(live & (over | quiet | gone | shared)).tolist():
            self._tell(number, batch.unix_offset_ns)
        settled = np.flatnonzero((state == _TOLD) & ((requests["borders"] == 0) & ((superseded != 0) | shared) | gone))
        for number in settled.tolist():
            self._settle(number)
        self._free = np.concatenate([self._free, settled.astype(np.int32)])
        self._let_go()

    def _let_go(self) -> None:
        """Forget connections whose slots are free again."""
        rows = np.flatnonzero((self._places["row"] >= 0) & (self._places["born"] != self._flows["born"]))
        left, lives = self._places["row"][rows], self._places["born"][rows]
        self._places["row"][rows] = -1
        self._settle_rows(0, left, lives)

    def _tell(self, number: int, offset_ns: int) -> None:
        """Report what was seen of a request."""
        request = self._requests[number]
        self._requests["state"][number] = _TOLD
        if request["packets"].any():
            self._due.append(_request(request, offset_ns))

    def _settle(self, number: int) -> None:
        """Nobody names a request any more: keep what its connection's span will say of it."""
        self._requests["state"][number] = _FREE
        if (served := self._served.get(int(self._requests["born"][number]))) is None:
            return
        served.numbers.remove(number)
        if len(served.packed) < LINKS * _LINK.itemsize:
            served.packed += _links_of(self._requests[number : number + 1]).tobytes()
        else:
            served.dropped += 1

    def take_requests(self) -> list[Request]:
        """Requests whose figures fell due since the last call."""
        due, self._due = self._due, []
        return due

    def end(self, slot: int, offset_ns: int) -> tuple[tuple[Link, ...], int]:
        """A connection's span is due: the contexts that it served, oldest first, and how many more there were.

        Figures of its requests that are not out yet fall due. `offset_ns` turns the records' times into Unix time.
        """
        if slot >= len(self._places):
            return (), 0
        if (found := self._served.get(int(self._places["born"][slot]))) is None:
            return (), 0
        for number in found.numbers:
            if self._requests["state"][number] == _LIVE:
                self._tell(number, offset_ns)
        served = np.concatenate([np.frombuffer(bytes(found.packed), _LINK), _links_of(self._requests[found.numbers])])
        served = served[np.argsort(served["began_ns"], kind="stable")]
        distinct = list(
            {request["trace_id"].tobytes() + request["span_id"].tobytes(): request for request in served}.values()
        )
        links = tuple(_link(request, offset_ns) for request in distinct[:LINKS])
        return links, found.dropped + len(distinct) - len(links)


def _room(count: int) -> tuple[_Joined, tuple[NDArray[np.int64], NDArray[np.int32], Slots]]:
    """Room for the contexts of so many packets, as C and as Python see it."""
    numbers, spans = np.empty(count, np.int64), np.empty(count, np.int32)
    sets = np.empty((count, KEPT), np.int64)
    return _Joined(numbers.ctypes.data, spans.ctypes.data, sets.ctypes.data, 0), (numbers, spans, sets)


def _links_of(requests: Records) -> Records:
    links = np.empty(len(requests), _LINK)
    for name in _LINK.names or ():
        links[name] = requests[name]
    return links


def _link(request: Any, offset_ns: int) -> Link:
    ended_ns = max(int(request["last_ns"]), int(request["began_ns"]))
    shared = bool(request["marks"] & ContextMark.SHARED)
    received, sent = (Range(int(begin), int(end)) for begin, end in zip(request["begin"], request["end"], strict=True))
    return Link(
        trace_id=request["trace_id"].tobytes(),
        span_id=request["span_id"].tobytes(),
        origin=Origin(int(request["origin"])),
        shared=shared,
        start_ns=int(request["began_ns"]) + offset_ns,
        end_ns=ended_ns + offset_ns,
        sent=None if shared else sent,
        received=None if shared or (request["unplaced"] and not request["last_ns"]) else received,
    )


def _request(request: Any, offset_ns: int) -> Request:
    first_ns, payload, packets = request["first_ns"], request["payload"], request["packets"]

    def time(value: Any) -> int | None:
        return int(value) + offset_ns if value else None

    return Request(
        link=_link(request, offset_ns),
        slot=int(request["slot"]),
        first_sent_ns=time(first_ns[_TRANSMIT]),
        first_received_ns=time(first_ns[_RECEIVE]),
        last_acked_ns=time(request["acked_ns"]),
        bytes_sent=int(payload[_TRANSMIT]),
        bytes_received=int(payload[_RECEIVE]),
        packets_sent=int(packets[_TRANSMIT]),
        packets_received=int(packets[_RECEIVE]),
        retransmits=int(request["retransmits"]),
        longest_gap_s=int(request["gap_ns"]) / 1e9,
    )
