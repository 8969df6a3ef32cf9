"""The file that the Collector wrote to one trace: spans of the applications, and the packets of each request in it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tcpio_otel import names
from tests.demo.stage import SHOP_ADDRESS, STOCK_ADDRESS, Lost, Run
from tests.kernel.harness import plain

SERVER, CLIENT = 2, 3  # opentelemetry.proto.trace.v1.Span.SpanKind
ENDS = {SHOP_ADDRESS: "shop", STOCK_ADDRESS: "stock"}
ASKED = ("GET /items", "POST /reservations/coffee", "GET /items/coffee")
HIT = ASKED[1]
"""The request whose answer the wire loses."""


class NoTraceError(Exception):
    """Nothing that was received is the trace of the order."""


@dataclass(frozen=True)
class Span:
    """A span, of an application or of the agent."""

    service: str
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: list[tuple[str, str, dict[str, Any]]]
    """Trace id, span id, attributes."""

    @property
    def duration_ms(self) -> float:
        """From start to end."""
        return (self.end_ns - self.start_ns) / 1e6

    @property
    def asked(self) -> str:
        """Method and path, where it is a request."""
        url = self.attributes.get("url.full") or self.attributes.get("url.path") or ""
        return f"{self.attributes.get('http.request.method')} {urlsplit(url).path}"


@dataclass(frozen=True)
class Record:
    """A log record of the agent: a packet, or the figures of a request; `at` is the end where it was made."""

    event: str
    trace_id: str
    span_id: str
    time_ns: int
    at: str
    attributes: dict[str, Any]

    @property
    def sent(self) -> bool:
        """Whether it left this end."""
        return bool(self.attributes[names.IO_DIRECTION] == "transmit")

    @property
    def payload_bytes(self) -> int:
        """Of the segment, or of all segments of a super-packet."""
        return int(self.attributes[names.PAYLOAD_SIZE])

    @property
    def segments(self) -> int:
        """Over 1 for a super-packet."""
        return int(self.attributes.get(names.GSO_SEGMENTS, 1))

    @property
    def retransmit(self) -> bool:
        """Whether it carries what was sent before."""
        return names.RETRANSMIT in self.attributes

    def carries(self, other: "Record") -> bool:
        """Whether the first byte of another packet's payload is in this one's."""
        first = (other.attributes[names.SEQ] - self.attributes[names.SEQ]) % (1 << 32)
        return bool(first < self.payload_bytes)


@dataclass(frozen=True)
class Retransmit:
    """A packet that was sent again, and what became of the first copy."""

    first: Record | None
    again: Record
    arrived: bool
    """Whether what it carries had reached the other end already."""


@dataclass
class Request:
    """What the shop asks the stock: its span, the stock's, and what the agent tells of it at both ends."""

    client: Span
    server: Span | None
    figures: list[Record] = field(default_factory=list)
    packets: list[Record] = field(default_factory=list)
    """In time order."""
    unserved: list[Record] = field(default_factory=list)
    """Packets of its connection that no request claims."""

    @property
    def title(self) -> str:
        """Method and path."""
        return self.client.asked

    def count(self, at: str, *, sent: bool) -> int:
        """How many packets one end sent or received."""
        return sum(packet.at == at and packet.sent == sent for packet in self.packets)

    def figures_at(self, at: str) -> dict[str, Any]:
        """Those of one end; empty where there are none."""
        return next((record.attributes for record in self.figures if record.at == at), {})

    @cached_property
    def retransmits(self) -> list[Retransmit]:
        """In time order."""
        return [self._retransmit(packet) for packet in self.packets if packet.retransmit]

    def _retransmit(self, again: Record) -> Retransmit:
        before = [packet for packet in self.packets if packet.time_ns < again.time_ns and packet.carries(again)]
        first = next((packet for packet in before if packet.at == again.at and packet.sent), None)
        arrived = any(
            packet.at != again.at and not packet.sent and packet.carries(again)
            for packet in (*before, *self.unserved)
            if packet.time_ns < again.time_ns
        )
        return Retransmit(first, again, arrived)


@dataclass
class Trace:
    """One trace of the applications, and what links to it."""

    run: Run
    root: Span
    spans: list[Span]
    requests: list[Request]
    connections: list[Span]
    """Spans of the agent, client's end first."""
    unserved: list[Record]
    """Packets of those connections that no request claims."""

    def offset_ms(self, time_ns: int) -> float:
        """Since the root span began."""
        return (time_ns - self.root.start_ns) / 1e6

    def children(self, span: Span) -> list[Span]:
        """Those of a span that the reader wants to see, in time order: of kind CLIENT and SERVER."""
        found = [child for child in self.spans if child.parent_id == span.span_id and child.kind in (SERVER, CLIENT)]
        return sorted(found, key=lambda child: child.start_ns)

    def request(self, title: str) -> Request | None:
        """The one with that method and path."""
        return next((request for request in self.requests if request.title == title), None)

    def packets(self) -> int:
        """How many there are in this trace."""
        return sum(len(request.packets) for request in self.requests)


def _items(path: Path, resources: str, scopes: str, items: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for line in path.read_text().splitlines():
        for resource in json.loads(line).get(resources, []):
            for scope in resource[scopes]:
                for item in scope[items]:
                    yield plain(resource["resource"].get("attributes", [])), item


def _span(resource: dict[str, Any], span: dict[str, Any]) -> Span:
    links = [
        (link["traceId"], link["spanId"], plain(link.get("attributes", []))) for link in span.get("links", [])
    ]  # fmt: skip
    return Span(
        service=resource["service.name"],
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        name=span["name"],
        kind=span["kind"],
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=plain(span.get("attributes", [])),
        links=links,
    )


def _record(record: dict[str, Any]) -> Record:
    attributes = plain(record["attributes"])
    return Record(
        event=record["eventName"],
        trace_id=record.get("traceId", ""),
        span_id=record.get("spanId", ""),
        time_ns=int(record["timeUnixNano"]),
        at=ENDS.get(attributes[names.LOCAL_ADDRESS], "elsewhere"),
        attributes=attributes,
    )


def read(path: Path, run: Run) -> Trace:
    """The trace of a run's one order.

    Raises:
        NoTraceError: the shop has exported no span that starts it.
    """
    spans, root = [], None
    for resource, item in _items(path, "resourceSpans", "scopeSpans", "spans"):
        spans.append(span := _span(resource, item))
        if resource.get("deployment.environment.name") == run.name and span.service == "shop" and not span.parent_id:
            root = span
    if root is None:
        raise NoTraceError("the shop has exported no span that starts a trace")
    records = sorted(
        (_record(item) for _, item in _items(path, "resourceLogs", "scopeLogs", "logRecords")),
        key=lambda record: record.time_ns,
    )
    own = [span for span in spans if span.trace_id == root.trace_id]
    connections = [
        span
        for span in spans
        if span.name == names.CONNECTION_SPAN and any(trace_id == root.trace_id for trace_id, *_ in span.links)
    ]
    theirs = {span.trace_id for span in connections}
    unserved = [record for record in records if record.event == names.PACKET_EVENT and record.trace_id in theirs]
    made = Trace(run, root, own, [], sorted(connections, key=lambda span: -span.kind), unserved)
    for client in (span for span in made.children(root) if span.kind == CLIENT):
        server = next(iter(made.children(client)), None)
        made.requests.append(request := Request(client, server, unserved=unserved))
        ids = {client.span_id, server.span_id if server else ""}
        for record in records:
            if record.trace_id == root.trace_id and record.span_id in ids:
                (request.packets if record.event == names.PACKET_EVENT else request.figures).append(record)
    return made


def missing(trace: Trace, lost: Lost | None) -> list[str]:
    """What the trace should hold and does not, in words."""
    asked = [request.title for request in trace.requests]
    if asked != list(ASKED):
        return [f"the trace holds the requests {asked}, not {list(ASKED)}"]
    found = []
    for request in trace.requests:
        if request.server is None or request.server.service != "stock":
            found.append(f"{request.title}: no span of the stock")
        for at in ENDS.values():
            counted = {
                "sent": [packet for packet in request.packets if packet.at == at and packet.sent],
                "received": [packet for packet in request.packets if packet.at == at and not packet.sent],
            }
            found += [
                f"{request.title}: no payload that was {what} at the {at}"
                for what, packets in counted.items()
                if not any(packet.payload_bytes for packet in packets)
            ]
            if not (figures := request.figures_at(at)):
                found.append(f"{request.title}: no tcp.request of the {at}")
                continue
            if figures[names.CONTEXT_SOURCE] != trace.run.joined_by:
                found.append(f"{request.title}: joined at the {at} by {figures[names.CONTEXT_SOURCE]}")
            for what, name in (("sent", names.PACKETS_SENT), ("received", names.PACKETS_RECEIVED)):
                segments = sum(packet.segments for packet in counted[what])
                if figures[name] != segments:
                    found.append(f"{request.title}: {figures[name]} {what} at the {at}, but {segments} in its packets")
    found += _missing_connections(trace)
    return found + _missing_retransmit(trace, lost)


def _missing_connections(trace: Trace) -> list[str]:
    if [span.kind for span in trace.connections] != [CLIENT, SERVER]:
        return [f"{len(trace.connections)} connection spans link to the trace, not the client's and the server's"]
    found = []
    for connection, end in zip(trace.connections, ("client", "server"), strict=True):
        linked = {span_id for trace_id, span_id, _ in connection.links if trace_id == trace.root.trace_id}
        found += [
            f"{request.title}: the {end}'s connection span does not link to it"
            for request in trace.requests
            if not linked & {request.client.span_id, request.server.span_id if request.server else ""}
        ]
    return found


def _missing_retransmit(trace: Trace, lost: Lost | None) -> list[str]:
    if lost is None:
        return ["the wire has lost nothing"]
    hit = {
        request.title
        for request in trace.requests
        for retransmit in request.retransmits
        if retransmit.again.at == "stock" and retransmit.again.attributes[names.SEQ] == lost.seq and retransmit.first
    }
    if hit != {HIT}:
        return [f"the packet that the wire lost was sent again in {sorted(hit) or 'no request'}, not in {HIT}"]
    request = trace.request(HIT)
    if request is None or not request.figures_at("stock").get(names.RETRANSMITS):
        return [f"{HIT}: tcp.request of the stock counts no retransmit"]
    return []
