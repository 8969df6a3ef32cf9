"""Batches to connections: which slot each record belongs to, and which connections came to their end.

Most records belong to an open connection and carry data: those are counted by column. Only what may change a
connection's state, or needs telling in its span, goes through `lifecycle.Life` one by one.
"""

import errno
import itertools
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names, native
from tcpio_otel.batch import FLOW, RECORD, Batch, Birth, Direction, Endpoint, Flag, Kind, Mark, State, pick
from tcpio_otel.connections.entry import ROW_FIELDS, Entry, Fact, Owner, Row, Totals, facts, owners
from tcpio_otel.connections.events import Connection, Counts, End, Ends, Phase, Role, Standing, Start
from tcpio_otel.connections.identity import (
    FIN_RECEIVED_STATES,
    Identity,
    from_initial_sequence,
    identity,
    initial_sequence,
)
from tcpio_otel.connections.index import Index, Keys, keys_of
from tcpio_otel.connections.lifecycle import HANDSHAKE, Life, Segment
from tcpio_otel.connections.report import connection, text

Records = NDArray[np.void]
Slots = NDArray[np.int64]

_MODULUS, _HALF = 1 << 32, 1 << 31
_FIN, _SYN, _ACK, _RST = int(Flag.FIN), int(Flag.SYN), int(Flag.ACK), int(Flag.RST)
_NO_SOCKET, _LISTENER = int(Mark.NO_SOCKET), int(Mark.LISTENER)
_UNMEASURED_RTT = (1 << 32) - 1
_TRANSMIT, _RESET_KIND, _CLOSE = int(Direction.TRANSMIT), int(Kind.RESET), int(State.CLOSE)
_NEVER = np.iinfo(np.int64).max

ORPHAN_FIN_WAIT_NS = 60_000_000_000
"""How long the kernel waits for the peer's FIN once an application has let go (tcp_fin_timeout's default)."""

GIVEN_UP_LIMIT = 1 << 16
"""Connections that left before their sockets closed and are remembered for that, some 200 bytes each."""

_CONNECTED = (
    State.ESTABLISHED, State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING,
    State.TIME_WAIT,
)  # fmt: skip

_RESET_WINDOW = 1 << 26
"""How far a RST's number may be from the furthest seen: more than is ever under way, little of what can be guessed."""

_WALKED_ROWS = 1024
"""Records that are looked at one by one are Python objects meanwhile: never more than these."""

EVICTED_SHARE = 10
"""A full table gives up one in so many connections at once, so that finding the oldest is paid for rarely."""


@dataclass(frozen=True, slots=True)
class Talker:
    """An open connection among the busiest."""

    local: Endpoint
    peer: Endpoint
    pid: int
    process_name: str
    packets: int
    payload_bytes: int


@dataclass(slots=True)
class _Counting:
    """How far the records of a batch have been counted into the columns of their slots."""

    records: Records
    slots: Slots
    counted: int = 0


class ConnectionTable:
    """Every connection that is open or has just ended, bounded in number.

    A slot that `update` returns stays what it is until the next call of `update`; a caller that keeps it longer
    says so by `hold`, and by `release` when it is done.

    Args:
        limit: connections kept; beyond it the longest silent ones are evicted.
        linger_ns: how long the last segments of an ended connection may take.
        handshake_timeout_ns: after so long without completing, a handshake has failed.
        summary_interval_ns: how often an open connection gives a summary, if it was not silent; 0: never.
        kernel_totals: whether the source gives the kernel's own totals when a socket closes (kind SOCKET).
        older_told: whether it tells of sockets that are older than itself before anything else.
        reset_reasons: the kernel's names for the reasons of RSTs.

    Attributes:
        flows: what is known of each slot (dtype FLOW).
        births: slots taken with the last batch.
        owned: slots of which it told the process, or another one than before; one may occur more than once.
    """

    def __init__(
        self,
        *,
        limit: int,
        linger_ns: int,
        handshake_timeout_ns: int,
        summary_interval_ns: int,
        kernel_totals: bool,
        older_told: bool,
        reset_reasons: Mapping[int, str],
    ) -> None:
        self._limit, self._linger_ns, self._handshake_timeout_ns = limit, linger_ns, handshake_timeout_ns
        self._summary_interval_ns = summary_interval_ns
        self._kernel_totals, self._older_told, self._reset_reasons = kernel_totals, older_told, reset_reasons
        self._given_up: dict[tuple[int, ...], bool] = {}  # keys of connections that left before the kernel closed them
        self._index = Index()
        self._entries: list[Entry | None] = []
        self._free = array("q")  # a list would keep an object for each number, strewn over the memory of a burst
        self._leaving: list[int] = []
        self._versions = itertools.count(1)
        self._embryonic: dict[tuple[int, int], int] = {}
        self._ended: list[Connection] = []
        self._summaries: list[Connection] = []
        self._counting = _Counting(np.empty(0, RECORD), np.empty(0, np.int64))
        self._row = -1  # the record of the batch that is looked at
        self.births: list[Birth] = []
        self.owned: list[int] = []
        self._open = 0
        self.flows: Records = np.zeros(1024, FLOW)
        self._columns(len(self.flows))

    def _columns(self, slots: int) -> None:
        self._last_seen = np.zeros(slots, np.int64)
        self._attentive = np.zeros(slots, np.bool_)
        self._waiting = np.zeros(slots, np.bool_)
        self._owed = np.zeros(slots, np.bool_)  # whose span is
        self._holds = np.zeros(slots, np.int32)
        self._deadlines = np.full(slots, _NEVER)  # when to look at a slot again
        # By slot and direction, at 2 * slot + direction.
        self._packets = np.zeros(2 * slots, np.int64)
        self._payload = np.zeros(2 * slots, np.int64)
        self._high = np.zeros(2 * slots, np.uint32)  # one past the highest sequence number, modulo 2^32
        self._progress = np.zeros(2 * slots, np.int64)  # how far it came since the first segment
        self._flagged = np.zeros(2 * slots, np.int64)  # how much of that SYN and FIN took
        self._told = np.zeros(slots, np.int64)  # packets, when somebody last asked for what is active
        self._looked = np.zeros(slots, np.bool_)  # since then, at its socket
        self._segments = np.zeros(slots, np.int64)  # of its socket, when it was looked at last

    def _grow(self) -> None:
        self._deadlines = np.concatenate([self._deadlines, np.full_like(self._deadlines, _NEVER)])
        for name in ("flows", "_last_seen", "_attentive", "_waiting", "_owed", "_holds", "_packets", "_payload",
                     "_high", "_progress", "_flagged", "_told", "_looked", "_segments"):  # fmt: skip
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))

    # What callers ask.

    @property
    def open_connections(self) -> int:
        """Connections whose span is still owed."""
        return self._open

    def waiting(self, slots: Slots) -> NDArray[np.bool_]:
        """Which slots are in a handshake that may still tell their ids (bool, shape of `slots`)."""
        return self._waiting[slots]

    def open_slots(self) -> Slots:
        """The slots of connections that are open (int64, shape (n,)), by number."""
        return np.flatnonzero(self._owed)

    def payload(self) -> NDArray[np.int64]:
        """Payload that went through each slot since its connection is followed, in bytes, each byte once.

        Shape (slots, 2), by direction.
        """
        return (self._progress - self._flagged).reshape(-1, 2)

    def standing(self, slot: int) -> Standing | None:
        """How the connection of a slot stands; None when it has left, or is none."""
        entry = self._entries[slot]
        if entry is None or entry.life is None:
            return None
        flow, life = self.flows[slot], entry.life
        return Standing(
            local=entry.local,
            peer=entry.peer,
            role=life.role,
            phase=life.phase,
            start=entry.start,
            started_ns=life.started_ns,
            pid=int(flow["pid"]),
            process_name=text(flow["process_name"]),
        )

    def phases(self, slots: Slots) -> list[Phase]:
        """Where the connection of each slot stands; those that have left, or are none, are closed."""
        entries = (self._entries[slot] for slot in slots.tolist())
        return [entry.life.phase if entry and entry.life else Phase.CLOSED for entry in entries]

    def find(self, records: Records) -> Slots:
        """The slot of the connection that each record tells of (int64, shape (n,)); -1: it is not followed."""
        return self._index.find(keys_of(np.ascontiguousarray(records)))

    def take_summaries(self) -> list[Connection]:
        """Open connections whose summary fell due since the last call."""
        summaries, self._summaries = self._summaries, []
        return summaries

    def active(self, now_ns: int) -> Iterator[Connection]:
        """Open connections that were not silent since the last call, as they are now; `now_ns` is their end.

        They have round-trip times if their sockets were looked at since.
        """
        packets, looked = self._packets[0::2] + self._packets[1::2], self._looked
        changed = np.flatnonzero((packets != self._told) | looked)
        self._told, self._looked = packets, np.zeros_like(looked)
        for slot in changed[changed < len(self._entries)].tolist():
            entry = self._entries[slot]
            if entry and not entry.reported and entry.life and entry.identity:
                now = self._event(slot, entry, entry.life, entry.identity, None, now_ns)
                yield now if looked[slot] else replace(now, rtt_smoothed_s=None, rtt_min_s=None)

    def ends(self, slot: int) -> Ends | None:
        """Which connection a slot holds; None when it has left."""
        entry = self._entries[slot]
        if entry is None:
            return None
        flow, life = self.flows[slot], entry.life
        return Ends(
            local=entry.local,
            peer=entry.peer,
            connection_id=entry.identity.connection_id if entry.identity else None,
            local_isn=life.local_isn if life else None,
            peer_isn=life.peer_isn if life else None,
            pid=int(flow["pid"]),
            process_name=text(flow["process_name"]),
        )

    @property
    def record_slots(self) -> Slots:
        """The slot of every record of the last batch, of whatever kind (int64, shape (records,)); -1: none."""
        return self._counting.slots

    def hold(self, slots: Slots) -> None:
        """Keep slots, each once for every time it occurs, beyond the next `update`."""
        np.add.at(self._holds, slots, 1)

    def release(self, slots: Slots) -> None:
        """Undo `hold`."""
        np.subtract.at(self._holds, slots, 1)

    def talkers(self, count: int) -> list[Talker]:
        """The open connections that moved most payload, busiest first."""
        payload = self._payload[0::2] + self._payload[1::2]
        packets = self._packets[0::2] + self._packets[1::2]
        talkers: list[Talker] = []
        for slot in np.argsort(-payload[: len(self._entries)], kind="stable")[: 4 * count].tolist():
            entry = self._entries[slot]
            if entry and not entry.reported and len(talkers) < count:
                flow = self.flows[slot]
                talkers.append(
                    Talker(
                        local=entry.local,
                        peer=entry.peer,
                        pid=int(flow["pid"]),
                        process_name=text(flow["process_name"]),
                        packets=int(packets[slot]),
                        payload_bytes=int(payload[slot]),
                    )
                )
        return talkers

    # A batch.

    def update(self, batch: Batch) -> tuple[Slots, list[Connection]]:
        """Take a batch in.

        Args:
            batch: records in time order.

        Returns:
            The slot of every packet record, in the order in which they stand in the batch (int64, shape (packets,)),
            and the connections that ended.
        """
        self._reclaim()
        self.births.clear()
        self.owned.clear()
        records = np.ascontiguousarray(batch.records)
        slots = np.empty(0, np.int64)
        self._counting = _Counting(records, slots)
        if len(records):
            keys = keys_of(records)
            slots = self._index.find(keys)
            self._admit(batch, records, keys, slots)
            if not batch.is_packet.all():
                self._pass_by_quiet(records, slots)
            self._counting = _Counting(records, slots)
            self._walk(batch, records, keys, slots)
            self._count_to(len(records))
            if self._open > self._limit:
                self._evict(batch.now_ns)
            slots = slots[batch.is_packet]
        self._expire(batch.now_ns)
        return slots, self._take_ended()

    def close(self, now_ns: int, snapshot: Records | None) -> list[Connection]:
        """End every connection that is still open, as the agent stops.

        Args:
            now_ns: the time on the records' clock.
            snapshot: records of kind SOCKET taken just before, for totals.
        """
        if snapshot is not None and len(snapshot):
            for slot, fact, owner in zip(self.find(snapshot).tolist(), facts(snapshot), owners(snapshot), strict=True):
                entry = self._entries[slot] if slot >= 0 else None
                if entry and entry.life and not entry.closed:
                    self._learn_owner(slot, owner)
                    self._take_totals(slot, entry, fact)
        for slot, entry in enumerate(self._entries):
            if entry and not entry.reported:
                ended = entry.life is not None and (entry.life.ended or entry.closed)
                self._report(slot, entry, End.OBSERVED if ended else End.AGENT_SHUTDOWN, now_ns)
        return self._take_ended()

    def _take_ended(self) -> list[Connection]:
        ended, self._ended = self._ended, []
        return ended

    def _admit(self, batch: Batch, records: Records, keys: Keys, slots: Slots) -> None:
        """Give a slot to every key that has none."""
        unknown = np.nonzero(slots < 0)[0]
        if not len(unknown):
            return
        born: dict[tuple[int, ...], int] = {}
        for row, *key in zip(unknown.tolist(), *keys[unknown].T.tolist(), strict=True):
            slot = born.get(tuple(key))
            if slot is None:
                slot = self._birth(batch, records[row], tuple(key))
                if slot is None:
                    continue
                born[tuple(key)] = slot
            slots[row] = slot

    def _pass_by_quiet(self, records: Records, slots: Slots) -> None:
        """Of sockets that were looked at again, leave out those to which nothing has come since the last time."""
        looked = np.flatnonzero((records["kind"] == Kind.LOOK) & (slots >= 0))
        if len(looked):
            told = records[looked]
            quiet = told["segments_in"].astype(np.int64) + told["segments_out"] == self._segments[slots[looked]]
            slots[looked[quiet]] = -1

    def _birth(self, batch: Batch, record: Any, key: tuple[int, ...]) -> int | None:
        """A slot for the first record of a key; None when the record tells of no connection at all."""
        kind, flags, marks = int(record["kind"]), int(record["flags"]), int(record["marks"])
        if kind in (Kind.RESET, Kind.CGROUP, Kind.LOOK) or (
            kind == Kind.SOCKET and not self._tells_of_unseen(record, key)
        ):
            return None
        if kind == Kind.PACKET and marks & _LISTENER and flags & _SYN and flags & _ACK:
            joined = self._embryonic.get((int(record["netns"]), (int(record["ack"]) - 1) % _MODULUS))
            if joined is not None:
                return joined  # NAT made its tuple another than that of the SYN it answers
        life: Life | None = Life(int(record["time_ns"]))
        start = Start.OBSERVED
        if kind == Kind.PACKET:
            opening = flags & (_SYN | _RST) == _SYN
            if marks & _NO_SOCKET or (not opening and (marks & _LISTENER or flags & _RST)):
                life = None
            elif not opening:
                start = Start.INHERITED
        else:
            start = Start.INHERITED
        if life and start is Start.INHERITED:
            life.inherit(opened_by_us=None, local_isn=None, peer_isn=None)
        slot = self._open_slot(record, key, life, start, batch.unix_offset_ns)
        entry = self._entries[slot]
        if entry and start is Start.INHERITED:
            entry.older = not self._older_told or (kind == Kind.SOCKET and record["new_state"] != State.CLOSE)
        if marks & _LISTENER and flags & (_SYN | _ACK) == _SYN:
            self._embryonic[embryo := (int(record["netns"]), int(record["seq"]))] = slot
            self._entries[slot].embryo = embryo  # type: ignore[union-attr]
        return slot

    def _tells_of_unseen(self, record: Any, key: tuple[int, ...]) -> bool:
        """Whether a socket's record is of a connection to be followed: an older one, or one whose packets were lost."""
        if record["new_state"] != State.CLOSE:
            return True
        if not self._older_told or self._given_up.pop(key, False):
            return False
        return record["old_state"] in _CONNECTED and bool(record["segments_in"] or record["segments_out"])

    def _open_slot(self, record: Any, key: tuple[int, ...], life: Life | None, start: Start, offset_ns: int) -> int:
        entry = Entry(
            Endpoint(record["local_address"].tobytes(), int(record["local_port"])),
            Endpoint(record["peer_address"].tobytes(), int(record["peer_port"])),
            int(record["netns"]),
            life,
            offset_ns,
        )
        entry.start = start
        opening = int(record["flags"]) & (_SYN | _ACK) == _SYN
        slot = self._allocate()
        self._entries[slot] = entry
        accepted = record["kind"] == Kind.PACKET and record["direction"] == Direction.RECEIVE and opening
        self.births.append(Birth(slot, entry.netns, entry.local, entry.peer, bool(accepted)))
        self._index.insert(key, slot)
        self.flows[slot] = np.zeros((), FLOW)
        self.flows["born"][slot] = next(self._versions)
        self._set_owner(slot, Owner(*(record[name] for name in Owner._fields)))
        self.renew(slot)
        self._last_seen[slot] = record["time_ns"]
        self._attentive[slot] = life is not None
        self._waiting[slot] = self._owed[slot] = life is not None
        for column in (self._packets, self._payload, self._high, self._progress, self._flagged):
            column[2 * slot : 2 * slot + 2] = 0
        self._told[slot] = self._segments[slot] = 0
        self._looked[slot] = False
        if life is None:
            self._identify_stray(slot, record)
            self._schedule(slot, int(record["time_ns"]) + self._linger_ns)
        else:
            self._open += 1
            first_look_ns = min(self._handshake_timeout_ns, self._summary_interval_ns or self._handshake_timeout_ns)
            self._schedule(slot, int(record["time_ns"]) + first_look_ns)
        return slot

    def _allocate(self) -> int:
        if self._free:
            return self._free.pop()
        if len(self._entries) == len(self.flows):
            self._grow()
        self._entries.append(None)
        return len(self._entries) - 1

    def _evict(self, now_ns: int) -> None:
        slots = np.array([slot for slot, entry in enumerate(self._entries) if entry and not entry.reported], np.int64)
        count = max(self._open - self._limit, len(slots) // EVICTED_SHARE)
        oldest = slots[np.argpartition(self._last_seen[slots], count - 1)[:count]]
        for slot in oldest.tolist():
            entry = self._entries[slot]
            if entry:
                self._report(slot, entry, End.EVICTED, now_ns)
                self._leave(slot)

    def _walk(self, batch: Batch, records: Records, keys: Keys, slots: Slots) -> None:
        """Everything that is not plain data, one by one, in order."""
        rows = self._sift(records, slots)
        for start in range(0, len(rows), _WALKED_ROWS):
            self._walk_rows(batch, records, keys, slots, rows[start : start + _WALKED_ROWS])

    def _walk_rows(self, batch: Batch, records: Records, keys: Keys, slots: Slots, rows: NDArray[np.int64]) -> None:
        packets, chosen = batch.is_packet[rows], pick(records, rows)
        told = iter(facts(pick(chosen, ~packets)))
        walked = zip(
            rows.tolist(), packets.tolist(), owners(chosen), *(chosen[field].tolist() for field in ROW_FIELDS),
            strict=True,
        )  # fmt: skip
        for row, is_packet, owner, *fields in walked:
            slot = int(slots[row])
            entry = self._entries[slot]
            self._row = row
            fact = None if is_packet else next(told)
            if entry is None:
                continue
            segment = Row(*fields)
            if not fact and self._reuses(entry, segment):
                slot = self._succeed(batch, records, keys, slots, row)
                entry = self._entries[slot]
                if entry is None:
                    continue
            self._learn_owner(slot, owner)
            if fact:
                self._fact(slot, entry, fact)
            elif not segment.flags & _RST or self._in_window(slot, entry, segment):
                self._packet(slot, entry, segment)

    def _reuses(self, entry: Entry, row: Row) -> bool:
        """Whether a SYN opens a new connection on the key of an old one, or of strays."""
        life = entry.life
        if row.marks & _NO_SOCKET:
            return False
        if life is None:
            return bool(row.flags & _SYN)  # a socket answers for the key now
        if row.flags & (_SYN | _ACK | _RST) != _SYN:
            return False
        sent = row.direction == _TRANSMIT
        if not sent and self._kernel_totals and not row.marks & _LISTENER:
            return False  # it met an open socket, which answers with an ACK and goes on
        known, answer = (life.local_isn, life.peer_isn) if sent else (life.peer_isn, life.local_isn)
        if known is None:
            return life.phase not in HANDSHAKE
        # The same number again is the same attempt, unless that was cut short before it was answered.
        return known != row.seq or (life.ended and answer is None and not life.refused)

    def _in_window(self, slot: int, entry: Entry, row: Row) -> bool:
        """Whether a RST can belong to an open connection: others are ignored (RFC 5961 section 3)."""
        if entry.life is None or entry.life.phase in HANDSHAKE:
            return True
        self._count_to(self._row)
        cell = 2 * slot + row.direction
        high = int(self._high[cell])
        if not high and not self._progress[cell]:
            return True
        return (row.seq - high + _RESET_WINDOW) % _MODULUS < 2 * _RESET_WINDOW

    def _succeed(self, batch: Batch, records: Records, keys: Keys, slots: Slots, row: int) -> int:
        """End the connection of a row's key and start its successor, which gets the row and all that follow."""
        self._count_to(row)
        self._row = row - 1  # the row itself is the successor's
        old = int(slots[row])
        entry = self._entries[old]
        if entry and not entry.reported:
            self._report(old, entry, End.OBSERVED, int(records["time_ns"][row]))
        self._leave(old)
        self._row = row
        new = self._birth(batch, records[row], tuple(keys[row].tolist()))
        if new is None:
            return old
        later = slots[row:]
        same = later == old
        same &= (keys[row:] == keys[row]).all(axis=1)
        later[same] = new
        return new

    def _sift(self, records: Records, slots: Slots) -> NDArray[np.int64]:
        """The records to look at one by one."""
        rows, attentive, pids = np.empty_like(slots), self._attentive[: len(self._entries)].copy(), self.flows["pid"]
        found = native.library.tcpio_sift(records, slots, len(records), attentive, pids, pids.strides[0], rows)
        return rows[:found]

    def _learn_owner(self, slot: int, owner: Owner) -> None:
        """Note which process a connection belongs to, and where that is at home; the newest wins."""
        flow = self.flows[slot]
        if not owner.pid or (flow["pid"], flow["cgroup"], flow["cgroup_v1"]) == owner[:3]:
            return
        if flow["pid"] != owner.pid:
            self.renew(slot)
        self._set_owner(slot, owner)

    def _set_owner(self, slot: int, owner: Owner) -> None:
        for name, value in zip(Owner._fields, owner, strict=True):
            self.flows[name][slot] = value
        self.owned.append(slot)

    def _packet(self, slot: int, entry: Entry, row: Row) -> None:
        life = entry.life
        if life is None:
            return
        segments = max(1, row.gso_segments)
        sent = row.direction == _TRANSMIT
        if sent and self._kernel_totals and not entry.closed and not row.flags & _RST and not row.marks & _NO_SOCKET:
            life.survive_reset()
        life.segment(
            Segment(row.time_ns, sent, row.flags, row.seq, row.ack, row.payload_bytes, row.window, row.marks, segments)
        )
        if row.flags & (_SYN | _FIN):
            self._flagged[2 * slot : 2 * slot + 2] = _flagged(entry, life)
        self._settle(slot, entry)

    def _settle(self, slot: int, entry: Entry) -> None:
        """Draw the conclusions from what a life has come to."""
        life = entry.life
        if life is None:
            return
        both_known = life.local_isn is not None and life.peer_isn is not None
        if entry.identity is None and (both_known or life.ended):
            self._identify(slot, entry)
        if entry.attentive == life.steady:
            entry.attentive = self._attentive[slot] = not life.steady
        if entry.reported:
            self._schedule(slot, life.ended_ns + self._linger_ns)
        elif life.ended or entry.closed:
            if self._complete(entry):
                self._report(slot, entry, End.OBSERVED, life.ended_ns)
            orphan = entry.closed and not life.ended and life.fin_sent and not entry.errno_name
            wait_ns = ORPHAN_FIN_WAIT_NS if orphan else 0
            self._schedule(slot, life.ended_ns + self._linger_ns + wait_ns)

    def _complete(self, entry: Entry) -> bool:
        """Whether nothing is missing: the wire has seen the end, and the kernel has given its totals."""
        life = entry.life
        if life is None:
            return False
        if entry.closed and entry.errno_name and entry.errno_name not in ("ECONNRESET", "EPIPE"):
            return True  # nothing crosses the wire when a connection fails by timeout
        return life.ended and (entry.closed or not self._kernel_totals)

    def _fact(self, slot: int, entry: Entry, fact: Fact) -> None:
        """A record of kind SOCKET or RESET."""
        life = entry.life
        if life is None:
            return
        if fact.kind == _RESET_KIND:
            reason = fact.reason
            entry.reset_reason = self._reset_reasons.get(reason, str(reason))
            return
        if entry.closed:
            return
        if fact.new_state == _CLOSE:
            error = fact.error
            entry.errno_name = errno.errorcode.get(error, str(error)) if error else None
            entry.closed = True
            life.lose_socket()
            life.ended_ns = max(life.ended_ns, fact.time_ns)
        self._take_totals(slot, entry, fact)
        if entry.identity is None:
            self._inherit(entry, fact)
        self._settle(slot, entry)

    def _inherit(self, entry: Entry, fact: Fact) -> None:
        """Learn from a socket's counters how a connection began that nobody saw begin."""
        life = entry.life
        if life is None:
            return
        unanswered = life.phase is Phase.SYN_RECEIVED and life.local_isn is None  # its SYN-ACK was not seen
        if life.phase in HANDSHAKE and not unanswered:
            return
        began = initial_sequence(
            state=fact.old_state,
            snd_una=fact.snd_una,
            snd_nxt=fact.snd_nxt,
            write_seq=fact.write_seq,
            rcv_nxt=fact.rcv_nxt,
            bytes_acked=fact.bytes_acked,
            bytes_received=fact.bytes_received,
            bytes_sent=fact.bytes_sent,
            bytes_retransmitted=fact.bytes_retransmitted,
        )  # fmt: skip
        if began and unanswered:
            if not began.opened_by_us and began.peer == life.peer_isn:
                life.inherit(opened_by_us=False, local_isn=began.local, peer_isn=began.peer)
        elif began:
            if life.role is Role.UNKNOWN:
                life.role = Role.CLIENT if began.opened_by_us else Role.SERVER
            life.local_isn, life.peer_isn = began.local, began.peer

    def _take_totals(self, slot: int, entry: Entry, fact: Fact) -> None:
        life = entry.life
        if life is None:
            return
        entry.moved_before = self._moved(slot, entry, life)
        if fact.kind == Kind.LOOK:
            entry.moved_before = self._catch_up(slot, fact, entry.moved_before)
        smoothed, least = fact.rtt_smoothed_us, fact.rtt_min_us
        fin = fact.old_state in FIN_RECEIVED_STATES or (
            life.peer_fin_end is not None and life.peer_fin_end == fact.rcv_nxt
        )
        fin |= fact.kind == Kind.SOCKET and fact.fin_received != 0
        self._looked[slot] |= fact.kind == Kind.LOOK
        self._segments[slot] = fact.segments_in + fact.segments_out
        received = fact.bytes_received
        first = entry.totals is None
        entry.totals = Totals(
            bytes_sent=fact.bytes_sent - fact.bytes_retransmitted,
            bytes_received=received - 1 if fin and received else received,
            packets_sent=fact.segments_out,
            packets_received=fact.segments_in,
            retransmits=fact.retransmits,
            rtt_smoothed_s=smoothed / 1e6 if smoothed else None,
            rtt_min_s=least / 1e6 if least != _UNMEASURED_RTT and smoothed else None,
        )
        if first and entry.older:
            told, moved = entry.totals, entry.moved_before
            entry.before = Counts(
                bytes_sent=max(0, told.bytes_sent - moved.bytes_sent),
                bytes_received=max(0, told.bytes_received - moved.bytes_received),
                packets_sent=max(0, told.packets_sent - moved.packets_sent),
                packets_received=max(0, told.packets_received - moved.packets_received),
                retransmits=max(0, told.retransmits - moved.retransmits),
            )

    def _catch_up(self, slot: int, fact: Fact, moved: Counts) -> Counts:
        """Have a slot's columns stand where its socket does: what of `moved` its totals hold, with what got lost of it.

        Bytes are counted by how far sequence numbers came, so that what was lost would count once more when the next
        segment is seen; and what came out of order is not among a socket's totals yet.
        """
        ahead = {Direction.TRANSMIT: 0, Direction.RECEIVE: 0}
        for direction, position in ((Direction.TRANSMIT, fact.snd_nxt), (Direction.RECEIVE, fact.rcv_nxt)):
            cell = 2 * slot + direction
            if self._high[cell] or self._progress[cell]:
                further = (position - int(self._high[cell]) + _HALF) % _MODULUS - _HALF
                ahead[direction] = further
                if further < 0:
                    continue
                self._progress[cell] += further
            self._high[cell] = position
        return moved._replace(
            bytes_sent=moved.bytes_sent + ahead[Direction.TRANSMIT],
            bytes_received=moved.bytes_received + ahead[Direction.RECEIVE],
        )

    # Ids.

    def renew(self, slot: int) -> None:
        """Say that something of a slot's flow has changed."""
        self.flows["version"][slot] = next(self._versions)

    def _publish(self, slot: int, ids: Identity, span_id: bytes) -> None:
        flow = self.flows[slot : slot + 1]
        flow["trace_id"] = np.frombuffer(ids.trace_id, "V16")
        flow["span_id"] = np.frombuffer(span_id, "V8")
        flow["identified"] = True
        flow["server"] = span_id == ids.server_span_id
        self._waiting[slot] = False
        self.renew(slot)

    def _identify(self, slot: int, entry: Entry) -> None:
        """Give a connection its ids, from what is known of its start by now."""
        life = entry.life
        if life is None:
            return
        local, peer = life.local_isn, life.peer_isn
        client = life.role is Role.CLIENT
        if life.role is Role.UNKNOWN and local is not None and peer is not None:
            client = local <= peer  # simultaneous open: both ends agree on who is the lower
        if local is None and peer is None:
            seed = b"".join(
                (entry.local.address, entry.peer.address, entry.local.port.to_bytes(2), entry.peer.port.to_bytes(2),
                 entry.netns.to_bytes(4), life.started_ns.to_bytes(8))
            )  # fmt: skip
            entry.identity = identity(seed)
        else:
            ours, theirs = local or 0, peer or 0
            entry.identity = from_initial_sequence(*(ours, theirs) if client else (theirs, ours))
        ids = entry.identity
        self._publish(slot, ids, ids.client_span_id if client else ids.server_span_id)

    def _identify_stray(self, slot: int, record: Any) -> None:
        """A SYN that no socket took: the client will compute its ids from its own number alone."""
        flags = int(record["flags"])
        if record["kind"] == Kind.PACKET and flags & (_SYN | _ACK) == _SYN:
            ids = from_initial_sequence(int(record["seq"]), 0)
            self._publish(slot, ids, ids.server_span_id)

    # Counting by column.

    def _count_to(self, row: int) -> None:
        """Count the records of the batch before `row`, into the slots that are theirs by now."""
        counting = self._counting
        if row <= counting.counted:
            return
        part = slice(counting.counted, row)
        counting.counted = row
        native.library.tcpio_count(
            counting.records[part], counting.slots[part], len(counting.slots[part]), self._last_seen, self._packets,
            self._payload, self._high, self._progress,
        )  # fmt: skip

    # Ends.

    def _schedule(self, slot: int, deadline_ns: int) -> None:
        """Look at a slot again at a time; a later call moves it."""
        self._deadlines[slot] = deadline_ns

    def _expire(self, now_ns: int) -> None:
        """Look at every slot whose time has come; one that was let go in between has none any more."""
        while len(due := np.nonzero(self._deadlines <= now_ns)[0]):
            for slot in due[np.argsort(self._deadlines[due], kind="stable")].tolist():
                entry = self._entries[slot]
                self._deadlines[slot] = _NEVER
                if entry is not None:
                    self._due(slot, entry, now_ns)

    def _due(self, slot: int, entry: Entry, now_ns: int) -> None:
        """An entry's deadline has come: it is silent, overdue, or well."""
        silent_ns = now_ns - int(self._last_seen[slot])
        life = entry.life
        if entry.reported:
            if silent_ns < self._linger_ns:
                self._schedule(slot, now_ns - silent_ns + self._linger_ns)
            else:
                self._leave(slot)
        elif life is not None and (life.ended or entry.closed):
            self._report(slot, entry, End.OBSERVED, life.ended_ns)
            self._schedule(slot, now_ns + self._linger_ns)
        elif life is not None and life.phase in HANDSHAKE:
            if silent_ns < self._handshake_timeout_ns:
                self._schedule(slot, now_ns - silent_ns + self._handshake_timeout_ns)
            else:
                self._report(slot, entry, End.OBSERVED, int(self._last_seen[slot]))
                self._schedule(slot, now_ns)
        elif life is not None and self._summary_interval_ns:
            ids, first_ns = entry.identity, life.started_ns + self._summary_interval_ns
            if now_ns >= first_ns and ids is not None and silent_ns < self._summary_interval_ns:
                self._summaries.append(self._event(slot, entry, life, ids, None, now_ns))
            self._schedule(slot, first_ns if now_ns < first_ns else now_ns + self._summary_interval_ns)

    def _leave(self, slot: int) -> None:
        """Take an entry out; its slot is used again once nobody holds it."""
        entry = self._entries[slot]
        if entry is None:
            return
        self._index.remove(slot)
        self._entries[slot] = None
        if self._older_told and entry.life is not None and not entry.closed:
            self._give_up(entry)
        self._attentive[slot] = self._waiting[slot] = False
        self._deadlines[slot] = _NEVER
        self._leaving.append(slot)
        if entry.embryo and self._embryonic.get(entry.embryo) == slot:
            del self._embryonic[entry.embryo]

    def _give_up(self, entry: Entry) -> None:
        """Remember a connection whose socket's last record is still to come, so that it is not taken for another's."""
        ports = struct.pack("<HHI", entry.local.port, entry.peer.port, entry.netns)
        while len(self._given_up) >= GIVEN_UP_LIMIT:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[struct.unpack("<5Q", entry.local.address + entry.peer.address + ports)] = True

    def _reclaim(self) -> None:
        """Make the slots of entries that left available, but for those that a caller holds."""
        held = [slot for slot in self._leaving if self._holds[slot]]
        freed = [slot for slot in self._leaving if not self._holds[slot]]
        self.flows["born"][freed] = 0
        self._free.extend(freed)
        self._leaving = held

    def _report(self, slot: int, entry: Entry, end: End, end_ns: int) -> None:
        """The span is settled: build what it is made of. A SYN that nobody answered makes none."""
        life = entry.life
        entry.reported = True
        self._owed[slot] = False
        self._open -= 1
        if life is None:
            return
        if entry.identity is None:
            self._identify(slot, entry)
        self._waiting[slot] = False
        if life.role is Role.SERVER and life.local_isn is None and entry.start is Start.OBSERVED:
            return
        ids = entry.identity
        if ids is not None:
            self._ended.append(self._event(slot, entry, life, ids, end, end_ns))
        life.notes.clear()  # by far the most of an entry, which stays for its last segments

    def _event(self, slot: int, entry: Entry, life: Life, ids: Identity, end: End | None, end_ns: int) -> Connection:
        return connection(entry, life, ids, slot, self.flows[slot], self._moved(slot, entry, life), end, end_ns)

    def _moved(self, slot: int, entry: Entry, life: Life) -> Counts:
        """What records add up to, of those up to the one that is looked at now."""
        self._count_to(self._row + 1)
        received, sent = 2 * slot + Direction.RECEIVE, 2 * slot + Direction.TRANSMIT
        flagged_received, flagged_sent = _flagged(entry, life)
        return Counts(
            bytes_sent=int(self._progress[sent]) - flagged_sent,
            bytes_received=int(self._progress[received]) - flagged_received,
            packets_sent=int(self._packets[sent]),
            packets_received=int(self._packets[received]),
            retransmits=sum(note.name == names.RETRANSMITTED and note.segment.sent for note in life.notes),
        )


def _flagged(entry: Entry, life: Life) -> tuple[int, int]:
    """How many of the sequence numbers received and sent SYN and FIN took."""
    seen_opening = entry.start is Start.OBSERVED
    return (
        (seen_opening and life.peer_isn is not None) + (life.peer_fin_end is not None),
        (seen_opening and life.local_isn is not None) + life.fin_sent,
    )
