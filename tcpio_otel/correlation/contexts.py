"""Trace contexts to packets: which application's span each packet served, by connection, direction and sequence number.

The probe tells where contexts begin. What lies between there and the next one belongs to it, whenever it is sent: so
retransmits and segments over several requests fall out right, and nothing is asked of a packet but a comparison or two.
contexts.c does what is done to every record; this keeps the tables, and settles what has ended.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import native
from tcpio_otel.batch import (
    FIRST_CONTEXT,
    FLOW,
    RECORD,
    Batch,
    Birth,
    ContextMark,
    Contexts,
    Direction,
    Kind,
    Origin,
)
from tcpio_otel.correlation.events import Link, Request
from tcpio_otel.correlation.layout import (
    PLACE,
    REQUEST,
    ROW,
    Records,
    Room,
    Table,
    grown,
    lines,
)
from tcpio_otel.correlation.reports import LINK, link_of, links_of, request_of

Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]

LINKS = 128
"""Contexts that a connection's span links to; more are counted."""

LISTENERS = 4096
"""Listeners that are remembered, for tagging what they accept or for not doing so."""

_NONE = np.empty(0, np.int64)
_SLOT, _MASK = np.dtype(np.int64), np.dtype(np.bool_)

_NEVER, _LATE, _PERHAPS = range(3)
"""`enum answers` of contexts.h: whether what a connection receives gets its context later."""

SWEEP_NS = 100_000_000
SETTLED_NS, UNSETTLED_NS = 500_000_000, 2_000_000_000
"""For how long nothing is heard of a request that was followed by another before it is summed up: where all of it was
acknowledged, when a retransmit can still cross the acknowledgement; and where it was not."""

_FREE, _LIVE, _TOLD = range(3)
"""States of a request: told means that its figures were reported, and more may come."""

_TRANSMIT, _RECEIVE = int(Direction.TRANSMIT), int(Direction.RECEIVE)


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


class _Served:
    """What one connection has served: numbers of its requests, and packed rows of `LINK` of those that were let go."""

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
        self._places = lines(0, PLACE)
        self._rows = lines(64, ROW)
        self._free_rows = np.arange(len(self._rows), dtype=np.int32)
        self._requests = lines(256, REQUEST)
        self._free = np.arange(FIRST_CONTEXT, len(self._requests), dtype=np.int32)
        self._flows: Records = np.zeros(0, FLOW)
        self._served: dict[int, _Served] = {}  # by the life of a connection
        self._listeners: dict[tuple[int, int], int] = {}  # what is known of their tagging, by namespace and port
        self._due: list[Request] = []
        self._swept_ns = 0
        self._table = Table(server_offset=FLOW.fields["server"][1])  # type: ignore[index]
        self._room = Room(0)
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
        self._fit(flows)
        if births:
            self._begin(births)
        contexts, count, ahead = _NONE, len(batch.packets), 0
        if count != len(batch):
            others = np.flatnonzero(~batch.is_packet)
            contexts = others[batch.records["kind"][others] == Kind.CONTEXT]
        if waiting:
            ahead = len(waiting[0])
            count += ahead
        if len(self._room) < count:
            fresh = Room(2 * count)
            fresh.exchange.passes = self._room.exchange.passes
            self._room = fresh
        room = self._room
        exchange = room.exchange
        exchange.joined.room, exchange.earlier_count, exchange.apart = count, ahead, None
        if waiting:
            exchange.earlier = native.address(waiting[0], RECORD)
            exchange.earlier_slots = native.address(waiting[1], _SLOT)
        if apart is not None:
            exchange.apart = native.address(apart, _MASK)
        if len(contexts):
            self._reserve(len(contexts))
            taken = np.zeros(len(contexts), np.bool_)
            exchange.numbers, exchange.free_rows = self._free.ctypes.data, self._free_rows.ctypes.data
            exchange.taken = taken.ctypes.data
        records = np.ascontiguousarray(batch.records)
        native.library.tcpio_follow(
            ctypes.byref(self._table), native.address(records, RECORD), native.address(slots, _SLOT), len(records),
            ctypes.byref(exchange),
        )  # fmt: skip
        self.lost += exchange.lost
        if len(contexts):
            self._free_rows = self._free_rows[exchange.rows_used :]
            self._take(taken)
            self._remember_listeners(batch.records[contexts], slots[contexts])
        self._sweep(batch)
        return Followed(room.waits[:count], self._contexts(room, count))

    def _begin(self, births: Sequence[Birth]) -> None:
        """Slots are other connections' now."""
        slots = np.array([birth.slot for birth in births], np.int64)
        self._leave(slots[self._places["row"][slots] >= 0])
        fresh = np.zeros(len(slots), PLACE)
        fresh["born"], fresh["newest"]["number"] = self._flows["born"][slots], -1
        fresh["row"] = fresh["first_waiting"] = -1
        fresh["answers"] = [
            self._listeners.get((birth.netns, birth.local.port), _PERHAPS) if birth.accepted and self._late else _NEVER
            for birth in births
        ]
        self._places[slots] = fresh

    def _contexts(self, room: Room, count: int) -> Contexts | None:
        """What C has found, with the ids of the sets."""
        joined = room.exchange.joined
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
            self._places = grown(self._places, len(flows))
            self._places["row"][known:], self._places["newest"]["number"][known:] = -1, -1
        self._point()

    def _reserve(self, contexts: int) -> None:
        """Make room for so many contexts, and as many connections that had none."""
        while contexts > len(self._free):
            size = len(self._requests)
            self._requests = grown(self._requests, 2 * size)
            self._free = np.concatenate([self._free, np.arange(size, 2 * size, dtype=np.int32)])
        while contexts > len(self._free_rows):
            size = len(self._rows)
            self._rows = grown(self._rows, 2 * size)
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
        self._places["row"][slots], self._places["newest"]["number"][slots] = -1, -1
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
        room = Room(len(records))
        native.library.tcpio_join(
            ctypes.byref(self._table), np.ascontiguousarray(records), slots, len(records),
            ctypes.byref(room.exchange.joined),
        )  # fmt: skip
        return self._contexts(room, len(records))

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
        acked = (requests["begin"] != requests["end"]) & ((requests["acked"] - requests["end"]).astype(np.int32) >= 0)
        done = acked.all(axis=1)
        superseded = requests["superseded_ns"]
        heard = np.maximum(np.maximum(requests["last_ns"], requests["began_ns"]), superseded)
        over = (superseded != 0) & (heard + np.where(done, SETTLED_NS, UNSETTLED_NS).astype(np.uint64) <= now_ns)
        quiet = done & (heard + np.uint64(self._quiet_ns) <= now_ns)
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
            self._due.append(request_of(request, offset_ns))

    def _settle(self, number: int) -> None:
        """Nobody names a request any more: keep what its connection's span will say of it."""
        self._requests["state"][number] = _FREE
        if (served := self._served.get(int(self._requests["born"][number]))) is None:
            return
        served.numbers.remove(number)
        if len(served.packed) < LINKS * LINK.itemsize:
            served.packed += links_of(self._requests[number : number + 1]).tobytes()
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
        served = np.concatenate([np.frombuffer(bytes(found.packed), LINK), links_of(self._requests[found.numbers])])
        served = served[np.argsort(served["began_ns"], kind="stable")]
        distinct = list(
            {request["trace_id"].tobytes() + request["span_id"].tobytes(): request for request in served}.values()
        )
        links = tuple(link_of(request, offset_ns) for request in distinct[:LINKS])
        return links, found.dropped + len(distinct) - len(links)
