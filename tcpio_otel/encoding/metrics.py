"""The agent's own counters to an OTLP metrics request: the ledger, the exporters, the connection table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource

from tcpio_otel import names
from tcpio_otel.encoding.spans import SCOPE
from tcpio_otel.ledger import Balance
from tcpio_otel.payload import Signal

Points = Iterable[tuple[int, dict[str, str]]]

EXPORTER_METRICS = {
    Signal.LOGS: (names.EXPORTED_LOGS, names.INFLIGHT_LOGS),
    Signal.TRACES: (names.EXPORTED_SPANS, names.INFLIGHT_SPANS),
    Signal.METRICS: (names.EXPORTED_POINTS, names.INFLIGHT_POINTS),
}


@dataclass(frozen=True)
class ExportCounts:
    """What became of the items of one signal: accepted, failed by `error.type`, and those under way."""

    accepted: int = 0
    failed: Mapping[str, int] | None = None
    inflight: int = 0


@dataclass(frozen=True)
class Observation:
    """All that the agent reports of itself at one moment; times are Unix nanoseconds."""

    started_ns: int
    now_ns: int
    balance: Balance
    open_connections: int
    faults: Mapping[str, int]
    exports: Mapping[Signal, ExportCounts]


def total(of: names.Instrument, points: list[NumberDataPoint]) -> Metric:
    """A cumulative sum."""
    data = Sum(points, AggregationTemporality.CUMULATIVE, of.kind is names.Kind.SUM)
    return Metric(of.name, of.meaning, of.unit, data)


def points_in(found: Iterable[ResourceMetrics]) -> int:
    """How many data points these are."""
    return sum(
        len(metric.data.data_points) for each in found for scope in each.scope_metrics for metric in scope.metrics
    )


def request_of(found: list[ResourceMetrics]) -> tuple[ExportMetricsServiceRequest, int]:
    """Metrics as an export request, and the number of data points in it."""
    return encode_metrics(MetricsData(found)), points_in(found)


def _sum(observation: Observation, of: names.Instrument, points: Points) -> Metric:
    found = [
        NumberDataPoint(attributes, observation.started_ns, observation.now_ns, value) for value, attributes in points
    ]
    return total(of, found)


def metrics(observation: Observation) -> list[Metric]:
    """The metrics of an observation. `tcpio.packets` adds up over its points to `tcpio.packets.seen`."""
    balance = observation.balance
    outcomes: list[tuple[int, dict[str, str]]] = [
        (balance.exported, {names.OUTCOME: "exported"}),
        (balance.sampled, {names.OUTCOME: "sampled"}),
        (balance.in_flight, {names.OUTCOME: "in_flight"}),
    ]
    for outcome, reasons in (("filtered", balance.filtered), ("dropped", balance.dropped)):
        outcomes += [(count, {names.OUTCOME: outcome, names.REASON: reason}) for reason, count in reasons.items()]
    found = [
        _sum(observation, names.SEEN, [(balance.seen, {})]),
        _sum(observation, names.OUTCOMES, outcomes),
        _sum(observation, names.WRONG, [(count, {names.FAULT: fault}) for fault, count in observation.faults.items()]),
        Metric(
            names.OPEN.name, names.OPEN.meaning, names.OPEN.unit,
            Gauge([NumberDataPoint({}, observation.started_ns, observation.now_ns, observation.open_connections)]),
        ),
    ]  # fmt: skip
    for signal, counts in observation.exports.items():
        ended, inflight = EXPORTER_METRICS[signal]
        component = {names.COMPONENT: f"tcpio_otel/{signal.value}"}
        exported = [(counts.accepted, component)]
        exported += [(count, {**component, names.ERROR_TYPE: kind}) for kind, count in (counts.failed or {}).items()]
        found += [
            _sum(observation, ended, exported),
            _sum(observation, inflight, [(counts.inflight, component)]),
        ]
    return [metric for metric in found if metric.data.data_points]


def resource_metrics(observation: Observation, resource: Resource) -> ResourceMetrics:
    """An observation, and whose it is."""
    scope = ScopeMetrics(SCOPE, metrics(observation), names.SCHEMA_URL)
    return ResourceMetrics(resource, [scope], names.SCHEMA_URL)


def metrics_request(observation: Observation, resource: Resource) -> tuple[ExportMetricsServiceRequest, int]:
    """An observation as an export request, and the number of data points in it."""
    return request_of([resource_metrics(observation, resource)])
