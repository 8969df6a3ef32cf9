"""The one noun that every stage shares: a batch of records, as a NumPy structured array in time order.

`RECORD` is `struct tcpio_record` of bpf/record.h; a test compares the two through the object's BTF. `FLOW` is what
the connection table knows of each slot and the encoders need.
"""

from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """`enum tcpio_kind`."""

    PACKET = 1
    SOCKET = 2
    RESET = 3
    CONTEXT = 4
    CGROUP = 5
    LOOK = 6


class Origin(IntEnum):
    """`enum tcpio_origin`: where a trace context is known from."""

    TAG = 1
    TRACEPARENT = 2
    B3 = 3
    PUBLISHED = 4


class ContextMark(IntFlag):
    """`enum tcpio_context_mark`."""

    SHARED = 1
    EARLY = 2


class Direction(IntEnum):
    """`enum tcpio_direction`."""

    RECEIVE = 0
    TRANSMIT = 1


class Mark(IntFlag):
    """`enum tcpio_mark`."""

    RETRANSMIT = 1
    DROPPED = 2
    TRANSLATED = 4
    LISTENER = 8
    NO_SOCKET = 16


class Flag(IntFlag):
    """TCP header byte 13, RFC 9293 section 3.1; the names are those `tcpio.d` prints."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    PUSH = 0x08
    ACK = 0x10
    URG = 0x20
    ECE = 0x40
    CWR = 0x80


class State(IntEnum):
    """The kernel's TCP states (include/net/tcp_states.h), part of its ABI."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


FLAG_NAMES: tuple[str, ...] = tuple(
    "|".join(flag.name or "" for flag in Flag if bits & flag) or "null" for bits in range(256)
)
"""The text of every flags byte, as `tcpio.d` prints it: `FIN|ACK`; `null` for none."""


def _layout(*fields: tuple[str, str, int], itemsize: int) -> np.dtype[Any]:
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": itemsize})


RECORD = _layout(
    ("time_ns", "<u8", 0),
    ("socket_cookie", "<u8", 8),
    ("local_address", "V16", 16),
    ("peer_address", "V16", 32),
    ("local_port", "<u2", 48),
    ("peer_port", "<u2", 50),
    ("netns", "<u4", 52),
    ("pid", "<u4", 56),
    ("cpu", "<u2", 60),
    ("kind", "u1", 62),
    ("state", "u1", 63),
    ("process_name", "S16", 64),
    # kind PACKET
    ("seq", "<u4", 80),
    ("ack", "<u4", 84),
    ("payload_bytes", "<u4", 88),
    ("window", "<u2", 92),
    ("gso_segments", "<u2", 94),
    ("flags", "u1", 96),
    ("direction", "u1", 97),
    ("marks", "<u2", 98),
    ("drop_reason", "<u2", 100),
    ("gso_size", "<u2", 102),
    ("header_local_port", "<u2", 104),
    ("header_peer_port", "<u2", 106),
    ("contexts", "<u2", 108),
    ("header_local_address", "V16", 112),
    ("header_peer_address", "V16", 128),
    # kinds PACKET and SOCKET
    ("cgroup", "<u4", 152),
    ("cgroup_v1", "<u4", 156),
    # kinds SOCKET and RESET
    ("bytes_acked", "<u8", 80),
    ("bytes_received", "<u8", 88),
    ("bytes_sent", "<u8", 96),
    ("bytes_retransmitted", "<u8", 104),
    ("snd_una", "<u4", 112),
    ("snd_nxt", "<u4", 116),
    ("write_seq", "<u4", 120),
    ("rcv_nxt", "<u4", 124),
    ("segments_in", "<u4", 128),
    ("segments_out", "<u4", 132),
    ("retransmits", "<u4", 136),
    ("rtt_smoothed_us", "<u4", 140),
    ("rtt_min_us", "<u4", 144),
    ("old_state", "u1", 148),
    ("new_state", "u1", 149),
    ("error", "u1", 150),
    ("reason", "u1", 151),
    ("fin_received", "u1", 151),
    # kind CONTEXT
    ("trace_id", "V16", 80),
    ("span_id", "V8", 96),
    ("sent_seq", "<u4", 104),
    ("received_seq", "<u4", 108),
    ("serial", "<u2", 112),
    ("origin", "u1", 114),
    ("context_marks", "u1", 115),
    # kind CGROUP
    ("cgroup_name", "S80", 80),
    itemsize=160,
)


RAW = np.dtype(f"V{RECORD.itemsize}")
"""A record without its fields: NumPy joins and picks such arrays as bytes, where it would repack structured ones."""

KEY_OFFSET, KEY_BYTES = 16, 40
"""Where the connection's key lies in a record: the socket's tuple and network namespace."""

IPV4_PREFIX = bytes(10) + b"\xff\xff"
"""An address that starts so is IPv4 (RFC 4291 section 2.5.5.2)."""

FLOW = np.dtype(
    [
        ("version", "<u8"),
        ("born", "<u8"),
        ("trace_id", "V16"),
        ("span_id", "V8"),
        ("identified", "?"),
        ("server", "?"),
        ("pid", "<u4"),
        ("cgroup", "<u4"),
        ("cgroup_v1", "<u4"),
        ("workload", "<i4"),
        ("peer", "<i4"),
        ("process_name", "S16"),
    ],
    align=True,
)
"""What the connection table publishes of a slot.

`version` is unique over slots and rises with every change of the rest, so that a consumer knows when its own copy is
stale; `born` is unique over connections, and 0 where there is none; the ids are zero until `identified`; `server` says
whether this end was connected to. The process and its cgroups are those that a record named last; `workload` is the
number of what they belong to, which attribution adds; 0: the agent's own host, and no more is known. `peer` is the
number of what is known of the other end, likewise; 0: nothing.
"""


@dataclass(frozen=True)
class Batch:
    """Records in time order, and the clock to read them by.

    `records` has dtype RECORD and shape (n,); `unix_offset_ns` added to `time_ns` gives Unix time (0 for a replayed
    capture, whose records carry Unix time themselves); `observed_ns` is the Unix time of the drain, and `now_ns` its
    time on the records' clock: whatever is older has come by now, however late this batch is looked at.
    """

    records: NDArray[np.void]
    unix_offset_ns: int
    observed_ns: int
    now_ns: int

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def is_packet(self) -> NDArray[np.bool_]:
        """Which records are of kind PACKET."""
        mask: NDArray[np.bool_] = self.records["kind"] == Kind.PACKET
        return mask

    @cached_property
    def packets(self) -> NDArray[np.void]:
        """The records of kind PACKET, in order."""
        return self.records if self.is_packet.all() else pick(self.records, self.is_packet)


class Endpoint(NamedTuple):
    """An address (16 bytes, network order, IPv4 as ::ffff:a.b.c.d) and a port."""

    address: bytes
    port: int


Names = tuple[tuple[str, str | int], ...]
"""Attributes, by name."""


class Birth(NamedTuple):
    """A slot that a new connection has taken: its namespace, its ends, and whether it was connected to."""

    slot: int
    netns: int
    local: Endpoint
    peer: Endpoint
    accepted: bool


NO_CONTEXT, INTERLEAVED, FIRST_CONTEXT = 0, 1, 2
"""Numbers of contexts: a packet's is not known; it is one of several on its connection; the first that is one."""


@dataclass(frozen=True)
class Contexts:
    """The trace contexts of packets, as their applications have them.

    `numbers` (int64, shape (n,)) says which row of `ids` (24 bytes and more: trace id, then span id) each packet
    served, or that none is known. `spans` (int32, shape (n,)) is 0, or, for a packet that reaches over several
    contexts, 1 + the place of all their ids in `sets`.
    """

    numbers: NDArray[np.int64]
    spans: NDArray[np.int32]
    sets: tuple[tuple[tuple[bytes, bytes], ...], ...]
    ids: NDArray[np.void]

    def part(self, rows: slice) -> "Contexts":
        """Those of some packets, side by side."""
        return replace(self, numbers=self.numbers[rows], spans=self.spans[rows])

    def kept(self) -> "Contexts":
        """The same by themselves: rows of `ids` are others' sooner or later."""
        distinct, inverse = np.unique(
            np.concatenate([np.arange(FIRST_CONTEXT), self.numbers]), return_inverse=True
        )  # so that the first ones stay what they are
        return replace(self, numbers=inverse[FIRST_CONTEXT:].astype(np.int64), ids=self.ids[distinct])

    def where(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> "Contexts":
        """Those of some packets."""
        return replace(self, numbers=self.numbers[mask], spans=self.spans[mask])


@dataclass(frozen=True)
class Packets:
    """Packet records, and all it takes to encode them.

    `records` has dtype RECORD and shape (n,), contiguous, all of kind PACKET; `slots` (int64, shape (n,)) says which
    row of `flows` (dtype FLOW) each belongs to. `unix_offset_ns` and `observed_ns` are those of their batch. `contexts`
    is None where no application's traces are known. `order` (int64, shape (n,)) says in which order they are wanted;
    None: as they stand.
    """

    records: NDArray[np.void]
    slots: NDArray[np.int64]
    flows: NDArray[np.void]
    unix_offset_ns: int
    observed_ns: int
    contexts: Contexts | None = None
    order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def part(self, rows: slice) -> "Packets":
        """Some of them, side by side."""
        contexts = self.contexts.part(rows) if self.contexts else None
        return replace(self, records=self.records[rows], slots=self.slots[rows], contexts=contexts)

    def arranged(self) -> "Packets":
        """The same as they are wanted: copied, so that they stand in that order."""
        if self.order is None:
            return self
        contexts = self.contexts.where(self.order) if self.contexts else None
        records, slots = pick(self.records, self.order), self.slots[self.order]
        return replace(self, records=records, slots=slots, contexts=contexts, order=None)

    @property
    def unix_ns(self) -> NDArray[np.uint64]:
        """The time of each (uint64, shape (n,))."""
        times: NDArray[np.uint64] = self.records["time_ns"] + np.uint64(self.unix_offset_ns)
        return times


def pick(records: NDArray[np.void], rows: NDArray[np.bool_] | NDArray[np.intp]) -> NDArray[np.void]:
    """Some of the records (dtype RECORD), copied whole."""
    return records.view(RAW)[rows].view(RECORD)
