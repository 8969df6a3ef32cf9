"""The Collector configurations that we show: each is valid, and does what it says, connected to the real thing."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import collector
from tests.integration.captured import Story
from tests.integration.collector import Collector
from tests.kernel.harness import plain, wait_for
from tests.peers import collector_contrib, prometheus
from tests.peers.bulk import bulk
from tests.peers.collector_contrib import CONFIGURATIONS, send, shown
from tests.peers.go import or_skip

BUILDERS = {
    "kubernetes": collector.build,
    **{name: partial(collector_contrib.build_alone, name) for name in collector_contrib.ALONE},
}
"""Of what is not in the Collector that has all else."""

SOON = {
    "connectors": {
        "span_metrics": {"metrics_flush_interval": "100ms"},
        "service_graph": {"metrics_flush_interval": "100ms", "store": {"ttl": "1s"}},
    }
}
UNFILTERED = {"service": {"pipelines": {"traces/requests": {"processors": ["memory_limiter"]}}}}
CLIENT, SERVER, INTERNAL = 3, 2, 1
OURS = {"checkout", "payments", "reports"}

LOGS = ("resourceLogs", "scopeLogs", "logRecords")
SPANS = ("resourceSpans", "scopeSpans", "spans")
METRICS = ("resourceMetrics", "scopeMetrics", "metrics")


@pytest.fixture(autouse=True)
def _collector_is_built() -> None:
    or_skip(collector_contrib.build)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml")))
def test_it_is_valid(name: str, tmp_path: Path) -> None:
    """As it stands, for a Collector that has the components."""
    binary = or_skip(BUILDERS.get(name, collector_contrib.build))
    path = CONFIGURATIONS / f"{name}.yaml"
    variables = dict.fromkeys(re.findall(r"\$\{env:(\w+)", path.read_text()), "http://127.0.0.1:4317")
    variables |= {"QUEUE_DIRECTORY": str(tmp_path), "GATEWAY_HOST": "localhost", "OTLP_INSECURE": "true"}
    result = subprocess.run(
        [binary, "validate", "--config", path], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_page_lists_every_file_and_variable() -> None:
    """The table in config/collector/README.md."""
    page = (CONFIGURATIONS / "README.md").read_text()
    rows = {line.split("]")[0][3:]: line for line in page.splitlines() if line.startswith("| [")}
    assert set(rows) == {path.name for path in CONFIGURATIONS.glob("*.yaml")}
    for name, row in rows.items():
        variables = set(re.findall(r"\$\{env:(\w+)", (CONFIGURATIONS / name).read_text()))
        assert set(re.findall(r"`([A-Z_]+)`", row)) == variables


def app_spans() -> bytes:
    """A request of one application to another, as their instrumentation exports it."""
    now_ns, trace_id, client, server = time.time_ns(), os.urandom(16).hex(), os.urandom(8).hex(), os.urandom(8).hex()
    ends = (("shop", CLIENT, client, ""), ("stock", SERVER, server, client))
    resources = [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]},
            "scopeSpans": [{"scope": {"name": "app"}, "spans": [{
                "traceId": trace_id, "spanId": span_id, "parentSpanId": parent, "name": "GET /items", "kind": kind,
                "startTimeUnixNano": str(now_ns - 5_000_000), "endTimeUnixNano": str(now_ns),
            }]}],
        }
        for service, kind, span_id, parent in ends
    ]  # fmt: skip
    return json.dumps({"resourceSpans": resources}).encode()


def send_all(into: Collector, story: Story) -> None:
    """What our agent sends, and then what applications do: who has heard of these would have heard of ours."""
    send(into, "traces", [*story.requests("traces"), app_spans()])


@contextmanager
def receiver(directory: Path) -> Iterator[Collector]:
    """A Collector that writes down what it receives, in place of a backend or of a gateway."""
    directory.mkdir()
    with collector.collector(directory) as made:
        (directory / "received.json").touch()
        yield made


def span_kinds(received: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Of spans, by their names."""
    found: dict[str, set[int]] = {}
    for span in received:
        found.setdefault(span["name"], set()).add(span["kind"])
    return found


def labels_of(metrics: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The attributes of each point of a metric."""
    points = [point for each in metrics if each["name"] == name for point in each["sum"]["dataPoints"]]
    return [plain(point["attributes"]) for point in points]


@pytest.mark.parametrize("filtered", [True, False], ids=["as_shown", "without_the_filter"])
def test_the_gateway_counts_requests_and_no_connections(story: Story, tmp_path: Path, filtered: bool) -> None:
    """Neither span metrics nor the service graph knows of ours; without the filter, both would."""
    overrides = {**SOON, "processors": {"tail_sampling": {"decision_wait": "1s"}}, **({} if filtered else UNFILTERED)}
    with receiver(tmp_path / "backend") as backend:
        endpoint = f"127.0.0.1:{backend.grpc_port}"
        with shown(tmp_path, "gateway", overrides=overrides, OTLP_ENDPOINT=endpoint, OTLP_INSECURE="true") as gateway:
            send_all(gateway, story)
            wait_for(lambda: ("shop", "stock") in edges(backend), "the service graph")
            wait_for(lambda: {"shop", "stock"} <= services(backend), "span metrics")
            wait_for(lambda: traces(backend) >= troubled(story), "connections with trouble")
    assert services(backend) & OURS == (set() if filtered else OURS)
    assert (("checkout", "payments") in edges(backend)) == (not filtered)


def services(backend: Collector) -> set[str]:
    """Whose calls are counted."""
    return {each["service.name"] for each in labels_of(backend.received(*METRICS), "traces.span.metrics.calls")}


def edges(backend: Collector) -> set[tuple[str, str]]:
    """Who asks whom, by the service graph."""
    points = labels_of(backend.received(*METRICS), "traces_service_graph_request_total")
    return {(each["client"], each["server"]) for each in points}


def traces(backend: Collector) -> set[str]:
    """The ids of traces that were kept."""
    return {span["traceId"] for span in backend.received(*SPANS)}


def troubled(story: Story) -> set[str]:
    """The traces of connections that failed or had to send something again."""
    spans = story.written("traces")
    found = {
        span["traceId"]
        for span in spans
        if span.get("status", {}).get("code") == 2 or span["attributes"]["tcp.retransmits"]
    }
    assert 4 <= len(found) <= len({span["traceId"] for span in spans})
    return found


@pytest.mark.parametrize("filtered", [True, False], ids=["as_shown", "without_the_filter"])
def test_prometheus_has_requests_and_no_connections(story: Story, tmp_path: Path, filtered: bool) -> None:
    """What it answers when asked for calls, and for the edges of the service graph."""
    or_skip(prometheus.build)
    overrides = {**SOON, **({} if filtered else UNFILTERED)}
    with (
        prometheus.started(tmp_path) as server,
        shown(tmp_path, "prometheus", overrides=overrides, PROMETHEUS_ENDPOINT=server.url) as running,
    ):
        send_all(running, story)

        def pairs() -> set[tuple[str, str]]:
            found = server.query("traces_service_graph_request_total")
            return {(labels["client"], labels["server"]) for labels, _ in found}

        def counted() -> set[str]:
            return {labels["service_name"] for labels, _ in server.query("traces_span_metrics_calls_total")}

        wait_for(lambda: ("shop", "stock") in pairs() and {"shop", "stock"} <= counted(), "the applications")
        graph, services = pairs(), counted()
    assert services & OURS == (set() if filtered else OURS)
    assert (("checkout", "payments") in graph) == (not filtered)


def test_agents_are_told_apart_in_prometheus(story: Story, tmp_path: Path) -> None:
    """Two nodes, one series each: by the host's name, as the agent has no instance id."""
    or_skip(prometheus.build)
    request, resource, _metrics = story.own_metrics()
    host = resource["host.name"]
    other = request.replace(b'{"stringValue":"%s"}' % host.encode(), b'{"stringValue":"another"}')
    assert other != request
    with (
        prometheus.started(tmp_path) as server,
        shown(tmp_path, "prometheus", PROMETHEUS_ENDPOINT=server.url) as running,
    ):
        send(running, "metrics", [request, other])
        wait_for(lambda: len(server.query("tcpio_packets_seen_total")) == 2, "both agents")
        assert {labels["instance"] for labels, _ in server.query("tcpio_packets_seen_total")} == {host, "another"}


def test_tempo_gets_connections_as_internal_spans(story: Story, tmp_path: Path) -> None:
    """So that they are no edges of its service graph; applications' spans stay as they are."""
    with receiver(tmp_path / "backend") as backend:
        with shown(tmp_path, "tempo", TEMPO_ENDPOINT=f"127.0.0.1:{backend.grpc_port}") as running:
            send_all(running, story)
        wait_for(lambda: "tcp.connection" in span_kinds(backend.received(*SPANS)), "connections")
    kinds = span_kinds(backend.received(*SPANS))
    assert kinds == {"GET /items": {CLIENT, SERVER}, "tcp.connection": {INTERNAL}}


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("elasticsearch", {"logs": "logs-", "traces": "traces-", "metrics": "metrics-"}),
        ("opensearch", {"logs": "ss4o_logs-", "traces": "ss4o_traces-"}),
    ],
)
def test_a_server_of_documents_gets_each_packet_and_connection(
    story: Story, tmp_path: Path, name: str, indices: dict[str, str]
) -> None:
    """By the exporter itself; the server is a stand-in that takes what the real one's bulk request may have."""
    or_skip(partial(collector_contrib.build_alone, name))
    with bulk() as server:
        variables = {f"{name.upper()}_ENDPOINT": server.url, f"{name.upper()}_API_KEY": "of-the-server"}
        with shown(tmp_path, name, **variables) as running:
            for signal in indices:
                send(running, signal, story.requests(signal))
            for signal, keys in (("logs", LOGS), ("traces", SPANS)):
                expected = total(story.requests(signal), keys)
                # An exporter may gather for half a minute before it sends.
                wait_for(lambda n=expected, s=signal: len(server.of(indices[s])) >= n, signal, 120)
    assert not server.refused
    if name == "elasticsearch":
        assert ("authorization", "apikey of-the-server") in server.headers
        assert server.of(indices["metrics"])
    text = json.dumps(server.of(indices["logs"]))
    assert all(json.dumps(record["body"]["stringValue"]) in text for record in story.written("logs"))
    text = json.dumps(server.of(indices["traces"]))
    assert all(f'"{span["spanId"]}"' in text for span in story.written("traces"))


def test_a_trace_has_one_gateway(story: Story, tmp_path: Path) -> None:
    """Spans of a trace go to the same of two, and both get some; logs and metrics arrive, too."""
    requests = {signal: story.requests(signal) for signal in ("traces", "logs", "metrics")}
    requests["traces"] += [app_spans() for _ in range(50)]
    with ExitStack() as stack:
        gateways = [stack.enter_context(receiver(tmp_path / name)) for name in ("one", "other")]
        endpoints = [f"127.0.0.1:{gateway.grpc_port}" for gateway in gateways]
        # No name here resolves to both.
        balanced = {"resolver": {"dns": None, "static": {"hostnames": endpoints}}}
        overrides = {"exporters": {"load_balancing": balanced, "otlp_grpc": {"endpoint": endpoints[0]}}}
        (queue := tmp_path / "queue").mkdir()
        variables = {"GATEWAY_HOST": "localhost", "QUEUE_DIRECTORY": str(queue)}
        with shown(tmp_path, "agent", overrides=overrides, **variables) as running:
            for signal, sent in requests.items():
                send(running, signal, sent)
            for signal, keys in (("traces", SPANS), ("logs", LOGS), ("metrics", METRICS)):
                expected = total(requests[signal], keys)
                wait_for(lambda k=keys, n=expected: sum(len(each.received(*k)) for each in gateways) == n, signal)
    one, other = ({span["traceId"] for span in gateway.received(*SPANS)} for gateway in gateways)
    assert one
    assert other
    assert not one & other


def total(requests: list[bytes], keys: tuple[str, str, str]) -> int:
    """How many items there are in requests."""
    resources, scopes, items = keys
    return sum(
        len(scope[items])
        for request in requests
        for resource in json.loads(request)[resources]
        for scope in resource[scopes]
    )
