"""The agent's own counters as OTLP metrics."""

import json
from dataclasses import replace
from typing import Any

from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric

from tcpio_otel import __version__, names
from tcpio_otel.encoding import proto_json
from tcpio_otel.encoding.metrics import ExportCounts, Observation, metrics, metrics_request
from tcpio_otel.encoding.resource import host_resource
from tcpio_otel.ledger import Balance
from tcpio_otel.payload import Signal

BALANCE = Balance(
    seen=1000,
    exported=700,
    sampled=50,
    filtered={"port": 100, "own": 20},
    dropped={"ring_full": 90, "queue_full": 10},
    in_flight=30,
)
OBSERVATION = Observation(
    started_ns=1_795_000_000_000_000_000,
    now_ns=1_795_000_060_000_000_000,
    balance=BALANCE,
    open_connections=12,
    faults={"late": 3},
    exports={
        Signal.LOGS: ExportCounts(700, {"rejected": 4, "queue_full": 10}, 25),
        Signal.TRACES: ExportCounts(40, None, 0),
        Signal.METRICS: ExportCounts(200, {"http_413": 5}, 1),
    },
)


def by_name(observation: Observation = OBSERVATION) -> dict[str, Metric]:
    """The metrics of a request."""
    request, _ = metrics_request(observation, host_resource(None, {}))
    return {metric.name: metric for metric in request.resource_metrics[0].scope_metrics[0].metrics}


def points(metric: Metric) -> dict[tuple[tuple[str, str], ...], int]:
    """Values by their attributes."""
    kind: Any = getattr(metric, metric.WhichOneof("data"))
    return {
        tuple(sorted((pair.key, pair.value.string_value) for pair in point.attributes)): point.as_int
        for point in kind.data_points
    }


def test_the_ledger_adds_up_for_whoever_looks_at_the_metrics() -> None:
    """Every outcome and every reason is a point of `tcpio.packets`; their sum is `tcpio.packets.seen`."""
    assert BALANCE.difference == 0
    found = by_name()
    assert points(found["tcpio.packets.seen"]) == {(): 1000}
    assert points(found["tcpio.packets"]) == {
        (("tcpio.outcome", "exported"),): 700,
        (("tcpio.outcome", "sampled"),): 50,
        (("tcpio.outcome", "in_flight"),): 30,
        (("tcpio.outcome", "filtered"), ("tcpio.reason", "port")): 100,
        (("tcpio.outcome", "filtered"), ("tcpio.reason", "own")): 20,
        (("tcpio.outcome", "dropped"), ("tcpio.reason", "ring_full")): 90,
        (("tcpio.outcome", "dropped"), ("tcpio.reason", "queue_full")): 10,
    }
    assert sum(points(found["tcpio.packets"]).values()) == 1000


def test_exports_are_counted_as_the_semantic_conventions_have_it() -> None:
    """`otel.sdk.exporter.*`: without error.type what was accepted, with it what was not."""
    found = by_name()
    logs = ("otel.component.name", "tcpio_otel/logs")
    assert points(found["otel.sdk.exporter.log.exported"]) == {
        (logs,): 700,
        (("error.type", "rejected"), logs): 4,
        (("error.type", "queue_full"), logs): 10,
    }
    assert points(found["otel.sdk.exporter.log.inflight"]) == {(logs,): 25}
    assert list(points(found["otel.sdk.exporter.span.exported"]).values()) == [40]
    assert set(points(found["otel.sdk.exporter.metric_data_point.exported"]).values()) == {200, 5}
    units = {name: metric.unit for name, metric in found.items() if name.startswith("otel.sdk")}
    assert set(units.values()) == {"{log_record}", "{span}", "{data_point}"}


def test_a_metric_without_points_is_left_out() -> None:
    """A source that knows no faults sends no empty metric."""
    assert "tcpio.faults" not in {metric.name for metric in metrics(replace(OBSERVATION, faults={}))}


def test_connections_and_faults_are_reported() -> None:
    """How many are open is a gauge; what went wrong is a counter by kind."""
    found = by_name()
    assert found["tcpio.connections.open"].WhichOneof("data") == "gauge"
    assert points(found["tcpio.connections.open"]) == {(): 12}
    assert points(found["tcpio.faults"]) == {(("tcpio.fault", "late"),): 3}


def test_sums_are_cumulative_since_the_start_and_only_counters_are_monotonic() -> None:
    """What is in flight, or changes its outcome, goes down as well as up."""
    for name, metric in by_name().items():
        kind: Any = getattr(metric, metric.WhichOneof("data"))
        assert {point.time_unix_nano for point in kind.data_points} == {OBSERVATION.now_ns}
        if metric.WhichOneof("data") == "sum":
            assert kind.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
            assert {point.start_time_unix_nano for point in kind.data_points} == {OBSERVATION.started_ns}
            assert kind.is_monotonic == (name != "tcpio.packets" and not name.endswith("inflight"))


def test_resource_and_scope_say_whose_metrics_they_are() -> None:
    """The same resource and scope as those of logs and spans."""
    request, _ = metrics_request(OBSERVATION, host_resource("edge", {}))
    (of_resource,) = request.resource_metrics
    (of_scope,) = of_resource.scope_metrics
    assert {pair.key: pair.value.string_value for pair in of_resource.resource.attributes}["service.name"] == "edge"
    assert (of_scope.scope.name, of_scope.scope.version) == ("tcpio_otel", __version__)
    assert {of_resource.schema_url, of_scope.schema_url} == {names.SCHEMA_URL}


def test_the_points_are_counted() -> None:
    """The number that the exporter's own counters go by, in both formats."""
    request, count = metrics_request(OBSERVATION, host_resource(None, {}))
    assert count == sum(len(points(metric)) for metric in by_name().values())
    line = json.loads(proto_json.as_line(request))
    metrics = line["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    assert count == sum(len((metric.get("sum") or metric["gauge"])["dataPoints"]) for metric in metrics)


def test_an_agent_that_has_just_started_reports_zeros() -> None:
    """Nothing seen, nothing exported: a receiver can take rates from the first request on."""
    observation = Observation(1, 2, Balance(), 0, {"late": 0}, {Signal.LOGS: ExportCounts()})
    for metric in by_name(observation).values():
        assert set(points(metric).values()) == {0}
