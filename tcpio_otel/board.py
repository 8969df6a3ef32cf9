"""What `top` knows of a host's connections: ranked, filtered, added up by workload; of each only what is shown.

Choosing goes by column. A row, with its texts, is made for what somebody will see, and for nothing else.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.attribution.naming import NOTHING, Known, Place, Workload
from tcpio_otel.attribution.peers import Peers
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import Batch, Direction, Endpoint
from tcpio_otel.connections.events import CloseReason, Connection, Phase, Role, Standing, Start
from tcpio_otel.connections.rates import Moment, Rates
from tcpio_otel.connections.table import ConnectionTable, Slots
from tcpio_otel.encoding.endpoints import bracketed
from tcpio_otel.encoding.table import printable

FADE_NS = 10_000_000_000
"""How long a connection that has ended stays in sight."""

ENDED_LIMIT = 2048
"""How many of those that failed, and how many of the others, are kept at most."""

WORKLOAD_LIMIT = 4096
"""How many workloads whose connections have ended are remembered for how these did."""

_RECEIVE, _TRANSMIT = int(Direction.RECEIVE), int(Direction.TRANSMIT)
_CONTAINER_DIGITS = 12
_FAILED_CONNECTS = (CloseReason.REFUSED, CloseReason.TIMEOUT, CloseReason.UNREACHABLE)
_FAILURES = (CloseReason.RESET, *_FAILED_CONNECTS)
_ARROWS = {Role.CLIENT: "->", Role.SERVER: "<-", Role.UNKNOWN: "--"}
# As ss(8) calls them.
_PHASES = {
    Phase.CLOSED: "unconn",
    Phase.SYN_SENT: "syn-sent",
    Phase.SYN_RECEIVED: "syn-recv",
    Phase.ESTABLISHED: "estab",
    Phase.FIN_WAIT_1: "fin-wait-1",
    Phase.FIN_WAIT_2: "fin-wait-2",
    Phase.CLOSE_WAIT: "close-wait",
    Phase.CLOSING: "closing",
    Phase.LAST_ACK: "last-ack",
    Phase.FINISHED: "time-wait",
    Phase.RESET: "reset",
}
_UNUSUAL_FIRST = {
    phase: place
    for place, phase in enumerate(
        (Phase.RESET, Phase.SYN_SENT, Phase.SYN_RECEIVED, Phase.CLOSE_WAIT, Phase.FIN_WAIT_1, Phase.FIN_WAIT_2,
         Phase.CLOSING, Phase.LAST_ACK, Phase.FINISHED, Phase.CLOSED, Phase.ESTABLISHED)
    )
}  # fmt: skip


class Sort(StrEnum):
    """What rows are sorted by: most comes first; by age the oldest; by state what is not established."""

    OUT = "out"
    IN = "in"
    BYTES = "bytes"
    RTT = "rtt"
    RETRANSMITS = "retransmits"
    RETRANSMIT_RATE = "retransmit-rate"
    AGE = "age"
    STATE = "state"


@dataclass(frozen=True)
class Choice:
    """Which rows are wanted, and in what order."""

    sort: Sort = Sort.OUT
    reverse: bool = False
    text: str = ""
    by_workload: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A connection. Rates are a second, and None of one that has ended; what is not known is None or empty."""

    process: str
    local: str
    arrow: str
    peer: str
    peer_name: str
    out_rate: float | None
    in_rate: float | None
    payload_bytes: int
    rtt_ms: float | None
    retransmits: int
    retransmit_rate: float | None
    age_s: float
    older: bool  # than anybody looked
    state: str
    failed: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.out_rate is None


@dataclass(frozen=True, slots=True)
class Group:
    """A workload. Rates are a second; retransmits, resets and failed connects are counted since the start."""

    workload: str
    connections: int = 0
    out_rate: float = 0
    in_rate: float = 0
    retransmit_rate: float = 0
    retransmits: int = 0
    resets: int = 0
    failed_connects: int = 0

    @property
    def failed(self) -> bool:
        """Whether anything has."""
        return bool(self.resets or self.failed_connects)


class Totals(NamedTuple):
    """Of all connections together, a second; and how many are open."""

    packets: float = 0
    payload_bytes: float = 0
    retransmits: float = 0
    connections: int = 0


class _Ended(NamedTuple):
    connection: Connection
    workload: Workload
    peer: Known
    seen_ns: int


@dataclass(slots=True)
class _Ends:
    """What came of the connections of a workload that have ended."""

    label: str = ""
    retransmits: int = 0
    resets: int = 0
    failed_connects: int = 0


class Board:
    """The connections of a table as of the last `refresh`.

    Args:
        table: takes each batch in first.
        rates: beside it, likewise; taken over.
        workloads: whose connections are; None: nobody tells, and programs stand for themselves.
        peers: who is at their other ends; None: nobody tells.
        fade_ns: how long connections that ended are shown; None: for good.
    """

    def __init__(
        self,
        table: ConnectionTable,
        rates: Rates,
        workloads: Workloads | None,
        peers: Peers | None,
        fade_ns: int | None = FADE_NS,
    ) -> None:
        self._table, self._rates, self._workloads, self._peers = table, rates, workloads, peers
        self._fade_ns, self._now_ns = fade_ns, 0
        self._failures: deque[_Ended] = deque(maxlen=ENDED_LIMIT)
        self._others: deque[_Ended] = deque(maxlen=ENDED_LIMIT)
        self._ends: dict[Workload, _Ends] = {}
        # By slot: what can be looked for, and the version of the slot that it was made of.
        self._texts: list[str] = []
        self._text_versions = np.zeros(0, np.uint64)
        self._moment: Moment | None = None

    def take(self, batch: Batch, slots: Slots, ended: Iterable[Connection]) -> None:
        """Take in a batch that the table has taken in, and what it returned."""
        self._rates.take(batch, slots)
        flows = self._table.flows
        for connection in ended:
            number, peer = int(flows["workload"][connection.slot]), int(flows["peer"][connection.slot])
            workload = self._workload(number, connection.process_name)
            seen = _Ended(connection, workload, self._peer(peer), batch.now_ns)
            (self._failures if connection.close_reason in _FAILURES else self._others).append(seen)
            ends = self._ends_of(workload)
            ends.retransmits += connection.counts.retransmits
            ends.resets += connection.close_reason is CloseReason.RESET
            ends.failed_connects += connection.close_reason in _FAILED_CONNECTS

    def _ends_of(self, workload: Workload) -> _Ends:
        key = _key(workload)
        while len(self._ends) >= WORKLOAD_LIMIT and key not in self._ends:
            del self._ends[next(iter(self._ends))]
        ends = self._ends.setdefault(key, _Ends())
        ends.label = _label(workload)
        return ends

    def refresh(self, now_ns: int) -> Totals:
        """Have everything as of now, and rates since the last time; `now_ns` is on the records' clock."""
        moment, self._now_ns = self._rates.moment(now_ns), now_ns
        self._moment = moment
        if self._fade_ns is not None:
            for kept in (self._failures, self._others):
                while kept and kept[0].seen_ns < now_ns - self._fade_ns:
                    kept.popleft()
        return Totals(moment.packets_s, moment.payload_s, moment.retransmits_s, len(moment.slots))

    # Connections.

    def connections(self, choice: Choice, first: int, count: int) -> list[Row]:
        """Rows of open connections, from the `first` on, at most `count`."""
        moment = self._moment
        if moment is None:
            return []
        order = self._ranked(moment, choice)
        if choice.text:
            order = order[self._matching(moment.slots, choice.text)[order]]
        return list(islice(self._rows(moment, order[first:]), count))

    def ended(self, choice: Choice, count: int) -> list[Row]:
        """Rows of connections that have ended, at most `count`: those that failed first, the last one first."""
        kept = (each for kind in (self._failures, self._others) for each in reversed(kind))
        rows = (self._ended_row(each) for each in kept if each.seen_ns <= self._now_ns)
        return list(islice((row for row in rows if _holds(row, choice.text)), count))

    def _ranked(self, moment: Moment, choice: Choice) -> Slots:
        """The rows of a moment as they are wanted; what is equal has most bytes first, then the oldest."""
        payload = moment.totals.sum(axis=1)
        match choice.sort:
            case Sort.OUT:
                key: NDArray[np.generic] = moment.rates[:, _TRANSMIT]
            case Sort.IN:
                key = moment.rates[:, _RECEIVE]
            case Sort.BYTES:
                key = payload
            case Sort.RTT:
                key = moment.rtt_us
            case Sort.RETRANSMITS:
                key = moment.retransmits
            case Sort.RETRANSMIT_RATE:
                key = moment.retransmit_rates
            case Sort.AGE:
                key = -moment.born.astype(np.int64)
            case Sort.STATE:
                phases = self._table.phases(moment.slots)
                key = np.array([-_UNUSUAL_FIRST[phase] for phase in phases], np.int64)
        sign = 1 if choice.reverse else -1
        return np.lexsort((moment.born, -payload, sign * key))

    def _rows(self, moment: Moment, order: Slots) -> Iterable[Row]:
        flows = self._table.flows
        for place in order.tolist():
            slot = int(moment.slots[place])
            standing = self._table.standing(slot)
            if standing is None or flows["born"][slot] != moment.born[place]:
                continue  # it has left since
            rtt_us = int(moment.rtt_us[place])
            yield Row(
                process=self._process(int(flows["workload"][slot]), standing.process_name, standing.pid),
                local=_text(standing.local),
                arrow=_ARROWS[standing.role],
                peer=_text(standing.peer),
                peer_name=_name(self._peer(int(flows["peer"][slot]))),
                out_rate=float(moment.rates[place, _TRANSMIT]),
                in_rate=float(moment.rates[place, _RECEIVE]),
                payload_bytes=int(moment.totals[place].sum()),
                rtt_ms=rtt_us / 1e3 if rtt_us else None,
                retransmits=int(moment.retransmits[place]),
                retransmit_rate=float(moment.retransmit_rates[place]),
                age_s=max(0, self._now_ns - standing.started_ns) / 1e9,
                older=standing.start is Start.INHERITED,
                state=_PHASES[standing.phase],
            )

    def _ended_row(self, ended: _Ended) -> Row:
        connection = ended.connection
        how = str(connection.close_reason or connection.end)
        return Row(
            process=_of(ended.workload, connection.process_name, connection.pid),
            local=_text(connection.local),
            arrow=_ARROWS[connection.role],
            peer=_text(connection.peer),
            peer_name=_name(ended.peer),
            out_rate=None,
            in_rate=None,
            payload_bytes=connection.bytes_sent + connection.bytes_received,
            rtt_ms=None if connection.rtt_smoothed_s is None else connection.rtt_smoothed_s * 1e3,
            retransmits=connection.retransmits,
            retransmit_rate=None,
            age_s=(connection.end_ns - connection.start_ns) / 1e9,
            older=connection.start is Start.INHERITED,
            state=f"{how}/{connection.close_initiator}" if connection.close_initiator else how,
            failed=connection.close_reason in _FAILURES,
        )

    # Workloads.

    def groups(self, choice: Choice) -> list[Group]:
        """A row for each workload that has connections, or had one that failed."""
        moment = self._moment
        if moment is None:
            return []
        owners, inverse = self._owners(moment.slots)
        columns = (
            np.ones(len(inverse)), moment.rates[:, _TRANSMIT], moment.rates[:, _RECEIVE], moment.retransmit_rates,
            moment.resent,
        )  # fmt: skip
        sums = zip(*(np.bincount(inverse, column, len(owners)).tolist() for column in columns), strict=True)
        open_now = {_key(owner): (_label(owner), figures) for owner, figures in zip(owners, sums, strict=True)}
        nothing, found = (0,) * len(columns), list[Group]()
        for key in dict.fromkeys([*open_now, *self._ends]):
            ends = self._ends.get(key, _Ends())
            label, (connections, out_rate, in_rate, resent_s, resent) = open_now.get(key, (ends.label, nothing))
            group = Group(
                workload=label,
                connections=int(connections),
                out_rate=out_rate,
                in_rate=in_rate,
                retransmit_rate=resent_s,
                retransmits=int(resent) + ends.retransmits,
                resets=ends.resets,
                failed_connects=ends.failed_connects,
            )
            if (group.connections or group.failed) and choice.text.lower() in group.workload.lower():
                found.append(group)
        found.sort(key=lambda group: _GROUP_KEYS[choice.sort](group), reverse=not choice.reverse)
        return found

    def _owners(self, slots: Slots) -> tuple[list[Workload], NDArray[np.intp]]:
        """The workloads of slots, each once, and which of them each slot belongs to (shape of `slots`)."""
        flows = self._table.flows[slots]
        numbers = flows["workload"].astype(np.int64)
        unnamed = np.flatnonzero(numbers == 0)
        programs, which = np.unique(flows["process_name"][unnamed], return_inverse=True)
        numbers[unnamed] = -1 - which
        distinct, inverse = np.unique(numbers, return_inverse=True)
        owners: list[Workload] = []
        for number in distinct.tolist():
            program = bytes(programs[-1 - number]).decode("utf-8", "replace") if number < 0 else ""
            owners.append(self._workload(max(number, 0), program))
        return owners, inverse

    # Texts.

    def _workload(self, number: int, program: str) -> Workload:
        """The workload with a number; where nobody knows of one, the program."""
        return self._workloads[number] if self._workloads and number else Workload(Place(), program)

    def _peer(self, number: int) -> Known:
        return self._peers[number] if self._peers else NOTHING

    def _process(self, number: int, program: str, pid: int) -> str:
        return _of(self._workload(number, program), program, pid)

    def _matching(self, slots: Slots, text: str) -> NDArray[np.bool_]:
        """Which connections hold a text, whatever its case: in their ends, process, workload or peer."""
        text = text.lower()
        flows = self._table.flows
        numbers, peers = flows["workload"][slots], flows["peer"][slots]
        wanted = [each for each in np.unique(numbers).tolist() if text in _label(self._workload(each, "")).lower()]
        named = [each for each in np.unique(peers).tolist() if text in _name(self._peer(each)).lower()]
        found = np.isin(numbers, wanted) | np.isin(peers, named)
        self._renew_texts(slots)
        texts = self._texts
        found |= np.fromiter((text in texts[slot] for slot in slots.tolist()), np.bool_, len(slots))
        return found

    def _renew_texts(self, slots: Slots) -> None:
        """What can be looked for, made again where a slot has changed."""
        versions = self._table.flows["version"]
        if more := len(versions) - len(self._texts):
            self._texts += [""] * more
            self._text_versions = np.concatenate([self._text_versions, np.zeros(more, np.uint64)])
        for slot in slots[versions[slots] != self._text_versions[slots]].tolist():
            standing = self._table.standing(slot)
            self._texts[slot] = _searched(standing).lower() if standing else ""
        self._text_versions[slots] = versions[slots]


_GROUP_KEYS: dict[Sort, Callable[[Group], float]] = {
    Sort.OUT: lambda group: group.out_rate,
    Sort.IN: lambda group: group.in_rate,
    Sort.BYTES: lambda group: group.out_rate + group.in_rate,
    Sort.RTT: lambda group: group.connections,
    Sort.RETRANSMITS: lambda group: group.retransmits,
    Sort.RETRANSMIT_RATE: lambda group: group.retransmit_rate,
    Sort.AGE: lambda group: group.connections,
    Sort.STATE: lambda group: group.resets + group.failed_connects,
}
"""What workloads are sorted by; those that have no such figure, by how many connections they have."""


def _text(end: Endpoint) -> str:
    return f"{bracketed(end.address)}:{end.port}"


def _key(workload: Workload) -> Workload:
    """A workload whatever is told of it by now."""
    return workload._replace(told=())


def _label(workload: Workload) -> str:
    """What a workload is called: its pod or container; else its unit and program."""
    place, program, told = workload
    if contained := dict(told).get("k8s.pod.name") or place.container_id[:_CONTAINER_DIGITS] or place.pod_uid:
        return printable(contained)
    named = [name for name in dict.fromkeys((place.unit, program)) if name]
    return printable(":".join(named))


def _of(workload: Workload, program: str, pid: int) -> str:
    """A process with the workload that it belongs to: `web-0:nginx/42`, `curl/43`."""
    process = f"{printable(program)}/{pid}" if pid else printable(program)
    place = workload.place
    return f"{_label(workload)}:{process}" if place.container_id or place.pod_uid else process


def _name(peer: Known) -> str:
    """What a peer is called: a Service, and the pod behind it; a pod; a node."""
    told = [dict(meaning.attributes) for meaning in (peer.meaning, peer.behind) if meaning]
    found = (each.get(f"k8s.{kind}.name") for each in told for kind in ("service", "pod", "node"))
    return printable(":".join(dict.fromkeys(str(name) for name in found if name)))


def _searched(standing: Standing) -> str:
    process = _of(Workload(Place(), ""), standing.process_name, standing.pid)
    return f"{process} {_text(standing.local)} {_text(standing.peer)}"


def _holds(row: Row, text: str) -> bool:
    return not text or text.lower() in " ".join((row.process, row.local, row.peer, row.peer_name, row.state)).lower()
