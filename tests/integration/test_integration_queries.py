"""Each query of docs/queries.md, taken from the page and asked of the real backend, answers with what happened."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.backends import Backends
from tests.integration.captured import (
    ADDRESSES,
    BULK,
    CLOSED,
    FULL,
    LOST_ANSWERS,
    LOST_REQUESTS,
    SLOW,
    SMALL,
    TURNED_AWAY,
    Story,
)
from tests.kernel.harness import plain
from tests.peers.server import REPOSITORY

PAGE = (REPOSITORY / "docs" / "queries.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
CHECKOUT, REPORTS, PAYMENTS = ("checkout-0", "reports-0", "payments-0")

Rows = list[Any]
Case = tuple[str, str, int]
"""A section, a language, and which of the blocks in that language."""


def _cases() -> dict[Case, str]:
    found: dict[Case, str] = {}
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        for language, text in BLOCK.findall(section):
            number = sum(case[:2] == (title, language) for case in found)
            found[title, language, number] = text
    return found


CASES = _cases()
ANSWERS: dict[Case, Callable[[Rows, Story], None]] = {}


def answers(title: str, language: str, number: int = 0) -> Callable[[Callable[[Rows, Story], None]], Any]:
    """What a query of the page must find."""

    def register(check: Callable[[Rows, Story], None]) -> Callable[[Rows, Story], None]:
        ANSWERS[title, language, number] = check
        return check

    return register


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)).replace(" ", "_") for case in CASES])
def test_the_query_finds_what_happened(filled: Backends, story: Story, case: Case) -> None:
    """Word for word as the page has it."""
    ANSWERS[case](filled.ask(case[1], CASES[case], story.trace_id), story)


def test_nothing_is_missing_from_the_tables(filled: Backends, story: Story) -> None:
    """Each record that the agent wrote is a row, whatever way it took."""
    counted = Counter(record["eventName"] for record in story.written("logs"))
    assert set(counted) == {"tcp.packet", "tcp.request", "tcp.connection.summary"}
    for language, query, name in (
        ("sql", "SELECT EventName, count() AS rows FROM otel_logs GROUP BY EventName", "EventName"),
        ("logsql", "* | stats by (event_name) count() rows", "event_name"),
    ):
        assert {row[name]: int(row["rows"]) for row in filled.ask(language, query)} == counted


def picked(rows: Rows, *names: str) -> list[tuple[Any, ...]]:
    """Some columns; VictoriaLogs leaves out what is empty."""
    return [tuple(row.get(name, "") for name in names) for row in rows]


def tags(span: dict[str, Any]) -> dict[str, Any]:
    """Of one of Jaeger's spans."""
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def client_ports(traces: Rows) -> set[int]:
    """Of the connections that Jaeger found."""
    return {tags(span)["client.port"] for trace in traces for span in trace["spans"]}


def pods_of(item: dict[str, Any]) -> tuple[str, str]:
    """Whose a record or span is, and who its peer is."""
    return item["attributes"].get("k8s.pod.name", ""), item["attributes"].get("tcp.peer.k8s.pod.name", "")


@answers("Which pods retransmit", "sql")
def _(rows: Rows, story: Story) -> None:
    expected: Counter[tuple[str, str]] = Counter()
    for span in story.written("traces"):
        expected[pods_of(span)] += span["attributes"]["tcp.retransmits"]
    assert {(row["pod"], row["to_pod"]): int(row["retransmits"]) for row in rows} == +expected
    assert expected[PAYMENTS, CHECKOUT] >= LOST_ANSWERS
    assert expected[CHECKOUT, PAYMENTS] >= LOST_REQUESTS + 1  # and a SYN
    assert all(int(row["sent"]) > int(row["retransmits"]) for row in rows)
    assert [int(row["retransmits"]) for row in rows] == sorted(expected.values(), reverse=True)[: len(rows)]


@answers("Which pods retransmit", "logsql")
def _(rows: Rows, story: Story) -> None:
    expected = Counter(pods_of(packet) for packet in story.written("logs") if "tcp.retransmit" in packet["attributes"])
    pairs = picked(rows, "k8s.pod.name", "tcp.peer.k8s.pod.name")
    assert dict(zip(pairs, (int(row["retransmits"]) for row in rows), strict=True)) == expected
    assert expected[CHECKOUT, PAYMENTS] >= LOST_REQUESTS + 1


@answers("Which pods retransmit", "logql")
def _(samples: Rows, story: Story) -> None:
    expected = Counter(pods_of(packet) for packet in story.written("logs") if "tcp.retransmit" in packet["attributes"])
    found = {(labels["k8s_pod_name"], labels["tcp_peer_k8s_pod_name"]): int(value) for labels, value in samples}
    assert found == expected


def workloads_of(span: dict[str, Any]) -> tuple[str, str]:
    """Whose a span is, as Prometheus calls it, and who its peer is."""
    own = span["attributes"]
    return f"{own['service.namespace']}/{own['service.name']}", own["tcp.peer.service.name"]


def by_workloads(samples: Rows) -> dict[tuple[str, str], float]:
    """Samples, likewise."""
    return {(labels["job"], labels["tcp_peer_service_name"]): value for labels, value in samples}


@answers("Which pods retransmit", "promql")
def _(samples: Rows, story: Story) -> None:
    expected: Counter[tuple[str, str]] = Counter()
    for span in story.written("traces"):
        expected[workloads_of(span)] += span["attributes"]["tcp.retransmits"]
    assert by_workloads(samples) == +expected


@answers("Whose handshakes are slow", "sql")
def _(rows: Rows, story: Story) -> None:
    assert picked(rows[:1], "client", "server", "port") == [(CHECKOUT, PAYMENTS, str(SLOW))]
    assert rows[0]["longest_ms"] >= 1000
    assert picked(rows, "longest_ms") == sorted(picked(rows, "longest_ms"), reverse=True)
    assert {(row["client"], row["port"]): int(row["connections"]) for row in rows} == {
        (CHECKOUT, str(SLOW)): 1,
        (CHECKOUT, str(BULK)): 1,
        (CHECKOUT, str(FULL)): 1,
        (CHECKOUT, str(SMALL)): 2,
        (REPORTS, str(SMALL)): 1,
    }


@answers("Whose handshakes are slow", "promql")
def _(samples: Rows, story: Story) -> None:
    found = {(labels["job"], labels["server_port"]): seconds for labels, seconds in samples}
    established = {("shop/checkout", str(port)) for port in (BULK, SLOW, SMALL, FULL)} | {("shop/reports", str(SMALL))}
    assert set(found) == established
    assert max(found, key=lambda each: found[each]) == ("shop/checkout", str(SLOW))
    assert found["shop/checkout", str(SLOW)] > 0.9


@answers("Whose backlog is full", "sql")
def _(rows: Rows, story: Story) -> None:
    found = picked(rows, "server", "port", "connections", "syns")
    assert [(*row[:2], int(row[2]), int(row[3])) for row in found] == [
        (PAYMENTS, str(FULL), TURNED_AWAY, 2 * TURNED_AWAY)
    ]


@answers("Whose backlog is full", "logsql")
def _(rows: Rows, story: Story) -> None:
    found = picked(rows, "k8s.pod.name", "network.local.port", "connections", "syns")
    assert found == [(PAYMENTS, str(FULL), str(TURNED_AWAY), str(2 * TURNED_AWAY))]


@answers("Who resets whom", "sql")
def _(rows: Rows, story: Story) -> None:
    found = picked(rows, "resets", "is_reset", "port", "reason", "connections")
    assert sorted(found) == [
        (PAYMENTS, CHECKOUT, str(SMALL), "reset", 1),
        (PAYMENTS, REPORTS, str(CLOSED), "refused", 1),
    ]


@answers("Who resets whom", "logsql")
def _(rows: Rows, story: Story) -> None:
    found = picked(rows, "network.local.address", "network.local.port", "network.peer.address", "resets")
    assert sorted(found) == [
        (ADDRESSES["payments"], str(SMALL), ADDRESSES["checkout"], "1"),
        (ADDRESSES["payments"], str(CLOSED), ADDRESSES["reports"], "1"),
    ]


@answers("Who resets whom", "logql")
def _(samples: Rows, story: Story) -> None:
    names = "network_local_address", "network_local_port", "network_peer_address"
    assert sorted((*(labels[name] for name in names), value) for labels, value in samples) == [
        (ADDRESSES["payments"], str(SMALL), ADDRESSES["checkout"], "1"),
        (ADDRESSES["payments"], str(CLOSED), ADDRESSES["reports"], "1"),
    ]


@answers("Who resets whom", "http")
def _(traces: Rows, story: Story) -> None:
    assert client_ports(traces) == {story.asked["abort"]["port"]}


def traced(story: Story) -> list[dict[str, Any]]:
    """The packets of the trace, in time order."""
    found = [record for record in story.written("logs") if record.get("traceId") == story.trace_id]
    packets = [record for record in found if record["eventName"] == "tcp.packet"]
    sent = sum(
        packet["attributes"]["tcp.payload.size"]
        for packet in packets
        if packet["attributes"]["network.io.direction"] == "transmit" and "tcp.retransmit" not in packet["attributes"]
    )
    assert sent == sum(story.asked["traced"][way] for way in ("sent", "received"))
    return sorted(packets, key=lambda packet: int(packet["timeUnixNano"]))


@answers("Who resets whom", "promql")
def _(samples: Rows, story: Story) -> None:
    assert by_workloads(samples) == {("shop/payments", "checkout"): 1}
    assert samples[0][0]["server_port"] == str(SMALL)


@answers("The packets of this trace", "sql")
def _(rows: Rows, story: Story) -> None:
    expected = [
        (
            packet["body"]["stringValue"], packet["attributes"]["service.name"],
            packet["attributes"]["network.io.direction"], packet["attributes"]["tcp.flags"],
            packet["attributes"]["tcp.payload.size"], "tcp.retransmit" in packet["attributes"],
        )
        for packet in traced(story)
    ]  # fmt: skip
    found = picked(rows, "Body", "at", "direction", "flags", "bytes", "again")
    assert [(*row[:4], int(row[4]), bool(row[5])) for row in found] == expected


@answers("The packets of this trace", "logsql")
def _(rows: Rows, story: Story) -> None:
    assert [row["_msg"] for row in rows] == [packet["body"]["stringValue"] for packet in traced(story)]


@answers("The packets of this trace", "logql")
def _(lines: Rows, story: Story) -> None:
    assert [line for _, line in lines] == [packet["body"]["stringValue"] for packet in traced(story)]


@answers("The packets of this trace", "sql", 1)
def _(rows: Rows, story: Story) -> None:
    asked = story.asked["traced"]
    both = asked["sent"], asked["received"]
    found = {row["at"]: (int(row["bytes_sent"]), int(row["bytes_received"])) for row in rows}
    assert found == {"checkout": both, "payments": both[::-1]}
    assert all(row["SpanId"] == story.span_id and row["first_byte_ms"] > 0 for row in rows)


@answers("The packets of this trace", "sql", 2)
def _(rows: Rows, story: Story) -> None:
    assert picked(rows, "at", "SpanKind", "reason") == [("checkout", "Client", "fin"), ("payments", "Server", "fin")]


@answers("Connections that never closed", "sql")
def _(rows: Rows, story: Story) -> None:
    assert sorted(picked(rows, "pod", "peer")) == [(PAYMENTS, REPORTS), (REPORTS, PAYMENTS)]
    assert {row["port"] for row in rows} == {str(SMALL)}
    for row in rows:
        one, other = row["bytes_sent"], row["bytes_received"]
        told = (one, other) if row["pod"] == REPORTS else (other, one)
        assert 0 < int(told[0]) <= story.asked["hold"]["sent"]
        assert int(told[1]) == 0


@answers("Connections that never closed", "sql", 1)
def _(rows: Rows, story: Story) -> None:
    assert sorted(picked(rows, "pod", "peer", "port", "end")) == [
        (CHECKOUT, PAYMENTS, str(FULL), "agent_shutdown"),
        (PAYMENTS, CHECKOUT, str(FULL), "agent_shutdown"),
        (PAYMENTS, REPORTS, str(SMALL), "agent_shutdown"),
        (REPORTS, PAYMENTS, str(SMALL), "agent_shutdown"),
    ]
    assert all(row["open_s"] > 2 for row in rows)


@answers("Connections that never closed", "http")
def _(traces: Rows, story: Story) -> None:
    assert client_ports(traces) == {story.asked["hold"]["port"]}


@answers("Top talkers", "sql")
def _(rows: Rows, story: Story) -> None:
    checkout = [told for name, told in story.asked.items() if name != "hold"]
    sums, connections = [sum(told[way] for told in checkout) for way in ("sent", "received")], len(checkout)
    expected = [
        (CHECKOUT, PAYMENTS, *sums, connections + 1 + TURNED_AWAY),
        (REPORTS, PAYMENTS, story.asked["hold"]["sent"], 0, 2),
    ]
    found = picked(rows, "client", "server", "bytes_sent", "bytes_received", "connections")
    assert [(*row[:2], *map(int, row[2:])) for row in found] == expected


@answers("Top talkers", "logsql")
def _(rows: Rows, story: Story) -> None:
    pairs = picked(rows, "k8s.pod.name", "tcp.peer.k8s.pod.name")
    assert pairs[:2] == [(PAYMENTS, CHECKOUT), (CHECKOUT, PAYMENTS)]
    answered = sum(told["received"] for told in story.asked.values())
    assert int(rows[0]["bytes"]) > answered  # with what was lost


@answers("Top talkers", "logql")
def _(samples: Rows, story: Story) -> None:
    expected: Counter[tuple[str, str]] = Counter()
    for record in story.written("logs"):
        if record["eventName"] == "tcp.packet" and record["attributes"]["network.io.direction"] == "transmit":
            expected[pods_of(record)] += record["attributes"]["tcp.payload.size"]
    found = {
        (labels.get("k8s_pod_name", ""), labels.get("tcp_peer_k8s_pod_name", "")): int(value)
        for labels, value in samples
    }
    assert found == expected


@answers("Top talkers", "promql")
def _(samples: Rows, story: Story) -> None:
    held = story.asked["hold"]
    others = [told for told in story.asked.values() if told is not held]
    assert by_workloads(samples) == {
        ("shop/checkout", "payments"): sum(told["sent"] + told["received"] for told in others),
        ("shop/reports", "payments"): held["sent"],
    }


@answers("Asymmetric loss between two ends", "sql")
def _(rows: Rows, story: Story) -> None:
    found = {(row["source"], row["destination"]): int(row["lost"]) for row in rows}
    checkout, reports, payments = (ADDRESSES[name] for name in ("checkout", "reports", "payments"))
    assert found == {
        (payments, checkout): story.lost["to_client", BULK],
        (checkout, payments): story.lost["to_server", BULK] + story.lost["to_server", SLOW],
        (reports, payments): 0,
        (payments, reports): 0,
    }


@answers("Is it the agent", "promql")
def _(samples: Rows, story: Story) -> None:
    assert samples == []


@answers("Is it the agent", "promql", 1)
def _(samples: Rows, story: Story) -> None:
    _request, resource, metrics = story.own_metrics()
    host, faults = resource["host.name"], metrics["tcpio.faults"]
    counted = {
        (host, plain(point["attributes"])["tcpio.fault"]): int(point["asInt"])
        for point in faults["sum"]["dataPoints"]
        if int(point["asInt"])
    }
    assert {(labels["instance"], labels["tcpio_fault"]): value for labels, value in samples} == counted
