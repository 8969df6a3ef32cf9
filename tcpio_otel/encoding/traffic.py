"""Series of traffic to OTLP metrics: a Resource for each workload, cumulative sums, exponential histograms."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource

from tcpio_otel import names
from tcpio_otel.aggregation.histogram import Example, Histogram
from tcpio_otel.aggregation.traffic import OVERFLOW, Key, Series
from tcpio_otel.attribution.naming import Workload
from tcpio_otel.batch import Names
from tcpio_otel.connections.events import Counts, Role
from tcpio_otel.encoding.metrics import points_in, request_of, total
from tcpio_otel.encoding.spans import SCOPE

Attributes = dict[str, str | int | bool]
Told = list[tuple[Attributes, Series]]
Values = list[tuple[int, Names]]
"""Figures, and what each is about beyond its series."""


def key_attributes(key: Key) -> Attributes:
    """What a series is about, beyond its Resource (docs/attributes.md)."""
    if key == OVERFLOW:
        return {names.OVERFLOW: True}
    found: Attributes = dict(key.peer)
    if key.role is not Role.UNKNOWN:
        found |= {names.ROLE: key.role.value, names.SERVER_PORT: key.server_port}
    return found


POINTS = 2000
"""Data points in a request, roughly: gRPC servers refuse more than 4 MiB."""


def traffic_requests(
    series: Iterable[tuple[Key, Series]],
    resource: Callable[[Workload], Resource],
    drop_reasons: Mapping[int, str],
    now_ns: int,
) -> Iterator[tuple[ExportMetricsServiceRequest, int]]:
    """The metrics of series as export requests, each with its number of data points; arguments as for `traffic`."""
    some: list[ResourceMetrics] = []
    points = 0
    for metrics in traffic(series, resource, drop_reasons, now_ns):
        some.append(metrics)
        points += points_in([metrics])
        if points >= POINTS:
            yield request_of(some)
            some, points = [], 0
    if some:
        yield request_of(some)


def traffic(
    series: Iterable[tuple[Key, Series]],
    resource: Callable[[Workload], Resource],
    drop_reasons: Mapping[int, str],
    now_ns: int,
    *,
    examples: bool = True,
) -> list[ResourceMetrics]:
    """The metrics of series, by workload.

    Args:
        series: all of them.
        resource: of a workload.
        drop_reasons: the running kernel's names.
        now_ns: Unix time.
        examples: take the examples of their histograms, which others will not get then.
    """
    by_workload: dict[Workload, Told] = {}
    for key, found in series:
        by_workload.setdefault(key.workload, []).append((key_attributes(key), found))
    return [
        ResourceMetrics(
            resource(workload), [ScopeMetrics(SCOPE, _metrics(told, drop_reasons, now_ns, examples), names.SCHEMA_URL)],
            names.SCHEMA_URL,
        )
        for workload, told in by_workload.items()
    ]  # fmt: skip


def _metrics(told: Told, drop_reasons: Mapping[int, str], now_ns: int, examples: bool) -> list[Metric]:
    def summed(of: names.Instrument, points: Callable[[Series], Values]) -> Metric:
        found = [
            NumberDataPoint({**attributes, **dict(more)}, series.started_ns, now_ns, value)
            for attributes, series in told
            for value, more in points(series)
        ]
        return total(of, found)

    def by(name: str, counts: Mapping[str, int]) -> Values:
        return [(count, ((name, value),) if value else ()) for value, count in counts.items()]

    def connected(points: Callable[[Series, Counts], Values]) -> Callable[[Series], Values]:
        """Of series that have connections: others have drops alone."""
        return lambda series: (
            points(series, series.counts) if series.opened or series.closed or any(series.moved) else []
        )

    def directions(sent: int, received: int) -> Values:
        return [(sent, ((names.IO_DIRECTION, "transmit"),)), (received, ((names.IO_DIRECTION, "receive"),))]

    found = [
        summed(names.IO, connected(lambda _, counts: directions(counts.bytes_sent, counts.bytes_received))),
        summed(names.PACKETS, connected(lambda _, counts: directions(counts.packets_sent, counts.packets_received))),
        summed(names.RETRANSMITTED_PACKETS, connected(lambda _, counts: [(counts.retransmits, ())])),
        summed(names.OPENED, connected(lambda series, _: [(series.opened, ())])),
        summed(names.CLOSED, lambda series: by(names.CLOSE_REASON, series.closed)),
        summed(names.FAILED, lambda series: by(names.ERROR_TYPE, series.failed)),
        summed(names.RESETS, lambda series: by(names.CLOSE_INITIATOR, series.resets)),
        summed(
            names.DROPS,
            lambda series: by(
                names.DROP_REASON, {drop_reasons.get(reason, str(reason)): n for reason, n in series.drops.items()}
            ),
        ),
        _histogram(names.HANDSHAKES, told, lambda series: series.handshakes, now_ns, examples),
        _histogram(names.ROUND_TRIPS, told, lambda series: series.round_trips, now_ns, examples),
    ]
    return [metric for metric in found if metric.data.data_points]


def _histogram(
    of: names.Instrument, told: Told, taken: Callable[[Series], Histogram], now_ns: int, examples: bool
) -> Metric:
    points = [
        _point(attributes, series.started_ns, now_ns, histogram, histogram.take_slowest() if examples else None)
        for attributes, series in told
        if (histogram := taken(series)).count
    ]
    return Metric(of.name, of.meaning, of.unit, ExponentialHistogram(points, AggregationTemporality.CUMULATIVE))


def _point(
    attributes: Attributes, started_ns: int, now_ns: int, histogram: Histogram, slowest: Example | None
) -> ExponentialHistogramDataPoint:
    first, counts = histogram.counts()
    exemplars = []
    if slowest:
        ids = int.from_bytes(slowest.span_id), int.from_bytes(slowest.trace_id)
        exemplars = [Exemplar({}, slowest.value, slowest.time_ns, *ids)]
    return ExponentialHistogramDataPoint(
        attributes, started_ns, now_ns, histogram.count, histogram.sum, histogram.scale, histogram.zeros,
        Buckets(first, counts), Buckets(0, []), 0, histogram.least, histogram.most, exemplars,
    )  # fmt: skip
