"""Connections to OTLP spans, and open ones to log records: the SDK's own data, the exporter's own encoders."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs  # it has no public name in this release
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord as LogRecordMessage
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as SpanLink
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from tcpio_otel import names
from tcpio_otel.connections.events import Connection, Role
from tcpio_otel.encoding.endpoints import address_text, network_type
from tcpio_otel.encoding.proto_json import as_dict, compact
from tcpio_otel.encoding.protobuf import field
from tcpio_otel.encoding.requests import Links, link_attributes
from tcpio_otel.payload import Items

SCOPE = InstrumentationScope(names.SCOPE, names.SCOPE_VERSION, names.SCHEMA_URL)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_KINDS = {Role.CLIENT: SpanKind.CLIENT, Role.SERVER: SpanKind.SERVER, Role.UNKNOWN: SpanKind.INTERNAL}


def attributes(connection: Connection) -> dict[str, str | int | float]:
    """The attributes of a connection's span (docs/attributes.md); what is not known is left out."""
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
        names.CONNECTION_END: connection.end.value if connection.end else None,
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
    return {name: value for name, value in found.items() if value is not None} | dict(connection.peer_names)


def _context(trace_id: bytes, span_id: bytes) -> SpanContext:
    return SpanContext(int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=_SAMPLED)


_NO_LINKS = Links()


def _links(connection: Connection, served: Links) -> Any:
    links: Any = BoundedList(None)
    links.extend(
        [
            SpanLink(
                SpanContext(
                    int.from_bytes(link.trace_id), int.from_bytes(link.span_id), is_remote=True, trace_flags=_SAMPLED
                ),
                link_attributes(link, connection.local_isn, connection.peer_isn),
            )
            for link in served.links
        ]
    )
    links.dropped = served.dropped
    return links


def span(connection: Connection, resource: Resource, served: Links = _NO_LINKS) -> ReadableSpan:
    """A connection as a span of the SDK, with ids and times of its own, linked to the contexts that it served."""
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
        links=_links(connection, served),
        kind=_KINDS[connection.role],
        status=Status(StatusCode.ERROR, connection.error_type) if failed else Status(StatusCode.UNSET),
        start_time=connection.start_ns,
        end_time=connection.end_ns,
        instrumentation_scope=SCOPE,
    )


class SpanEncoder:
    """Encodes connections by the exporter's own encoder, each as field 2 of `ScopeSpans`."""

    def __init__(self, resource: Resource) -> None:
        self._resource = resource

    def encode(self, connections: Sequence[Connection], served: Sequence[Links] | None = None) -> Items:
        """Encode connections in their order, one item each, with what each has served."""
        if not connections:
            return items([])
        request = encode_spans(list(map(span, connections, repeat(self._resource), served or repeat(_NO_LINKS))))
        messages = request.resource_spans[0].scope_spans[0].spans
        return items([field(2, message.SerializeToString(deterministic=True)) for message in messages])

    def encode_summaries(self, connections: Sequence[Connection], observed_ns: int) -> Items:
        """Encode open connections as log records, one item each, as field 2 of `ScopeLogs`."""
        messages = summary_messages(connections, observed_ns, self._resource)
        return items([field(2, message.SerializeToString(deterministic=True)) for message in messages])


class SpanJsonEncoder:
    """Encodes connections as OTLP/JSON spans, each with a comma behind it.

    From the SDK's spans and not through protobuf, which would cost three times as much; a test compares the two.
    """

    def __init__(self, resource: Resource) -> None:
        self._resource = resource

    def encode(self, connections: Sequence[Connection], served: Sequence[Links] | None = None) -> Items:
        """Encode connections in their order, one item each, with what each has served."""
        spans = map(span, connections, repeat(self._resource), served or repeat(_NO_LINKS))
        return items([compact(_as_json(found)) + b"," for found in spans])

    def encode_summaries(self, connections: Sequence[Connection], observed_ns: int) -> Items:
        """Encode open connections as OTLP/JSON log records, each with a comma behind it."""
        messages = summary_messages(connections, observed_ns, self._resource)
        return items([compact(as_dict(message)) + b"," for message in messages])


def summary(connection: Connection, observed_ns: int) -> LogRecord:
    """What an open connection has come to, as a log record in its span."""
    text = (
        f"open for {(connection.end_ns - connection.start_ns) / 1e9:.0f} s, "
        f"sent {connection.bytes_sent} bytes in {connection.packets_sent} packets, "
        f"received {connection.bytes_received} in {connection.packets_received}, "
        f"{connection.retransmits} retransmits"
    )
    return LogRecord(
        timestamp=connection.end_ns,
        observed_timestamp=observed_ns,
        context=set_span_in_context(NonRecordingSpan(_context(connection.trace_id, connection.span_id))),
        severity_text="INFO",
        severity_number=SeverityNumber.INFO,
        body=text,
        attributes=attributes(connection),
        event_name=names.CONNECTION_SUMMARY,
    )


def summary_messages(connections: Sequence[Connection], observed_ns: int, resource: Resource) -> list[LogRecordMessage]:
    """The summaries of open connections as OTLP messages; `observed_ns` is Unix time."""
    records = [ReadableLogRecord(summary(connection, observed_ns), resource, SCOPE) for connection in connections]
    return list(encode_logs(records).resource_logs[0].scope_logs[0].log_records)


def items(parts: list[bytes]) -> Items:
    """Encoded items in one buffer."""
    return Items(memoryview(b"".join(parts)), np.cumsum([len(part) for part in parts], dtype=np.int64))


def _as_json(sdk_span: ReadableSpan) -> dict[str, Any]:
    """A span of the SDK as opentelemetry.proto.trace.v1.Span in OTLP/JSON; defaults are left out, as protobuf does."""
    context, parent = sdk_span.get_span_context(), sdk_span.parent
    failed = sdk_span.status.status_code is StatusCode.ERROR
    members: dict[str, Any] = {
        "traceId": f"{context.trace_id:032x}" if context else "",
        "spanId": f"{context.span_id:016x}" if context else "",
        "parentSpanId": f"{parent.span_id:016x}" if parent else "",
        "name": sdk_span.name,
        "kind": sdk_span.kind.value + 1,  # the protocol counts from 1: 0 is UNSPECIFIED
        "startTimeUnixNano": str(sdk_span.start_time),
        "endTimeUnixNano": str(sdk_span.end_time),
        "attributes": _attributes_json(sdk_span.attributes or {}),
        "events": [_event_json(event) for event in sdk_span.events],
        "droppedEventsCount": sdk_span.dropped_events,
        "links": [_link_json(link) for link in sdk_span.links],
        "droppedLinksCount": sdk_span.dropped_links,
        "status": {"message": sdk_span.status.description, "code": StatusCode.ERROR.value} if failed else {},
        "flags": _FLAGS,
    }
    return {key: value for key, value in members.items() if value or key == "status"}


_FLAGS = 0x100  # SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: the parent, where there is one, is known to be local


_REMOTE = _FLAGS | 0x200  # SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


def _link_json(link: SpanLink) -> dict[str, Any]:
    return {
        "traceId": f"{link.context.trace_id:032x}",
        "spanId": f"{link.context.span_id:016x}",
        "attributes": _attributes_json(link.attributes or {}),
        "flags": _REMOTE,
    }


def _event_json(event: Event) -> dict[str, Any]:
    members = {"timeUnixNano": str(event.timestamp), "name": event.name}
    return {**members, "attributes": _attributes_json(event.attributes)} if event.attributes else members


def _attributes_json(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value_json(value)} for key, value in found.items()]


def _value_json(value: str | bool | float) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    return {"intValue": str(value)} if isinstance(value, int) else {"doubleValue": value}
