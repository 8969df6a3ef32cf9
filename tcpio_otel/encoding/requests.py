"""What correlation tells, as OTLP: links of a connection's span, and the log record of each request."""

from typing import NamedTuple

from tcpio_otel import names
from tcpio_otel.batch import Origin
from tcpio_otel.connections.events import Ends
from tcpio_otel.correlation.events import Link, Range, Request
from tcpio_otel.encoding.endpoints import address_text, network_type
from tcpio_otel.encoding.packet_json import otlp_attribute
from tcpio_otel.encoding.protobuf import double_attribute, field, fixed64, int_attribute, string_attribute, varint

Attributes = dict[str, str | int | float | bool]

_SOURCES = {
    Origin.TAG: "tag",
    Origin.TRACEPARENT: "traceparent",
    Origin.B3: "b3",
    Origin.PUBLISHED: "published",
}
_MODULUS = 1 << 32


class Links(NamedTuple):
    """The contexts that a connection's span links to, and how many more there were."""

    links: tuple[Link, ...] = ()
    dropped: int = 0


def _offsets(found: Range | None, isn: int | None, start: str, end: str) -> Attributes:
    """A range as offsets in the stream; the first byte follows the SYN."""
    if found is None or isn is None:
        return {}
    first = (found.start - isn - 1) % _MODULUS
    return {start: first, end: first + (found.end - found.start) % _MODULUS}


def link_attributes(link: Link, local_isn: int | None, peer_isn: int | None) -> Attributes:
    """The attributes of a link (docs/attributes.md); what is not known is left out."""
    found: Attributes = {names.CONTEXT_SOURCE: _SOURCES[link.origin]}
    if link.shared:
        found[names.CONTEXT_SHARED] = True
    found |= {names.CONTEXT_START: link.start_ns, names.CONTEXT_END: link.end_ns}
    found |= _offsets(link.sent, local_isn, names.SENT_START, names.SENT_END)
    found |= _offsets(link.received, peer_isn, names.RECEIVED_START, names.RECEIVED_END)
    return found


def request_attributes(request: Request, ends: Ends | None) -> Attributes:
    """The attributes of a request's log record (docs/attributes.md)."""
    found: dict[str, str | int | float | bool | None] = {names.NETWORK_TRANSPORT: "tcp"}
    if ends:
        found |= {
            names.NETWORK_TYPE: network_type(ends.local.address),
            names.LOCAL_ADDRESS: address_text(ends.local.address),
            names.LOCAL_PORT: ends.local.port,
            names.PEER_ADDRESS: address_text(ends.peer.address),
            names.PEER_PORT: ends.peer.port,
            names.CONNECTION_ID: ends.connection_id,
            names.PID: ends.pid or None,
            names.EXECUTABLE_NAME: ends.process_name or None,
            **dict(ends.peer_names),
        }
    begun = [time for time in (request.first_sent_ns, request.first_received_ns) if time is not None]
    start_ns = min(begun, default=request.link.start_ns)
    found |= {
        names.CONTEXT_SOURCE: _SOURCES[request.link.origin],
        names.BYTES_SENT: request.bytes_sent,
        names.BYTES_RECEIVED: request.bytes_received,
        names.PACKETS_SENT: request.packets_sent,
        names.PACKETS_RECEIVED: request.packets_received,
        names.RETRANSMITS: request.retransmits,
        names.REQUEST_DURATION: max(0, request.link.end_ns - start_ns) / 1e9,
        names.FIRST_BYTE: (max(begun) - start_ns) / 1e9 if len(begun) > 1 else None,
        names.LAST_ACK: (
            max(0, request.last_acked_ns - request.first_sent_ns) / 1e9
            if request.last_acked_ns is not None and request.first_sent_ns is not None
            else None
        ),
        names.LONGEST_GAP: request.longest_gap_s,
    }
    if ends:
        found |= _offsets(request.link.sent, ends.local_isn, names.SENT_START, names.SENT_END)
        found |= _offsets(request.link.received, ends.peer_isn, names.RECEIVED_START, names.RECEIVED_END)
    return {name: value for name, value in found.items() if value is not None}


def _body(request: Request) -> str:
    return (
        f"sent {request.bytes_sent} bytes in {request.packets_sent} packets, received {request.bytes_received} "
        f"in {request.packets_received}, {request.retransmits} retransmits"
    )


def _time_ns(request: Request) -> int:
    return min((time for time in (request.first_sent_ns, request.first_received_ns) if time), default=0) or (
        request.link.start_ns
    )


def _severity(request: Request) -> tuple[int, str]:
    return names.SEVERITIES[bool(request.retransmits)]


def _attribute(key: str, value: str | float | bool) -> bytes:
    if isinstance(value, float):
        return double_attribute(key, value)
    return int_attribute(key, value) if isinstance(value, int) else string_attribute(key, value)


def request_log(request: Request, ends: Ends | None, observed_ns: int) -> bytes:
    """A request as `LogRecord` in protobuf, as field 2 of `ScopeLogs`; `observed_ns` is Unix time."""
    number, text = _severity(request)
    parts = [
        b"\x09" + fixed64(_time_ns(request)),
        b"\x10" + varint(number),
        field(3, text.encode()),
        field(5, field(1, _body(request).encode())),
        *(_attribute(key, value) for key, value in request_attributes(request, ends).items()),
        field(9, request.link.trace_id),
        field(10, request.link.span_id),
        b"\x59" + fixed64(observed_ns),
        field(12, names.REQUEST_EVENT.encode()),
    ]
    return field(2, b"".join(parts))


def request_log_json(request: Request, ends: Ends | None, observed_ns: int) -> bytes:
    """The same in OTLP/JSON, with a comma behind it."""
    number, text = _severity(request)
    attributes = ",".join(otlp_attribute(key, value) for key, value in request_attributes(request, ends).items())
    return (
        f'{{"timeUnixNano":"{_time_ns(request)}","observedTimeUnixNano":"{observed_ns}","severityNumber":{number},'
        f'"severityText":"{text}","body":{{"stringValue":"{_body(request)}"}},"attributes":[{attributes}],'
        f'"eventName":"{names.REQUEST_EVENT}","traceId":"{request.link.trace_id.hex()}",'
        f'"spanId":"{request.link.span_id.hex()}"}},'
    ).encode()
