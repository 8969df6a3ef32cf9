"""Connections to OTLP spans, as the SDK's own data and by the exporter's own encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from tcpio_otel.connections.events import Connection, Role
from tcpio_otel.encoding import names
from tcpio_otel.encoding.endpoints import address_text, network_type
from tcpio_otel.encoding.protobuf import field
from tcpio_otel.payload import Items

SCOPE = InstrumentationScope(names.SCOPE, names.SCOPE_VERSION, names.SCHEMA_URL)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_KINDS = {Role.CLIENT: SpanKind.CLIENT, Role.SERVER: SpanKind.SERVER, Role.UNKNOWN: SpanKind.INTERNAL}


def attributes(connection: Connection) -> dict[str, str | int | float]:
    """The attributes of a connection's span (docs/record.md); what is not known is left out."""
    local, peer = address_text(connection.local.address), address_text(connection.peer.address)
    found: dict[str, str | int | float | None] = {
        names.NETWORK_TRANSPORT: "tcp",
        names.NETWORK_TYPE: network_type(connection.local.address),
        names.LOCAL_ADDRESS: local,
        names.LOCAL_PORT: connection.local.port,
        names.PEER_ADDRESS: peer,
        names.PEER_PORT: connection.peer.port,
        names.CONNECTION_ID: connection.connection_id,
        names.BYTES_SENT: connection.bytes_sent,
        names.BYTES_RECEIVED: connection.bytes_received,
        names.PACKETS_SENT: connection.packets_sent,
        names.PACKETS_RECEIVED: connection.packets_received,
        names.RETRANSMITS: connection.retransmits,
        names.TOTALS_SOURCE: "kernel" if connection.kernel_totals else "records",
        names.CONNECTION_START: connection.start.value,
        names.CONNECTION_END: connection.end.value,
        names.RTT_SMOOTHED: connection.rtt_smoothed_s,
        names.RTT_MIN: connection.rtt_min_s,
        names.HANDSHAKE_DURATION: connection.handshake_s,
        names.CLOSE_REASON: connection.close_reason.value if connection.close_reason else None,
        names.CLOSE_INITIATOR: connection.close_initiator,
        names.ERROR_TYPE: connection.error_type,
        names.PID: connection.pid or None,
        names.EXECUTABLE_NAME: connection.process_name or None,
    }
    if connection.role is not Role.UNKNOWN:
        ours = (local, connection.local.port)
        theirs = (peer, connection.peer.port)
        client, server = (ours, theirs) if connection.role is Role.CLIENT else (theirs, ours)
        found[names.CLIENT_ADDRESS], found[names.CLIENT_PORT] = client
        found[names.SERVER_ADDRESS], found[names.SERVER_PORT] = server
    return {name: value for name, value in found.items() if value is not None}


def _context(trace_id: bytes, span_id: bytes) -> SpanContext:
    return SpanContext(int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=_SAMPLED)


def span(connection: Connection, resource: Resource) -> ReadableSpan:
    """A connection as a span of the SDK, with ids and times of its own."""
    events: Any = BoundedList(None)
    events.extend([Event(note.name, dict(note.attributes), note.time_ns) for note in connection.milestones])
    events.dropped = connection.milestones_dropped
    failed = connection.error_type is not None
    return ReadableSpan(
        name=names.CONNECTION_SPAN,
        context=_context(connection.trace_id, connection.span_id),
        parent=_context(connection.trace_id, connection.parent_span_id) if connection.parent_span_id else None,
        resource=resource,
        attributes=attributes(connection),
        events=events,
        kind=_KINDS[connection.role],
        status=Status(StatusCode.ERROR, connection.error_type) if failed else Status(StatusCode.UNSET),
        start_time=connection.start_ns,
        end_time=connection.end_ns,
        instrumentation_scope=SCOPE,
    )


class SpanEncoder:
    """Encodes connections, each as one item.

    Args:
        resource: what the spans are about.
        item: from a protobuf `Span` to the item's bytes; by default field 2 of `ScopeSpans`.
    """

    def __init__(self, resource: Resource, item: Callable[[Any], bytes] | None = None) -> None:
        self._resource = resource
        self._item = item or (lambda message: field(2, message.SerializeToString(deterministic=True)))

    def encode(self, connections: Sequence[Connection]) -> Items:
        """Encode connections in their order."""
        if not connections:
            return Items(memoryview(b""), np.empty(0, np.int64))
        request = encode_spans([span(connection, self._resource) for connection in connections])
        items = [self._item(message) for message in request.resource_spans[0].scope_spans[0].spans]
        return Items(memoryview(b"".join(items)), np.cumsum([len(item) for item in items], dtype=np.int64))
