"""Metrics of traffic against programs' own counts, spans, and a ring that is much too small."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.harness import Namespace, agent, drawing, only, plain, spans, wait_for

Points = dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]
"""By metric, the last value of each series: its attributes, with those of its Resource, and the data point."""


def last_points(directory: Path) -> Points:
    """What the last export of each series said."""
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for line in (directory / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines():
        for resource in json.loads(line)["resourceMetrics"]:
            whose = plain(resource["resource"]["attributes"])
            for metric in resource["scopeMetrics"][0]["metrics"]:
                data = next(metric[kind] for kind in ("sum", "gauge", "exponentialHistogram") if kind in metric)
                for point in data["dataPoints"]:
                    attributes = {**whose, **plain(point.get("attributes", []))}
                    found[metric["name"], json.dumps(attributes, sort_keys=True)] = attributes, point
    points: Points = {}
    for (name, _), value in found.items():
        points.setdefault(name, []).append(value)
    return points


def total(points: Points, name: str, **wanted: Any) -> int:
    """The sum over series with these attributes, dots written as two underscores."""
    return sum(
        int(point["asInt"])
        for attributes, point in points.get(name, [])
        if all(attributes.get(key.replace("__", ".")) == value for key, value in wanted.items())
    )


def test_series_add_up_to_spans_and_to_what_programs_counted(namespace: Namespace, tmp_path: Path) -> None:
    """Connections that end well, are refused, and are reset; with exports while they go on."""
    settings = {**only(namespace), "TCPIO_METRICS_INTERVAL": "200ms"}
    with agent(tmp_path, "run", "--otlp-file", "out", **settings) as watcher:
        counted = namespace.traffic("exchange", "4", "200", "1000", "30000")
        reset = namespace.traffic("reset")
        namespace.traffic("refused", "4")
        assert watcher.stop() == 0
    points, found = last_points(tmp_path / "out"), spans(tmp_path / "out")
    client = {"tcp__connection__role": "client", "server__port": counted["port"]}
    sent, received = {"network__io__direction": "transmit"}, {"network__io__direction": "receive"}
    assert total(points, "tcp.io", **client, **sent) == counted["server_received"]
    assert total(points, "tcp.io", **client, **received) == counted["client_received"]
    server = {"tcp__connection__role": "server", "server__port": counted["port"]}
    assert total(points, "tcp.io", **server, **sent) == counted["client_received"]
    for role in (client, server):
        assert total(points, "tcp.connections.opened", **role) == counted["connections"]
        assert total(points, "tcp.connections.closed", **role, tcp__close__reason="fin") == counted["connections"]
    for role, initiator in (("client", "local"), ("server", "peer")):
        of_reset = {"server__port": reset["port"], "tcp__connection__role": role}
        assert total(points, "tcp.resets", **of_reset, tcp__close__initiator=initiator) == 1
    assert total(points, "tcp.connections.failed", server__port=9, error__type="connection_refused") == 1
    by_span: Counter[tuple[str, str, str]] = Counter()
    for span in found:
        attributes = span["attributes"]
        role = {2: "server", 3: "client"}.get(span["kind"])
        if role and attributes["tcp.connection.start"] == "observed":
            key = role, attributes["server.port"]
            by_span[*key, "transmit"] += attributes["tcp.packets.sent"]
            by_span[*key, "receive"] += attributes["tcp.packets.received"]
    for (role, port, direction), packets in by_span.items():
        of = {"tcp__connection__role": role, "server__port": port, "network__io__direction": direction}
        assert total(points, "tcp.packets", **of) == packets
    handshakes = [
        point for attributes, point in points["tcp.handshake.duration"] if attributes["server.port"] == counted["port"]
    ]
    assert [int(point["count"]) for point in handshakes] == [counted["connections"]] * 2
    traces = {span["traceId"] for span in found}
    assert {point["exemplars"][0]["traceId"] for point in handshakes if "exemplars" in point} <= traces


def test_series_are_exact_when_packets_are_lost(namespace: Namespace, tmp_path: Path) -> None:
    """An agent that is kept from reading: the kernel's totals tell all the same.

    Of long connections, and of short ones of which not a single packet finds room. Which end is the client is not
    always known of these, as the numbers of a socket that closes in a hurry do not tell.
    """
    settings = {**only(namespace), "TCPIO_CAPTURE_RING_MEMORY": "1MiB", "TCPIO_METRICS_INTERVAL": "500ms"}
    with agent(tmp_path, "run", "--otlp-file", "out", **settings) as watcher:
        watcher.process.send_signal(signal.SIGSTOP)
        runs = [namespace.traffic("exchange", "4", *run) for run in (("3", "1000", "200000000"), ("100", "9", "7000"))]
        watcher.process.send_signal(signal.SIGCONT)
        assert watcher.stop() == 0
    assert watcher.ledger()["dropped"] > 0
    assert "facts lost" not in watcher.stderr()
    points = last_points(tmp_path / "out")
    both_ways = sum(counted["client_received"] + counted["server_received"] for counted in runs)
    for direction in ("transmit", "receive"):
        assert total(points, "tcp.io", network__io__direction=direction) == both_ways
    assert total(points, "tcp.connections.closed") == 2 * sum(counted["connections"] for counted in runs)
    at_servers = {"tcp__connection__role": "server", "network__io__direction": "transmit"}
    assert total(points, "tcp.io", **at_servers, server__port=runs[0]["port"]) == runs[0]["client_received"]


def test_open_connections_are_told_exactly_too(namespace: Namespace, tmp_path: Path) -> None:
    """While they go on, and packets are lost: the kernel's totals, and round-trip times, once for each export."""
    settings = {**only(namespace), "TCPIO_CAPTURE_RING_MEMORY": "1MiB", "TCPIO_METRICS_INTERVAL": "1s"}
    metrics = tmp_path / "out" / "metrics.jsonl"
    with (
        agent(tmp_path, "run", "--otlp-file", "out", **settings) as watcher,
        drawing(namespace, 3, 20_000_000) as conversation,
    ):
        port = conversation.port

        def moved(points: Points) -> tuple[int, int]:
            ends = (("client", "receive"), ("server", "transmit"))
            return tuple(
                total(points, "tcp.io", server__port=port, tcp__connection__role=role, network__io__direction=direction)
                for role, direction in ends
            )

        def round_trips() -> tuple[int, float]:
            found = [
                (int(point["count"]), point["sum"])
                for attributes, point in last_points(tmp_path / "out").get("tcp.rtt.smoothed", [])
                if attributes["server.port"] == port and attributes["tcp.connection.role"] == "server"
            ]
            return found[0] if found else (0, 0.0)

        def exports() -> int:
            return metrics.read_text().count("\n") if metrics.exists() else 0

        def wait_for_exports(count: int) -> None:
            until = exports() + count
            wait_for(lambda: exports() >= until, "exports")

        wait_for_exports(4)
        if "known at their end alone" in watcher.stderr():
            pytest.skip("before 5.19 nobody may look at sockets without privileges")
        for stopped in (True, True, False):
            known, known_s = round_trips()
            if stopped:
                watcher.process.send_signal(signal.SIGSTOP)
            counted, rtt_us = conversation.draw()
            watcher.process.send_signal(signal.SIGCONT)
            wait_for(lambda n=counted: moved(last_points(tmp_path / "out")) == (n, n), "what the programs counted")
            wait_for_exports(4)
            assert moved(last_points(tmp_path / "out")) == (counted, counted)
            if stopped:  # once while they moved, and not again when they are silent
                now, now_s = round_trips()
                assert now == known + 3
                assert now_s - known_s == pytest.approx(rtt_us / 1e6, abs=3e-6)
        assert not total(last_points(tmp_path / "out"), "tcp.connections.closed", server__port=port)
        conversation.end()
        assert watcher.stop() == 0
    assert watcher.ledger()["dropped"] > 0
    assert moved(last_points(tmp_path / "out")) == (counted, counted)
