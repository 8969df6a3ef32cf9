"""What the connection table reports: connections that ended, frozen, with all that a span needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from tcpio_otel.batch import Endpoint, Names


class Role(StrEnum):
    """Which end of the connection this is: the one that sent the first SYN, the other, or not known."""

    CLIENT = "client"
    SERVER = "server"
    UNKNOWN = "unknown"


class Start(StrEnum):
    """How the table came to know the connection: it saw the handshake, or the connection was older."""

    OBSERVED = "observed"
    INHERITED = "inherited"


class End(StrEnum):
    """Why the table stopped following the connection."""

    OBSERVED = "observed"
    AGENT_SHUTDOWN = "agent_shutdown"
    EVICTED = "evicted"


class Phase(StrEnum):
    """The states of RFC 9293, as an observer can tell them."""

    CLOSED = "closed"
    SYN_SENT = "syn_sent"
    SYN_RECEIVED = "syn_received"
    ESTABLISHED = "established"
    FIN_WAIT_1 = "fin_wait_1"
    FIN_WAIT_2 = "fin_wait_2"
    CLOSE_WAIT = "close_wait"
    CLOSING = "closing"
    LAST_ACK = "last_ack"
    FINISHED = "finished"  # both FINs acknowledged; TIME_WAIT at one end
    RESET = "reset"


class CloseReason(StrEnum):
    """How a connection came to its end on the wire."""

    FIN = "fin"
    RESET = "reset"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    ABORTED = "aborted"  # ended by this end without a segment that says so


class Counts(NamedTuple):
    """What went over a connection: payload without retransmits, in bytes, and segments."""

    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    retransmits: int


NONE = Counts(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Milestone:
    """Something that happened to a connection: becomes a span event. `time_ns` is Unix time."""

    name: str
    time_ns: int
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a TCP connection: at the end of its life or of the agent's, or, where `end` is None, in between.

    Times are Unix nanoseconds; durations and round-trip times are seconds, None where nothing measured them.
    `trace_id`, `span_id` and `parent_span_id` are 16, 8 and 8 bytes (parent empty: a root span). Bytes are payload
    that the socket sent and had acknowledged or received in order, without retransmits; `kernel_totals` says
    whether all totals come from the kernel's `tcp_sock`, or some from adding up records. `slot` is the table's, and
    good until its next `update`; the initial sequence numbers are None where they are not known. `peer_names` are
    attributes that say who the peer is, which attribution adds. `before` is what of the totals is older than the agent.
    """

    local: Endpoint
    peer: Endpoint
    netns: int
    role: Role
    start: Start
    end: End | None
    start_ns: int
    end_ns: int
    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    connection_id: str
    close_reason: CloseReason | None
    close_initiator: str | None  # "local" or "peer"
    error_type: str | None
    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    retransmits: int
    kernel_totals: bool
    rtt_smoothed_s: float | None
    rtt_min_s: float | None
    handshake_s: float | None
    pid: int
    process_name: str
    milestones: tuple[Milestone, ...]
    milestones_dropped: int
    slot: int = -1
    local_isn: int | None = None
    peer_isn: int | None = None
    peer_names: Names = ()
    before: Counts = NONE

    @property
    def counts(self) -> Counts:
        """What went over it since it is followed."""
        now = (self.bytes_sent, self.bytes_received, self.packets_sent, self.packets_received, self.retransmits)
        return Counts(*(total - before for total, before in zip(now, self.before, strict=True)))


@dataclass(frozen=True, slots=True)
class Standing:
    """How an open connection stands: its ends, who opened it, and since when it is followed, on the records' clock."""

    local: Endpoint
    peer: Endpoint
    role: Role
    phase: Phase
    start: Start
    started_ns: int
    pid: int
    process_name: str


@dataclass(frozen=True, slots=True)
class Ends:
    """Which connection something is about; the rest is as in `Connection`."""

    local: Endpoint
    peer: Endpoint
    connection_id: str | None
    local_isn: int | None
    peer_isn: int | None
    pid: int
    process_name: str
    peer_names: Names = ()
