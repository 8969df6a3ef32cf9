"""Every segment that tcpdump sees, in every situation that we know of; and the spans that come of it."""

from collections import Counter
from dataclasses import replace

import pytest

from tcpio_otel.batch import Flag
from tcpio_otel.capture.loaders import Loader
from tests.kernel import hosts
from tests.kernel.conformance import Outcome, Run
from tests.kernel.scenarios import Span


def test_nothing_is_lost_or_left_over(conformance: Run) -> None:
    """Each ledger adds up without a loss, and no segment on the lanes belongs to no scenario."""
    for agent in conformance.agents.values():
        assert agent.ledger["dropped"] == 0
        assert agent.stray == conformance.stray


def test_every_segment_is_recorded_once(outcome: Outcome, loader: Loader) -> None:
    """Our records and tcpdump's, as multisets: direction, ends, numbers, flags, payload and window."""
    assert not outcome.failure, outcome.failure
    assert outcome.captured
    ours, theirs = outcome.told[loader].segments, outcome.expected_of(loader)
    missing, extra = theirs - ours, ours - theirs
    assert not missing, f"{missing.total()} missing, {extra.total()} extra"
    assert not extra
    for segments, payload, each in outcome.told[loader].super_packets:
        assert segments == -(-payload // each)


def test_super_packets_are_among_them(conformance: Run) -> None:
    """Bulk data leaves TCP in super-packets, also where a device has them cut up.

    Loopback's MTU lets one segment be as long as a super-packet: older kernels make no longer ones there.
    """
    bulk = [found for (_, name), found in conformance.outcomes.items() if name == "bulk_both_ways"]
    if not bulk:
        pytest.skip("no bulk scenario was asked for")
    for found in bulk:
        if found.lane.server is found.lane.client and hosts.KERNEL < (6, 12):
            continue
        for loader, told in found.told.items():
            assert told.super_packets, (found.lane.name, loader)


def _saw(outcome: Outcome, wanted_way: str, wanted: int) -> bool:
    """Whether BCC's agent saw such a segment: not when no full socket sent or received it."""
    told = outcome.told[Loader.BCC].segments
    return any(way == wanted_way and flags & wanted == wanted for way, *_, flags, _payload, _window in told)


def _told_by_bcc(span: Span, outcome: Outcome) -> list[Span]:
    """What is left of a span where the kernel's types are not known: no errors, no segments without a socket."""
    if span.reason in ("timeout", "unreachable"):
        return [replace(span, reason="aborted", initiator="local")]
    # A RST that no full socket sends has no namespace before 6.15, and is rarely seen since.
    lone_reset = hosts.KERNEL < (6, 15) or not _saw(outcome, "transmit", Flag.RST)
    if outcome.name == "data_after_close" and span.kind == "server" and lone_reset:
        return [replace(span, reason="fin")]
    if outcome.name == "abandoned_connect" and span.kind == "server":
        if not _saw(outcome, "transmit", Flag.SYN | Flag.ACK):
            return []  # nobody knows that the server answered
        if not _saw(outcome, "receive", Flag.RST):  # a moment decides whether it meets a full socket
            return [replace(span, reason="timeout", initiator=None)]
    return [span]


def test_spans_say_what_happened(outcome: Outcome, loader: Loader) -> None:
    """Their number, kind, reason, initiator, and totals as the programs have counted them."""
    assert not outcome.failure, outcome.failure
    expected = [Span(*list(vars(span).values())[:5]) for span in outcome.expected]
    told = outcome.told[loader].judged()
    if loader is Loader.BCC:
        expected = [left for span in expected for left in _told_by_bcc(span, outcome)]
    assert told == Counter(expected)
    for span in outcome.expected:
        if span.retransmits is not None:
            (found,) = [one for one in outcome.told[loader].spans if one["kind"] == 3]
            assert found["attributes"]["tcp.retransmits"] == span.retransmits


def test_both_ends_are_in_one_trace(outcome: Outcome, loader: Loader) -> None:
    """The server's span is a child of its client's."""
    assert not outcome.failure, outcome.failure
    if loader is Loader.BCC and outcome.name == "abandoned_connect":
        pytest.skip("no socket receives the SYN-ACK, so the client's end cannot know the server's number")
    spans = outcome.told[loader].spans
    clients = {span["spanId"]: span for span in spans if span["kind"] == 3}
    servers = [span for span in spans if span["kind"] == 2]
    for span in servers:
        assert clients[span["parentSpanId"]]["traceId"] == span["traceId"]
    assert len({span["parentSpanId"] for span in servers}) == len(servers)
