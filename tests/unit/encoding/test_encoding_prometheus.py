"""Metrics as Prometheus scrapes them, read back by the official parsers of both formats."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

from tcpio_otel.aggregation.histogram import Example, Histogram
from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import UNKNOWN
from tcpio_otel.connections.events import Counts
from tcpio_otel.encoding.prometheus import BOUNDS, families
from tcpio_otel.encoding.resource import Resources, host_resource
from tcpio_otel.encoding.spans import SCOPE
from tcpio_otel.encoding.traffic import traffic, traffic_requests
from tests.unit.aggregation.test_aggregation_traffic import DATABASE, NOW_NS, WEB, connection

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]
Read = Callable[[list[ResourceMetrics]], Samples]


class Shown:
    """A collector."""

    def __init__(self, found: list[ResourceMetrics]) -> None:
        self.found = found

    def collect(self) -> Any:
        return families(self.found)


def by_name(found: Any) -> Samples:
    """Values by name and labels; each can stand there once."""
    samples: Samples = {}
    for sample in (sample for family in found for sample in family.samples):
        series, labels = samples.setdefault(sample.name, {}), frozenset(sample.labels.items())
        assert labels not in series, sample
        series[labels] = sample.value
    return samples


def as_text(found: list[ResourceMetrics]) -> Samples:
    """Through the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Shown(found))
    return by_name(text_string_to_metric_families(generate_latest(registry).decode()))


def as_openmetrics(found: list[ResourceMetrics]) -> Samples:
    """Through OpenMetrics, whose parser is strict."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Shown(found))
    return by_name(parser.text_string_to_metric_families(exposition.generate_latest(registry).decode()))


def labels(**given: str) -> frozenset[tuple[str, str]]:
    """As `by_name` has them."""
    return frozenset(given.items())


def of(resource: dict[str, Any], *metrics: Metric) -> ResourceMetrics:
    """Metrics of somebody."""
    return ResourceMetrics(Resource(resource), [ScopeMetrics(SCOPE, list(metrics), "")], "")


def total(name: str, unit: str, *points: tuple[int, dict[str, Any]], monotonic: bool = True) -> Metric:
    """A sum."""
    found = [NumberDataPoint(attributes, 1, 2, value) for value, attributes in points]
    return Metric(name, "What it is.", unit, Sum(found, AggregationTemporality.CUMULATIVE, monotonic))


READERS = pytest.mark.parametrize("read", [as_text, as_openmetrics])


@READERS
def test_names_and_labels_are_those_that_prometheus_gives_them(read: Read) -> None:
    """Units, `_total`, job and instance; what a label cannot be called becomes what it can."""
    found = read([
        of({"service.name": "web", "service.namespace": "shop", "service.instance.id": "shop.web-1.web", "k8s.pod.name":
            "web-1", "k8s.pod.label.app/tier": "a\\b\n\"c\""},
           total("tcp.io", "By", (7, {"network.io.direction": "transmit"}), (8, {"network.io.direction": "receive"})),
           total("tcp.retransmits", "{packet}", (3, {"otel.metric.overflow": True, "server.port": 443})),
           total("bytes.io", "By", (1, {}))),
        of({"service.name": "agent", "host.name": "node-1"},
           total("otel.inflight", "{span}", (5, {}), monotonic=False),
           Metric("tcpio.connections.open", "", "{connection}", Gauge([NumberDataPoint({}, 1, 2, 4)]))),
    ])  # fmt: skip
    web, agent = {"job": "shop/web", "instance": "shop.web-1.web"}, {"job": "agent", "instance": "node-1"}
    assert found == {
        "target_info": {
            labels(**web, k8s_pod_name="web-1", k8s_pod_label_app_tier='a\\b\n"c"'): 1,
            labels(**agent, host_name="node-1"): 1,
        },
        "tcp_io_bytes_total": {
            labels(**web, network_io_direction="transmit"): 7, labels(**web, network_io_direction="receive"): 8,
        },
        "tcp_retransmits_total": {labels(**web, otel_metric_overflow="true", server_port="443"): 3},
        "bytes_io_total": {labels(**web): 1},
        "otel_inflight": {labels(**agent): 5},
        "tcpio_connections_open": {labels(**agent): 4},
    }  # fmt: skip


@READERS
def test_what_labels_do_not_tell_apart_is_added_up(read: Read) -> None:
    """A series stands there once, or Prometheus refuses them all."""
    one = {"service.name": "nginx", "host.name": "h"}
    found = read([
        of(one, total("tcp.drops", "{packet}", (1, {}))),
        of({**one, "process.executable.name": "nginx"}, total("tcp.drops", "{packet}", (2, {}))),
        of({**one, "container.id": "c0ffee"}, total("tcp.drops", "{packet}", (4, {"a.b": "x", "a_b": "y"}))),
    ])  # fmt: skip
    assert found["tcp_drops_total"] == {
        labels(job="nginx", instance="h"): 3, labels(job="nginx", instance="c0ffee", a_b="x;y"): 4,
    }  # fmt: skip
    assert set(found["target_info"]) == {
        labels(job="nginx", instance="h", host_name="h"),
        labels(job="nginx", instance="c0ffee", host_name="h", container_id="c0ffee"),
    }


def histogram_of(values: list[float]) -> Metric:
    """A histogram as the agent has it."""
    made = Histogram()
    for value in values:
        made.add(Example(value, 1, b"t" * 16, b"s" * 8))
    first, counts = made.counts()
    point = ExponentialHistogramDataPoint(
        {}, 1, 2, made.count, made.sum, made.scale, made.zeros, Buckets(first, counts), Buckets(0, []), 0,
        made.least, made.most,
    )  # fmt: skip
    return Metric("tcp.rtt", "", "s", ExponentialHistogram([point], AggregationTemporality.CUMULATIVE))


SECONDS = st.floats(2.0**-20, 100) | st.just(0.0) | st.sampled_from([2.0**power for power in range(-20, 7)])


@READERS
@given(values=st.lists(SECONDS, min_size=1, max_size=50))
def test_buckets_count_exactly(read: Read, values: list[float]) -> None:
    """As many as are no longer than a bound, two histograms together; the last bucket has all."""
    found = read([of({"service.name": "s"}, histogram_of(values), histogram_of([1.5]))])
    everything = [*values, 1.5]
    told = {dict(of_series)["le"]: value for of_series, value in found["tcp_rtt_seconds_bucket"].items()}
    assert len(told) == len(BOUNDS) + 1
    for bound, count in told.items():
        assert count == sum(value <= float(bound) for value in everything)
    assert list(found["tcp_rtt_seconds_count"].values()) == [len(everything)]
    assert list(found["tcp_rtt_seconds_sum"].values()) == [pytest.approx(math.fsum(everything))]


def test_a_histogram_over_many_decades_still_has_everything() -> None:
    """Where its own buckets are wider than a factor of two, their upper ends count."""
    found = as_text([of({"service.name": "s"}, histogram_of([2.0**power for power in range(-300, 300, 7)]))])
    told = {float(dict(of_series)["le"]): value for of_series, value in found["tcp_rtt_seconds_bucket"].items()}
    assert told[math.inf] == len(range(-300, 300, 7))
    assert sorted(told.values()) == [value for _, value in sorted(told.items())]


def test_scrapes_leave_the_examples_to_exports() -> None:
    """An example is told once: to who can take it."""
    series = Traffic(10)
    series.add(connection(1, Counts(10, 20, 3, 4, 5), rtt_smoothed_s=0.5), WEB, DATABASE, NOW_NS)
    resources = Resources(host_resource("agent", {}, host_name="node-1"), lambda _: UNKNOWN)
    assert "tcp_handshake_duration_seconds_count" in as_text(
        traffic(series, resources.of, {}, NOW_NS + 9, examples=False)
    )
    (request, _), *_ = traffic_requests(series, resources.of, {}, NOW_NS + 9)
    exemplars = [
        point.exemplars
        for metric in request.resource_metrics[0].scope_metrics[0].metrics
        for point in metric.exponential_histogram.data_points
    ]
    assert exemplars
    assert all(exemplars)
