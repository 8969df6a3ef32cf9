"""Protobuf to OTLP/JSON, against a walk through the message's own description."""

import base64
import json
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    Exemplar,
    Gauge,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from tcpio_otel.encoding import proto_json
from tcpio_otel.payload import Part

IDS = {"trace_id", "span_id", "parent_span_id"}
WIDE = {FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
TIMES = st.integers(0, (1 << 64) - 1)
DOUBLES = st.floats(allow_nan=False, allow_infinity=False)

PLAIN = st.one_of(
    st.builds(AnyValue, string_value=TEXTS),
    st.builds(AnyValue, bool_value=st.booleans()),
    st.builds(AnyValue, int_value=INTEGERS),
    st.builds(AnyValue, double_value=DOUBLES),
    st.builds(AnyValue, bytes_value=st.binary(max_size=5)),
)
PAIRS = st.lists(st.builds(KeyValue, key=TEXTS | st.sampled_from(["traceId", "spanId"]), value=PLAIN), max_size=3)
VALUES = st.one_of(
    PLAIN,
    st.builds(AnyValue, array_value=st.builds(ArrayValue, values=st.lists(PLAIN, max_size=2))),
    st.builds(AnyValue, kvlist_value=st.builds(KeyValueList, values=PAIRS)),
)
ATTRIBUTES = st.lists(st.builds(KeyValue, key=TEXTS, value=VALUES), max_size=3)
TRACE_ID, SPAN_ID = st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8)
SPANS = st.builds(
    Span,
    trace_id=TRACE_ID,
    span_id=SPAN_ID,
    parent_span_id=st.just(b"") | SPAN_ID,
    name=TEXTS,
    kind=st.integers(0, 5),
    start_time_unix_nano=TIMES,
    attributes=ATTRIBUTES,
    dropped_events_count=st.integers(0, (1 << 32) - 1),
    events=st.lists(st.builds(Span.Event, time_unix_nano=TIMES, name=TEXTS, attributes=ATTRIBUTES), max_size=2),
    links=st.lists(st.builds(Span.Link, trace_id=TRACE_ID, span_id=SPAN_ID), max_size=1),
    status=st.builds(Status, code=st.integers(0, 2), message=TEXTS),
    flags=st.integers(0, (1 << 32) - 1),
)
POINTS = st.lists(
    st.builds(
        NumberDataPoint,
        attributes=ATTRIBUTES,
        time_unix_nano=TIMES,
        as_int=INTEGERS,
        exemplars=st.lists(st.builds(Exemplar, as_double=DOUBLES, trace_id=TRACE_ID, span_id=SPAN_ID), max_size=1),
    ),
    max_size=2,
)
METRICS = st.one_of(
    st.builds(Metric, name=TEXTS, gauge=st.builds(Gauge, data_points=POINTS)),
    st.builds(
        Metric,
        name=TEXTS,
        sum=st.builds(
            Sum,
            data_points=POINTS,
            aggregation_temporality=st.just(AGGREGATION_TEMPORALITY_CUMULATIVE),
            is_monotonic=st.booleans(),
        ),
    ),
)
SCOPES = st.builds(InstrumentationScope, name=TEXTS, version=TEXTS)
RESOURCES = st.builds(Resource, attributes=ATTRIBUTES)


def of_one(request: type[Message], resource: type[Message], scope: type[Message], items: str, what: Any) -> Any:
    """Requests of one resource and one scope."""
    name = "resource_spans" if items == "spans" else "resource_metrics"
    scopes = st.builds(scope, scope=SCOPES, schema_url=TEXTS, **{items: st.lists(what, max_size=2)})
    scope_name = name.replace("resource", "scope")
    resources = st.builds(resource, resource=RESOURCES, **{scope_name: scopes.map(lambda one: [one])})
    return st.builds(request, **{name: resources.map(lambda one: [one])})


REQUESTS = of_one(ExportTraceServiceRequest, ResourceSpans, ScopeSpans, "spans", SPANS) | of_one(
    ExportMetricsServiceRequest, ResourceMetrics, ScopeMetrics, "metrics", METRICS
)


def walked(message: Message) -> dict[str, Any]:
    """OTLP/JSON by the letter: https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding."""

    def value(field: FieldDescriptor, found: Any) -> Any:
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            return walked(found)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return found.hex() if field.name in IDS else base64.b64encode(found).decode()
        return str(found) if field.cpp_type in WIDE else found

    def camel(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(word.title() for word in others)

    return {
        camel(field.name): [value(field, one) for one in found] if field.is_repeated else value(field, found)
        for field, found in message.ListFields()
    }


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_messages_become_otlp_json_by_the_letter(request: Message) -> None:
    """Hex ids, enums as integers, 64-bit integers as text, lowerCamelCase: what the Collector's file receiver reads."""
    assert json.loads(proto_json.as_line(request)) == walked(request)


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_nothing_is_lost_on_the_way(request: Message) -> None:
    """Read back, with the ids as base64 again, it is the same message."""

    def base64_ids(value: Any) -> Any:
        if isinstance(value, list):
            return [base64_ids(one) for one in value]
        if not isinstance(value, dict):
            return value
        ids = {"traceId", "spanId", "parentSpanId"}
        return {
            key: base64.b64encode(bytes.fromhex(one)).decode() if key in ids else base64_ids(one)
            for key, one in value.items()
        }

    line = proto_json.as_line(request)
    assert Parse(json.dumps(base64_ids(json.loads(line))), type(request)()) == request


@settings(max_examples=20, deadline=None)
@given(REQUESTS)
def test_a_request_is_one_line(request: Message) -> None:
    """Whatever the texts hold: the file exporter's format has one request a line."""
    line = proto_json.as_line(request)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


def test_an_envelope_is_the_request_around_its_items() -> None:
    """With many runs of items, with one, with none."""
    keys = ("resourceSpans", "scopeSpans", "spans")
    envelope = proto_json.JsonEnvelope(
        lambda number: b'{"attributes":[%d]}' % number, {"name": "n"}, "https://schema", keys
    )  # fmt: skip
    made: list[list[list[bytes]]] = [[[b'{"a":1},{"b":2},', b'{"c":3},'], [b'{"d":4},']], [[b'{"a":1},']], []]
    for groups in made:
        views = [[memoryview(run) for run in runs] for runs in groups]
        line = envelope.wrap([Part(7 + place, runs, sum(map(len, runs))) for place, runs in enumerate(views)])
        assert line.endswith(b"\n")
        assert json.loads(line) == {
            "resourceSpans": [
                {
                    "resource": {"attributes": [7 + place]},
                    "scopeSpans": [
                        {
                            "scope": {"name": "n"},
                            "spans": json.loads(b"[" + b"".join(runs)[:-1] + b"]"),
                            "schemaUrl": "https://schema",
                        }
                    ],
                    "schemaUrl": "https://schema",
                }
                for place, runs in enumerate(groups)
            ]
        }
        items = sum(len(run) for runs in groups for run in runs)
        room = sum(envelope.overhead_bytes(7 + place) for place in range(len(groups)))
        assert not groups or len(line) <= items + room
