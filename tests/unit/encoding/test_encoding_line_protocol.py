"""Lines against a slow, obvious encoding of the same, and against a reader that goes by Telegraf's grammar."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.batch import Packets
from tcpio_otel.connections.events import CloseReason, Connection, Counts, End
from tcpio_otel.encoding import line_protocol as lines
from tcpio_otel.encoding.metrics import ExportCounts, Observation
from tcpio_otel.ledger import Balance
from tcpio_otel.payload import Part, Signal
from tests import oracle, traffic
from tests.unit.aggregation.test_aggregation_traffic import DATABASE, NOW_NS, WEB, connection
from tests.unit.encoding.test_encoding_packets import OBSERVED, REASONS, cut

Read = tuple[str, dict[str, str], dict[str, Any], int]

POD = Workload(
    Place(container_id="c" * 64, pod_uid="uid-1"), "nginx",
    (
        ("k8s.pod.name", "web-6d4-x1"), ("k8s.pod.uid", "uid-1"), ("k8s.namespace.name", "shop"),
        ("k8s.replicaset.name", "web-6d4"), ("k8s.deployment.name", "web"), ("k8s.container.name", "app"),
        ("service.name", "web"), ("service.instance.id", "shop.web-6d4-x1.app"),
    ),
)  # fmt: skip


IN_TAGS = r"(?:[^\t\n\v\f\r ,=\\]|\\[^\t\n\v\f\r\\]|\\(?=\\))+"
TAG = re.compile(f",({IN_TAGS})=({IN_TAGS})")
FIELD = re.compile(rf',?({IN_TAGS})=(?:"((?:[^\n\\"]|\\[\\"])*)"|(true|false)|(-?\d+)i|(-?[\d.]+(?:e[-+]?\d+)?))')
TIME = re.compile(r" (\d{1,19})\n")
"""plugins/parsers/influx/machine.go.rl of Telegraf, as far as it goes for what we say."""


def unescaped(text: str) -> str:
    """As plugins/parsers/influx/escape.go does it."""
    return re.sub(r'\\([,"= ])', r"\1", text) if re.search("[ ,=]", text) else text


def read(line: bytes) -> Read:
    """A line: measurement, tags, fields, time."""
    text = line.decode()
    measurement = text[: re.search("[, ]", text).start()]  # type: ignore[union-attr]
    tags: dict[str, str] = {}
    fields: dict[str, Any] = {}
    at = len(measurement)
    while found := TAG.match(text, at):
        tags[unescaped(found[1])] = unescaped(found[2])
        at = found.end()
    assert text[at] == " "
    at += 1
    while found := FIELD.match(text, at):
        name, string, truth, whole, real = found.groups()
        if string is not None:
            fields[unescaped(name)] = re.sub(r'\\(["\\])', r"\1", string)
        else:
            fields[unescaped(name)] = truth == "true" if truth else int(whole) if whole else float(real)
        at = found.end()
    end = TIME.fullmatch(text, at)
    assert end, text[at:]
    assert len(tags) + len(fields) == len({*tags, *fields})
    return measurement, tags, fields, int(end[1])


TEXT = st.text(st.sampled_from('\\\\\\ ,="\n\t\r\0aé\U0001f600'), max_size=8) | st.text(max_size=8)


def sayable(text: str, pattern: str) -> str:
    """What of a text can be said at all."""
    return re.sub(pattern, "\ufffd", text).encode(errors="replace").decode()


@given(TEXT, TEXT, TEXT)
def test_texts_come_back_as_they_were(tag: str, name: str, field: str) -> None:
    """Tags and fields hold whatever a process calls itself, but for what the format cannot say."""
    line = lines.line("m", lines.tags([("k" + name, tag), ("z", "1")]), lines.fields([("f", field), ("g", 2)]), 7)
    measurement, tags, fields, time_ns = read(line)
    in_tags = r"[\0\t\n\v\f\r]|\\\Z"
    expected = {sayable(lines.key("k" + name), in_tags): sayable(tag, in_tags)} if tag else {}
    assert (measurement, tags, time_ns) == ("m", {**expected, "z": "1"}, 7)
    assert fields == {"f": sayable(field, r"[\0\n]"), "g": 2}


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_numbers_come_back_as_they_were(real: float, whole: int, truth: bool) -> None:
    """Integers stay integers, and no digit of a float is lost."""
    found = read(lines.line("m", "", lines.fields([("r", real), ("w", whole), ("t", truth)]), 1))[2]
    assert found == {"r": real, "w": whole, "t": truth}
    assert [type(each) for each in found.values()] == [float, int, bool]


KINDS = {
    0x02: "syn", 0x12: "syn_ack", 0x11: "fin", 0x01: "fin", 0x04: "rst", 0x14: "rst", 0x10: "ack", 0x00: "other",
    0xC2: "syn", 0x52: "syn_ack", 0x20: "other", 0x16: "rst",
}  # fmt: skip


def test_kinds_of_segments() -> None:
    """By what of them matters most; payload counts where no flag says more."""
    assert {bits: lines.segment(bits, False) for bits in KINDS} == KINDS
    assert [lines.segment(bits, True) for bits in (0x18, 0x10, 0x02, 0x11, 0x00)] == [
        "payload", "payload", "syn", "fin", "payload",
    ]  # fmt: skip


def obvious(record: Any, flow: Any, asked: tuple[str, ...], time_ns: int) -> Read:
    """A packet's line, from the attributes of its log record."""
    found = oracle.attributes(record, flow, REASONS)
    del found["network.transport"]
    tags = {"segment": lines.segment(int(record["flags"]), record["payload_bytes"] > 0)}
    fields: dict[str, Any] = {}
    for name, each in found.items():
        is_tag = name in ("network.io.direction", "process.executable.name", "tcp.peer.kind", *asked)
        if not is_tag:
            said = re.sub(r"[\0\n]", "\ufffd", each) if isinstance(each, str) else each
            fields["real_peer_port" if name == "tcp.peer.port" else lines.key(name)] = said
        elif each != "":
            tags[lines.key(name)] = re.sub(r"[\0\t\n\v\f\r]|\\\Z", "\ufffd", str(each))
    return "tcp_packet", tags, fields, time_ns


def encoded(encoder: lines.PacketLines, packets: Packets, workload: Workload = UNKNOWN) -> list[bytes]:
    """Lines of packets that are all of a workload."""
    found = encoder.encode(packets)
    whole = lines.LineEnvelope(lambda _: workload).wrap([Part(1, [found.buffer], len(found.buffer))])
    assert whole.count(b"\n") == len(found)
    return whole.splitlines(keepends=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("asked", [(), ("network.peer.address", "network.local.port")])
def test_packets_by_column_say_what_their_log_records_say(seed: int, asked: tuple[str, ...]) -> None:
    """Thousands of records with anything in every field, with what was asked for as tags."""
    moments = lines.Moments()
    encoder = lines.PacketLines(REASONS, moments, oracle.peer_names, frozenset(asked))
    moved = 0
    for part in range(2):
        records, slots, flows = traffic.wild(3_000, 200, 2 * seed + part)
        flows["peer"] = np.arange(len(flows)) % 4
        found = [read(line) for line in encoded(encoder, Packets(records, slots, flows, 5, OBSERVED))]
        expected = [
            obvious(record, flows[slot], asked, int(record["time_ns"]) + 5)
            for record, slot in zip(records, slots.tolist(), strict=True)
        ]
        assert [each[:3] for each in found] == [each[:3] for each in expected]
        moved += sum(one[3] != other[3] for one, other in zip(found, expected, strict=True))
        assert moments.moved == moved


def test_packets_of_one_moment_are_told_at_different_ones() -> None:
    """In whatever order they are encoded; each that is moved is counted, and the records stay as they are."""
    records, slots, flows = traffic.flows_and_records(1_000, connections=20)
    records["time_ns"] = 10**15 + np.arange(1_000) // 100 * 1_000
    before = records.copy()
    moments = lines.Moments()
    order = np.random.default_rng(1).permutation(1_000)
    found = encoded(lines.PacketLines({}, moments), Packets(records, slots, flows, 0, OBSERVED, order=order))
    times = [read(line)[3] for line in found]
    assert len(set(times)) == 1_000
    assert sorted(times) == [10**15 + block * 1_000 + place for block in range(10) for place in range(100)]
    assert moments.moved == 990
    assert (records == before).all()


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=8))
def test_no_two_lines_have_the_same_time(batches: list[list[int]]) -> None:
    """Whatever came before; each stands at the first moment that is free, from its own on."""
    moments, taken, moved = lines.Moments(), set[int](), 0
    for batch in batches:
        found = moments.free(np.array(batch, np.int64)).tolist()
        for place in sorted(range(len(batch)), key=lambda place: batch[place]):
            assert found[place] >= batch[place]
            assert set(range(batch[place], found[place])) <= taken | set(found)
            moved += found[place] != batch[place]
        assert not taken & set(found)
        assert len(set(found)) == len(found)
        taken |= set(found)
    assert moments.moved == moved


def test_moments_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a busy host is bounded."""
    monkeypatch.setattr(lines.Moments, "REMEMBERED", 100)
    moments = lines.Moments()
    for start in range(0, 10_000, 50):
        moments.free(np.arange(start, start + 50))
    assert sum(map(len, moments._taken)) < 200


def test_a_workload_is_told_by_what_lasts() -> None:
    """No id, no pod's name, and no ReplicaSet whose Deployment is known; who it is may become known late."""
    packets = Packets(*traffic.flows_and_records(10), 0, 0)
    found = [read(line)[1] for line in encoded(lines.PacketLines({}, lines.Moments()), packets, POD)]
    expected = {
        "service_name": "web", "k8s_namespace_name": "shop", "k8s_deployment_name": "web", "k8s_container_name": "app",
    }  # fmt: skip
    assert [expected.items() <= each.items() for each in found] == [True] * 10
    assert {name for each in found for name in each} == {
        *expected, "direction", "segment", "process_executable_name",
    }  # fmt: skip
    assert [name for name, _ in lines.workload_tags(lines.like(POD))] == [
        name for name, _ in lines.workload_tags(POD)
    ]  # fmt: skip
    host = Workload(Place(unit="ssh"), "sshd")
    assert lines.workload_tags(host) == (("service.name", "ssh"), ("process.executable.name", "sshd"))


def test_a_peer_is_told_by_what_lasts_too() -> None:
    """The rest of what is known of it are fields."""
    peer = (
        ("tcp.peer.kind", "pod"), ("tcp.peer.k8s.pod.name", "db-0"), ("tcp.peer.k8s.cronjob.name", "nightly"),
        ("tcp.peer.k8s.job.name", "nightly-28"), ("tcp.peer.address", "10.0.0.1"),
    )  # fmt: skip
    one = replace(connection(1, Counts(1, 2, 3, 4, 5), end=End.OBSERVED), peer_names=peer)
    _, tags, fields, _ = line_of(one)
    assert {name: tags[name] for name in tags if name.startswith("peer_")} == {
        "peer_kind": "pod", "peer_k8s_cronjob_name": "nightly",
    }  # fmt: skip
    assert (fields["peer_k8s_pod_name"], fields["real_peer_address"]) == ("db-0", "10.0.0.1")


def line_of(one: Connection, asked: frozenset[str] = frozenset()) -> Read:
    """The line of a connection."""
    found = lines.ConnectionLines(lines.Moments(), asked).encode([one])
    return read(lines.LineEnvelope(lambda _: UNKNOWN).wrap([Part(0, [found.buffer], len(found.buffer))]))


def test_a_connection_says_what_its_span_says() -> None:
    """Everything of the span as fields, but for what has few values."""
    one = connection(
        1, Counts(10, 20, 3, 4, 5), end=End.OBSERVED, close_reason=CloseReason.RESET, close_initiator="peer",
        error_type="connection_reset", rtt_smoothed_s=0.5, process_name="a b",
    )  # fmt: skip
    measurement, tags, fields, time_ns = line_of(one)
    assert (measurement, time_ns) == ("tcp_connection", one.end_ns)
    assert tags == {
        "connection_role": "client", "close_reason": "reset", "close_initiator": "peer",
        "error_type": "connection_reset", "process_executable_name": "a b",
    }  # fmt: skip
    expected: Mapping[str, Any] = {
        "bytes_sent": 10, "bytes_received": 20, "packets_sent": 3, "packets_received": 4, "retransmits": 5,
        "rtt_smoothed": 0.5, "start_ns": one.start_ns, "trace_id": one.trace_id.hex(), "server_port": one.peer.port,
        "duration": (one.end_ns - one.start_ns) / 1e9, "connection_end": "observed",
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected
    _, tags, fields, _ = line_of(one, frozenset(("server.port",)))
    assert tags["server_port"] == str(one.peer.port)
    assert "server_port" not in fields


def test_connections_that_end_at_once_are_told_at_different_moments() -> None:
    """As all do that are open when the agent stops."""
    moments = lines.Moments()
    found = lines.ConnectionLines(moments).encode([connection(slot, end=End.AGENT_SHUTDOWN) for slot in range(5)])
    assert len({read(line.replace(b"\0", b""))[3] for line in cut(found)}) == 5
    assert moments.moved == 4


def test_series_add_up_by_what_their_tags_say() -> None:
    """Two pods of a Deployment share a series; beyond the limit there is one for all others, and it says so."""
    series = Traffic(2, lines.like)
    other = POD._replace(place=Place(container_id="d" * 64, pod_uid="uid-2"))
    ended = {"end": End.OBSERVED, "close_reason": CloseReason.RESET, "close_initiator": "peer"}
    for slot, workload in enumerate((POD, other, WEB, Workload(Place(), "job"))):
        one = connection(slot, Counts(10, 20, 3, 4, 1), rtt_smoothed_s=0.25, **ended)
        series.add(one, workload, DATABASE, NOW_NS)
    told = [read(line) for line in lines.series_lines(series, {}, NOW_NS + 9)]
    assert {(measurement, time_ns) for measurement, _, _, time_ns in told} == {("tcp_peer", NOW_NS + 9)}
    web = next(each for each in told if each[1].get("k8s_deployment_name") == "web")
    assert web[1]["peer_service_name"] == "db"
    assert sorted(fields["connections_closed"] for _, _, fields, _ in told) == [1, 1, 2]
    sums = {name: sum(each[2][name] for each in told) for name in web[2]}
    assert sums == {
        "bytes_sent": 40, "bytes_received": 80, "packets_sent": 12, "packets_received": 16, "retransmits": 4,
        "connections_opened": 4, "connections_closed": 4, "connections_failed": 0, "resets": 4,
        "handshake_duration_count": 4, "handshake_duration_sum": 1.0, "rtt_smoothed_count": 4, "rtt_smoothed_sum": 1.0,
    }  # fmt: skip
    assert [tags for _, tags, _, _ in told if "otel_metric_overflow" in tags] == [{"otel_metric_overflow": "true"}]


def test_drops_have_the_kernels_names() -> None:
    """And a measurement of their own, by reason."""
    records, _, _ = traffic.flows_and_records(4)
    records["drop_reason"] = [2, 77, 77, 9]
    series = Traffic(10, lines.like)
    series.drop(records, np.array([1, 1, 1, 0]), [UNKNOWN, POD].__getitem__, NOW_NS)
    found = [read(line) for line in lines.series_lines(series, REASONS, NOW_NS)]
    assert [(name, tags["drop_reason"], tags.get("service_name"), fields) for name, tags, fields, _ in found] == [
        ("tcp_drop", "NO_SOCKET", "web", {"packets": 1}),
        ("tcp_drop", "TCP_CSUM", "web", {"packets": 2}),
        ("tcp_drop", "9", None, {"packets": 1}),
    ]  # fmt: skip


def test_the_agent_tells_the_ledger() -> None:
    """Its sum, and each reason."""
    balance = Balance(10, 3, 0, {"signal_off": 2}, {"queue_full": 4}, 1)
    counts = {Signal.TRACES: ExportCounts(7, {"queue_full": 2}, 1)}
    found = [read(line) for line in lines.agent_lines(Observation(1, 99, balance, 5, {"late": 0}, counts))]
    assert found[0] == (
        "tcpio", {},
        {
            "packets_seen": 10, "packets_exported": 3, "packets_filtered": 2, "packets_sampled": 0,
            "packets_dropped": 4, "packets_in_flight": 1, "connections_open": 5, "late": 0,
            "lines_of_connections_written": 7, "lines_of_connections_dropped": 2,
        },
        99,
    )  # fmt: skip
    assert found[1:] == [
        ("tcpio_packets", {"outcome": "filtered", "reason": "signal_off"}, {"packets": 2}, 99),
        ("tcpio_packets", {"outcome": "dropped", "reason": "queue_full"}, {"packets": 4}, 99),
    ]
