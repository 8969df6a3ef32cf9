r"""Packets, connections and series to lines of InfluxDB's line protocol, as Telegraf's parser reads them.

Names are those of log records and spans, cut by `key`. What is a tag, and so makes a series, is a choice: only what has
few values and lasts. A tag cannot hold everything: neither line breaks and tabs nor a backslash at its end, and an
empty one is none (plugins/parsers/influx/machine.go.rl). A character that cannot be said becomes U+FFFD.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names
from tcpio_otel.aggregation.traffic import Key, Series
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.batch import FLAG_NAMES, RAW, RECORD, Flag, Mark, Names, Packets
from tcpio_otel.connections.events import Connection, Role
from tcpio_otel.encoding.columns import Segment, Table, constant, decimals
from tcpio_otel.encoding.metrics import Observation
from tcpio_otel.encoding.packet_json import present
from tcpio_otel.encoding.peer import OWNERS, WORKLOAD_NAMES
from tcpio_otel.encoding.resource import workload_attributes
from tcpio_otel.encoding.rows import Ends, PeerNames, RowStore, SegmentEncoder, nobody
from tcpio_otel.encoding.spans import attributes, items
from tcpio_otel.encoding.traffic import key_attributes
from tcpio_otel.payload import Items, Part, Signal

PACKET, CONNECTION, PEER, DROP, AGENT, AGENT_PACKETS = (
    "tcp_packet", "tcp_connection", "tcp_peer", "tcp_drop", "tcpio", "tcpio_packets"
)  # fmt: skip
"""Measurements."""

Value = str | int | float | bool
Attributes = Iterable[tuple[str, Value]]


class Field(NamedTuple):
    """A field that is no attribute: its type, what it means, and where it comes from."""

    kind: str
    meaning: str
    value: Callable[[Any], Value]


Fields = Mapping[str, Field]

WORKLOAD = "\0"
"""Where in a line the workload's tags will stand: who it is may become known while the line waits."""

_UNSAYABLE = "\ufffd"
_NOT_IN_TAGS = re.compile(r"[\0\t\n\v\f\r]|\\\Z")
_NOT_IN_FIELDS = re.compile(r"[\0\n]")  # a line break could be said, but then a line would be two
_ESCAPED = re.compile(r"[ ,=]")


def tag(value: str) -> str:
    """A tag's name or value.

    Telegraf takes a backslash as it is, but for one before a comma, a blank, an equals sign, and, if any of these is in
    the text at all, a quotation mark.
    """
    said = _NOT_IN_TAGS.sub(_UNSAYABLE, value)
    if not _ESCAPED.search(said):
        return said
    return _ESCAPED.sub(r"\\\g<0>", said.replace('\\"', '\\\\"'))


def field(value: Value) -> str:
    """A field's value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i"
    if isinstance(value, float):
        return repr(value)
    said = _NOT_IN_FIELDS.sub(_UNSAYABLE, value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{said}"'


_KEYS = {
    names.NETWORK_TYPE: "network_type",
    names.IO_DIRECTION: "direction",
    names.REAL_PEER_ADDRESS: "real_peer_address",  # network.peer.address is not real where NAT was at work
    names.REAL_PEER_PORT: "real_peer_port",
}


def key(name: str) -> str:
    """What an attribute is called in a line: `tcp.bytes.sent` is `bytes_sent`."""
    return _KEYS.get(name) or re.sub("^(?:tcp|network)[.]", "", name).replace(".", "_")


def tags(found: Attributes) -> str:
    """Tags, with a comma before each; those without a value are left out."""
    texts = ((name, value if isinstance(value, str) else str(value).lower()) for name, value in found)
    return "".join(f",{tag(key(name))}={tag(text)}" for name, text in texts if text)


def fields(found: Attributes) -> str:
    """Fields, with a comma before each."""
    return "".join(f",{tag(key(name))}={field(value)}" for name, value in found)


def taken(wanted: Fields, source: object) -> dict[str, Value]:
    """The values of fields that are no attributes."""
    return {name: each.value(source) for name, each in wanted.items()}


def line(measurement: str, all_tags: str, all_fields: str, time_ns: int) -> bytes:
    """A line; tags and fields as `tags` and `fields` give them."""
    return f"{measurement}{all_tags} {all_fields.removeprefix(',')} {time_ns}\n".encode(errors="replace")


_OWNED = {names.REPLICA_SET: names.DEPLOYMENT, names.JOB: names.CRON_JOB}
"""What its owner makes afresh every now and then: who knows the owner need not tell it."""

WORKLOAD_TAGS = (
    names.SERVICE_NAME, names.SERVICE_NAMESPACE, names.NAMESPACE, *OWNERS, names.CONTAINER_NAME, names.EXECUTABLE_NAME,
)  # fmt: skip
PEER_TAGS = frozenset(names.PEER_PREFIX + name for name in WORKLOAD_NAMES)
PACKET_TAGS = frozenset((names.IO_DIRECTION, names.EXECUTABLE_NAME))
CONNECTION_TAGS = frozenset(
    (names.EXECUTABLE_NAME, names.CLOSE_REASON, names.CLOSE_INITIATOR, names.ERROR_TYPE, names.ROLE)
)
CONNECTION_FIELDS: Fields = {
    "start_ns": Field(names.INT, "its start, in Unix time", attrgetter("start_ns")),
    "duration": Field(
        names.DOUBLE, "from its start to its end, in seconds", lambda found: (found.end_ns - found.start_ns) / 1e9
    ),
    "trace_id": Field(names.STRING, "its own, 32 hex digits", lambda found: found.trace_id.hex()),
    "span_id": Field(names.STRING, "its own, 16 hex digits", lambda found: found.span_id.hex()),
}
PEER_FIELDS: Fields = {
    "bytes_sent": Field(names.INT, "payload, without retransmits", attrgetter("counts.bytes_sent")),
    "bytes_received": Field(names.INT, "payload, without retransmits", attrgetter("counts.bytes_received")),
    "packets_sent": Field(names.INT, "segments", attrgetter("counts.packets_sent")),
    "packets_received": Field(names.INT, "segments", attrgetter("counts.packets_received")),
    "retransmits": Field(names.INT, "segments sent again", attrgetter("counts.retransmits")),
    "connections_opened": Field(names.INT, "that were established", attrgetter("opened")),
    "connections_closed": Field(names.INT, "that ended", lambda series: series.closed.total()),
    "connections_failed": Field(names.INT, "that were not established", lambda series: series.failed.total()),
    "resets": Field(names.INT, "connections that a RST ended", lambda series: series.resets.total()),
    "handshake_duration_count": Field(names.INT, "handshakes seen", attrgetter("handshakes.count")),
    "handshake_duration_sum": Field(
        names.DOUBLE, "what they took, in seconds", lambda series: float(series.handshakes.sum)
    ),
    "rtt_smoothed_count": Field(
        names.INT, "ends of connections whose round-trip time is known", attrgetter("round_trips.count")
    ),
    "rtt_smoothed_sum": Field(
        names.DOUBLE, "the sum of these, in seconds", lambda series: float(series.round_trips.sum)
    ),
}
AGENT_FIELDS: Fields = {
    "packets_seen": Field(names.INT, "that the source saw", attrgetter("balance.seen")),
    "packets_exported": Field(names.INT, "that were written", attrgetter("balance.exported")),
    "packets_filtered": Field(names.INT, "that nobody asked for", lambda seen: sum(seen.balance.filtered.values())),
    "packets_sampled": Field(names.INT, "that a sample left out", attrgetter("balance.sampled")),
    "packets_dropped": Field(names.INT, "that were lost", lambda seen: sum(seen.balance.dropped.values())),
    "packets_in_flight": Field(names.INT, "under way", attrgetter("balance.in_flight")),
    "connections_open": Field(names.INT, "whose line is still owed", attrgetter("open_connections")),
}


def lasting(found: Names, prefix: str = "") -> Names:
    """Attributes without those that an owner makes afresh, where the owner is told; their names begin with a prefix."""
    told = {name for name, _ in found}
    young = {prefix + name for name, owner in _OWNED.items() if prefix + owner in told}
    return tuple((name, value) for name, value in found if name not in young)


def peer_tags(found: Names) -> Names:
    """What of a peer's attributes is the same for all that are like it, and for long."""
    return lasting(tuple(each for each in found if each[0] in PEER_TAGS), names.PEER_PREFIX)


def workload_tags(workload: Workload) -> tuple[tuple[str, str], ...]:
    """What of a workload is the same for all that are like it, and for long: no container's id, no pod's name."""
    found = workload_attributes(workload)
    kept = lasting(tuple((name, found[name]) for name in WORKLOAD_TAGS if name in found))
    return tuple((name, str(value)) for name, value in kept)


def like(workload: Workload) -> Workload:
    """What all workloads with the same tags are to series: one."""
    return Workload(Place(), "", workload_tags(workload)) if workload != UNKNOWN else UNKNOWN


class Moments:
    """Sees to it that no two lines of a measurement have the same time, whatever their tags.

    A database takes a second line of a series with the same time for a correction of the first, and whoever reads may
    leave tags out. So a line whose time is taken is moved to the next nanosecond that is free.

    Attributes:
        moved: how many were.
    """

    REMEMBERED = 1 << 20
    """Lines that a later one is compared with: those that waited, say for a handshake, come after younger ones."""

    def __init__(self) -> None:
        self.moved = 0
        self._taken: deque[NDArray[np.int64]] = deque()  # each in order
        self._lines = 0

    def free(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The times at which lines of these times stand (int64, shape as given), all different and now taken."""
        if not len(times_ns):
            return times_ns
        order = np.argsort(times_ns, kind="stable")
        wanted = times_ns[order]
        steps = np.arange(len(wanted))
        found = np.maximum.accumulate(wanted - steps) + steps
        while (taken := self._is_taken(found)).any():
            found = np.maximum.accumulate(found + taken - steps) + steps
        self.moved += int(np.count_nonzero(found != wanted))
        self._taken.append(found)
        self._lines += len(found)
        while len(self._taken) > 1 and self._lines - len(self._taken[0]) >= self.REMEMBERED:
            self._lines -= len(self._taken.popleft())
        free = np.empty_like(found)
        free[order] = found
        return free

    def _is_taken(self, times_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of them are (bool, shape as given); they are in order."""
        taken = np.zeros(len(times_ns), np.bool_)
        for before in self._taken:
            if before[0] <= times_ns[-1] and times_ns[0] <= before[-1]:
                places = np.minimum(np.searchsorted(before, times_ns), len(before) - 1)
                taken |= before[places] == times_ns
        return taken


_RETRANSMIT, _DROPPED = int(Mark.RETRANSMIT), int(Mark.DROPPED)


def segment(bits: int, payload: bool) -> str:
    """What kind of segment it is, by its flags and whether it has payload: the first of these that fits."""
    flags = Flag(bits)
    for kind, fits in (
        ("rst", Flag.RST in flags),
        ("syn_ack", Flag.SYN | Flag.ACK in flags),
        ("syn", Flag.SYN in flags),
        ("fin", Flag.FIN in flags),
        ("payload", payload),
        ("ack", Flag.ACK in flags),
    ):
        if fits:
            return kind
    return "other"


class PacketLines(SegmentEncoder):
    """Encodes packet records as lines of `tcp_packet`.

    Args:
        drop_reasons: the running kernel's names.
        moments: of the measurement.
        peer_names: what is known of peers.
        asked: attributes that are to be tags, beyond those that are.
    """

    def __init__(
        self,
        drop_reasons: Mapping[int, str],
        moments: Moments,
        peer_names: PeerNames = nobody,
        asked: frozenset[str] = frozenset(),
    ) -> None:
        def number(name: str, width: int, limit: int) -> Table:
            return Table(lambda value: fields([(name, value)]).encode(), width, limit)

        def drop(reason: int) -> bytes:
            return fields([(names.DROP_REASON, drop_reasons.get(reason, str(reason)))]).encode()

        super().__init__(RowStore(self._rows, 2, peer_names))
        self._moments, self._asked = moments, asked
        self._kinds = Table(lambda kind: f",segment={segment(kind >> 1, kind & 1 == 1)} ".encode(), 24, 512)
        self._flags = Table(lambda bits: f'flags="{FLAG_NAMES[bits]}",flags_bits={bits}i'.encode(), 64, 256)
        self._cpus = number(names.CPU, 40, 1 << 16)
        self._payloads = number(names.PAYLOAD_SIZE, 40, 1 << 18)
        self._windows = number(names.WINDOW, 24, 1 << 16)
        self._segment_counts = number(names.GSO_SEGMENTS, 40, 1 << 16)
        self._segment_sizes = number(names.GSO_SIZE, 40, 1 << 16)
        self._retransmits = Table(lambda marked: marked * fields([(names.RETRANSMIT, True)]).encode(), 24, 2)
        self._drops = Table(lambda reason: drop(reason) if reason else b"", 192, 1 << 16)

    def encode(self, packets: Packets) -> Items:
        """Encode packet records, one line each."""
        packets = packets.arranged()
        wanted = packets.unix_ns.astype(np.int64)
        times_ns = self._moments.free(wanted)
        if (times_ns != wanted).any():
            records = packets.records.view(RAW).copy().view(RECORD)
            records["time_ns"] = times_ns.astype(np.uint64) - np.uint64(packets.unix_offset_ns)
            packets = replace(packets, records=records)
        return super().encode(packets)

    def _rows(self, ends: Ends) -> tuple[bytes, ...]:
        found = dict(ends.attributes)
        del found[names.NETWORK_TRANSPORT]
        chosen = {*PACKET_TAGS, *self._asked, *dict(peer_tags(ends.peer_names))}
        of_tags = [(name, value) for name, value in found.items() if name in chosen]
        of_fields = [(name, value) for name, value in found.items() if name not in chosen]
        return tags(of_tags).encode(errors="replace"), fields(of_fields).encode(errors="replace")

    def _segments(self, packets: Packets) -> list[Segment] | None:
        numbers, records, store = self._connections.numbers(packets), packets.records, self._connections
        if numbers is None:
            return None
        marks, many = records["marks"], records["gso_segments"] > 1
        kinds = records["flags"].astype(np.int64) << 1 | (records["payload_bytes"] > 0)
        return [
            constant(f"{PACKET}{WORKLOAD}".encode()),
            (store.rows(0, numbers), store.lengths(0, numbers)),
            self._kinds.segment(kinds),
            self._flags.segment(records["flags"]),
            self._cpus.segment(records["cpu"]),
            self._payloads.segment(records["payload_bytes"]),
            *(constant(b",seq="), decimals(records["seq"])),
            *(constant(b"i,ack="), decimals(records["ack"]), constant(b"i")),
            self._windows.segment(records["window"]),
            present(self._segment_counts.segment(records["gso_segments"]), many),
            present(self._segment_sizes.segment(records["gso_size"]), many),
            self._retransmits.segment((marks & _RETRANSMIT != 0).astype(np.int64)),
            self._drops.segment(np.where(marks & _DROPPED != 0, records["drop_reason"], 0)),
            (store.rows(1, numbers), store.lengths(1, numbers)),
            constant(b" "),
            decimals(packets.unix_ns),
            constant(b"\n"),
        ]


class ConnectionLines:
    """Encodes connections as lines of `tcp_connection`, each at the time of its end.

    Args:
        moments: of the measurement.
        asked: attributes that are to be tags, beyond those that are.
    """

    def __init__(self, moments: Moments, asked: frozenset[str] = frozenset()) -> None:
        self._moments, self._asked = moments, asked

    def encode(self, connections: Sequence[Connection]) -> Items:
        """Encode connections in their order, one line each."""
        times_ns = self._moments.free(np.array([connection.end_ns for connection in connections], np.int64))
        return items(
            [self._line(connection, at_ns) for connection, at_ns in zip(connections, times_ns.tolist(), strict=True)]
        )

    def _line(self, connection: Connection, time_ns: int) -> bytes:
        found: dict[str, Value] = {**attributes(connection)}
        del found[names.NETWORK_TRANSPORT]
        if connection.role is not Role.UNKNOWN:
            found[names.ROLE] = connection.role.value
        chosen = {*CONNECTION_TAGS, *self._asked, *dict(peer_tags(connection.peer_names))}
        found |= taken(CONNECTION_FIELDS, connection)
        of_tags = [(name, value) for name, value in found.items() if name in chosen]
        of_fields = [(name, value) for name, value in found.items() if name not in chosen]
        return line(CONNECTION, WORKLOAD + tags(of_tags), fields(of_fields), time_ns)


class LineEnvelope:
    """Puts the workloads' tags into lines of packets and connections.

    Args:
        workload: what a number stands for.
    """

    def __init__(self, workload: Callable[[int], Workload]) -> None:
        self._workload = workload
        self._made: dict[int, tuple[Workload, bytes]] = {}

    def wrap(self, parts: list[Part]) -> bytes:
        """The lines of a request."""
        return b"".join(
            bytes(run).replace(WORKLOAD.encode(), self._tags(part.resource)) for part in parts for run in part.runs
        )

    def overhead_bytes(self, resource: int) -> int:
        """None that counts: standard output takes requests of any size."""
        del resource
        return 0

    def _tags(self, number: int) -> bytes:
        workload = self._workload(number)
        known = self._made.get(number)
        if known is None or known[0] is not workload:
            # A line says for itself which program it was.
            told = [(name, value) for name, value in workload_tags(workload) if name != names.EXECUTABLE_NAME]
            known = self._made[number] = workload, tags(told).encode(errors="replace")
        return known[1]


def series_lines(series: Iterable[tuple[Key, Series]], drop_reasons: Mapping[int, str], now_ns: int) -> list[bytes]:
    """Series of workloads that are told apart by `like`, as lines of `tcp_peer` and `tcp_drop`; totals so far."""
    found = []
    for of, told in series:
        whose = workload_tags(of.workload)
        if told.opened or told.closed or any(told.counts):
            all_tags = tags([*whose, *key_attributes(of).items()])
            found.append(line(PEER, all_tags, fields(taken(PEER_FIELDS, told).items()), now_ns))
        for reason, count in told.drops.items():
            all_tags = tags([*whose, (names.DROP_REASON, drop_reasons.get(reason, str(reason)))])
            found.append(line(DROP, all_tags, fields([("packets", count)]), now_ns))
    return found


KINDS = {Signal.LOGS: "packets", Signal.TRACES: "connections", Signal.METRICS: "totals"}
"""What the lines of a signal are about."""

EXPORT_FIELDS = ("lines_of_*_written", "lines_of_*_dropped")


def agent_lines(observation: Observation) -> list[bytes]:
    """What the agent reports of itself, as lines of `tcpio` and `tcpio_packets`; totals so far."""
    balance = observation.balance
    values: dict[str, Value] = {**taken(AGENT_FIELDS, observation), **observation.faults}
    for signal, counts in observation.exports.items():
        written, dropped = (name.replace("*", KINDS[signal]) for name in EXPORT_FIELDS)
        values |= {written: counts.accepted, dropped: sum((counts.failed or {}).values())}
    found = [line(AGENT, "", fields(values.items()), observation.now_ns)]
    for outcome, reasons in (("filtered", balance.filtered), ("dropped", balance.dropped)):
        for reason, count in reasons.items():
            all_tags = tags([("outcome", outcome), ("reason", reason)])
            found.append(line(AGENT_PACKETS, all_tags, fields([("packets", count)]), observation.now_ns))
    return found
