"""What the connection table keeps of each slot besides its columns, and the fields of records that it reads."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import Endpoint
from tcpio_otel.connections.events import NONE, Start
from tcpio_otel.connections.identity import Identity
from tcpio_otel.connections.lifecycle import Life

Records = NDArray[np.void]


class Totals(NamedTuple):
    """What the kernel says of a socket, in the units of `Connection`."""

    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    retransmits: int
    rtt_smoothed_s: float | None
    rtt_min_s: float | None


class Row(NamedTuple):
    """The fields of a packet record that the slow path reads, in this order."""

    time_ns: int
    seq: int
    ack: int
    payload_bytes: int
    window: int
    gso_segments: int
    flags: int
    direction: int
    marks: int
    state: int


ROW_FIELDS = list(Row._fields)


class Fact(NamedTuple):
    """The fields of a record of kind SOCKET or RESET, by their names."""

    time_ns: int
    kind: int
    bytes_acked: int
    bytes_received: int
    bytes_sent: int
    bytes_retransmitted: int
    snd_una: int
    snd_nxt: int
    write_seq: int
    rcv_nxt: int
    segments_in: int
    segments_out: int
    retransmits: int
    rtt_smoothed_us: int
    rtt_min_us: int
    old_state: int
    new_state: int
    error: int
    reason: int
    fin_received: int


def facts(records: Records) -> list[Fact]:
    """Records of kind SOCKET or RESET, field by field."""
    return [Fact(*fields) for fields in zip(*(records[name].tolist() for name in Fact._fields), strict=True)]


class Owner(NamedTuple):
    """Whose a socket is, as a record says it; all zero where nobody knows."""

    pid: int
    cgroup: int
    cgroup_v1: int
    process_name: bytes


def owners(records: Records) -> list[Owner]:
    """Whose each record's socket is."""
    return [Owner(*fields) for fields in zip(*(records[name].tolist() for name in Owner._fields), strict=True)]


class Entry:
    """What a slot holds besides its columns. `life` is None for segments that belong to no connection."""

    __slots__ = (
        "attentive", "before", "closed", "embryo", "errno_name", "identity", "life", "local", "moved_before", "netns",
        "offset_ns", "older", "peer", "reported", "reset_reason", "start", "totals",
    )  # fmt: skip

    def __init__(self, local: Endpoint, peer: Endpoint, netns: int, life: Life | None, offset_ns: int) -> None:
        self.local, self.peer, self.netns, self.life, self.offset_ns = local, peer, netns, life, offset_ns
        self.start = Start.OBSERVED
        self.identity: Identity | None = None
        self.totals: Totals | None = None
        self.moved_before = NONE  # by the time the totals were taken
        self.older = False  # than the agent, or that may be
        self.before = NONE  # what had been before anybody looked
        self.closed = False  # the kernel said so
        self.embryo: tuple[int, int] | None = None  # its place among the handshakes of listeners
        self.errno_name: str | None = None
        self.reset_reason: str | None = None
        self.reported = life is None
        self.attentive = life is not None
