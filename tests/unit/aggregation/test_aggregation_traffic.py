"""Connections to series: nothing is counted twice, and nothing is left out."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.aggregation.traffic import IDLE_NS, OVERFLOW, Key, Series, Traffic
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.batch import RECORD, Endpoint
from tcpio_otel.connections.events import NONE, CloseReason, Connection, Counts, End, Role, Start

WEB, JOB = Workload(Place(unit="web"), "web"), Workload(Place(), "job")
DATABASE = (("tcp.peer.service.name", "db"),)
NOW_NS = 1_795_000_000_000_000_000


def connection(slot: int = 1, counts: Counts = NONE, **fields: Any) -> Connection:
    """A client's connection as it is now: open, unless it is said how it ended."""
    given_: dict[str, Any] = {
        "local": Endpoint(bytes(16), 40000), "peer": Endpoint(bytes(16), 5432), "netns": 1, "role": Role.CLIENT,
        "start": Start.OBSERVED, "end": None, "start_ns": NOW_NS - 5, "end_ns": NOW_NS, "trace_id": b"t" * 16,
        "span_id": b"s" * 8, "parent_span_id": b"", "connection_id": "c", "close_reason": None,
        "close_initiator": None, "error_type": None, "kernel_totals": True, "rtt_smoothed_s": None,
        "rtt_min_s": None, "handshake_s": 0.25, "pid": 1, "process_name": "p", "milestones": (),
        "milestones_dropped": 0, "slot": slot, **counts._asdict(),
    }  # fmt: skip
    return Connection(**{**given_, **fields})


def the_only(traffic: Traffic) -> tuple[Key, Series]:
    """The one series."""
    (found,) = traffic
    return found


def test_a_connection_counts_with_what_came_since() -> None:
    """Asked now and then, and at its end, which may know more than records said, or less."""
    traffic = Traffic(10)
    for counts in (Counts(10, 20, 3, 4, 0), Counts(10, 20, 3, 4, 0), Counts(110, 220, 13, 14, 2)):
        traffic.add(connection(counts=counts), WEB, DATABASE, NOW_NS)
        assert the_only(traffic)[1].counts == counts
    ended = connection(
        counts=Counts(500, 700, 40, 12, 5), end=End.OBSERVED, close_reason=CloseReason.FIN, rtt_smoothed_s=0.5
    )
    traffic.add(ended, WEB, DATABASE, NOW_NS)
    key, series = the_only(traffic)
    assert key == Key(WEB, DATABASE, Role.CLIENT, 5432)
    assert series.counts == Counts(500, 700, 40, 12, 5)
    assert (series.opened, series.closed, series.failed, series.resets) == (1, {"fin": 1}, {}, {})
    assert (series.handshakes.count, series.handshakes.sum) == (1, 0.25)
    assert (series.round_trips.count, series.round_trips.sum) == (1, 0.5)
    assert series.started_ns == NOW_NS - 5


def test_what_is_older_than_the_agent_is_not_counted() -> None:
    """Nor is a handshake that nobody saw."""
    traffic = Traffic(10)
    old = connection(counts=Counts(1000, 1000, 100, 100, 9), before=Counts(900, 990, 90, 100, 9), start=Start.INHERITED)
    traffic.add(old, WEB, (), NOW_NS)
    _, series = the_only(traffic)
    assert series.counts == Counts(100, 10, 10, 0, 0)
    assert (series.opened, series.handshakes.count, series.started_ns) == (0, 0, NOW_NS)


def test_ends_are_told_apart() -> None:
    """Refused, timed out, reset by either end."""
    traffic = Traffic(10)
    ends = [
        {"close_reason": CloseReason.REFUSED, "error_type": "connection_refused", "handshake_s": None},
        {"close_reason": CloseReason.TIMEOUT, "error_type": "timeout", "handshake_s": None},
        {"close_reason": CloseReason.TIMEOUT, "error_type": "timeout"},  # established, and then lost
        {"close_reason": CloseReason.RESET, "error_type": "connection_reset", "close_initiator": "peer"},
        {"close_reason": CloseReason.RESET, "close_initiator": "local"},
    ]
    for slot, end in enumerate(ends):
        traffic.add(connection(slot, end=End.OBSERVED, **end), WEB, (), NOW_NS)
    _, series = the_only(traffic)
    assert series.closed == {"refused": 1, "timeout": 2, "reset": 2}
    assert series.failed == {"connection_refused": 1, "timeout": 1}
    assert series.resets == {"peer": 1, "local": 1}
    assert series.opened == 3


def test_a_slot_that_another_connection_has_counts_anew() -> None:
    """Also where nobody said that the old one had ended."""
    traffic = Traffic(10)
    traffic.add(connection(counts=Counts(100, 0, 1, 0, 0)), WEB, (), NOW_NS)
    traffic.add(connection(counts=Counts(7, 0, 1, 0, 0), start_ns=NOW_NS), WEB, (), NOW_NS)
    assert the_only(traffic)[1].counts.bytes_sent == 107


def test_who_it_is_may_be_known_later() -> None:
    """What came before stays where it was counted."""
    traffic = Traffic(10)
    traffic.add(connection(counts=Counts(100, 0, 1, 0, 0)), UNKNOWN, (), NOW_NS)
    traffic.add(connection(counts=Counts(150, 0, 1, 0, 0)), WEB, DATABASE, NOW_NS)
    assert [(key.workload, series.counts.bytes_sent) for key, series in traffic] == [(UNKNOWN, 100), (WEB, 50)]


def test_series_are_bounded_and_what_finds_no_place_is_visible() -> None:
    """The sum over all is still what it was."""
    traffic = Traffic(3)
    for number in range(20):
        counts = Counts(10, 0, 1, 0, 0)
        peer = (("server.address", f"192.0.2.{number}"),)
        traffic.add(connection(number, counts, end=End.OBSERVED, close_reason=CloseReason.FIN), WEB, peer, NOW_NS)
    found = dict(traffic)
    assert len(found) == 4
    assert found[OVERFLOW].counts.bytes_sent == 170
    assert sum(series.counts.bytes_sent for series in found.values()) == 200


def test_series_go_when_nothing_came_for_a_while() -> None:
    """But not those of connections that are open and silent."""
    traffic = Traffic(10)
    traffic.add(connection(1), WEB, (), NOW_NS)
    traffic.add(connection(2, end=End.OBSERVED, close_reason=CloseReason.FIN), JOB, (), NOW_NS)
    traffic.tidy(NOW_NS + IDLE_NS - 1)
    assert {key.workload for key, _ in traffic} == {WEB, JOB}
    traffic.tidy(NOW_NS + IDLE_NS)
    assert {key.workload for key, _ in traffic} == {WEB}


def test_drops_are_counted_by_reason() -> None:
    """Each for the workload whose it would have been."""
    traffic = Traffic(10)
    records = np.zeros(5, RECORD)
    records["drop_reason"] = [2, 2, 77, 2, 77]
    traffic.drop(records, np.array([1, 1, 1, 0, 0]), [UNKNOWN, WEB].__getitem__, NOW_NS)
    assert {key.workload: series.drops for key, series in traffic} == {WEB: {2: 2, 77: 1}, UNKNOWN: {2: 1, 77: 1}}


_COUNTS = st.builds(Counts, *(st.integers(0, 1000) for _ in Counts._fields))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), _COUNTS, st.booleans()), max_size=60))
def test_the_sum_of_series_is_the_sum_of_connections(steps: list[tuple[int, int, Counts, bool]]) -> None:
    """Whatever is asked in between, and to whomever it belongs at a time."""
    traffic, last, done = Traffic(2), dict[int, Counts](), Counts(0, 0, 0, 0, 0)
    born = dict.fromkeys(range(4), 0)
    for slot, owner, counts, ends in steps:
        end = {"end": End.OBSERVED, "close_reason": CloseReason.FIN} if ends else {}
        given_ = replace(connection(slot, counts, start_ns=NOW_NS + born[slot]), **end)
        traffic.add(given_, [UNKNOWN, WEB, JOB][owner], (), NOW_NS)
        last[slot] = counts
        if ends:
            done = Counts(*(a + b for a, b in zip(done, last.pop(slot), strict=True)))
            born[slot] += 1
    expected = [sum(values) for values in zip(done, *last.values(), strict=True)]
    assert [sum(values) for values in zip(*(series.moved for _, series in traffic), strict=True)] in (expected, [])


def test_workloads_may_be_alike_to_series() -> None:
    """Those that are share one, whoever of them was first."""
    traffic = Traffic(10, lambda workload: workload._replace(place=Place()))
    for slot, place in enumerate((Place(unit="a"), Place(unit="b"))):
        traffic.add(connection(slot, Counts(1, 2, 3, 4, 5)), Workload(place, "web"), (), NOW_NS)
    key, series = the_only(traffic)
    assert (key.workload, series.counts) == (Workload(Place(), "web"), Counts(2, 4, 6, 8, 10))
