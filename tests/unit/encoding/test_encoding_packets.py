"""Packet records by column against the slow, obvious encoding of the same."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tcpio_otel import names
from tcpio_otel.batch import Contexts, Mark, Packets
from tcpio_otel.encoding.columns import decimals
from tcpio_otel.encoding.otlp_logs import PacketLogEncoder
from tcpio_otel.encoding.packet_json import JsonLines, PacketJsonEncoder
from tcpio_otel.encoding.proto_json import JsonEnvelope
from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.table import PacketTable, _local_offset_ns, printable
from tcpio_otel.payload import Items, Part
from tcpio_otel.pipeline import PacketEncoder
from tests import oracle, traffic

BARE = ProtobufEnvelope(lambda _: b"")

REASONS = {2: "NO_SOCKET", 77: "TCP_CSUM"}
OFFSET, OBSERVED = 1_795_000_000_000_000_000, 1_795_000_123_456_789_012


def cut(items: Items) -> list[bytes]:
    """Items one by one."""
    whole = bytes(items.buffer)
    return [whole[start:end] for start, end in zip([0, *items.ends[:-1].tolist()], items.ends.tolist(), strict=True)]


@pytest.mark.parametrize("seed", range(10))
def test_wild_records_are_byte_identical_to_the_official_classes(seed: int) -> None:
    """100,000 records with anything in every field: protobuf by column is what the official classes serialise."""
    encoder = PacketLogEncoder(REASONS, oracle.peer_names)
    for part in range(2):
        # The second part uses the slots again for other connections, as the agent does.
        records, slots, flows = traffic.wild(5_000, 300, 2 * seed + part)
        flows["peer"] = np.arange(len(flows)) % 4
        encoded = encoder.encode(Packets(records, slots, flows, 0, OBSERVED))
        assert cut(encoded) == oracle.items(records, slots, flows, 0, OBSERVED, REASONS)


@pytest.mark.parametrize("seed", range(4))
def test_contexts_are_byte_identical_too(seed: int) -> None:
    """Ids are the context's where there is one; what is one of several, or reaches over several, says so."""
    records, slots, flows = traffic.wild(2_000, 100, seed)
    contexts = traffic.wild_contexts(len(records), seed)
    encoded = PacketLogEncoder(REASONS).encode(Packets(records, slots, flows, 0, OBSERVED, contexts))
    assert cut(encoded) == oracle.items(records, slots, flows, 0, OBSERVED, REASONS, contexts)


def test_contexts_can_be_kept() -> None:
    """By themselves, and so whatever becomes of the table that they are from."""
    records, slots, flows = traffic.wild(500, 50, 1)
    contexts = traffic.wild_contexts(len(records), 1)
    expected = oracle.items(records, slots, flows, 0, OBSERVED, REASONS, contexts)
    kept = replace(contexts, ids=contexts.ids.copy()).kept()
    assert len(kept.ids) <= len(np.unique(contexts.numbers)) + 2
    encoded = PacketLogEncoder(REASONS).encode(Packets(records, slots, flows, 0, OBSERVED, kept))
    assert cut(encoded) == expected


@pytest.mark.parametrize("encoder", [PacketLogEncoder(REASONS), PacketJsonEncoder(REASONS)], ids=["protobuf", "json"])
@pytest.mark.parametrize("wild", [False, True])
def test_another_order_is_the_same_items_in_it(encoder: PacketEncoder, wild: bool) -> None:
    """With contexts too, and where one connection shows several tuples in its headers."""
    for seed in range(4):
        records, slots, flows = traffic.wild(3_000, 200, seed) if wild else traffic.flows_and_records(9_000)
        contexts = traffic.wild_contexts(len(records), seed)
        order = np.random.default_rng(seed).permutation(len(records))
        packets = Packets(records, slots, flows, 0, OBSERVED, contexts)
        as_they_stand = cut(encoder.encode(packets))
        found = cut(encoder.encode(replace(packets, order=order)))
        assert found == [as_they_stand[place] for place in order.tolist()]


def test_ordinary_traffic_is_byte_identical_across_chunks() -> None:
    """A batch larger than one chunk has no seam."""
    records, slots, flows = traffic.flows_and_records(10_000)
    encoded = PacketLogEncoder(REASONS).encode(Packets(records, slots, flows, OFFSET, OBSERVED))
    assert cut(encoded) == oracle.items(records, slots, flows, OFFSET, OBSERVED, REASONS)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_shape_of_batch_is_byte_identical(seed: int, packets: int, slots: int) -> None:
    """Small batches, few connections, one record: nothing depends on size."""
    records, rows, flows = traffic.wild(packets, slots, seed % 100_000)
    encoded = PacketLogEncoder(REASONS).encode(Packets(records, rows, flows, 5, OBSERVED))
    assert cut(encoded) == oracle.items(records, rows, flows, 5, OBSERVED, REASONS)


def test_an_empty_batch_is_no_items() -> None:
    """Nothing in, nothing out, in every format."""
    records, slots, flows = traffic.flows_and_records(0)
    for encoder in (PacketLogEncoder({}), PacketJsonEncoder({}), JsonLines({})):
        assert len(encoder.encode(Packets(records, slots, flows, 0, 0))) == 0


def test_a_connection_that_learns_its_ids_is_encoded_afresh() -> None:
    """A new version of a flow replaces what was kept of the old one."""
    records, slots, flows = traffic.flows_and_records(200, connections=5)
    flows["identified"] = False
    encoder = PacketLogEncoder({})
    encoder.encode(Packets(records, slots, flows, 0, 1))
    flows["identified"], flows["pid"], flows["version"] = True, 99, flows["version"] + 1000
    assert cut(encoder.encode(Packets(records, slots, flows, 0, 1))) == oracle.items(records, slots, flows, 0, 1, {})


@pytest.mark.parametrize("encoder", [PacketLogEncoder({}), PacketJsonEncoder({}), JsonLines({})])
def test_what_is_forgotten_is_made_again(encoder: PacketEncoder) -> None:
    """Letting go of memory changes nothing of what comes out."""
    packets = Packets(*traffic.flows_and_records(500, connections=50), 0, OBSERVED)
    before = cut(encoder.encode(packets))
    encoder.forget()
    assert cut(encoder.encode(packets)) == before


def test_wrapped_items_are_an_export_request() -> None:
    """Resource, scope and schema stand around the records, and the official classes read them."""
    records, slots, flows = traffic.flows_and_records(300)
    encoded = PacketLogEncoder({}).encode(Packets(records, slots, flows, 0, OBSERVED))
    middle = int(encoded.ends[99])
    runs = [encoded.buffer[:middle], encoded.buffer[middle:]]
    request = ExportLogsServiceRequest.FromString(BARE.wrap([Part(0, runs, len(encoded.buffer))]))
    (resource_logs,) = request.resource_logs
    (scope_logs,) = resource_logs.scope_logs
    assert (scope_logs.scope.name, scope_logs.schema_url) == (names.SCOPE, names.SCHEMA_URL)
    assert resource_logs.schema_url == names.SCHEMA_URL
    assert [record.SerializeToString() for record in scope_logs.log_records] == [
        oracle.log_record(record, flows[slot], 0, OBSERVED, {}).SerializeToString()
        for record, slot in zip(records, slots.tolist(), strict=True)
    ]


def otlp_json(record: Any, flow: Any, contexts: Contexts | None, number: int) -> dict[str, Any]:
    """A record as OTLP/JSON, from the oracle's protobuf."""
    message = oracle.log_record(record, flow, 0, OBSERVED, REASONS, oracle.context_of(contexts, number))
    values = {"string_value": "stringValue", "int_value": "intValue", "bool_value": "boolValue"}
    attributes = []
    for attribute in message.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        if kind == "array_value":
            values_of = [{"stringValue": one.string_value} for one in value.values]
            attributes.append((attribute.key, {"arrayValue": {"values": values_of}}))
            continue
        attributes.append((attribute.key, {values[kind]: str(value) if kind == "int_value" else value}))
    return {
        "timeUnixNano": str(message.time_unix_nano),
        "observedTimeUnixNano": str(message.observed_time_unix_nano),
        "severityNumber": message.severity_number,
        "severityText": message.severity_text,
        "body": {"stringValue": message.body.string_value},
        "attributes": dict(attributes),
        "eventName": message.event_name,
        **({"traceId": message.trace_id.hex(), "spanId": message.span_id.hex()} if message.trace_id else {}),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("joined", [False, True])
def test_json_holds_what_protobuf_holds(seed: int, joined: bool) -> None:
    """OTLP/JSON says the same as the official protobuf, in the File Exporter's form."""
    records, slots, flows = traffic.wild(2_000, 150, seed)
    contexts = traffic.wild_contexts(len(records), seed) if joined else None
    flows["peer"] = np.arange(len(flows)) % 4
    items = PacketJsonEncoder(REASONS, oracle.peer_names).encode(Packets(records, slots, flows, 0, OBSERVED, contexts))
    line = JsonEnvelope(lambda _: b"{}", {}, "url", ("resourceLogs", "scopeLogs", "logRecords")).wrap(
        [Part(0, [items.buffer], 0)]
    )
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    (found,) = json.loads(line)["resourceLogs"][0]["scopeLogs"]
    for number, (given_record, row, slot) in enumerate(zip(found["logRecords"], records, slots.tolist(), strict=True)):
        expected = otlp_json(row, flows[slot], contexts, number)
        given_record["attributes"] = {entry["key"]: entry["value"] for entry in given_record["attributes"]}
        assert given_record == expected


@pytest.mark.parametrize("seed", range(3))
def test_json_lines_are_flat_and_complete(seed: int) -> None:
    """`watch --json` prints one object a line: the time, and every attribute of the log record."""
    records, slots, flows = traffic.wild(1_000, 100, seed)
    lines = bytes(JsonLines(REASONS).encode(Packets(records, slots, flows, 0, OBSERVED)).buffer).splitlines()
    for line, row, slot in zip(lines, records, slots.tolist(), strict=True):
        found = json.loads(line)
        time_ns = int(row["time_ns"])
        assert found.pop("time") == f"{np.datetime64(time_ns, 'ns')}Z"
        assert found == oracle.attributes(row, flows[slot], REASONS)


@pytest.mark.parametrize("seed", range(3))
def test_the_table_is_tcpio_ds(seed: int) -> None:
    """Every line of the table is the line that `tcpio.d` would print."""
    records, slots, flows = traffic.wild(2_000, 100, seed)
    table = PacketTable(time=False, process=False, seq=False)
    lines = bytes(table.encode(Packets(records, slots, flows, 0, OBSERVED)).buffer).decode().splitlines()
    assert lines == [oracle.tcpio_line(record) for record in records]


def test_the_table_looks_as_documented() -> None:
    """Heading and rows of the Solaris and illumos documentation, column by column."""
    records, slots, flows = traffic.flows_and_records(1, connections=1)
    for side, name, port in (("local", "192.0.2.8", 22), ("peer", "192.0.2.40", 60337)):
        address = traffic.mapped(np.array([[int(part) for part in name.split(".")]], np.uint8)).view("V16").ravel()
        records[f"header_{side}_address"], records[f"header_{side}_port"] = address, port
    records["cpu"], records["payload_bytes"], records["flags"], records["direction"] = 3, 736, 0x18, 1
    table = PacketTable(time=False, process=False, seq=False)
    text = table.header() + bytes(table.encode(Packets(records, slots, flows, 0, OBSERVED)).buffer)
    assert text.decode().splitlines() == [
        " CPU           LADDR:LPORT                RADDR:RPORT  BYTES  FLAGS",
        "   3        192.0.2.8:22    ->       192.0.2.40:60337    736  (PUSH|ACK)",
    ]


def test_flags_add_columns() -> None:
    """--time, --seq and --process put their columns at the edges, and control characters stay harmless."""
    records, slots, flows = traffic.flows_and_records(50)
    flows["process_name"], flows["pid"] = b"ev\x1b[2Jil", 42
    records["marks"] = Mark(0)
    table = PacketTable(time=True, process=True, seq=True)
    lines = bytes(table.encode(Packets(records, slots, flows, OFFSET, OBSERVED)).buffer).decode().splitlines()
    for line, record in zip(lines, records, strict=True):
        clock, rest = line[:18], line[18:]
        assert clock[8:] == f".{(int(record['time_ns']) + OFFSET) % 10**9:09d}"
        assert rest == (
            f"{oracle.tcpio_line(record)}  {record['seq']} {record['ack']} {record['window']}  42 ev\\x1b[2Jil"
        )


@pytest.mark.parametrize(
    ("zone", "hours"),
    [
        ("Europe/Berlin", ["01:59:59", "03:00:00", "02:59:59", "02:00:00"]),
        ("America/St_Johns", ["22:29:59", "22:30:00", "22:29:59", "22:30:00"]),
    ],
)
def test_times_are_local_where_and_when_they_happened(
    zone: str, hours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--time shows what the clock on the wall showed then: on both sides of a change to summer time and back."""
    spring, autumn = (
        int(np.datetime64(moment, "ns").astype(np.int64)) for moment in ("2026-03-29T01", "2026-10-25T01")
    )
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    _local_offset_ns.cache_clear()
    try:
        records, slots, flows = traffic.flows_and_records(4)
        records["time_ns"] = [spring - 1, spring, autumn - 1, autumn]
        table = PacketTable(time=True, process=False, seq=False)
        lines = bytes(table.encode(Packets(records, slots, flows, 0, OBSERVED)).buffer).decode().splitlines()
    finally:
        monkeypatch.undo()
        time.tzset()
        _local_offset_ns.cache_clear()
    assert [line[:8] for line in lines] == hours


def test_control_characters_are_escaped() -> None:
    """A terminal never gets them from a process name."""
    assert printable("a\x1bb\n") == "a\\x1bb\\x0a"


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_decimals_are_decimals(numbers: list[int]) -> None:
    """Numbers of every length come out as Python prints them."""
    rows, lengths = decimals(np.array(numbers, np.uint64))
    assert [bytes(row)[:length].decode() for row, length in zip(rows, lengths.tolist(), strict=True)] == [
        str(number) for number in numbers
    ]
