"""Initial sequence numbers to trace and span ids, the same at both ends of a connection, on whatever hosts they are."""

import hashlib
import struct
from dataclasses import dataclass

from tcpio_otel.batch import State

_MODULUS = 1 << 32

_FIN_SENT_STATES = (State.FIN_WAIT1, State.FIN_WAIT2, State.LAST_ACK, State.CLOSING)
FIN_RECEIVED_STATES = (State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING, State.TIME_WAIT)
"""States that a socket enters by receiving a FIN."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The ids of one connection: `trace_id` 16 bytes, the others 8; none of them is all zero."""

    trace_id: bytes
    client_span_id: bytes
    server_span_id: bytes

    @property
    def connection_id(self) -> str:
        """The first half of the trace id, in hex."""
        return self.trace_id[:8].hex()


def identity(seed: bytes) -> Identity:
    """Ids from any bytes. The lowest bit of each is set: W3C Trace Context forbids ids of zeros only."""
    digest = bytearray(hashlib.blake2b(seed, digest_size=32, person=b"tcpio_otel").digest())
    for last in (15, 23, 31):
        digest[last] |= 1
    return Identity(bytes(digest[:16]), bytes(digest[16:24]), bytes(digest[24:]))


def from_initial_sequence(client: int, server: int) -> Identity:
    """Ids from the two initial sequence numbers; the server's is 0 when it never sent one."""
    return identity(struct.pack(">II", client, server))


@dataclass(frozen=True, slots=True)
class SequenceNumbers:
    """What a socket's counters say of its start: who opened the connection, and both initial sequence numbers."""

    opened_by_us: bool
    local: int
    peer: int


def initial_sequence(
    *,
    state: int,
    snd_una: int,
    snd_nxt: int,
    write_seq: int,
    rcv_nxt: int,
    bytes_acked: int,
    bytes_received: int,
    bytes_sent: int,
    bytes_retransmitted: int,
) -> SequenceNumbers | None:
    """The initial sequence numbers of a connection in mid-life, from `struct tcp_sock`.

    `bytes_acked` counts a client's SYN but not a server's, which went out before the socket existed; whether it
    did is what is left of the acknowledged bytes once payload and FIN are taken off. None when the counters do
    not fit together: they were read while they changed.
    """
    fin_sent = state in _FIN_SENT_STATES and snd_nxt == write_seq
    unacknowledged = (snd_nxt - snd_una) % _MODULUS
    syn = bytes_acked + unacknowledged - (bytes_sent - bytes_retransmitted) - fin_sent
    if syn not in (0, 1):
        return None
    return SequenceNumbers(
        opened_by_us=syn == 1,
        local=(snd_una - bytes_acked - (1 - syn)) % _MODULUS,
        peer=(rcv_nxt - bytes_received - 1) % _MODULUS,
    )
