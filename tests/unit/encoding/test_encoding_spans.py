"""Connections to OTLP spans, in protobuf and in JSON."""

import ipaddress
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tcpio_otel import names
from tcpio_otel.batch import Endpoint
from tcpio_otel.connections.events import CloseReason, Connection, End, Milestone, Role, Start
from tcpio_otel.encoding import proto_json
from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.resource import host_resource, message
from tcpio_otel.encoding.spans import SCOPE, SpanEncoder, SpanJsonEncoder, span
from tcpio_otel.payload import Items, Part

BARE = ProtobufEnvelope(lambda _: b"")

RESOURCE = host_resource("edge", {"deployment.environment.name": "test"}, host_name="node-1")
START_NS = 1_795_000_000_000_000_000

ADDRESSES = st.ip_addresses().map(
    lambda address: address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)
COUNTS = st.integers(0, (1 << 63) - 1)
TIMES = st.integers(1, (1 << 63) - 1)
SECONDS = st.none() | st.floats(0, 1e6)

CONNECTIONS = st.builds(
    Connection,
    local=st.builds(Endpoint, ADDRESSES, st.integers(0, 65535)),
    peer=st.builds(Endpoint, ADDRESSES, st.integers(0, 65535)),
    netns=st.integers(0, (1 << 32) - 1),
    start_ns=TIMES,
    end_ns=TIMES,
    trace_id=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=8, max_size=8),
    parent_span_id=st.just(b"") | st.binary(min_size=8, max_size=8).filter(any),
    connection_id=TEXTS,
    close_initiator=st.sampled_from([None, "local", "peer"]),
    error_type=st.sampled_from([None, "connection_reset", "timeout"]),
    bytes_sent=COUNTS,
    bytes_received=COUNTS,
    packets_sent=COUNTS,
    packets_received=COUNTS,
    retransmits=COUNTS,
    rtt_smoothed_s=SECONDS,
    rtt_min_s=SECONDS,
    handshake_s=SECONDS,
    pid=st.integers(0, (1 << 22)),
    process_name=TEXTS,
    milestones=st.lists(
        st.builds(Milestone, NAMES, TIMES, st.dictionaries(NAMES, TEXTS | COUNTS | st.booleans())),
        max_size=3,
    ).map(tuple),
    milestones_dropped=st.integers(0, 1000),
)


def endpoint(text: str, port: int) -> Endpoint:
    """An endpoint from text."""
    address = ipaddress.ip_address(text)
    return Endpoint(address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed, port)


CONNECTION = Connection(
    local=endpoint("192.0.2.8", 40_000),
    peer=endpoint("192.0.2.40", 443),
    netns=4026531840,
    role=Role.CLIENT,
    start=Start.OBSERVED,
    end=End.OBSERVED,
    start_ns=START_NS,
    end_ns=START_NS + 1_500_000_000,
    trace_id=bytes(range(16)),
    span_id=bytes(range(8)),
    parent_span_id=b"",
    connection_id="0001020304050607",
    close_reason=CloseReason.FIN,
    close_initiator="local",
    error_type=None,
    bytes_sent=736,
    bytes_received=1 << 40,
    packets_sent=7,
    packets_received=8,
    retransmits=1,
    kernel_totals=True,
    rtt_smoothed_s=0.002,
    rtt_min_s=0.001,
    handshake_s=0.003,
    pid=4711,
    process_name="curl",
    milestones=(
        Milestone("tcp.syn", START_NS, {"network.io.direction": "transmit"}),
        Milestone("tcp.zero_window", START_NS + 5, {"count": 3, "ours": True}),
    ),
    milestones_dropped=2,
)


def parts(items: Items) -> list[bytes]:
    """Each item by itself."""
    return [bytes(items.buffer[start:end]) for start, end in zip([0, *items.ends[:-1]], items.ends, strict=True)]


def encoded(connection: Connection) -> Span:
    """One connection through the encoder and back."""
    (item,) = parts(SpanEncoder(RESOURCE).encode([connection]))
    request = BARE.wrap([Part(0, [memoryview(item)], len(item))])
    return ExportTraceServiceRequest.FromString(request).resource_spans[0].scope_spans[0].spans[0]


def attributes(found: Any) -> dict[str, Any]:
    """Attributes of a protobuf message as Python values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in found.attributes}


def test_a_connection_becomes_a_span_with_all_that_is_known_of_it() -> None:
    """Names, kinds, times and values are those that docs/record.md promises."""
    found = encoded(CONNECTION)
    assert (found.name, found.kind) == ("tcp.connection", Span.SPAN_KIND_CLIENT)
    assert (found.trace_id, found.span_id, found.parent_span_id) == (bytes(range(16)), bytes(range(8)), b"")
    assert (found.start_time_unix_nano, found.end_time_unix_nano) == (START_NS, START_NS + 1_500_000_000)
    assert found.status.code == Status.STATUS_CODE_UNSET
    assert attributes(found) == {
        "network.transport": "tcp",
        "network.type": "ipv4",
        "network.local.address": "192.0.2.8",
        "network.local.port": 40_000,
        "network.peer.address": "192.0.2.40",
        "network.peer.port": 443,
        "client.address": "192.0.2.8",
        "client.port": 40_000,
        "server.address": "192.0.2.40",
        "server.port": 443,
        "tcp.connection.id": "0001020304050607",
        "tcp.connection.start": "observed",
        "tcp.connection.end": "observed",
        "tcp.bytes.sent": 736,
        "tcp.bytes.received": 1 << 40,
        "tcp.packets.sent": 7,
        "tcp.packets.received": 8,
        "tcp.retransmits": 1,
        "tcp.totals.source": "kernel",
        "tcp.rtt.smoothed": 0.002,
        "tcp.rtt.min": 0.001,
        "tcp.handshake.duration": 0.003,
        "tcp.close.reason": "fin",
        "tcp.close.initiator": "local",
        "process.pid": 4711,
        "process.executable.name": "curl",
    }
    assert [(event.name, event.time_unix_nano, attributes(event)) for event in found.events] == [
        ("tcp.syn", START_NS, {"network.io.direction": "transmit"}),
        ("tcp.zero_window", START_NS + 5, {"count": 3, "ours": True}),
    ]
    assert found.dropped_events_count == 2


def test_the_server_end_is_the_child_and_swaps_the_addresses() -> None:
    """client.* is the end that sent the SYN, wherever the span was made."""
    server = replace(CONNECTION, role=Role.SERVER, parent_span_id=b"clientid")
    found = encoded(server)
    assert (found.kind, found.parent_span_id) == (Span.SPAN_KIND_SERVER, b"clientid")
    by_name = attributes(found)
    assert (by_name["client.address"], by_name["client.port"]) == ("192.0.2.40", 443)
    assert (by_name["server.address"], by_name["server.port"]) == ("192.0.2.8", 40_000)
    assert by_name["network.local.address"] == "192.0.2.8"


def test_an_unknown_role_claims_neither_end() -> None:
    """INTERNAL, with local and peer addresses only; what was not measured is left out."""
    found = encoded(
        replace(
            CONNECTION, role=Role.UNKNOWN, start=Start.INHERITED, end=End.EVICTED, kernel_totals=False,
            close_reason=None, close_initiator=None, rtt_smoothed_s=None, rtt_min_s=None, handshake_s=None,
            pid=0, process_name="",
        )
    )  # fmt: skip
    assert found.kind == Span.SPAN_KIND_INTERNAL
    by_name = attributes(found)
    assert not [name for name in by_name if name.startswith(("client.", "server.", "tcp.rtt", "tcp.close", "process."))]
    assert "tcp.handshake.duration" not in by_name
    assert by_name["tcp.totals.source"] == "records"
    assert (by_name["tcp.connection.start"], by_name["tcp.connection.end"]) == ("inherited", "evicted")


@pytest.mark.parametrize("reason", [CloseReason.RESET, CloseReason.REFUSED, CloseReason.TIMEOUT])
def test_a_failure_is_an_error_and_says_which(reason: CloseReason) -> None:
    """Status ERROR, its description and error.type agree."""
    found = encoded(replace(CONNECTION, close_reason=reason, error_type=f"connection_{reason}"))
    assert found.status.code == Status.STATUS_CODE_ERROR
    assert found.status.message == attributes(found)["error.type"] == f"connection_{reason}"
    assert attributes(found)["tcp.close.reason"] == reason.value


def test_ipv6_is_written_as_rfc_5952_has_it() -> None:
    """And IPv4 mapped into IPv6 is IPv4."""
    found = attributes(encoded(replace(CONNECTION, local=endpoint("2001:db8:0:0::1", 1), peer=endpoint("::1", 2))))
    assert (found["network.local.address"], found["network.peer.address"]) == ("2001:db8::1", "::1")
    assert found["network.type"] == "ipv6"


@settings(max_examples=30, deadline=None)
@given(st.lists(CONNECTIONS, min_size=1, max_size=3))
def test_wrapped_items_are_the_request_that_the_sdks_encoder_makes(connections: list[Connection]) -> None:
    """Cut into items and joined again, nothing is lost, added or changed."""
    items = SpanEncoder(RESOURCE).encode(connections)
    assert len(items) == len(connections)
    body = ProtobufEnvelope(lambda _: message(RESOURCE).SerializeToString()).wrap(
        [Part(0, [items.buffer], len(items.buffer))]
    )
    assert ExportTraceServiceRequest.FromString(body) == encode_spans(
        [span(connection, RESOURCE) for connection in connections]
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(CONNECTIONS, min_size=1, max_size=3))
def test_json_spans_are_the_protobuf_spans(connections: list[Connection]) -> None:
    """Both encoders say the same, so a file and a receiver hold the same."""
    items = SpanJsonEncoder(RESOURCE).encode(connections)
    expected = encode_spans([span(connection, RESOURCE) for connection in connections])
    assert json.loads(b"[" + bytes(items.buffer)[:-1] + b"]") == [
        proto_json.as_dict(found) for found in expected.resource_spans[0].scope_spans[0].spans
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(CONNECTIONS, min_size=2, max_size=4), st.data())
def test_any_run_of_items_is_a_request(connections: list[Connection], data: st.DataObject) -> None:
    """Batches are cut anywhere between items, in both formats."""
    first = data.draw(st.integers(0, len(connections) - 1))
    last = data.draw(st.integers(first + 1, len(connections)))
    wanted = [connection.span_id for connection in connections[first:last]]

    chosen = [memoryview(part) for part in parts(SpanEncoder(RESOURCE).encode(connections))[first:last]]
    request = ExportTraceServiceRequest.FromString(BARE.wrap([Part(0, chosen, sum(map(len, chosen)))]))
    assert [found.span_id for found in request.resource_spans[0].scope_spans[0].spans] == wanted

    chosen = [memoryview(part) for part in parts(SpanJsonEncoder(RESOURCE).encode(connections))[first:last]]
    envelope = proto_json.JsonEnvelope(
        lambda _: proto_json.compact(proto_json.as_dict(message(RESOURCE))),
        {"name": SCOPE.name, "version": SCOPE.version}, names.SCHEMA_URL,
        ("resourceSpans", "scopeSpans", "spans"),
    )  # fmt: skip
    line = json.loads(envelope.wrap([Part(0, chosen, sum(map(len, chosen)))]))
    assert [bytes.fromhex(found["spanId"]) for found in line["resourceSpans"][0]["scopeSpans"][0]["spans"]] == wanted


@pytest.mark.parametrize("encoder", [SpanEncoder, SpanJsonEncoder])
def test_no_connections_are_no_items(encoder: type[SpanEncoder | SpanJsonEncoder]) -> None:
    """An idle agent exports nothing."""
    items = encoder(RESOURCE).encode([])
    assert (len(items), len(items.buffer), items.ends.dtype) == (0, 0, np.int64)


OPEN = replace(CONNECTION, end=None, close_reason=None, close_initiator=None, end_ns=START_NS + 90_000_000_000)


def test_an_open_connection_becomes_a_log_record_in_its_span() -> None:
    """The summary carries the span's ids and attributes, but for those of its end."""
    (item,) = parts(SpanEncoder(RESOURCE).encode_summaries([OPEN], START_NS + 7))
    request = BARE.wrap([Part(0, [memoryview(item)], len(item))])
    (record,) = ExportLogsServiceRequest.FromString(request).resource_logs[0].scope_logs[0].log_records
    assert (record.trace_id, record.span_id) == (OPEN.trace_id, OPEN.span_id)
    assert (record.event_name, record.severity_number, record.severity_text) == ("tcp.connection.summary", 9, "INFO")
    assert (record.time_unix_nano, record.observed_time_unix_nano) == (OPEN.end_ns, START_NS + 7)
    found, ended = attributes(record), attributes(encoded(CONNECTION))
    ending = {"tcp.connection.end", "tcp.close.reason", "tcp.close.initiator"}
    assert found == {name: value for name, value in ended.items() if name not in ending}
    assert record.body.string_value == (
        "open for 90 s, sent 736 bytes in 7 packets, received 1099511627776 in 8, 1 retransmits"
    )


def test_summaries_in_json_say_the_same() -> None:
    """OTLP/JSON holds the protobuf message, by the rules of its mapping."""
    (item,) = parts(SpanJsonEncoder(RESOURCE).encode_summaries([OPEN], START_NS + 7))
    (expected,) = parts(SpanEncoder(RESOURCE).encode_summaries([OPEN], START_NS + 7))
    request = ExportLogsServiceRequest.FromString(BARE.wrap([Part(0, [memoryview(expected)], len(expected))]))
    summary = request.resource_logs[0].scope_logs[0].log_records[0]
    found = json.loads(item.removesuffix(b","))
    assert found == proto_json.as_dict(summary)
    assert (found["traceId"], found["spanId"]) == (OPEN.trace_id.hex(), OPEN.span_id.hex())
