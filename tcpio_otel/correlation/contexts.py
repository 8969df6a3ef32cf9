"""Trace contexts to packets: which application's span each packet served, by connection, direction and sequence number.

The probe tells where contexts begin. What lies between there and the next one belongs to it, whenever it is sent: so
retransmits and segments over several requests fall out right, and nothing is asked of a packet but a comparison or two.
contexts.c does what is done to every record; this keeps the tables, and settles what has ended.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.batch import (
    FIRST_CONTEXT,
    FLOW,
    RAW,
    RECORD,
    Batch,
    Birth,
    ContextMark,
    Contexts,
    Direction,
    Kind,
    Origin,
)
from tcpio_otel.correlation.events import Link, Range, Request

Records = NDArray[np.void]
Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]

KEPT, CACHE_LINE_BYTES = 8, 64
LINKS = 128
"""Contexts that a connection's span links to; more are counted."""

LISTENERS = 4096
"""Listeners that are remembered, for tagging what they accept or for not doing so."""

_NONE = np.empty(0, np.int64)

_NEVER, _LATE, _PERHAPS = range(3)
"""`enum answers` of contexts.h: whether what a connection receives gets its context later."""

SWEEP_NS = 100_000_000
SETTLE_NS = 1_000_000_000
"""How long a request that was followed by another may still be acknowledged, or its retransmits arrive."""

_PLACE = np.dtype(
    [
        ("born", "<u8"), ("row", "<i4"), ("high", "<u4"), ("answer", "<u4"), ("answer_before", "<u4"),
        ("unanswered", "<u4"), ("first", "<u4"), ("fin", "<u4", 2), ("sending", "u1"), ("answers", "u1"),
        ("finished", "u1"), ("receiving", "u1"), ("turns", "u1"), ("pass", "<u4"), ("first_waiting", "<i4"),
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
        ("count", "<u4", 2), ("known", "<u4"), ("serial", "<u2"), ("shared", "u1"), ("reserved", "u1"),
        ("borders", _BORDER, (KEPT, 2)), ("pad", "u1", 48),
    ],
    align=True,
)  # fmt: skip
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
"""`struct request` of contexts.h: one context, and what was seen of its packets."""

_FREE, _LIVE, _TOLD, _SETTLED = range(4)
"""States of a request: told means that its figures were reported, and more may come; settled that nothing will."""

_TRANSMIT, _RECEIVE = int(Direction.TRANSMIT), int(Direction.RECEIVE)


class _Table(ctypes.Structure):
    """`struct table` of contexts.c."""

    _fields_ = tuple((name, c_void_p) for name in ("places", "rows", "requests", "flows")) + tuple(
        (name, c_uint64) for name in ("flow_stride", "server_offset")
    )


class _Joined(ctypes.Structure):
    """`struct joined`."""

    _fields_ = (
        *((name, c_void_p) for name in ("numbers", "spans", "sets")),
        *((name, c_uint64) for name in ("found", "joined")),
    )


class _Exchange(ctypes.Structure):
    """`struct exchange`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "numbers", "taken", "free_rows", "next", "waits", "apart",
        )),
        ("joined", _Joined),
        *((name, c_uint64) for name in ("rows_used", "lost", "pass")),
    )  # fmt: skip


@dataclass(frozen=True)
class Followed:
    """What became of packets: whether each still waits for its context (bool, shape (n,)), and what others have.

    `contexts` is None where none has any.
    """

    waits: Mask
    contexts: Contexts | None

    def part(self, rows: slice) -> "Followed":
        """What became of some of them, side by side."""
        return Followed(self.waits[rows], self.contexts.part(rows) if self.contexts else None)


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
        late: whether contexts can come after the packets that they are about, as a server's tags do.
    """

    def __init__(self, *, quiet_ns: int, late: bool = True) -> None:
        self._quiet_ns, self._late = quiet_ns, late
        self._places = _lines(0, _PLACE)
        self._rows = _lines(64, _ROW)
        self._free_rows = np.arange(len(self._rows), dtype=np.int32)
        self._requests = _lines(256, REQUEST)
        self._free = np.arange(FIRST_CONTEXT, len(self._requests), dtype=np.int32)
        self._flows: Records = np.zeros(0, FLOW)
        self._served: dict[int, _Served] = {}  # by the life of a connection
        self._listeners: dict[tuple[int, int], int] = {}  # what is known of their tagging, by namespace and port
        self._due: list[Request] = []
        self._swept_ns = 0
        self._table = _Table(server_offset=FLOW.fields["server"][1])  # type: ignore[index]
        self._room = _Room(0)
        self._passes = 0
        self.begun = 0
        self.lost = 0

    # A batch.

    def follow(
        self,
        batch: Batch,
        slots: Slots,
        flows: Records,
        births: Sequence[Birth] = (),
        apart: Mask | None = None,
        waiting: tuple[Records, Slots] | None = None,
    ) -> Followed:
        """Take a batch in, after the connection table has.

        Args:
            batch: records in time order.
            slots: the slot of each record, of whatever kind (int64, shape (records,)); -1: none.
            flows: the connection table's (dtype FLOW).
            births: slots that new connections have taken with this batch.
            apart: which packets wait for something else, and are left to `join` (bool, shape (packets,)); None: none.
            waiting: packets of earlier batches that still wait for their context, in time order, and their slots.

        Returns:
            What became of those that waited, and of the packets of the batch behind them; good until the next call.
        """
        plain = len(batch.packets) == len(batch)
        contexts = _NONE if plain else np.flatnonzero(batch.records["kind"] == Kind.CONTEXT)
        self._fit(flows)
        if births:
            self._begin(births)
        if len(contexts):
            self._reserve(len(contexts))
        ahead = len(waiting[0]) if waiting else 0
        records, all_slots = np.ascontiguousarray(batch.records), slots
        if waiting:
            records = np.concatenate([waiting[0].view(RAW), records.view(RAW)]).view(RECORD)
            all_slots = np.concatenate([waiting[1], slots])
        count = len(records)
        taken, skipped = np.zeros(len(contexts), np.bool_), None
        if apart is not None:
            skipped = np.zeros(count, np.bool_)
            skipped[ahead:][batch.is_packet] = apart
        if len(self._room) < count:
            self._room = _Room(2 * count)
        room = self._room
        self._passes = (self._passes + 1) % (1 << 32)
        exchange = _Exchange(
            self._free.ctypes.data, taken.ctypes.data, self._free_rows.ctypes.data, *room.scratch,
            None if skipped is None else skipped.ctypes.data, room.joined(), 0, 0, self._passes,
        )  # fmt: skip
        native.library.tcpio_follow(
            ctypes.byref(self._table), _address(records, RECORD), _address(all_slots, np.dtype(np.int64)), count,
            ahead, ctypes.byref(exchange),
        )  # fmt: skip
        self.lost += exchange.lost
        if len(contexts):
            self._free_rows = self._free_rows[exchange.rows_used :]
            self._take(taken)
            self._remember_listeners(batch.records[contexts], slots[contexts])
        self._sweep(batch)
        waits = room.waits[:count]
        found = self._contexts(room, exchange.joined, count)
        if plain:
            return Followed(waits, found)
        packets = np.concatenate([np.ones(ahead, np.bool_), batch.is_packet])
        return Followed(waits[packets], found.where(packets) if found else None)

    def _begin(self, births: Sequence[Birth]) -> None:
        """Slots are other connections' now."""
        slots = np.array([birth.slot for birth in births], np.int64)
        self._leave(slots[self._places["row"][slots] >= 0])
        fresh = np.zeros(len(slots), _PLACE)
        fresh["born"], fresh["row"] = self._flows["born"][slots], -1
        fresh["answers"] = [
            self._listeners.get((birth.netns, birth.port), _PERHAPS) if birth.accepted and self._late else _NEVER
            for birth in births
        ]
        self._places[slots] = fresh

    def _contexts(self, room: "_Room", joined: _Joined, count: int) -> Contexts | None:
        """What C has found, with the ids of the sets."""
        if not joined.joined:
            return None
        ids = self._requests
        named = tuple(
            tuple((ids["trace_id"][number].tobytes(), ids["span_id"][number].tobytes())
                  for number in row if number >= FIRST_CONTEXT)
            for row in room.sets[: joined.found].tolist()
        )  # fmt: skip
        return Contexts(room.numbers[:count], room.spans[:count], named, ids)

    def _fit(self, flows: Records) -> None:
        """Make room for every slot."""
        if flows is self._flows:
            return
        self._flows, known = flows, len(self._places)
        if len(flows) > known:
            self._places = _grown(self._places, len(flows))
            self._places["row"][known:] = -1
        self._point()

    def _reserve(self, contexts: int) -> None:
        """Make room for so many contexts, and as many connections that had none."""
        while contexts > len(self._free):
            size = len(self._requests)
            self._requests = _grown(self._requests, 2 * size)
            self._free = np.concatenate([self._free, np.arange(size, 2 * size, dtype=np.int32)])
        while contexts > len(self._free_rows):
            size = len(self._rows)
            self._rows = _grown(self._rows, 2 * size)
            self._free_rows = np.concatenate([self._free_rows, np.arange(size, 2 * size, dtype=np.int32)])
        self._point()

    def _point(self) -> None:
        """Tell C where the tables lie."""
        table = self._table
        table.places, table.rows = self._places.ctypes.data, self._rows.ctypes.data
        table.requests, table.flows = self._requests.ctypes.data, self._flows.ctypes.data
        table.flow_stride = self._flows.strides[0]

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

    def _leave(self, slots: NDArray[np.int64]) -> None:
        """The connections of slots that have rows are gone: let go of the contexts that those name."""
        rows = self._places["row"][slots]
        for row in self._rows[rows]:
            for direction in (_RECEIVE, _TRANSMIT):
                numbers = row["borders"][: row["count"][direction], direction]["number"]
                np.subtract.at(self._requests["borders"], numbers[numbers >= FIRST_CONTEXT], 1)
        for born in self._places["born"][slots].tolist():
            self._served.pop(born, None)
        self._places["row"][slots] = -1
        self._free_rows = np.concatenate([self._free_rows, rows])

    def _remember_listeners(self, records: Records, slots: Slots) -> None:
        for netns, port, slot, origin in zip(
            records["netns"].tolist(), records["local_port"].tolist(), slots.tolist(), records["origin"].tolist(),
            strict=True,
        ):  # fmt: skip
            if origin == Origin.TAG and slot >= 0 and self._places["answers"][slot] == _LATE:
                self._remember(netns, port, _LATE)

    def _remember(self, netns: int, port: int, answers: int) -> None:
        while len(self._listeners) >= LISTENERS:
            self._listeners.pop(next(iter(self._listeners)))
        self._listeners[netns, port] = answers

    def give_up(self, records: Records, slots: Slots) -> None:
        """Packets have waited for long enough: where nobody was known to tag, nobody does (shapes as for `join`)."""
        perhaps = self._places["answers"][slots] == _PERHAPS
        self._places["answers"][slots[perhaps]] = _NEVER
        listeners = {*zip(records["netns"][perhaps].tolist(), records["local_port"][perhaps].tolist(), strict=True)}
        for netns, port in listeners:
            self._remember(netns, port, _NEVER)

    def join(self, records: Records, slots: Slots) -> Contexts | None:
        """The contexts of packets that were left apart, now that nothing else keeps them; None: none has any.

        Args:
            records: packets (dtype RECORD, shape (n,)), each given once.
            slots: of each.
        """
        room = _Room(len(records))
        joined = room.joined()
        native.library.tcpio_join(
            ctypes.byref(self._table), np.ascontiguousarray(records), slots, len(records), ctypes.byref(joined)
        )
        return self._contexts(room, joined, len(records))

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
        self._leave(np.flatnonzero((self._places["row"] >= 0) & (self._places["born"] != self._flows["born"])))

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


def _address(array: NDArray[Any], dtype: np.dtype[Any]) -> int:
    """Where an array lies that C takes for one of `dtype`; ctypes' own check of that takes as long as many records do.

    Raises:
        TypeError: it is something else.
    """
    if (array.dtype is not dtype and array.dtype != dtype) or not array.flags.c_contiguous:
        raise TypeError(f"not a contiguous array of {dtype}: {array.dtype}, strides {array.strides}")
    return array.ctypes.data


def _lines(count: int, dtype: np.dtype[np.void]) -> Records:
    """So many rows of zeros, the first at the start of a cache line; so are the others, by the size of their dtype."""
    memory = np.zeros(count * dtype.itemsize + CACHE_LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return memory[start : start + count * dtype.itemsize].view(dtype)


def _grown(rows: Records, count: int) -> Records:
    grown = _lines(count, rows.dtype)
    grown[: len(rows)] = rows
    return grown


class _Room:
    """Room for what there is to say of so many packets; used again, as fresh pages cost more than their contents."""

    def __init__(self, count: int) -> None:
        self.numbers, self.spans = np.empty(count, np.int64), np.empty(count, np.int32)
        self.sets = np.empty((count, KEPT), np.int64)
        self.waits, self.next = np.empty(count, np.bool_), np.empty(count, np.int32)
        self.scratch = self.next.ctypes.data, self.waits.ctypes.data
        self._joined = self.numbers.ctypes.data, self.spans.ctypes.data, self.sets.ctypes.data

    def __len__(self) -> int:
        return len(self.numbers)

    def joined(self) -> _Joined:
        """The part that C calls `struct joined`."""
        return _Joined(*self._joined, 0, 0)


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
        last_acked_ns=time(request["acked_ns"][_TRANSMIT]),
        bytes_sent=int(payload[_TRANSMIT]),
        bytes_received=int(payload[_RECEIVE]),
        packets_sent=int(packets[_TRANSMIT]),
        packets_received=int(packets[_RECEIVE]),
        retransmits=int(request["retransmits"]),
        longest_gap_s=int(request["gap_ns"]) / 1e9,
    )
