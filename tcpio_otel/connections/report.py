"""What a connection's entry comes to: the event from which its span is made, or its summary."""

from collections.abc import Iterable
from typing import Any

from tcpio_otel import names
from tcpio_otel.connections.entry import Entry, Totals
from tcpio_otel.connections.events import CloseReason, Connection, Counts, End, Milestone
from tcpio_otel.connections.identity import Identity
from tcpio_otel.connections.lifecycle import HANDSHAKE, Life


def connection(
    entry: Entry, life: Life, ids: Identity, slot: int, flow: Any, moved: Counts, end: End | None, end_ns: int
) -> Connection:
    """The event of a connection: `flow` is its row (dtype FLOW), `moved` what its records add up to by now.

    `end` is None while it is open; `end_ns` is on the records' clock.
    """
    reason, initiator, error_type = life.verdict(entry.errno_name)
    if reason is None and end is End.OBSERVED:
        if life.phase in HANDSHAKE and not entry.closed:
            reason, error_type = CloseReason.TIMEOUT, "timeout"
        else:
            reason, initiator = CloseReason.ABORTED, "local"
    span_id = flow["span_id"].tobytes()
    totals = _totals(entry, moved)
    return Connection(
        local=entry.local,
        peer=entry.peer,
        netns=entry.netns,
        role=life.role,
        start=entry.start,
        end=end,
        start_ns=life.started_ns + entry.offset_ns,
        end_ns=max(end_ns, life.started_ns) + entry.offset_ns,
        trace_id=ids.trace_id,
        span_id=span_id,
        parent_span_id=ids.client_span_id if span_id == ids.server_span_id else b"",
        connection_id=ids.connection_id,
        close_reason=reason,
        close_initiator=initiator,
        error_type=error_type,
        bytes_sent=totals.bytes_sent,
        bytes_received=totals.bytes_received,
        packets_sent=totals.packets_sent,
        packets_received=totals.packets_received,
        retransmits=totals.retransmits,
        kernel_totals=entry.totals is not None and (entry.closed or end is End.AGENT_SHUTDOWN),
        rtt_smoothed_s=totals.rtt_smoothed_s,
        rtt_min_s=totals.rtt_min_s,
        handshake_s=None if life.established_ns is None else (life.established_ns - life.started_ns) / 1e9,
        pid=int(flow["pid"]),
        process_name=text(flow["process_name"]),
        milestones=tuple(_milestones(entry, life)),
        milestones_dropped=life.notes_dropped,
        slot=slot,
        local_isn=life.local_isn,
        peer_isn=life.peer_isn,
        before=entry.before,
    )


def _totals(entry: Entry, now: Counts) -> Totals:
    """The kernel's totals and what records have added since; for want of them, all that records say."""
    then = entry.moved_before
    known = entry.totals or Totals(0, 0, 0, 0, 0, None, None)
    # What comes to a closed socket is refused, and what it had to send is sent or never will be.
    payload_counts = not entry.closed or entry.totals is None
    return known._replace(
        bytes_sent=known.bytes_sent + payload_counts * max(0, now.bytes_sent - then.bytes_sent),
        bytes_received=known.bytes_received + payload_counts * max(0, now.bytes_received - then.bytes_received),
        packets_sent=known.packets_sent + now.packets_sent - then.packets_sent,
        packets_received=known.packets_received + now.packets_received - then.packets_received,
        retransmits=known.retransmits + payload_counts * (now.retransmits - then.retransmits),
    )


def _milestones(entry: Entry, life: Life) -> Iterable[Milestone]:
    for name, segment in life.notes:
        attributes: dict[str, str | int | bool] = {
            names.IO_DIRECTION: "transmit" if segment.sent else "receive",
            names.SEQ: segment.seq,
        }
        if segment.payload_bytes:
            attributes[names.PAYLOAD_SIZE] = segment.payload_bytes
        if name == names.RST and segment.sent and entry.reset_reason:
            attributes[names.RESET_REASON] = entry.reset_reason
        yield Milestone(name, segment.time_ns + entry.offset_ns, attributes)


def text(name: Any) -> str:
    """The name of a process, as records have it."""
    return bytes(name).decode("utf-8", "replace")
