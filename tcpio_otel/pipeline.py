"""The stages behind the source, wired together: batches in, export requests out, every packet in the ledger.

Runs without privileges, and is imported only once they are gone. Everything the stages must know of each other is
here: they do not import one another.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names
from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import UNKNOWN, Workload
from tcpio_otel.attribution.peers import Peers
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import RAW, RECORD, Batch, Contexts, Mark, Names, Packets, pick
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.connections.events import Connection, Ends
from tcpio_otel.connections.table import ConnectionTable
from tcpio_otel.correlation.contexts import ContextTable
from tcpio_otel.correlation.events import Request as ServedRequest
from tcpio_otel.encoding.requests import Links
from tcpio_otel.encoding.rows import PeerNames
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.export.sender import Sender
from tcpio_otel.ledger import Ledger
from tcpio_otel.payload import Items, Request

_DROPPED = int(Mark.DROPPED)

AT_ONCE = 64
"""Connections or requests encoded in one go, which bounds the memory that a burst of ends takes."""

HELD_RECORDS_LIMIT = 1 << 16
"""Packet records whose logs may wait for a handshake to complete, or for a context; beyond it the oldest go without."""


class _OfSlot(Protocol):
    @property
    def slot(self) -> int: ...


Found = TypeVar("Found", bound=_OfSlot)


class _Ended(NamedTuple):
    """A connection that has ended, and what it has served."""

    connection: Connection
    served: Links

    @property
    def slot(self) -> int:
        return self.connection.slot


class Source(Protocol):
    """Where batches come from: the live probe, or a capture file."""

    paced: bool
    """Whether the source waits for its reader (a file does, a network does not)."""

    older_told: bool
    """Whether its first records are of sockets that are older than itself, all of them."""

    def __iter__(self) -> Iterator[Batch]: ...

    def now_ns(self) -> int:
        """The time on the records' clock."""

    def finish(self) -> Iterator[Batch]:
        """What is left once the source was told to stop."""

    def look(self) -> NDArray[np.void]:
        """Every open socket as of now, as often as is wanted; none, where the source knows of none.

        Raises:
            EnvironmentFault: the source knows of sockets and cannot tell.
        """

    def look_again(self) -> None:
        """Have it tell of every open socket soon, in its place among the records, where the source can."""

    def snapshot(self) -> NDArray[np.void] | None:
        """Every open socket as of now, where the source can tell."""

    def faults(self) -> dict[str, int]:
        """Counts of what went wrong without costing a packet its place in the ledger."""


class PacketEncoder(Protocol):
    """Turns packet records into items of a signal."""

    def encode(self, packets: Packets) -> Items:
        """Encode packet records; what comes back is good until the next call."""

    def forget(self) -> None:
        """Let go of memory that a burst took; what is still needed of it is made again."""


@dataclass(frozen=True)
class Output:
    """The way of one signal from encoded items to a receiver."""

    batcher: Batcher
    sender: Sender
    submitted: Callable[[Request], None]

    def add(self, items: Items, now_ns: int, *, block: bool) -> int:
        """Queue items; returns how many were too large for any request."""
        before = self.batcher.too_large
        self._submit(self.batcher.add(items, now_ns), block=block)
        return self.batcher.too_large - before

    def poll(self, now_ns: int, *, block: bool) -> None:
        """Send what has become old enough."""
        self._submit(self.batcher.poll(now_ns), block=block)

    def release(self, now_ns: int) -> None:
        """Queue what is ready, however young it is."""
        self._submit(self.batcher.release(now_ns), block=False)

    def flush(self) -> None:
        """Queue everything."""
        self._submit(self.batcher.flush(), block=False)

    def _submit(self, requests: Iterable[Request], *, block: bool) -> None:
        for request in requests:
            self.submitted(request)
            self.sender.submit(request, block=block)


@dataclass(frozen=True)
class _Held:
    """Packet rows whose logs wait for the ids of their connection, or for the context that they belong to."""

    records: NDArray[np.void]
    slots: NDArray[np.int64]
    unix_offset_ns: int
    observed_ns: int
    arrived_ns: int

    def __len__(self) -> int:
        return len(self.slots)

    def where(self, mask: NDArray[np.bool_]) -> "_Held":
        if mask.all():
            return self
        return replace(self, records=pick(self.records, mask), slots=self.slots[mask])


@dataclass
class Progress:
    """Totals since the start."""

    packets: int = 0
    payload_bytes: int = 0
    spans: int = 0


class Pipeline:
    """Everything between a source and the receivers.

    `logs` and `traces` are the outputs of packets and of spans, None where a signal is off: packets are then counted
    as filtered. `summaries` takes the log records of open connections, which are not in the ledger.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        connections: ConnectionTable,
        contexts: ContextTable | None,
        workloads: Workloads | None,
        peers: Peers | None,
        peer_names: PeerNames,
        traffic: Traffic | None,
        series_peer: Callable[[int, Connection], Names],
        packet_encoder: PacketEncoder,
        encode_spans: Callable[[list[Connection], list[Links]], Items],
        encode_requests: Callable[[list[tuple[ServedRequest, Ends | None]], int], Items],
        encode_summaries: Callable[[list[Connection], int], Items],
        logs: Output | None,
        summaries: Output | None,
        traces: Output | None,
        clock: Nanoseconds,
        handshake_wait_ns: int,
        context_wait_ns: int,
        paced: bool,
    ) -> None:
        self._ledger, self._connections, self._contexts = ledger, connections, contexts
        self._workloads, self._peers, self._peer_names = workloads, peers, peer_names
        self._traffic, self._series_peer = traffic, series_peer
        self._packet_encoder, self._encode_spans = packet_encoder, encode_spans
        self._encode_summaries, self._encode_requests = encode_summaries, encode_requests
        self._context_wait_ns = context_wait_ns
        self._logs, self._summaries, self._traces = logs, summaries, traces
        self._clock, self._handshake_wait_ns, self._paced = clock, handshake_wait_ns, paced
        self._held: deque[_Held] = deque()  # for the ids of their connection
        self._undecided: list[_Held] = []  # for their context
        self._nameless: list[tuple[_Held, Contexts | None]] = []  # for who their peer is
        self._late_spans: list[_Ended] = []  # likewise
        self._context_unknown = 0
        self._held_rows = self._nameless_rows = self._unix_offset_ns = 0
        self.progress = Progress()

    @property
    def connections(self) -> ConnectionTable:
        """The table, for those who want to look at open connections."""
        return self._connections

    def faults(self) -> dict[str, int]:
        """Counts of what could not be joined to an application's trace as it should be."""
        lost = self._contexts.lost if self._contexts else 0
        translations = {names.TRANSLATIONS_LOST: self._peers.translations_lost} if self._peers else {}
        return {names.CONTEXTS_LOST: lost, names.CONTEXT_UNKNOWN: self._context_unknown, **translations}

    def process(self, batch: Batch) -> None:
        """Take one batch in."""
        self._unix_offset_ns = batch.unix_offset_ns
        slots, ended = self._connections.update(batch)
        self._attribute(batch)
        if self._peers:
            table = self._connections
            self._peers.assign(batch, table.flows, slots, table.births, table.renew)
            self._name()
        packets = batch.packets
        self.progress.packets += len(packets)
        self.progress.payload_bytes += int(packets["payload_bytes"].sum())
        self._log(batch, _Held(packets, slots, batch.unix_offset_ns, batch.observed_ns, batch.now_ns))
        self._count_drops(batch, slots)
        self._span(ended)
        self._summarize(batch.observed_ns)
        self._sum_up(batch.observed_ns)
        for output in (self._logs, self._summaries, self._traces):
            if output:
                output.poll(self._clock(), block=self._paced)

    def _attribute(self, batch: Batch) -> None:
        if self._workloads:
            self._workloads.assign(batch, self._connections.flows, self._connections.owned)

    def _arrange(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64] | None, tuple[tuple[int, int], ...] | None]:
        """The order in which to encode what belongs to slots, and its groups, as `Workloads.arrange` says it."""
        return self._workloads.arrange(self._connections.flows, slots) if self._workloads else (None, None)

    def _log(self, batch: Batch, arrived: _Held) -> None:
        """Encode what has ids, or has waited long enough, and hold back the rest."""
        self._release(arrived.arrived_ns)
        held = self._connections.waiting(arrived.slots) & (self._handshake_wait_ns > 0)
        any_held = bool(held.any())
        contexts, undecided = self._follow(batch, held if any_held else None)
        if any_held:
            self._hold(arrived.where(held))
        if undecided is not None:
            self._undecided.append(arrived.where(undecided))
            self._connections.hold(self._undecided[-1].slots)
            held = held | undecided
        elif not any_held:
            self._encode(arrived, contexts)
            return
        self._encode(arrived.where(~held), contexts.where(~held) if contexts else None)

    def _follow(self, batch: Batch, held: NDArray[np.bool_] | None) -> tuple[Contexts | None, NDArray[np.bool_] | None]:
        """The contexts of a batch's packets, and which of them may still get one; what waited for that is seen to."""
        if self._contexts is None:
            return None, None
        table, waiting, before = self._connections, None, self._undecided
        if before:
            records = np.concatenate([rows.records.view(RAW) for rows in before]).view(RECORD)
            waiting = records, np.concatenate([rows.slots for rows in before])
        followed = self._contexts.follow(batch, table.record_slots, table.flows, table.births, held, waiting)
        self._undecided, start = [], 0
        for rows in before:
            part = slice(start, start + len(rows))
            start = part.stop
            became = followed.part(part)
            waits, contexts = became.waits, became.contexts
            overdue = batch.now_ns >= rows.arrived_ns + self._context_wait_ns or start > HELD_RECORDS_LIMIT
            self._connections.release(rows.slots)
            if overdue:
                self._context_unknown += int(np.count_nonzero(waits))
                overdue_rows = rows.where(waits)
                self._contexts.give_up(overdue_rows.records, overdue_rows.slots)
                waits = np.zeros(len(rows), np.bool_)
            self._encode(rows.where(~waits), contexts.where(~waits) if contexts else None)
            if waits.any():
                self._undecided.append(rows.where(waits))
                self._connections.hold(self._undecided[-1].slots)
        arrived = followed.part(slice(start, None)) if start else followed
        return arrived.contexts, arrived.waits if arrived.waits.any() else None

    def _hold(self, rows: _Held) -> None:
        self._connections.hold(rows.slots)
        self._held.append(rows)
        self._held_rows += len(rows)

    def _release(self, now_ns: int, *, everything: bool = False) -> None:
        """Let go of held rows that have their ids by now, or whose time is over."""
        for _ in range(len(self._held)):
            rows = self._held.popleft()
            self._held_rows -= len(rows)
            self._connections.release(rows.slots)
            overdue = now_ns >= rows.arrived_ns + self._handshake_wait_ns
            overdue |= everything or self._held_rows + len(rows) > HELD_RECORDS_LIMIT
            waiting = self._connections.waiting(rows.slots) & (not overdue)
            freed = rows.where(~waiting)
            if len(freed):
                self._encode(freed, self._contexts.join(freed.records, freed.slots) if self._contexts else None)
            if waiting.any():
                self._hold(rows.where(waiting))

    def _encode(self, rows: _Held, contexts: Contexts | None) -> None:
        """Encode packets, but for those whose peer may soon be known."""
        waiting = self._unnamed(rows.slots)
        if waiting is None:
            self._encode_now(rows, contexts)
            return
        late = rows.where(waiting)
        self._connections.hold(late.slots)
        self._nameless.append((late, contexts.where(waiting).kept() if contexts else None))
        self._nameless_rows += len(late)
        self._encode_now(rows.where(~waiting), contexts.where(~waiting) if contexts else None)

    def _unnamed(self, slots: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which of slots wait for who their peer is (bool, shape of `slots`); None: none does."""
        waiting = self._peers.waiting(slots) if self._peers and self._nameless_rows <= HELD_RECORDS_LIMIT else None
        return waiting if waiting is not None and waiting.any() else None

    def _name(self) -> None:
        """Let go of what has waited for who its peer is."""
        late, self._nameless, self._nameless_rows = self._nameless, [], 0
        for rows, contexts in late:
            self._connections.release(rows.slots)
            self._encode(rows, contexts)

    def _encode_now(self, rows: _Held, contexts: Contexts | None) -> None:
        if not len(rows):
            return
        if self._logs is None:
            self._ledger.filtered(len(rows), "signal_off")
            return
        order, groups = self._arrange(rows.slots)
        packets = Packets(
            rows.records, rows.slots, self._connections.flows, rows.unix_offset_ns, rows.observed_ns, contexts, order
        )
        items = replace(self._packet_encoder.encode(packets), groups=groups)
        too_large = self._logs.add(items, self._clock(), block=self._paced)
        self._ledger.dropped(too_large, "too_large")

    def _chunks(self, found: Sequence[Found]) -> Iterator[tuple[list[Found], tuple[tuple[int, int], ...] | None]]:
        """Connections or requests, some at a time, those of one workload side by side; with their groups."""
        for start in range(0, len(found), AT_ONCE):
            some = list(found[start : start + AT_ONCE])
            order, groups = self._arrange(_slots(some))
            yield some if order is None else [some[place] for place in order.tolist()], groups

    def _span(self, ended: list[Connection]) -> None:
        """Encode what has ended, but for those of which the peer may soon be known."""
        self.progress.spans += len(ended)
        fresh = [_Ended(connection, self._served(connection.slot)) for connection in ended]
        found, self._late_spans = [*self._late_spans, *fresh], []
        self._connections.release(_slots(found[: len(found) - len(fresh)]))
        waiting = self._unnamed(_slots(found))
        if waiting is not None:
            self._late_spans = [each for each, waits in zip(found, waiting.tolist(), strict=True) if waits]
            self._connections.hold(_slots(self._late_spans))
            found = [each for each, waits in zip(found, waiting.tolist(), strict=True) if not waits]
        self._count([each.connection for each in found])
        for some, groups in self._chunks(found):
            if self._traces:
                named = self._named([each.connection for each in some])
                items = replace(self._encode_spans(named, [each.served for each in some]), groups=groups)
                self._traces.add(items, self._clock(), block=self._paced)

    def _workload(self, number: int) -> Workload:
        return self._workloads[number] if self._workloads else UNKNOWN

    def _count(self, connections: Iterable[Connection]) -> None:
        """Add what came to connections to the series of traffic."""
        if self._traffic is None:
            return
        flows = self._connections.flows
        for connection in connections:
            workload, peer = (int(flows[name][connection.slot]) for name in ("workload", "peer"))
            named = self._series_peer(peer, connection)
            self._traffic.add(connection, self._workload(workload), named, connection.end_ns)

    def _count_drops(self, batch: Batch, slots: NDArray[np.int64]) -> None:
        if self._traffic is not None:
            rows = np.flatnonzero(batch.packets["marks"] & _DROPPED)
            if len(rows):
                workloads = self._connections.flows["workload"][slots[rows]]
                self._traffic.drop(pick(batch.packets, rows), workloads, self._workload, batch.observed_ns)

    @property
    def counts_traffic(self) -> bool:
        """Whether there are series of traffic."""
        return self._traffic is not None

    def traffic(self, now_ns: int) -> Traffic | None:
        """The series of traffic, open connections included; `now_ns` is on the records' clock."""
        if self._traffic is not None:
            self._count(self._connections.active(now_ns))
            self._traffic.tidy(now_ns + self._unix_offset_ns)
        return self._traffic

    def _named(self, found: list[Connection]) -> list[Connection]:
        """The same with what is known of their peers by now."""
        if not self._peers:
            return found
        numbers = self._connections.flows["peer"][_slots(found)].tolist()
        return [replace(each, peer_names=self._peer_names(number)) for each, number in zip(found, numbers, strict=True)]

    def _served(self, slot: int) -> Links:
        return Links(*self._contexts.end(slot, self._unix_offset_ns)) if self._contexts else Links()

    def _sum_up(self, observed_ns: int) -> None:
        """Send the figures of requests that are over."""
        for some, groups in self._chunks(self._contexts.take_requests() if self._contexts else []):
            if self._summaries:
                ends = [(request, self._ends(request.slot)) for request in some]
                items = replace(self._encode_requests(ends, observed_ns), groups=groups)
                self._summaries.add(items, self._clock(), block=self._paced)

    def _ends(self, slot: int) -> Ends | None:
        ends = self._connections.ends(slot)
        if ends and self._peers:
            return replace(ends, peer_names=self._peer_names(int(self._connections.flows["peer"][slot])))
        return ends

    def _summarize(self, observed_ns: int) -> None:
        for some, groups in self._chunks(self._connections.take_summaries()):
            if self._summaries:
                items = replace(self._encode_summaries(self._named(some), observed_ns), groups=groups)
                self._summaries.add(items, self._clock(), block=self._paced)

    def finish(self, now_ns: int, snapshot: NDArray[np.void] | None) -> None:
        """The source has said all: end open connections, encode what is held, queue everything."""
        ended = self._connections.close(now_ns, snapshot)
        if self._peers:
            self._peers.give_up(self._connections.flows)
            self._name()
        self._attribute(Batch(np.empty(0, RECORD), self._unix_offset_ns, 0, now_ns))
        self._release(now_ns, everything=True)
        for rows in self._undecided:
            self._connections.release(rows.slots)
            self._context_unknown += len(rows)
            self._encode(rows, None)
        self._span(ended)
        self._sum_up(now_ns + self._unix_offset_ns)
        for output in (self._logs, self._summaries, self._traces):
            if output:
                output.flush()


def _slots(found: Sequence[_OfSlot]) -> NDArray[np.int64]:
    return np.array([each.slot for each in found], np.int64)
