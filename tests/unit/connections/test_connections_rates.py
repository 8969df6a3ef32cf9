"""Rates and totals of open connections, between two moments and beside what the kernel says of them."""

import numpy as np

from tcpio_otel.batch import RECORD, Batch, Direction, Mark, State
from tcpio_otel.connections.events import Connection
from tcpio_otel.connections.rates import Rates
from tcpio_otel.connections.table import ConnectionTable
from tests.story import SECOND, End, table, told

OUT, IN = int(Direction.TRANSMIT), int(Direction.RECEIVE)


class Followed:
    """A table and the rates beside it, fed with ends of connections."""

    def __init__(self, followed: ConnectionTable | None = None) -> None:
        self.table = followed or table()
        self.rates = Rates(self.table)

    def hears(self, *ends: End) -> list[Connection]:
        """Take in what ends have told since the last time; returns what has ended."""
        batch = Batch(told(*ends), 0, 0, max(end.time_ns for end in ends))
        for end in ends:
            end.records.clear()
        slots, ended = self.table.update(batch)
        self.rates.take(batch, slots)
        return ended


def test_rates_are_payload_between_two_moments() -> None:
    """Each byte once, whatever was repeated; neither SYN nor FIN is payload; what came before is not counted again."""
    followed, end = Followed(), End().handshake().sends("PA", 1, 1, 1000).gets("PA", 1, 1001, 300)
    followed.hears(end)
    first = followed.rates.moment(12 * SECOND)
    assert first.rates.tolist() == [[150, 500]]
    assert first.packets_s == 2.5
    end.sends("PA", 1001, 301, 400).sends("PA", 1001, 301, 400, marks=Mark.RETRANSMIT).sends("FA", 1401, 301)
    followed.hears(end)
    second = followed.rates.moment(16 * SECOND)
    assert second.rates.tolist() == [[0, 100]]
    assert (second.retransmits.tolist(), second.retransmit_rates.tolist()) == ([1], [0.25])
    assert (second.payload_s, second.retransmits_s) == (200, 0.25)
    third = followed.rates.moment(17 * SECOND)
    assert (third.rates.tolist(), third.retransmits.tolist(), third.packets_s) == ([[0, 0]], [1], 0)


def looked(*ends: End) -> np.ndarray:
    """What the kernel says of open sockets when it is asked."""
    records = told(*ends)
    for end in ends:
        end.records.clear()
    return records


def test_a_look_gives_the_kernels_totals_and_ends_nothing() -> None:
    """Totals, retransmits and round-trip time are the kernel's, and what comes later is added to them, once."""
    followed, end = Followed(), End().handshake().sends("PA", 1, 1, 1000)
    followed.hears(end)
    assert followed.rates.moment(11 * SECOND).rtt_us.tolist() == [0]
    kernel = {"bytes_retransmitted": 500, "retransmits": 3, "rtt_smoothed_us": 40_000}
    for _ in range(2):
        end.socket(State.ESTABLISHED, State.ESTABLISHED, sent=1500, received=70, **kernel)
        followed.rates.look(looked(end))
    moment = followed.rates.moment(12 * SECOND)
    assert moment.totals.tolist() == [[70, 1000]]
    assert (moment.retransmits.tolist(), moment.resent.tolist(), moment.rtt_us.tolist()) == ([3], [0], [40_000])
    assert moment.rates.tolist() == [[0, 0]]
    followed.hears(end.sends("PA", 1001, 1, 200, marks=0))
    assert followed.rates.moment(13 * SECOND).totals.tolist() == [[70, 1200]]
    end.gets("FA", 1, 1201).sends("FA", 1201, 2).gets("A", 2, 1202)
    (connection,) = followed.hears(end.socket(State.LAST_ACK, sent=1700, received=71, **kernel))
    assert (connection.bytes_sent, connection.retransmits) == (1200, 3)
    assert followed.rates.moment(14 * SECOND).slots.tolist() == []


def test_a_look_at_sockets_that_nobody_follows_is_nothing() -> None:
    """It begins no connection: the table alone says what there is."""
    followed = Followed()
    followed.rates.look(looked(End().socket(State.ESTABLISHED, State.ESTABLISHED, sent=10)))
    followed.rates.look(np.empty(0, RECORD))
    assert len(followed.rates.moment(11 * SECOND).slots) == 0


def test_a_peers_fin_is_no_byte() -> None:
    """The kernel counts it among what it received; after it the socket stands in CLOSE_WAIT."""
    followed, end = Followed(), End().handshake().gets("PA", 1, 1, 100).gets("FA", 101, 1)
    followed.hears(end)
    followed.rates.look(looked(end.socket(State.CLOSE_WAIT, State.CLOSE_WAIT, sent=0, received=101)))
    assert followed.rates.moment(11 * SECOND).totals.tolist() == [[100, 0]]


def test_older_connections_have_what_the_first_look_said() -> None:
    """The probe tells of them when it starts, among its records."""
    followed, end = Followed(), End().socket(State.ESTABLISHED, State.ESTABLISHED, sent=9000, received=80)
    followed.hears(end)
    moment = followed.rates.moment(11 * SECOND)
    assert (moment.totals.tolist(), moment.rates.tolist()) == ([[80, 9000]], [[0, 0]])
    assert moment.rtt_us.tolist() == [0]  # nobody knows what has become of it since


def test_a_slot_that_is_used_again_starts_from_nothing() -> None:
    """Neither rates nor the kernel's figures of the one before are the new one's."""
    followed, end = Followed(), End().handshake().sends("PA", 1, 1, 1000)
    followed.hears(end)
    followed.rates.look(looked(end.socket(State.ESTABLISHED, State.ESTABLISHED, sent=5000, retransmits=7)))
    followed.rates.moment(11 * SECOND)
    followed.hears(end.gets("RA", 1, 1001).socket(State.ESTABLISHED, sent=5000))
    followed.hears(end.waits(5 * SECOND)._record(5))  # lingering is over
    followed.hears(end.waits(SECOND)._record(5))
    other = End(local=("192.0.2.1", 40001), time_ns=end.time_ns).handshake().sends("PA", 1, 1, 10)
    followed.hears(other)
    moment = followed.rates.moment(other.time_ns)
    assert moment.slots.tolist() == [0]
    assert (moment.totals.tolist(), moment.retransmits.tolist(), moment.rtt_us.tolist()) == ([[0, 10]], [0], [0])


def test_many_connections_at_once() -> None:
    """Columns grow with the table."""
    followed = Followed(followed=table(limit=5000))
    ends = [End(local=("192.0.2.1", 1024 + number)).handshake().sends("PA", 1, 1, number) for number in range(3000)]
    followed.hears(*ends)
    moment = followed.rates.moment(11 * SECOND)
    assert sorted(moment.rates[:, OUT].tolist()) == list(range(3000))


def test_a_captures_rates_count_from_its_first_packet() -> None:
    """Nobody knows its time before; and before it there are no rates."""
    followed = Followed(table(kernel_totals=False, older_told=False))
    followed.hears(End().handshake().sends("PA", 1, 1, 1000))
    assert followed.rates.moment(12 * SECOND).rates.tolist() == [[0, 500]]
