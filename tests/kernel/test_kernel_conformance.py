"""Every segment that tcpdump sees, in every situation that we know of; and the spans that come of it."""

from collections import Counter
from dataclasses import replace

from tests.kernel import hosts
from tests.kernel.conformance import Outcome, Run
from tests.kernel.scenarios import Span


def test_nothing_is_lost_or_left_over(conformance: Run) -> None:
    """The ledger adds up without a loss, and no segment on the lanes belongs to no scenario."""
    assert conformance.ledger["dropped"] == 0
    assert conformance.stray[0] == conformance.stray[1]


def test_every_segment_is_recorded_once(outcome: Outcome) -> None:
    """Our records and tcpdump's, as multisets: direction, ends, numbers, flags, payload and window."""
    assert not outcome.failure, outcome.failure
    assert outcome.theirs
    missing, extra = outcome.theirs - outcome.ours, outcome.ours - outcome.theirs
    assert not missing, f"{missing.total()} missing, {extra.total()} extra"
    assert not extra


def test_spans_say_what_happened(outcome: Outcome) -> None:
    """Their number, kind, reason, initiator, and totals as the programs have counted them."""
    assert not outcome.failure, outcome.failure
    told = outcome.told
    if hosts.KERNEL < (6, 10):
        # A program that waits for its connection can take the error off the socket before the kernel closes that.
        told = Counter(replace(span, reason="timeout", initiator=None) if span.reason == "aborted" and
                       outcome.name != "abandoned_connect" else span for span in told.elements())  # fmt: skip
    expected = Counter(Span(*list(vars(span).values())[:5]) for span in outcome.expected)
    assert told == expected
    for span in outcome.expected:
        if span.retransmits is not None:
            (found,) = [one for one in outcome.spans if one["kind"] == 3]
            assert found["attributes"]["tcp.retransmits"] == span.retransmits


def test_both_ends_are_in_one_trace(outcome: Outcome) -> None:
    """The server's span is a child of its client's."""
    assert not outcome.failure, outcome.failure
    clients = {span["spanId"]: span for span in outcome.spans if span["kind"] == 3}
    servers = [span for span in outcome.spans if span["kind"] == 2]
    for span in servers:
        assert clients[span["parentSpanId"]]["traceId"] == span["traceId"]
    assert len({span["parentSpanId"] for span in servers}) == len(servers)
