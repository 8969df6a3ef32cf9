"""Exponential histograms against the SDK's own mapping, and against what went in."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics._internal.exponential_histogram.mapping.exponent_mapping import ExponentMapping
from opentelemetry.sdk.metrics._internal.exponential_histogram.mapping.logarithm_mapping import LogarithmMapping

from tcpio_otel.aggregation.histogram import MOST_BUCKETS, Example, Histogram, bucket

VALUES = st.floats(1e-9, 1e6)


def example(value: float, time_ns: int = 1) -> Example:
    """A measurement of some span."""
    return Example(value, time_ns, b"t" * 16, b"s" * 8)


@given(VALUES, st.integers(-8, 8))
def test_buckets_are_the_sdks(value: float, scale: int) -> None:
    """The index of a value, at every scale; its neighbour where the value is as good as on the border."""
    theirs = (LogarithmMapping(scale) if scale > 0 else ExponentMapping(scale)).map_to_index(value)
    ours = bucket(value, scale)
    border = math.log2(value) * 2.0**scale
    assert ours == theirs or (abs(border - round(border)) < 1e-9 and abs(ours - theirs) == 1)


@pytest.mark.parametrize("scale", range(-4, 6))
@pytest.mark.parametrize("power", range(-20, 20))
def test_powers_of_two_are_the_upper_ends_of_their_buckets(power: int, scale: int) -> None:
    """As the data model has it: a bucket reaches from above its lower end to its upper end."""
    base = Fraction(2) ** power
    index = bucket(2.0**power, scale)
    # base**(1/2**scale) to the power of index + 1 is at least the value, to that of index it is not
    steps = Fraction(index + 1) / Fraction(2) ** scale
    assert base == Fraction(2) ** power
    assert steps >= power
    assert steps - 1 / Fraction(2) ** scale < power


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=200))
def test_nothing_is_lost(values: list[float]) -> None:
    """Count, sum and extremes are those of the values; every value lies in a bucket that has room for it."""
    histogram = Histogram()
    for time_ns, value in enumerate(values):
        histogram.add(example(value, time_ns))
    first, counts = histogram.counts()
    assert histogram.count == len(values) == sum(counts) + histogram.zeros
    assert histogram.sum == pytest.approx(sum(values))
    assert (histogram.least, histogram.most) == (min(values), max(values))
    assert len(counts) <= MOST_BUCKETS
    expected: dict[int, int] = {}
    for value in values:
        if value:
            index = bucket(value, histogram.scale)
            expected[index] = expected.get(index, 0) + 1
    found = {first + place: count for place, count in enumerate(counts) if count}
    borderline = sum(abs(found.get(index, 0) - expected.get(index, 0)) for index in found.keys() | expected.keys())
    near = sum(
        1 for value in values
        if value and abs((exact := math.log2(value) * 8) - round(exact)) < 1e-9
    )  # fmt: skip
    assert borderline <= 2 * near
    slowest = histogram.take_slowest()
    assert slowest is not None
    assert slowest.value == max(values)
    assert slowest.time_ns == values.index(max(values))
    assert histogram.take_slowest() is None
