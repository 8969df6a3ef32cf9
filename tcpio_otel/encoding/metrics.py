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

from tcpio_otel.encoding import names
from tcpio_otel.encoding.spans import SCOPE
from tcpio_otel.ledger import Balance
from tcpio_otel.payload import Signal

Points = Iterable[tuple[int, dict[str, str]]]

EXPORTER_METRICS = {
    Signal.LOGS: ("otel.sdk.exporter.log", "{log_record}"),
    Signal.TRACES: ("otel.sdk.exporter.span", "{span}"),
    Signal.METRICS: ("otel.sdk.exporter.metric_data_point", "{data_point}"),
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


def total(name: str, unit: str, description: str, points: list[NumberDataPoint], *, monotonic: bool = True) -> Metric:
    """A cumulative sum."""
    return Metric(name, description, unit, Sum(points, AggregationTemporality.CUMULATIVE, monotonic))


def points_in(found: Iterable[ResourceMetrics]) -> int:
    """How many data points these are."""
    return sum(
        len(metric.data.data_points) for each in found for scope in each.scope_metrics for metric in scope.metrics
    )


def request_of(found: list[ResourceMetrics]) -> tuple[ExportMetricsServiceRequest, int]:
    """Metrics as an export request, and the number of data points in it."""
    return encode_metrics(MetricsData(found)), points_in(found)


def _sum(
    observation: Observation, name: str, unit: str, description: str, points: Points, *, monotonic: bool
) -> Metric:
    found = [
        NumberDataPoint(attributes, observation.started_ns, observation.now_ns, value) for value, attributes in points
    ]
    return total(name, unit, description, found, monotonic=monotonic)


def metrics(observation: Observation) -> list[Metric]:
    """The metrics of an observation. `tcpio.packets` adds up over its points to `tcpio.packets.seen`."""
    balance = observation.balance
    outcomes: list[tuple[int, dict[str, str]]] = [
        (balance.exported, {"tcpio.outcome": "exported"}),
        (balance.sampled, {"tcpio.outcome": "sampled"}),
        (balance.in_flight, {"tcpio.outcome": "in_flight"}),
    ]
    for outcome, reasons in (("filtered", balance.filtered), ("dropped", balance.dropped)):
        outcomes += [(count, {"tcpio.outcome": outcome, "tcpio.reason": reason}) for reason, count in reasons.items()]
    found = [
        _sum(observation, "tcpio.packets.seen", "{packet}", "Packets seen.", [(balance.seen, {})], monotonic=True),
        _sum(observation, "tcpio.packets", "{packet}", "What became of them.", outcomes, monotonic=False),
        _sum(
            observation, "tcpio.faults", "{fault}", "What went wrong without costing a packet.",
            [(count, {"tcpio.fault": fault}) for fault, count in observation.faults.items()], monotonic=True,
        ),
        Metric(
            "tcpio.connections.open", "Connections whose span is still owed.", "{connection}",
            Gauge([NumberDataPoint({}, observation.started_ns, observation.now_ns, observation.open_connections)]),
        ),
    ]  # fmt: skip
    for signal, counts in observation.exports.items():
        name, unit = EXPORTER_METRICS[signal]
        component = {"otel.component.name": f"tcpio_otel/{signal.value}"}
        exported = [(counts.accepted, component)]
        exported += [(count, {**component, names.ERROR_TYPE: kind}) for kind, count in (counts.failed or {}).items()]
        found += [
            _sum(observation, f"{name}.exported", unit, "Items whose export ended.", exported, monotonic=True),
            _sum(
                observation,
                f"{name}.inflight",
                unit,
                "Items under way.",
                [(counts.inflight, component)],
                monotonic=False,
            ),
        ]
    return [metric for metric in found if metric.data.data_points]


def metrics_request(observation: Observation, resource: Resource) -> tuple[ExportMetricsServiceRequest, int]:
    """An observation as an export request, and the number of data points in it."""
    scope = ScopeMetrics(SCOPE, metrics(observation), names.SCHEMA_URL)
    return request_of([ResourceMetrics(resource, [scope], names.SCHEMA_URL)])
