"""Rings to batches: order, busy and discarded records, garbage."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpio_otel.batch import RECORD, Kind
from tcpio_otel.capture import ring
from tcpio_otel.capture.ring import BUSY, DISCARD, SLOT, Merger, parse
from tcpio_otel.errors import EnvironmentFault

LIMIT = 1 << 15


def slots(times: list[int], headers: list[int] | None = None) -> np.ndarray:
    """Ring contents: a packet record a time, each behind its header."""
    filled = np.zeros(len(times), SLOT)
    filled["length"] = RECORD.itemsize if headers is None else np.array(headers, "u8") | RECORD.itemsize
    filled["record"]["time_ns"] = times
    filled["record"]["kind"] = Kind.PACKET
    return filled


def taken(filled: np.ndarray, limit: int = LIMIT) -> tuple[list[int], int, bool]:
    records, size, left = parse(filled.view("u1"), limit, threading.Lock())
    return records["time_ns"].tolist(), size // SLOT.itemsize, left


def test_all_complete_records_are_taken() -> None:
    """Every record between the positions comes out, in ring order."""
    assert taken(slots([3, 1, 2])) == ([3, 1, 2], 3, False)


def test_reading_stops_at_a_record_that_is_being_written() -> None:
    """A busy record and all behind it stay in the ring for the next look."""
    assert taken(slots([1, 2, 3], [0, BUSY, 0])) == ([1], 1, True)


def test_discarded_records_are_skipped_and_consumed() -> None:
    """A discarded record takes room in the ring and never reaches a batch."""
    assert taken(slots([1, 2, 3], [0, DISCARD, 0])) == ([1, 3], 3, False)


def test_a_limit_leaves_the_rest() -> None:
    """A full ring is drained in bounded pieces."""
    assert taken(slots([1, 2, 3]), limit=2) == ([1, 2], 2, True)


def test_a_record_of_another_size_is_refused() -> None:
    """Probe and agent of different versions are told apart instead of misread."""
    filled = slots([1, 2])
    filled["length"][1] = RECORD.itemsize + 8
    with pytest.raises(EnvironmentFault, match="another size"):
        taken(filled)


@given(st.binary(max_size=4 * SLOT.itemsize))
@settings(max_examples=300)
def test_garbage_raises_nothing_but_the_documented_error(garbage: bytes) -> None:
    """Whatever stands in the ring, only EnvironmentFault comes out."""
    try:
        parse(np.frombuffer(garbage, "u1"), LIMIT, threading.Lock())
    except EnvironmentFault as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are fine, a traceback is not


@given(
    st.lists(st.lists(st.integers(0, 1000), max_size=30), min_size=1, max_size=4),
    st.lists(st.integers(0, 1000), max_size=4),
)
def test_merged_runs_are_complete_and_in_order(runs: list[list[int]], watermarks: list[int]) -> None:
    """Whatever the rings hold, all of it comes out once, each release sorted and not beyond its watermark."""
    merger, released = Merger(), []
    pending = [slots(run)["record"] for run in runs]
    for watermark in sorted(watermarks):
        times = merger.merge(pending, watermark)["time_ns"].tolist()
        pending = []
        assert times == sorted(times)
        assert all(time <= watermark for time in times)
        released += times
    released += merger.merge(pending, None)["time_ns"].tolist()
    assert sorted(released) == sorted(time for run in runs for time in run)
    assert merger.held_packets == 0


def test_a_record_that_is_being_written_holds_other_rings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind it may be older than what the other rings gave already."""
    waiting = {3: iter([([], True), ([5, 6], False)]), 4: iter([([7], False), ([8], False)])}

    class Told:
        def __init__(self, fd: int, size_bytes: int) -> None:
            del size_bytes
            self.script = waiting[fd]

        def take(self) -> tuple[np.ndarray, bool]:
            times, left = next(self.script)
            return slots(times)["record"].copy(), left

    monkeypatch.setattr(ring, "Ring", Told)
    monkeypatch.setattr(ring.select, "epoll", lambda: SimpleNamespace(register=lambda *_: None))
    rings = ring.Rings([3, 4], 4096, np.empty(0, RECORD), lambda: 10**9)
    assert [rings.drain()[0]["time_ns"].tolist() for _ in range(2)] == [[], [5, 6, 7, 8]]
    assert rings.late == 0


def test_records_behind_a_release_are_counted_late() -> None:
    """A record older than one that went out already is delivered all the same, and counted."""
    merger = Merger()
    merger.merge([slots([5, 10])["record"]], 20)
    assert merger.merge([slots([7, 12])["record"]], 20)["time_ns"].tolist() == [7, 12]
    assert merger.late == 1
