"""Which packets belong to which context, in stories, and against a slow and obvious join."""

import ctypes
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpio_otel import native
from tcpio_otel.batch import INTERLEAVED, NO_CONTEXT, Batch, ContextMark, Direction, Kind, Mark, Origin
from tcpio_otel.correlation import layout
from tcpio_otel.correlation.contexts import ContextTable
from tcpio_otel.correlation.events import Link, Request
from tests import story
from tests.story import MS, SECOND, End, told

NONE = (bytes(16), bytes(8))
EARLY, SHARED = int(ContextMark.EARLY), int(ContextMark.SHARED)


def ids(number: int) -> tuple[bytes, bytes]:
    """A trace id and a span id."""
    return number.to_bytes(16), (number + 1000).to_bytes(8)


@dataclass
class Told:
    """What became of a story: for each packet, in order of time, the ids that it has; links and requests."""

    packets: list[Any] = field(default_factory=list)
    waiting: int = 0
    links: tuple[Link, ...] = ()
    dropped: int = 0
    requests: list[Request] = field(default_factory=list)
    lost: int = 0


def served(records: np.ndarray, batches: list[int] | None = None, then_ns: int = 10 * SECOND) -> Told:
    """Feed a story in batches that end before the given records, resolve what waited, and let time pass."""
    table, contexts, found = story.table(), ContextTable(quiet_ns=SECOND), Told()
    results: dict[int, Any] = {}
    waiting: list[int] = []  # packets by number
    packets = np.flatnonzero(records["kind"] == Kind.PACKET)
    slot = 0
    for start, end in zip([0, *(batches or [])], [*(batches or []), len(records)], strict=True):
        part = records.view("V160")[start:end].copy().view(records.dtype)
        batch = Batch(part, 0, 0, int(records["time_ns"][max(end - 1, 0)]))
        slots, ended = table.update(batch)
        older = None
        if waiting:
            held = records.view("V160")[packets[waiting]].copy().view(records.dtype)
            older = held, np.full(len(held), slot, np.int64)
        followed = contexts.follow(batch, table.record_slots, table.flows, table.births, None, older)
        fresh = [number for number, row in enumerate(packets) if start <= row < end]
        numbers = waiting + fresh
        if len(slots):
            slot = int(slots[-1])
        waiting = []
        for place, number in enumerate(numbers):
            if followed.waits[place]:
                waiting.append(number)
            else:
                results[number] = _said(followed.contexts, place)
        for connection in ended:
            found.links, found.dropped = contexts.end(connection.slot, 0)
        found.requests += contexts.take_requests()
    later = Batch(records[:0], 0, 0, int(records["time_ns"][-1]) + then_ns)
    contexts.follow(later, table.record_slots, table.flows)
    found.requests += contexts.take_requests()
    if not found.links:
        found.links, found.dropped = contexts.end(slot, 0)
        found.requests += contexts.take_requests()
    found.waiting, found.lost = len(waiting), contexts.lost
    found.packets = [results.get(number, "waits") for number in range(len(packets))]
    return found


def _said(contexts: Any, place: int) -> Any:
    """The ids of a packet; None for none, a tuple of them for several."""
    if contexts is None:
        return None
    if contexts.spans[place]:
        return contexts.sets[contexts.spans[place] - 1]
    number = int(contexts.numbers[place])
    if number in (NO_CONTEXT, INTERLEAVED):
        return None if number == NO_CONTEXT else "interleaved"
    row = contexts.ids[number]
    return row["trace_id"].tobytes(), row["span_id"].tobytes()


def client() -> End:
    """A client, connected."""
    return End().handshake()


def server() -> End:
    """A server, connected."""
    return End(local=("192.0.2.2", 443), peer=("192.0.2.1", 40000)).handshake(client=False)


def asked_and_answered(end: End, number: int, at: int, back: int, **fields: Any) -> End:
    """A client's request of 100 bytes and its answer of 50, by their places in the stream."""
    end.serves(ids(number), at, back, **fields)
    end.sends("PA", at, back, 100).gets("A", back, at + 100)
    return end.gets("PA", back, at + 100, 50).sends("A", at + 100, back + 50)


def test_structures_are_laid_out_alike() -> None:
    """What C and Python share has one layout, and starts where C counts on it."""
    found = np.zeros(10, np.int64)
    native.library.tcpio_context_layout(found)
    place, row, request = layout.PLACE, layout.ROW, layout.REQUEST
    sizes = place.itemsize, row.itemsize, request.itemsize
    fields = (place, "last_waiting"), (row, "borders"), (request, "state"), (request, "last_ns"), (request, "unplaced")
    assert found.tolist() == [
        *sizes, ctypes.sizeof(layout.Joined), ctypes.sizeof(layout.Exchange),
        *((dtype.fields or {})[name][1] for dtype, name in fields),
    ]  # fmt: skip
    for dtype in (place, row, request):
        assert dtype.itemsize % layout.CACHE_LINE_BYTES == layout.grown(layout.lines(1, dtype), 3).ctypes.data % 64 == 0


def test_a_request_and_its_answer_belong_together() -> None:
    """Payload and acknowledgements, both ways; the handshake is nobody's."""
    end = asked_and_answered(asked_and_answered(client(), 1, 1, 1), 2, 101, 51)
    found = served(told(end))
    assert found.packets == [None] * 3 + [ids(1)] * 4 + [ids(2)] * 4
    assert [(link.trace_id, link.span_id) for link in found.links] == [ids(1), ids(2)]
    first, second = found.requests
    assert (first.bytes_sent, first.bytes_received, first.packets_sent, first.packets_received) == (100, 50, 2, 2)
    assert first.first_received_ns is not None
    assert first.first_sent_ns is not None
    assert first.first_received_ns - first.first_sent_ns == 2 * MS
    assert first.last_acked_ns == first.first_sent_ns + MS
    assert (second.link.sent.start, second.link.sent.end) == (1101, 1201)  # type: ignore[union-attr]


def test_a_retransmit_is_its_requests_whenever_it_is_sent() -> None:
    """Bytes of the first request that are sent again after the second has begun stay the first's, and are counted."""
    end = client().serves(ids(1), 1, 1).sends("PA", 1, 1, 100).gets("PA", 1, 1, 50)
    end.serves(ids(2), 101, 51).sends("PA", 101, 51, 100)
    end.sends("PA", 1, 51, 100, marks=Mark.RETRANSMIT).gets("A", 51, 201)
    found = served(told(end))
    assert found.packets[3:] == [ids(1), ids(1), ids(2), ids(1), ids(2)]
    assert [request.retransmits for request in found.requests] == [1, 0]
    assert [request.bytes_sent for request in found.requests] == [100, 100]


def test_bytes_that_were_lost_are_counted_once_they_come() -> None:
    """A gap in what comes is filled by the retransmit, and is part of the sum, each byte once."""
    end = client().serves(ids(1), 1, 1).sends("PA", 1, 1, 100)
    end.gets("PA", 51, 101, 50).gets("PA", 1, 101, 50).gets("PA", 51, 101, 50).sends("A", 101, 101)
    (request,) = served(told(end)).requests
    assert (request.bytes_received, request.packets_received) == (100, 3)


@pytest.mark.parametrize("last", ["request", "fin"])
def test_what_came_before_its_head_is_counted_with_it(last: str) -> None:
    """A body that overtook its head is told by no packet, but by where the next request or the stream's end is."""
    end = server().gets("PA", 101, 1, 200).serves(ids(1), 1, 1).gets("PA", 1, 1, 100)
    end.sends("PA", 1, 301, 10).gets("A", 301, 11)
    if last == "fin":
        end.gets("FA", 301, 11)
    else:
        end.serves(ids(2), 11, 301).gets("PA", 301, 11, 100)
    found = served(told(end))
    assert (found.requests[0].bytes_received, found.requests[0].bytes_sent) == (300, 10)


def test_a_server_is_told_of_what_it_has_read() -> None:
    """Its tag takes over what the request's head had said, with all that had come for it."""
    end = server().gets("PA", 1, 1, 10).sends("PA", 1, 11, 10)
    end.serves(ids(1), 11, 11).gets("PA", 11, 11, 100).serves(ids(2), 11, 111, origin=Origin.TAG).sends(
        "PA", 11, 111, 20
    )
    found = served(told(end))
    assert found.packets[-1] == ids(2)
    (request,) = (request for request in found.requests if request.link.span_id == ids(2)[1])
    assert (request.bytes_received, request.bytes_sent) == (100, 20)


def test_a_segment_over_two_requests_names_both() -> None:
    """A super-packet reaches over both; each is given its own bytes."""
    end = client().serves(ids(1), 1, 1).serves(ids(2), 101, 1).sends("PA", 1, 1, 150)
    found = served(told(end))
    assert found.packets[3] == (ids(1), ids(2))
    assert [request.bytes_sent for request in found.requests] == [100, 50]


def test_answers_to_pipelined_requests_are_not_guessed() -> None:
    """What was asked twice before an answer came is known in one direction only; the next exchange is clear again."""
    end = client().serves(ids(1), 1, 1).sends("PA", 1, 1, 100).serves(ids(2), 101, 1).sends("PA", 101, 1, 100)
    end.gets("PA", 1, 201, 80)
    asked_and_answered(end, 3, 201, 81)
    found = served(told(end))
    assert found.packets[3:6] == [ids(1), ids(2), "interleaved"]
    assert found.packets[6:] == [ids(3)] * 4


def test_a_request_without_ids_ends_the_one_before() -> None:
    """Its packets are nobody's rather than the last one's."""
    end = asked_and_answered(client(), 1, 1, 1).serves(NONE, 101, 51).sends("PA", 101, 51, 10).gets("PA", 51, 111, 10)
    assert served(told(end)).packets[-2:] == [None, None]


def test_ids_that_come_late_take_their_place() -> None:
    """A head in two segments: nobody's at first, its own from its start on once they are known."""
    end = asked_and_answered(client(), 1, 1, 1).serves(NONE, 101, 51).sends("PA", 101, 51, 10)
    end.serves(ids(2), 101, 51).sends("PA", 111, 51, 10).sends("PA", 101, 51, 10, marks=Mark.RETRANSMIT)
    assert served(told(end)).packets[-3:] == [None, ids(2), ids(2)]


def test_the_application_is_believed_before_the_request() -> None:
    """Where tag and header name the same place the tag prevails, whichever comes first; clearing undoes only a tag."""
    for order in (1, -1):
        end = client()
        for number, origin in ((1, Origin.TAG), (2, Origin.TRACEPARENT))[::order]:
            end.serves(ids(number), 1, 1, origin=origin)
        end.sends("PA", 1, 1, 100)
        assert served(told(end)).packets[-1] == ids(1)
    end = client().serves(ids(2), 1, 1).serves(NONE, 1, 1, origin=Origin.TAG).sends("PA", 1, 1, 100)
    assert served(told(end)).packets[-1] == ids(2)
    end = client().serves(ids(2), 1, 1, origin=Origin.TAG).serves(NONE, 1, 1, origin=Origin.TAG).sends("PA", 1, 1, 9)
    assert served(told(end)).packets[-1] is None


def test_a_servers_tag_is_for_what_it_has_read() -> None:
    """What came since it last answered belongs to it, be it tagged a batch later."""
    end = server().gets("PA", 1, 1, 100).sends("A", 1, 101)
    end.serves(ids(1), 1, 101, origin=Origin.TAG).sends("PA", 1, 101, 50).gets("A", 101, 51)
    end.gets("PA", 101, 51, 100).sends("A", 51, 201)  # the next request, before its tag
    records = told(end)
    tagged = told(end.serves(ids(2), 51, 201, origin=Origin.TAG).sends("PA", 51, 201, 50))
    found = served(tagged, [len(records)])
    assert found.packets[3:7] == [ids(1)] * 4
    assert found.packets[7:] == [ids(2)] * 3
    assert served(records).waiting == 2
    untold = served(records)
    assert untold.packets[-2:] == ["waits", "waits"]


def test_tickets_that_a_server_sends_first_cost_no_request_its_bytes() -> None:
    """The request was there before TLS sent its tickets, and was read after that: its tag comes last."""
    end = server().gets("PA", 1, 1, 500).sends("PA", 1, 501, 900).gets("PA", 501, 901, 80).gets("PA", 581, 901, 240)
    end.sends("PA", 901, 821, 500).serves(ids(1), 1401, 821, origin=Origin.TAG).sends("PA", 1401, 821, 50)
    end.gets("PA", 821, 1451, 240).serves(ids(2), 1451, 1061, origin=Origin.TAG).sends("PA", 1451, 1061, 50)
    found = served(told(end))
    assert found.packets[3:] == [None, None, ids(1), ids(1), None, ids(1), ids(2), ids(2)]


@pytest.mark.parametrize("turns", [1, 4])
def test_servers_that_do_not_tag_are_not_waited_for(turns: int) -> None:
    """After a few turns without a tag, or once somebody has waited in vain, nothing waits any more."""
    end = server()
    for turn in range(turns):
        end.gets("PA", 1 + 10 * turn, 1 + 10 * turn, 10).sends("PA", 1 + 10 * turn, 11 + 10 * turn, 10)
    records = told(end)
    assert served(records).waiting == (1 if turns == 1 else 0)
    table, contexts = story.table(), ContextTable(quiet_ns=SECOND)
    batch = Batch(records, 0, 0, int(records["time_ns"][-1]))
    slots, _ = table.update(batch)
    followed = contexts.follow(batch, table.record_slots, table.flows, table.births)
    contexts.give_up(records[followed.waits], slots[followed.waits])
    other = told(
        End(local=("192.0.2.2", 443), peer=("192.0.2.1", 41000), time_ns=20 * SECOND)
        .handshake(client=False)
        .gets("PA", 1, 1, 10)
    )
    batch = Batch(other, 0, 0, int(other["time_ns"][-1]))
    table.update(batch)
    waits = contexts.follow(batch, table.record_slots, table.flows, table.births).waits
    assert waits.any() == (turns == 4)  # nobody waited there for long, so nothing was learnt of the listener


def test_a_server_that_tags_after_all_is_watched_from_then_on() -> None:
    """Nobody waited for its first tag, so that is for what follows; the next is for all that was asked."""
    end, at = server(), 1
    for _ in range(5):
        end.gets("PA", at, at, 10).sends("PA", at, at + 10, 10)
        at += 10
    end.gets("PA", at, at, 100).serves(ids(1), at, at + 100, origin=Origin.TAG)
    end.sends("PA", at, at + 100, 50).sends("PA", at, at + 100, 50, marks=Mark.RETRANSMIT)
    end.gets("PA", at + 100, at + 50, 70).sends("PA", at, at + 170, 50, marks=Mark.RETRANSMIT)
    end.gets("PA", at + 170, at + 50, 30).serves(ids(2), at + 50, at + 200, origin=Origin.TAG)
    end.sends("PA", at + 50, at + 200, 50)
    found = served(told(end))
    assert found.packets[-7:] == [None, ids(1), ids(1), ids(2), ids(1), ids(2), ids(2)]
    first, second = found.requests
    assert (first.bytes_sent, first.bytes_received, first.retransmits) == (50, 0, 2)
    assert (second.bytes_sent, second.bytes_received) == (50, 100)


def test_a_long_upload_is_one_request() -> None:
    """What a server receives before it answers belongs to what it was told last, at once."""
    end = server().gets("PA", 1, 1, 100).serves(ids(1), 1, 101, origin=Origin.TAG)
    end.gets("PA", 101, 1, 1000).gets("PA", 1101, 1, 1000).sends("A", 1, 2101)
    assert served(told(end)).packets[-3:] == [ids(1)] * 3


def test_connections_of_a_listener_that_tags_are_waited_for() -> None:
    """From its second connection on, even the first request waits for its tag."""
    first = server().gets("PA", 1, 1, 100).serves(ids(1), 1, 101, origin=Origin.TAG).sends("PA", 1, 101, 10)
    second = End(
        local=("192.0.2.2", 443), peer=("192.0.2.1", 40001), time_ns=20 * SECOND
    ).handshake(client=False)  # fmt: skip
    second.gets("PA", 1, 1, 100).serves(ids(2), 1, 101, origin=Origin.TAG).sends("PA", 1, 101, 10)
    found = served(told(first, second), [len(first.records)])
    assert found.packets[-2:] == [ids(2)] * 2


def test_streams_that_share_a_connection_are_linked_and_not_guessed() -> None:
    """HTTP/2: the span links to each; packets say that several are at work."""
    end = client().serves(ids(1), 1, 1, context_marks=SHARED, origin=Origin.TAG).sends("PA", 1, 1, 100)
    end.serves(ids(2), 101, 1, context_marks=SHARED, origin=Origin.TAG).sends("PA", 101, 1, 100).gets("PA", 1, 201, 9)
    found = served(told(end))
    assert found.packets[3:] == ["interleaved"] * 3
    assert {(link.trace_id, link.shared, link.sent) for link in found.links} == {
        (ids(1)[0], True, None), (ids(2)[0], True, None),
    }  # fmt: skip
    assert not found.requests


def test_a_tag_before_the_connection_stands_is_good_from_its_start() -> None:
    """Nothing of what comes is older."""
    end = End().sends("S", state=2).serves(ids(1), 1, -5000, origin=Origin.TAG, context_marks=EARLY)
    end.gets("SA", ack=1).sends("A", 1, 1).sends("PA", 1, 1, 10).gets("PA", 1, 11, 10)
    found = served(told(end))
    assert found.packets[-2:] == [ids(1)] * 2
    assert found.requests[0].bytes_received == 10


def test_a_context_that_was_lost_leaves_no_wrong_ids() -> None:
    """A packet that knows of more contexts than came is nobody's, and so is all after it, until the next one."""
    end = asked_and_answered(client(), 1, 1, 1)
    end.contexts += 1  # no room in the ring
    end.sends("PA", 101, 51, 100).gets("PA", 51, 201, 50)
    asked_and_answered(end, 3, 201, 101)
    found = served(told(end))
    assert found.packets[-6:] == [None, None, *[ids(3)] * 4]
    assert found.lost == 1


def test_the_end_of_a_connection_is_nobodys_but_a_reset_is() -> None:
    """FIN, its acknowledgement and what a TIME_WAIT sends; a RST tells of what was under way."""
    end = asked_and_answered(client(), 1, 1, 1)
    end.gets("FA", 51, 101).sends("A", 101, 52).sends("FA", 101, 52).gets("A", 52, 102)
    end.gets("A", 52, 102, marks=Mark.NO_SOCKET, state=6)
    assert served(told(end)).packets[-5:] == [None] * 5
    end = asked_and_answered(client(), 1, 1, 1).serves(ids(2), 101, 51).sends("PA", 101, 51, 100).gets("RA", 51, 101)
    assert served(told(end)).packets[-2:] == [ids(2)] * 2


def test_a_connection_links_to_128_and_counts_the_others() -> None:
    """A long life of many requests is bounded."""
    end = client()
    for number in range(150):
        asked_and_answered(end, number + 1, 1 + 100 * number, 1 + 50 * number)
    records = told(end)
    found = served(records, list(range(0, len(records), 40))[1:], then_ns=SECOND)
    assert (len(found.links), found.dropped) == (128, 22)
    assert len(found.requests) == 150


def test_what_a_connection_took_is_given_back() -> None:
    """Rows and numbers of connections that ended serve others."""
    table, contexts = story.table(linger_ns=SECOND), ContextTable(quiet_ns=SECOND)
    for turn in range(2000):
        end = End(isn=turn * 7919, local=("192.0.2.1", 1024 + turn), time_ns=(10 + turn) * SECOND).handshake()
        asked_and_answered(end, turn + 1, 1, 1).sends("R", 101)
        records = told(end)
        batch = Batch(records, 0, 0, int(records["time_ns"][-1]))
        _, ended = table.update(batch)
        contexts.follow(batch, table.record_slots, table.flows, table.births)
        for connection in ended:
            contexts.end(connection.slot, 0)
    assert contexts.begun == 2000
    assert len(contexts._requests) == 256
    assert len(contexts._rows) == 64
    assert len(contexts._served) < 20


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[End, list[Any]]:
    """A client's conversation with retransmits, and whose each packet is, by what was written down as it went."""
    end = End(isn=draw(st.sampled_from([0, 2**32 - 300, 2**31])), peer_isn=draw(st.integers(0, 2**32 - 1))).handshake()
    expected: list[Any] = [None] * 3
    sent, received = [(0, 1, None)], [(0, 1, None)]  # from, to, whose
    for number in range(1, draw(st.integers(1, 12)) + 1):
        whose = ids(number) if draw(st.integers(0, 4)) else None
        at, back = sent[-1][1], received[-1][1]
        end.serves(whose or NONE, at, back)
        for _ in range(draw(st.integers(1, 3))):
            size = draw(st.integers(1, 120))
            end.sends("PA", sent[-1][1], received[-1][1], size)
            sent.append((sent[-1][1], sent[-1][1] + size, whose))
            expected.append(whose)
        for _ in range(draw(st.integers(1, 3))):
            size = draw(st.integers(1, 120))
            end.gets("PA", received[-1][1], sent[-1][1], size)
            received.append((received[-1][1], received[-1][1] + size, whose))
            expected.append(whose)
            if draw(st.booleans()):
                end.sends("A", sent[-1][1], received[-1][1])
                expected.append(whose)
        if draw(st.booleans()):  # something of the last few requests goes once more
            first, last, whose = draw(st.sampled_from(sent[1:][-6:]))
            end.sends("PA", first, received[-1][1], last - first, marks=Mark.RETRANSMIT)
            expected.append(whose)
        if draw(st.booleans()):  # an acknowledgement that comes late
            _, last, whose = draw(st.sampled_from(sent[1:][-6:]))
            end.gets("A", received[-1][1], last)
            expected.append(whose)
    return end, expected


@given(exchanges(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_join_is_the_obvious_one(exchange: tuple[End, list[Any]], chance: random.Random) -> None:
    """However a conversation is cut into batches, each packet is whose bytes it carries or confirms."""
    end, expected = exchange
    records = told(end)
    cuts = sorted(chance.sample(range(1, len(records)), min(len(records) - 1, chance.randrange(4))))
    found = served(records, cuts)
    assert found.packets == expected
    assert not found.lost
    sums = {(request.link.trace_id, request.link.span_id): request for request in found.requests}
    for name in {whose for whose in expected if whose}:
        own = [
            row for row, whose in zip(records[records["kind"] == Kind.PACKET], expected, strict=True) if whose == name
        ]
        sent = [row for row in own if row["direction"] == Direction.TRANSMIT]
        if not cuts:  # else a request may be summed up before a segment of it comes once more
            assert sums[name].packets_sent == len(sent)
            assert sums[name].packets_received == len(own) - len(sent)
        assert sums[name].bytes_sent == sum(
            int(row["payload_bytes"]) for row in sent if not row["marks"] & Mark.RETRANSMIT
        )


@pytest.mark.parametrize("seed", range(3))
def test_wild_records_break_nothing(seed: int) -> None:
    """Whatever the ring holds: no read or write beside the arrays, and every packet gets an answer."""
    chance = np.random.default_rng(seed)
    end = asked_and_answered(client(), 1, 1, 1)
    base = told(end)
    records = base.view("V160")[chance.integers(0, len(base), 3000)].copy().view(base.dtype)
    records["time_ns"] = 10 * SECOND + np.arange(3000)
    for name in ("seq", "ack", "sent_seq", "received_seq"):
        records[name] = chance.integers(0, 2**32, 3000)
    records["local_port"] = chance.integers(1, 20, 3000)
    records["kind"] = np.where(chance.random(3000) < 0.3, Kind.CONTEXT, Kind.PACKET)
    context = records["kind"] == Kind.CONTEXT
    records["origin"][context] = chance.integers(1, 5, 3000)[context]
    table, contexts = story.table(), ContextTable(quiet_ns=SECOND)
    for start in range(0, 3000, 250):
        part = records.view("V160")[start : start + 250].copy().view(base.dtype)
        batch = Batch(part, 0, 0, int(part["time_ns"][-1]) + start * SECOND)
        table.update(batch)
        followed = contexts.follow(batch, table.record_slots, table.flows, table.births)
        assert len(followed.waits) == len(batch.packets)
        if followed.contexts:
            assert (followed.contexts.numbers < len(contexts._requests)).all()
        contexts.take_requests()
