"""What correlation reports: contexts that a connection served, and what became of each, frozen."""

from dataclasses import dataclass

from tcpio_otel.batch import Origin


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of one direction of a connection, by sequence number; `end` is one past the last that was seen."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Link:
    """A trace context that a connection served: `trace_id` 16 bytes, `span_id` 8. Times are Unix nanoseconds.

    `sent` and `received` are its bytes, None where they are not known: it shared the connection with others, or the
    connection's start was not seen.
    """

    trace_id: bytes
    span_id: bytes
    origin: Origin
    shared: bool
    start_ns: int
    end_ns: int
    sent: Range | None
    received: Range | None


@dataclass(frozen=True, slots=True)
class Request:
    """What was seen of the packets of one context on one connection.

    `slot` is the connection's. Times are Unix nanoseconds, None where there was no such packet; `gap_s` is seconds.
    Bytes are payload, each byte once; packets and retransmits are segments.
    """

    link: Link
    slot: int
    first_sent_ns: int | None
    first_received_ns: int | None
    last_acked_ns: int | None
    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    retransmits: int
    longest_gap_s: float
