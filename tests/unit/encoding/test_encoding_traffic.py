"""Series of traffic as OTLP metrics, read back by the official classes."""

from typing import Any

from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import UNKNOWN
from tcpio_otel.connections.events import CloseReason, Counts, End
from tcpio_otel.encoding import traffic as encoding
from tcpio_otel.encoding.resource import Resources, host_resource
from tcpio_otel.encoding.traffic import traffic_requests
from tests.unit.aggregation.test_aggregation_traffic import DATABASE, JOB, NOW_NS, WEB, connection

RESOURCES = Resources(host_resource("agent", {}, host_name="node-1"), lambda _: UNKNOWN)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def read(traffic: Traffic, reasons: dict[int, str] | None = None) -> dict[tuple[str, str], list[Any]]:
    """Data points by service and metric."""
    found: dict[tuple[str, str], list[Any]] = {}
    for request, points in traffic_requests(traffic, RESOURCES.of, reasons or {}, NOW_NS + 9):
        told = 0
        for resource in request.resource_metrics:
            for metric in resource.scope_metrics[0].metrics:
                data = getattr(metric, metric.WhichOneof("data"))
                assert data.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
                service = plain(resource.resource.attributes)["service.name"]
                found.setdefault((service, metric.name), []).extend(data.data_points)
                told += len(data.data_points)
        assert told == points
    return found


def values(points: list[Any], *names: str) -> dict[tuple[Any, ...], int]:
    """Values by some attributes."""
    return {tuple(plain(point.attributes).get(name) for name in names): point.as_int for point in points}


def test_a_series_is_many_metrics() -> None:
    """Under the workload's Resource, from when the connection began, with who the peer is."""
    traffic = Traffic(10)
    traffic.add(connection(1, Counts(10, 20, 3, 4, 5)), WEB, DATABASE, NOW_NS)
    traffic.add(
        connection(2, Counts(1, 2, 3, 4, 5), end=End.OBSERVED, close_reason=CloseReason.RESET, close_initiator="peer",
                   error_type="connection_reset", rtt_smoothed_s=0.5),
        WEB, DATABASE, NOW_NS,
    )  # fmt: skip
    traffic.add(
        connection(3, end=End.OBSERVED, close_reason=CloseReason.REFUSED, error_type="connection_refused",
                   handshake_s=None),
        JOB, (), NOW_NS,
    )  # fmt: skip
    found = read(traffic)
    assert values(found["web", "tcp.io"], "network.io.direction") == {("transmit",): 11, ("receive",): 22}
    assert values(found["web", "tcp.packets"], "network.io.direction") == {("transmit",): 6, ("receive",): 8}
    (again,) = found["web", "tcp.retransmits"]
    assert plain(again.attributes) == {
        "tcp.peer.service.name": "db", "tcp.connection.role": "client", "server.port": 5432,
    }  # fmt: skip
    assert (again.as_int, again.start_time_unix_nano, again.time_unix_nano) == (10, NOW_NS - 5, NOW_NS + 9)
    assert values(found["web", "tcp.connections.opened"]) == {(): 2}
    assert values(found["web", "tcp.connections.closed"], "tcp.close.reason") == {("reset",): 1}
    assert values(found["web", "tcp.resets"], "tcp.close.initiator") == {("peer",): 1}
    assert ("web", "tcp.connections.failed") not in found
    assert values(found["job", "tcp.connections.failed"], "error.type") == {("connection_refused",): 1}
    (handshakes,) = found["web", "tcp.handshake.duration"]
    assert (handshakes.count, handshakes.sum, handshakes.scale, list(handshakes.positive.bucket_counts)) == (
        2, 0.5, 3, [2],
    )  # fmt: skip
    assert (handshakes.exemplars[0].trace_id, handshakes.exemplars[0].span_id) == (b"t" * 16, b"s" * 8)
    assert found["web", "tcp.rtt.smoothed"][0].max == 0.5
    assert not read(traffic)["web", "tcp.handshake.duration"][0].exemplars  # each is told once


def test_drops_have_the_kernels_names() -> None:
    """A number without a name stands for itself."""
    traffic = Traffic(10)
    traffic.add(connection(), WEB, (), NOW_NS)
    series = dict(traffic)[next(key for key, _ in traffic)]
    series.drops.update({2: 3, 99: 4})
    found = values(read(traffic, {2: "NO_SOCKET"})["web", "tcp.drops"], "tcp.drop.reason")
    assert found == {("NO_SOCKET",): 3, ("99",): 4}


def test_what_found_no_place_says_so() -> None:
    """By the attribute that OpenTelemetry's SDKs use for that."""
    traffic = Traffic(1)
    for slot, workload in enumerate((WEB, JOB)):
        traffic.add(connection(slot, Counts(5, 0, 1, 0, 0)), workload, (), NOW_NS)
    found = values(read(traffic)["agent", "tcp.io"], "otel.metric.overflow", "network.io.direction")
    assert found == {(True, "transmit"): 5, (True, "receive"): 0}


def test_many_series_are_several_requests(monkeypatch: Any) -> None:
    """So that none is larger than receivers take."""
    monkeypatch.setattr(encoding, "POINTS", 20)
    traffic = Traffic(100)
    for slot in range(50):
        workload = WEB._replace(program=str(slot), place=WEB.place._replace(unit=str(slot)))
        traffic.add(connection(slot, Counts(5, 0, 1, 0, 0)), workload, (), NOW_NS)
    requests = list(traffic_requests(traffic, RESOURCES.of, {}, NOW_NS))
    assert len(requests) > 5
    assert sum(len(request.resource_metrics) for request, _ in requests) == 50
