"""Metrics to the samples that Prometheus scrapes, by the names and labels that it gives to what it takes by OTLP.

https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/: units and `_total` end a name,
`job` and `instance` say who it is about, `target_info` what else is known of them. Text has no exponential histograms,
so they become classic ones, whose bounds are powers of two and whose counts are exact.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opentelemetry.sdk.metrics.export import (
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Metric,
    ResourceMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from prometheus_client import Metric as Family

from tcpio_otel import names

BOUNDS = range(-14, 7)
"""Powers of two that end the buckets: of seconds, from 61 us to 64 s."""

_ENDS = (*(str(2.0**power) for power in BOUNDS), "+Inf")

Labels = dict[str, str]
Labelled = tuple[tuple[str, str], ...]

_UNITS = {"By": "bytes", "s": "seconds"}
_UNSAYABLE = re.compile(r"[^a-zA-Z0-9_]")
_WHO = {names.SERVICE_NAME, names.SERVICE_NAMESPACE, names.SERVICE_INSTANCE}


def families(found: Iterable[ResourceMetrics]) -> list[Family]:
    """All metrics by name, `target_info` before them.

    What cannot be told apart by its labels is added up.
    """
    targets: dict[Labelled, Labels] = {}
    series: dict[str, _Series] = {}
    for each in found:
        identity, others = _target(each.resource)
        targets.setdefault(tuple(identity.items()), others)
        for metric in (metric for scope in each.scope_metrics for metric in scope.metrics):
            name = _name(metric)
            of_name = series.setdefault(name, _Series(name, metric))
            for point in metric.data.data_points:
                of_name.add(identity, point)
    info = Family("target", "What else is known of a job and its instance.", "info")
    for target, others in targets.items():
        info.add_sample("target_info", {**others, **dict(target)}, 1)
    return [info, *(each.family() for each in series.values())]


class _Series:
    """All series of one name."""

    def __init__(self, name: str, metric: Metric) -> None:
        self._name, self._meaning, self._kind = name, metric.description or "", _kind(metric)
        self._numbers: dict[Labelled, float] = defaultdict(float)
        self._histograms: dict[Labelled, _Buckets] = defaultdict(_Buckets)

    def add(self, identity: Labels, point: Any) -> None:
        labelled = tuple((identity | _labels(point.attributes or {})).items())
        if isinstance(point, ExponentialHistogramDataPoint):
            self._histograms[labelled].add(point)
        else:
            self._numbers[labelled] += point.value

    def family(self) -> Family:
        family = Family(self._name, self._meaning, self._kind)
        sample = f"{self._name}_total" if self._kind == "counter" else self._name
        for labelled, value in self._numbers.items():
            family.add_sample(sample, dict(labelled), value)
        for labelled, buckets in self._histograms.items():
            for suffix, more, count in buckets.samples():
                family.add_sample(f"{self._name}{suffix}", {**dict(labelled), **more}, count)
        return family


class _Buckets:
    """Exponential histograms, added up in buckets that end at `BOUNDS`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, point: ExponentialHistogramDataPoint) -> None:
        self._sum += point.sum
        self._counts[0] += point.zero_count
        for index, count in enumerate(point.positive.bucket_counts, point.positive.offset):
            # (base**index, base**(index + 1)], where base is 2**(1 / 2**scale): a power of two is never inside.
            ends = (index >> point.scale) + 1 if point.scale >= 0 else (index + 1) << -point.scale
            self._counts[min(max(ends - BOUNDS.start, 0), len(BOUNDS))] += count

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Suffix, label and value of each sample."""
        total = 0
        for bound, count in zip(_ENDS, self._counts, strict=True):
            total += count
            yield "_bucket", {"le": bound}, total
        yield "_count", {}, total
        yield "_sum", {}, self._sum


def _kind(metric: Metric) -> str:
    if isinstance(metric.data, ExponentialHistogram):
        return "histogram"
    return "counter" if isinstance(metric.data, Sum) and metric.data.is_monotonic else "gauge"


def _name(metric: Metric) -> str:
    """Without `_total`, which the samples of a counter have."""
    name, unit = _UNSAYABLE.sub("_", metric.name), _UNITS.get(metric.unit or "", "")
    return name if not unit or unit in name.split("_") else f"{name}_{unit}"


def _labels(attributes: Mapping[str, Any]) -> Labels:
    """Attributes as labels; the values of two whose names become one stand beside each other."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, value in sorted(attributes.items()):
        found[_UNSAYABLE.sub("_", name)].append(str(value).lower() if isinstance(value, bool) else str(value))
    return {name: ";".join(values) for name, values in found.items()}


def _target(resource: Resource) -> tuple[Labels, Labels]:
    """Who a Resource is, as `job` and `instance`, and what else is known of it.

    What has no `service.instance.id` differs by its container, or else its host.
    """
    told = resource.attributes
    job = "/".join(str(told[name]) for name in (names.SERVICE_NAMESPACE, names.SERVICE_NAME) if told.get(name))
    instances = (names.SERVICE_INSTANCE, names.CONTAINER_ID, names.HOST_NAME)
    instance = next((str(told[name]) for name in instances if told.get(name)), "")
    identity = {name: value for name, value in (("job", job), ("instance", instance)) if value}
    return identity, _labels({name: value for name, value in told.items() if name not in _WHO})
