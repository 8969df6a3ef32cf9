"""Exponential histograms, as OpenTelemetry's data model has them (metrics/data-model, ExponentialHistogram)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SCALE = 3
"""Each bucket reaches 2**(1 / 2**SCALE) times as far as the one before: 9 %, so that 160 buckets span six decades."""

MOST_BUCKETS = 160


class Example(NamedTuple):
    """A measurement, when it was made (Unix nanoseconds), and the span that it is of (16 and 8 bytes)."""

    value: float
    time_ns: int
    trace_id: bytes
    span_id: bytes


@dataclass(slots=True)
class Histogram:
    """Measurements of one kind, none of them negative."""

    count: int = 0
    sum: float = 0.0
    least: float = math.inf
    most: float = 0.0
    zeros: int = 0
    scale: int = SCALE
    buckets: dict[int, int] = field(default_factory=dict)
    slowest: Example | None = None

    def add(self, example: Example) -> None:
        """Take a measurement in; the largest since `take_slowest` is kept as an example."""
        value = example.value
        self.count += 1
        self.sum += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        if self.slowest is None or value > self.slowest.value:
            self.slowest = example
        if value == 0:
            self.zeros += 1
            return
        index = bucket(value, self.scale)
        self.buckets[index] = self.buckets.get(index, 0) + 1
        while max(self.buckets) - min(self.buckets) >= MOST_BUCKETS:
            self._halve()

    def take_slowest(self) -> Example | None:
        """The largest measurement since the last call."""
        found, self.slowest = self.slowest, None
        return found

    def counts(self) -> tuple[int, list[int]]:
        """The index of the first bucket, and the counts from there on without a gap."""
        if not self.buckets:
            return 0, []
        first = min(self.buckets)
        return first, [self.buckets.get(index, 0) for index in range(first, max(self.buckets) + 1)]

    def _halve(self) -> None:
        """Join every two neighbours."""
        self.scale -= 1
        self.buckets = merged((index >> 1, count) for index, count in self.buckets.items())


def bucket(value: float, scale: int) -> int:
    """The index of the bucket that a positive value falls into: (base**index, base**(index + 1)]."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5:  # a power of two is the upper end of its bucket, exactly
        exponent_below = exponent - 1
        return (exponent_below << scale) - 1 if scale >= 0 else (exponent_below - 1) >> -scale
    if scale <= 0:
        return (exponent - 1) >> -scale
    return math.ceil(math.log2(value) * (1 << scale)) - 1


def merged(counts: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Counts by index, added up."""
    found: dict[int, int] = {}
    for index, count in counts:
        found[index] = found.get(index, 0) + count
    return found
