"""How connections begin and end, one story a test."""

import errno
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpio_otel.batch import RECORD, Batch, Kind, Mark, State
from tcpio_otel.connections.events import CloseReason, Connection, Role, Start
from tcpio_otel.connections.events import End as Ended
from tcpio_otel.connections.identity import from_initial_sequence, initial_sequence
from tcpio_otel.connections.lifecycle import MILESTONE_LIMIT
from tcpio_otel.connections.table import ConnectionTable
from tests.story import MS, SECOND, End, lived, table, told


def only(ended: list[Connection]) -> Connection:
    """The one connection that ended."""
    assert len(ended) == 1
    return ended[0]


def names(connection: Connection) -> list[str]:
    """Its milestones in order."""
    return [milestone.name for milestone in connection.milestones]


def server_closes(client: bool = True) -> End:
    """A request and a response, closed by the server, seen from one end."""
    end = End().handshake(client) if client else End(isn=5000, peer_isn=1000).handshake(client)
    if client:
        end.sends("PA", 1, 1, 100).gets("PA", 1, 101, 300).sends("A", 101, 301)
        end.gets("FA", 301, 101).sends("FA", 101, 302).gets("A", 302, 102, state=State.LAST_ACK)
        return end.socket(State.LAST_ACK, sent=100, received=301)
    end.gets("PA", 1, 1, 100).sends("PA", 1, 101, 300).gets("A", 101, 301)
    end.sends("FA", 301, 101).gets("A", 101, 302).socket(State.FIN_WAIT2, sent=300, received=100)
    gone = {"marks": Mark.NO_SOCKET, "state": State.TIME_WAIT, "pid": 0}
    return end.gets("FA", 101, 302, **gone).sends("A", 302, 102, **gone)


def test_client_end_of_an_exchange() -> None:
    """Handshake, data, the peer closes first: a CLIENT with the kernel's totals."""
    connection = only(lived(told(server_closes())))
    assert (connection.role, connection.start, connection.end) == (Role.CLIENT, Start.OBSERVED, Ended.OBSERVED)
    assert (connection.bytes_sent, connection.bytes_received, connection.kernel_totals) == (100, 300, True)
    assert (connection.close_reason, connection.close_initiator, connection.error_type) == ("fin", "peer", None)
    assert (connection.handshake_s, connection.rtt_smoothed_s) == (2 * MS / SECOND, 0.0015)
    assert names(connection) == [
        "tcp.syn", "tcp.syn_ack", "tcp.established", "tcp.first_payload_sent", "tcp.first_payload_received", "tcp.fin",
        "tcp.fin",
    ]  # fmt: skip
    assert (connection.start_ns, connection.end_ns - connection.start_ns) == (10 * SECOND, 9 * MS)
    assert (connection.pid, connection.process_name) == (77, "app")


def test_server_end_waits_for_what_comes_after_the_kernel_closed_it() -> None:
    """An active closer's totals come before the peer's FIN: the span ends with the last ACK all the same."""
    connection = only(lived(told(server_closes(client=False))))
    assert (connection.role, connection.close_initiator) == (Role.SERVER, "local")
    assert (connection.bytes_sent, connection.bytes_received) == (300, 100)
    assert (connection.packets_sent, connection.packets_received) == (6, 7)
    assert names(connection)[-2:] == ["tcp.fin", "tcp.fin"]


def test_both_ends_share_a_trace() -> None:
    """Two agents that never talk to each other give the two ends one trace, the server under the client."""
    client, server = only(lived(told(server_closes()))), only(lived(told(server_closes(client=False))))
    assert client.trace_id == server.trace_id
    assert server.parent_span_id == client.span_id
    assert client.parent_span_id == b""
    assert client.connection_id == server.connection_id == client.trace_id[:8].hex()


def test_half_close_with_data() -> None:
    """What arrives after our own FIN still counts."""
    end = End().handshake().sends("PA", 1, 1, 10).sends("FA", 11, 1).gets("A", 1, 12)
    end.gets("PA", 1, 12, 500).sends("A", 12, 501).gets("FA", 501, 12).sends("A", 12, 502)
    connection = only(lived(told(end.socket(State.FIN_WAIT2, sent=10, received=501))))
    assert (connection.bytes_sent, connection.bytes_received, connection.close_initiator) == (10, 500, "local")


def test_simultaneous_close() -> None:
    """Both FINs cross: whoever sent first by our clock closed it."""
    end = End().handshake().sends("FA", 1, 1).gets("FA", 1, 1).sends("A", 2, 2).gets("A", 2, 2)
    connection = only(lived(told(end.socket(State.CLOSING, received=1))))
    assert (connection.close_reason, connection.close_initiator, connection.bytes_received) == ("fin", "local", 0)


def test_simultaneous_open() -> None:
    """Two SYNs cross: neither end is the server, and both find the same trace."""
    ends = []
    for isn, peer_isn in ((1000, 5000), (5000, 1000)):
        end = End(isn=isn, peer_isn=peer_isn).sends("S").gets("S").sends("SA", 0, 1).gets("SA", 0, 1).sends("A", 1, 1)
        end.gets("A", 1, 1).sends("FA", 1, 1).gets("FA", 1, 2).sends("A", 2, 2)
        ends.append(only(lived(told(end.socket(State.FIN_WAIT2, received=1)))))
    assert [end.role for end in ends] == [Role.UNKNOWN, Role.UNKNOWN]
    assert ends[0].trace_id == ends[1].trace_id
    assert ends[0].span_id != ends[1].span_id


def test_refused() -> None:
    """A RST instead of a SYN-ACK: an error with a name, and the ids that the other end would compute."""
    end = End().sends("S", state=State.SYN_SENT).gets("RA", -5000, 1).socket(State.SYN_SENT, error=errno.ECONNREFUSED)
    connection = only(lived(told(end)))
    assert (connection.close_reason, connection.close_initiator) == (CloseReason.REFUSED, "peer")
    assert connection.error_type == "connection_refused"
    assert connection.trace_id == from_initial_sequence(1000, 0).trace_id


def test_a_refusing_host_has_no_span_but_the_clients_ids() -> None:
    """Where no socket was, there is no span; the log records join the client's trace."""
    nobody = {"marks": Mark.NO_SOCKET, "state": 0, "pid": 0}
    end = End(isn=0, peer_isn=1000).gets("S", **nobody).sends("RA", 0, 1, **nobody)
    followed = table()
    slots, ended = followed.update(Batch(told(end), 0, 0, end.time_ns))
    assert ended == []
    assert set(followed.flows["trace_id"][slots].tolist()) == {from_initial_sequence(1000, 0).trace_id}
    assert followed.close(end.time_ns, None) == []


@pytest.mark.parametrize(
    ("error", "reason", "error_type"),
    [
        (errno.ETIMEDOUT, "timeout", "timeout"),
        (errno.EHOSTUNREACH, "unreachable", "host_unreachable"),
        (errno.ENETUNREACH, "unreachable", "network_unreachable"),
        (0, "aborted", None),
    ],
)
def test_connects_that_fail_without_an_answer(error: int, reason: str, error_type: str | None) -> None:
    """The kernel's error names the failure; no error means that the application gave up."""
    end = End().sends("S").waits(SECOND).sends("S", marks=Mark.RETRANSMIT).socket(State.SYN_SENT, error=error)
    connection = only(lived(told(end), then_ns=3 * SECOND))
    assert (connection.close_reason, connection.error_type) == (reason, error_type)
    assert names(connection) == ["tcp.syn", "tcp.retransmit"]


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_reset_in_the_middle(sent: bool, late: bool) -> None:
    """Whoever sends the RST ends it, whether the kernel's totals come before or after."""
    end = End().handshake().sends("PA", 1, 1, 50)
    close = {"sent": 50, "error": 0 if sent else errno.ECONNRESET}
    if late:
        end.socket(State.ESTABLISHED, **close)
    if sent:
        end.resets(3).sends("RA", 51, 1)
    else:
        end.gets("R", 1, 51)
    if not late:
        end.socket(State.ESTABLISHED, **close)
    connection = only(lived(told(end)))
    assert (connection.close_reason, connection.error_type) == ("reset", "connection_reset")
    assert connection.close_initiator == ("local" if sent else "peer")
    reset = connection.milestones[-1]
    assert (reset.name, reset.attributes.get("tcp.reset.reason")) == ("tcp.rst", "TCP_ABORT_ON_CLOSE" if sent else None)


@pytest.mark.parametrize("wait_ns", [0, 30 * SECOND])
def test_a_port_is_used_again(wait_ns: int) -> None:
    """A new SYN on the key of an old connection starts another, in TIME_WAIT or long after."""
    first = server_closes()
    second = server_closes()
    second.records.clear()
    second.isn, second.peer_isn, second.time_ns = 900_000, 700_000, first.time_ns + wait_ns
    again = End(isn=900_000, peer_isn=700_000, time_ns=first.time_ns + wait_ns).handshake()
    again.sends("FA", 1, 1).gets("FA", 1, 2).sends("A", 2, 2).socket(State.FIN_WAIT2, received=1)
    ended = lived(told(first, again))
    assert [connection.bytes_sent for connection in ended] == [100, 0]
    assert len({connection.trace_id for connection in ended}) == 2


def test_an_older_connection_is_inherited_with_its_ids() -> None:
    """A snapshot of the socket tells how a connection began that nobody saw begin."""
    end = End()
    numbers = {
        "snd_una": 1101, "snd_nxt": 1101, "write_seq": 1101, "bytes_acked": 101, "sent": 100, "received": 300,
    }  # fmt: skip
    end.socket(State.ESTABLISHED, State.ESTABLISHED, **numbers)
    end.sends("PA", 101, 301, 5).gets("A", 301, 106)
    followed = table()
    records = told(end)
    slots, _ = followed.update(Batch(records, 0, 0, end.time_ns))
    assert followed.flows["identified"][slots].all()
    connection = only(followed.close(end.time_ns, None))
    assert (connection.start, connection.end, connection.role) == (Start.INHERITED, Ended.AGENT_SHUTDOWN, Role.CLIENT)
    assert connection.trace_id == from_initial_sequence(1000, 5000).trace_id
    assert connection.close_reason is None


def test_a_server_whose_syn_ack_was_not_seen_learns_its_number_from_the_socket() -> None:
    """The accepted socket reports itself: same ids as the client computes; another one's report changes nothing."""
    listener = {"marks": Mark.LISTENER, "state": State.LISTEN}
    numbers = {"snd_una": 5001, "snd_nxt": 5001, "write_seq": 5001, "bytes_acked": 0}
    for rcv_nxt, known in ((1101, True), (9101, False)):
        end = End(isn=5000, peer_isn=1000).gets("S", **listener).gets("A", 1, 1, **listener)
        end.gets("PA", 1, 1, 100).socket(State.ESTABLISHED, State.ESTABLISHED, **numbers, received=100, rcv_nxt=rcv_nxt)
        end.sends("A", 1, 101)
        followed = table()
        records = told(end)
        slots, _ = followed.update(Batch(records, 0, 0, end.time_ns))
        assert followed.flows["identified"][slots].all() == known
        ended = followed.close(end.time_ns, None)
        if known:
            assert (only(ended).role, only(ended).start) == (Role.SERVER, Start.OBSERVED)
            assert only(ended).trace_id == from_initial_sequence(1000, 5000).trace_id
            assert (only(ended).bytes_received, only(ended).bytes_sent) == (100, 0)
        else:
            assert ended == []


def test_a_handshake_that_never_completes_times_out() -> None:
    """A SYN-ACK that nobody answers is a SERVER span with a timeout; a SYN that nobody answers is none."""
    listener = {"marks": Mark.LISTENER, "state": State.LISTEN}
    answered = End(isn=5000, peer_isn=1000).gets("S", **listener).sends("SA", 0, 1, **listener)
    ignored = End(peer=("192.0.2.9", 1)).gets("S", **listener)
    connection = only(lived(told(answered, ignored), then_ns=131 * SECOND))
    assert (connection.role, connection.error_type, connection.close_reason) == (Role.SERVER, "timeout", "timeout")


def test_nat_in_a_handshake() -> None:
    """A SYN-ACK whose headers NAT has rewritten joins the SYN that it answers, and makes no span of its own."""
    listener = {"marks": Mark.LISTENER, "state": State.LISTEN}
    end = End(isn=5000, peer_isn=1000, local=("10.0.0.1", 80), peer=("192.0.2.5", 999)).gets("S", **listener)
    end.local = ("198.51.100.1", 8080)
    end.sends("SA", 0, 1, **listener)
    end.local = ("10.0.0.1", 80)
    end.gets("A", 1, 1, **listener).gets("R", 1, 1).socket(State.ESTABLISHED)
    connection = only(lived(told(end)))
    assert (connection.role, connection.local.port) == (Role.SERVER, 80)
    assert connection.trace_id == from_initial_sequence(1000, 5000).trace_id


def test_a_full_table_evicts_the_longest_silent() -> None:
    """A flood of SYNs stays bounded; who is given up says so."""
    ends = [End(local=("192.0.2.1", port), time_ns=10 * SECOND + port * MS).sends("S") for port in range(1, 200)]
    followed = table(limit=50)
    _, ended = followed.update(Batch(told(*ends), 0, 0, 11 * SECOND))
    assert {connection.end for connection in ended} == {Ended.EVICTED}
    assert followed.open_connections <= 50
    assert [connection.local.port for connection in ended] == sorted(connection.local.port for connection in ended)
    assert len(ended) + followed.open_connections == 199


def test_strays_belong_to_nobody() -> None:
    """A last ACK to a TIME_WAIT socket long gone, or a lone RST, makes no connection."""
    gone = {"marks": Mark.NO_SOCKET, "state": State.TIME_WAIT, "pid": 0}
    end = End().gets("FA", 5, 5, **gone).sends("A", 5, 6, **gone)
    other = End(peer=("192.0.2.7", 7)).gets("R", 5, 5)
    followed = table()
    slots, ended = followed.update(Batch(told(end, other), 0, 0, end.time_ns))
    assert len(set(slots.tolist())) == 2
    assert ended + followed.close(end.time_ns, None) == []


def test_a_capture_adds_up_what_it_sees() -> None:
    """Without the kernel's totals, sequence numbers tell them, retransmits not counted twice."""
    end = End(isn=2**32 - 50).handshake().sends("PA", 1, 1, 100).sends("PA", 1, 1, 100, marks=Mark.RETRANSMIT)
    end.gets("PA", 1, 101, 70_000, gso_segments=50).gets("FA", 70_001, 101).sends("FA", 101, 70_002).gets(
        "A", 70_002, 102
    )
    connection = only(lived(told(end), kernel_totals=False))
    assert (connection.bytes_sent, connection.bytes_received, connection.kernel_totals) == (100, 70_000, False)
    assert (connection.packets_received, connection.retransmits) == (53, 1)


def summaries(followed: ConnectionTable, records: np.ndarray, now_ns: int) -> list[Connection]:
    """What a table has to say of open connections after some records."""
    _, ended = followed.update(Batch(records, 0, 0, now_ns))
    assert not ended
    return followed.take_summaries()


def test_open_connections_give_summaries_while_they_are_not_silent() -> None:
    """Every interval, what has been moved by then, under the span's ids; a silent one says nothing."""
    end = End().handshake().sends("PA", 1, 1, 100)
    followed = table(summary_interval_ns=60 * SECOND)
    assert summaries(followed, told(end), end.time_ns) == []
    (first,) = summaries(followed, told(end)[:0], 70 * SECOND)
    assert (first.bytes_sent, first.packets_sent, first.end, first.close_reason) == (100, 3, None, None)
    assert first.end_ns - first.start_ns == 60 * SECOND
    more = End(time_ns=90 * SECOND).gets("PA", 1, 101, 50)
    (second,) = summaries(followed, told(more), 130 * SECOND)
    assert (second.bytes_sent, second.bytes_received, second.kernel_totals) == (100, 50, False)
    assert (second.trace_id, second.span_id) == (first.trace_id, first.span_id)
    assert summaries(followed, told(more)[:0], 190 * SECOND) == []
    (last,) = followed.close(200 * SECOND, None)
    assert (last.trace_id, last.bytes_received, last.end) == (first.trace_id, 50, Ended.AGENT_SHUTDOWN)


def looked(end: End, segments: int, sent: int = 0, **fields: int) -> End:
    """The source has looked at a socket once more."""
    numbers = {"segments_out": segments, "snd_nxt": (end.isn + 1 + sent) % 2**32}
    end.socket(State.ESTABLISHED, State.ESTABLISHED, sent=sent, **numbers, **fields)
    end.records[-1]["kind"] = Kind.LOOK
    return end


def test_a_socket_that_is_looked_at_again_has_the_kernels_totals_by_then() -> None:
    """Of what was lost, too; what is seen after it counts on top, and a round-trip time is told once."""
    end = End().handshake().sends("PA", 1, 1, 100)
    looked(end, 9, sent=700, received=30, retransmits=2).sends("PA", 701, 31, 50)
    followed = table()
    followed.update(Batch(told(end), 0, 0, end.time_ns))
    (first,) = followed.active(end.time_ns)
    assert (first.bytes_sent, first.bytes_received, first.packets_sent, first.retransmits) == (750, 30, 10, 2)
    assert (first.rtt_smoothed_s, first.end, first.kernel_totals) == (0.0015, None, False)
    assert list(followed.active(end.time_ns)) == []
    end.records.clear()
    followed.update(Batch(told(end.sends("PA", 751, 31, 10)), 0, 0, end.time_ns))
    (second,) = followed.active(end.time_ns)
    assert (second.bytes_sent, second.rtt_smoothed_s) == (760, None)  # nobody has looked since
    end.records.clear()
    followed.update(Batch(told(looked(end, 30, sent=5000)), 0, 0, end.time_ns))
    (third,) = followed.active(end.time_ns)  # though no packet of it was seen
    assert (third.bytes_sent, third.packets_sent, third.rtt_smoothed_s) == (5000, 30, 0.0015)


def test_what_came_out_of_order_before_a_look_counts_once() -> None:
    """A socket has it among its totals only when the gap before it is closed."""
    end = End().handshake().gets("PA", 1, 1, 30).gets("PA", 131, 1, 20)
    looked(end, 9, received=30).gets("PA", 31, 1, 100)
    followed = table()
    followed.update(Batch(told(end), 0, 0, end.time_ns))
    (connection,) = followed.active(end.time_ns)
    assert connection.bytes_received == 150


def test_a_silent_socket_that_is_looked_at_again_says_nothing() -> None:
    """Its counters have not moved since the last time."""
    end, followed = End().handshake(), table()
    followed.update(Batch(told(looked(end, 9)), 0, 0, end.time_ns))
    assert len(list(followed.active(end.time_ns))) == 1
    end.records.clear()
    followed.update(Batch(told(looked(end, 9)), 0, 0, end.time_ns))
    assert list(followed.active(end.time_ns)) == []


def test_a_look_begins_no_connection() -> None:
    """One that the table has given up, or never knew, stays so."""
    end, followed = looked(End(), 9, sent=700), table()
    slots, ended = followed.update(Batch(told(end), 0, 0, end.time_ns))
    assert (followed.open_connections, slots.tolist(), ended, followed.births) == (0, [], [], [])


def test_an_older_connection_adds_what_is_seen_to_what_the_kernel_said() -> None:
    """Totals taken at the start are not the last word: later payload counts on top, and once."""
    numbers = {"snd_una": 2101, "snd_nxt": 2101, "write_seq": 2101, "rcv_nxt": 9001, "bytes_acked": 1101}
    end = End(isn=1000, peer_isn=5000).socket(State.ESTABLISHED, State.ESTABLISHED, sent=1100, received=4000, **numbers)
    end.sends("PA", 1101, 4001, 200).sends("PA", 1101, 4001, 200, marks=Mark.RETRANSMIT).gets("A", 4001, 1301)
    followed = table(summary_interval_ns=60 * SECOND)
    assert summaries(followed, told(end), end.time_ns) == []
    (summary,) = summaries(followed, told(end)[:0], 70 * SECOND)
    assert (summary.bytes_sent, summary.bytes_received) == (1300, 4000)
    assert (summary.packets_sent, summary.packets_received, summary.retransmits) == (7, 7, 1)
    assert not summary.kernel_totals


def test_what_comes_to_a_closed_socket_is_not_received() -> None:
    """Data after close is answered by RST; the kernel's totals stand, only the segments are counted on."""
    end = End().handshake().sends("FA", 1, 1).gets("A", 1, 2).socket(State.FIN_WAIT2)
    end.gets("PA", 1, 2, 500).sends("R", 2)
    connection = only(lived(told(end), then_ns=90 * SECOND))
    assert (connection.bytes_received, connection.kernel_totals) == (0, True)
    assert (connection.packets_received, connection.packets_sent) == (7, 6)


def test_an_old_connection_keeps_its_bytes_when_its_tuple_is_taken_without_a_word() -> None:
    """Three lives on one tuple, none closed: each has its own payload and segments."""
    lives = []
    for number, (isn, size) in enumerate(((1000, 100), (900_000, 50), (100, 30))):
        end = End(isn=isn, peer_isn=5000 + number, time_ns=(10 + number) * SECOND)
        lives.append(end.handshake().sends("PA", 1, 1, size).gets("PA", 1, 1 + size, 7).sends("A", 1 + size, 8))
    followed = table(kernel_totals=False)
    _, ended = followed.update(Batch(told(*lives), 0, 0, 20 * SECOND))
    ended += followed.close(20 * SECOND, None)
    assert [(connection.bytes_sent, connection.bytes_received) for connection in ended] == [(100, 7), (50, 7), (30, 7)]
    assert {(connection.packets_sent, connection.packets_received) for connection in ended} == {(4, 2)}


def test_a_reset_that_cannot_belong_to_the_connection_is_not_its_end() -> None:
    """A RST far out of the window, and a SYN astray, are ignored as the kernel ignores them."""
    end = server_closes(client=False)
    end.records[5:5] = End(isn=5000, peer_isn=1000, time_ns=end.records[4]["time_ns"][0]).gets("R", 2**31).records
    end.records[5:5] = (
        End(isn=5000, peer_isn=1000, time_ns=end.records[4]["time_ns"][0]).gets("S", 2**30, state=1).records
    )
    connection = only(lived(told(end)))
    assert (connection.close_reason, connection.bytes_received, connection.bytes_sent) == (CloseReason.FIN, 100, 300)
    assert connection.trace_id == from_initial_sequence(1000, 5000).trace_id


@pytest.mark.parametrize("believed", [False, True])
def test_a_reset_is_the_end_when_the_kernel_believes_it(believed: bool) -> None:
    """What the socket sends after a RST says that it was ignored, unless the kernel closes it by that RST after all."""
    end = End().handshake().sends("PA", 1, 1, 50).gets("R", 1).sends("PA", 51, 1, 50)
    if believed:
        end.socket(State.ESTABLISHED, sent=100)
    else:
        end.gets("A", 1, 101).waits(30 * SECOND).sends("FA", 101, 1).gets("FA", 1, 102).sends("A", 102, 2)
        end.socket(State.FIN_WAIT2, sent=100)
    connection = only(lived(told(end)))
    reason = (CloseReason.RESET, "peer") if believed else (CloseReason.FIN, "local")
    assert (connection.close_reason, connection.close_initiator) == reason
    assert (connection.start, connection.bytes_sent) == (Start.OBSERVED, 100)
    assert "tcp.rst" in names(connection)


def test_an_attempt_goes_on_after_a_challenge() -> None:
    """An ACK from an older connection is answered by RST, the SYN sent again: one connection, and no error."""
    end = End().sends("S", state=State.SYN_SENT).gets("A", 777_777, 333_333).sends("R", 333_333)
    end.sends("S", state=State.SYN_SENT, marks=Mark.RETRANSMIT).gets("SA", ack=1).sends("A", 1, 1)
    end.sends("PA", 1, 1, 50).sends("FA", 51, 1).gets("FA", 1, 52).sends("A", 52, 2)
    connection = only(lived(told(end), kernel_totals=False))
    assert (connection.close_reason, connection.error_type, connection.role) == (CloseReason.FIN, None, Role.CLIENT)
    assert (connection.bytes_sent, connection.bytes_received) == (50, 0)
    assert connection.trace_id == from_initial_sequence(1000, 5000).trace_id


def test_a_listener_takes_the_repeated_syn_after_a_challenge() -> None:
    """The same SYN that an older socket challenged opens a connection once that is gone."""
    old = End(isn=5000, peer_isn=1000).handshake(client=False)
    new = End(isn=8000, peer_isn=70_000, time_ns=old.time_ns)
    new.gets("S", state=State.ESTABLISHED).waits(-2 * MS)
    reset = End(isn=5000, peer_isn=1000, time_ns=old.time_ns + 2 * MS).gets("R", 1)
    reset.socket(State.ESTABLISHED, error=errno.ECONNRESET)
    new.waits(10 * MS).handshake(client=False).gets("PA", 1, 1, 60)
    new.gets("FA", 61, 1).sends("FA", 1, 62).gets("A", 62, 2).socket(State.LAST_ACK, received=61)
    ended = lived(told(old, reset, new))
    assert [connection.close_reason for connection in ended] == [CloseReason.RESET, CloseReason.FIN]
    assert [connection.bytes_received for connection in ended] == [0, 60]


def test_a_keep_alive_does_not_say_where_an_end_begins() -> None:
    """Its number is one too low: payload after it counts as it is."""
    end = End().sends("A", 99, 1).gets("A", 1, 100).sends("PA", 100, 1, 100).gets("A", 1, 200)
    end.sends("FA", 200, 1).gets("FA", 1, 201).sends("A", 201, 2)
    assert only(lived(told(end), kernel_totals=False)).bytes_sent == 100


def test_each_life_of_a_tuple_has_its_own_process() -> None:
    """Within one batch, the process of the last is not that of the first."""
    lives = []
    for number in range(3):
        end = End(isn=1000 * (number + 1), peer_isn=5000 + number, pid=100 + number, time_ns=(10 + number) * SECOND)
        end.handshake().sends("PA", 1, 1, 10).gets("A", 1, 11)
        lives.append(end.sends("R", 11).socket(State.ESTABLISHED, sent=10, error=errno.ECONNRESET))
    assert [connection.pid for connection in lived(told(*lives))] == [100, 101, 102]


def test_eviction_takes_the_silent_and_loses_nothing_of_the_batch_at_hand() -> None:
    """A batch with more connections than there is room for: all counted, the busy one stays, memory is given back."""
    busy = End(peer=("192.0.2.9", 9)).handshake()
    followed = table(limit=16, kernel_totals=False)
    followed.update(Batch(told(busy), 0, 0, busy.time_ns))
    crowd = [
        End(isn=10_000 + number, peer_isn=1, local=("192.0.2.1", 1000 + number), time_ns=11 * SECOND + number * MS)
        .handshake()
        .sends("PA", 1, 1, 300)
        for number in range(100)
    ]
    busy.waits(5 * SECOND).sends("PA", 1, 1, 10)
    _, ended = followed.update(Batch(told(busy, *crowd), 0, 0, 20 * SECOND))
    assert followed.open_connections <= 16
    assert {(connection.bytes_sent, connection.end) for connection in ended} == {(300, Ended.EVICTED)}
    assert any(connection.peer.port == 9 for connection in followed.close(20 * SECOND, None))


def test_handshakes_that_are_evicted_leave_nothing_behind() -> None:
    """A flood of SYNs to a listener, more than there is room for: every slot comes back."""
    followed = table(limit=16)
    for round_ in range(5):
        flood = [
            End(peer_isn=round_ * 1000 + number, local=("192.0.2.1", 80), peer=("192.0.2.7", 1000 + number)).gets(
                "S", marks=Mark.LISTENER, state=State.LISTEN
            )
            for number in range(100)
        ]
        followed.update(Batch(told(*flood), 0, 0, (20 + round_) * SECOND))
    followed.close(30 * SECOND, None)
    for now_ns in (300 * SECOND, 600 * SECOND, 900 * SECOND):
        followed.update(Batch(told(*flood)[:0], 0, 0, now_ns))
    assert not followed._embryonic
    assert not any(followed._entries)


def test_milestones_are_bounded_and_the_end_keeps_its_place() -> None:
    """A thousand retransmits do not push the FIN out."""
    end = End().handshake()
    for _ in range(1000):
        end.sends("PA", 1, 1, 10, marks=Mark.RETRANSMIT)
    end.gets("R", 1, 11).socket(State.ESTABLISHED, error=errno.ECONNRESET)
    connection = only(lived(told(end)))
    assert len(connection.milestones) <= MILESTONE_LIMIT
    assert connection.milestones_dropped > 800
    assert names(connection)[-1] == "tcp.rst"


def test_zero_windows_are_told_each_time() -> None:
    """A window that shuts, opens and shuts again is two milestones."""
    end = End().handshake().sends("PA", 1, 1, 10).gets("PA", 1, 11, 10).gets("A", 11, 11, window=0)
    end.gets("A", 11, 11, window=0).gets("A", 11, 11).gets("A", 11, 11, window=0).gets("R", 11, 11)
    connection = only(lived(told(end.socket(State.ESTABLISHED, error=errno.ECONNRESET))))
    assert names(connection).count("tcp.zero_window") == 2


def many_lives() -> np.ndarray:
    """Several connections at once, interleaved."""
    ends = [server_closes(), server_closes(client=False)]
    ends[1].local, ends[1].peer = ("192.0.2.2", 443), ("192.0.2.1", 40000)
    for record in ends[1].records:
        for prefix in ("", "header_"):
            if record["kind"] == Kind.PACKET or not prefix:
                record[f"{prefix}local_port"], record[f"{prefix}peer_port"] = 443, 40000
    for port in range(5):
        ends.append(End(local=("192.0.2.1", 50_000 + port), time_ns=10 * SECOND + port * 137_000).handshake())
        ends[-1].sends("PA", 1, 1, 7).gets("R", 1, 8).socket(State.ESTABLISHED, sent=7, error=errno.ECONNRESET)
    return told(*ends)


@given(st.lists(st.integers(1, 60), max_size=20))
@settings(deadline=None, max_examples=60)
def test_how_batches_are_cut_changes_nothing(cuts: list[int]) -> None:
    """Whole, row by row or anyhow: the same connections, and each row in the connection that it belongs to."""
    records = many_lives()
    whole = table()
    slots, expected = whole.update(Batch(records, 0, 0, int(records["time_ns"][-1])))
    ids = whole.flows["trace_id"][slots].tolist()
    followed, found, seen = table(), [], []
    bounds = [0, *sorted({cut for cut in cuts if cut < len(records)}), len(records)]
    for start, end in itertools.pairwise(bounds):
        part = records[start:end].view("V160").copy().view(RECORD)
        part_slots, ended = followed.update(Batch(part, 0, 0, int(part["time_ns"][-1])))
        followed.hold(part_slots)
        seen += part_slots.tolist()
        found += ended
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert followed.flows["trace_id"][seen].tolist() == ids


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_garbage_is_survived(seed: int) -> None:
    """Records that no kernel would write raise nothing, and the table stays bounded."""
    random = np.random.default_rng(seed)
    records = random.integers(0, 256, (300, RECORD.itemsize)).astype(np.uint8).view(RECORD).ravel()
    records["kind"] = random.integers(1, 4, 300)
    records["netns"], records["direction"] = random.integers(0, 2, 300), random.integers(0, 2, 300)
    for name in ("local_address", "peer_address"):
        records[name] = records[name][0]
    records["local_port"], records["peer_port"] = random.integers(0, 3, 300), random.integers(0, 3, 300)
    records["time_ns"] = np.sort(random.integers(0, 10**12, 300).astype(np.uint64))
    for kernel_totals in (True, False):
        followed = table(limit=16, kernel_totals=kernel_totals)
        slots, _ = followed.update(Batch(records, 0, 0, 10**12))
        assert len(slots) == np.count_nonzero(records["kind"] == Kind.PACKET)
        assert (slots >= 0).all()
        followed.close(10**12, None)
        assert followed.open_connections == 0


@given(
    opened_by_us=st.booleans(), local=st.integers(0, 2**32 - 1), peer=st.integers(0, 2**32 - 1),
    sent=st.integers(0, 2**33), unacknowledged=st.integers(0, 2**20), received=st.integers(0, 2**33),
    repeated=st.integers(0, 2**20),
)  # fmt: skip
def test_initial_sequence_numbers_follow_from_counters(
    opened_by_us: bool, local: int, peer: int, sent: int, unacknowledged: int, received: int, repeated: int
) -> None:
    """Whatever a connection has carried, its `tcp_sock` tells how it began."""
    unacknowledged = min(unacknowledged, sent)
    acked = sent - unacknowledged + opened_by_us
    found = initial_sequence(
        state=1,
        snd_una=(local + 1 + sent - unacknowledged) % 2**32,
        snd_nxt=(local + 1 + sent) % 2**32,
        write_seq=(local + 1 + sent) % 2**32,
        rcv_nxt=(peer + 1 + received) % 2**32,
        bytes_acked=acked,
        bytes_received=received,
        bytes_sent=sent + repeated,
        bytes_retransmitted=repeated,
    )
    assert found is not None
    assert (found.opened_by_us, found.local, found.peer) == (opened_by_us, local, peer)


def test_a_connection_of_which_every_packet_was_lost_is_known_by_its_socket() -> None:
    """Where the kernel says how it closed: all that went over it, and, from its numbers, who opened it."""
    numbers = {"snd_una": 1102, "snd_nxt": 1102, "write_seq": 1102, "bytes_acked": 102, "fin_received": 1}
    end = End(isn=1000, peer_isn=5000).socket(State.LAST_ACK, sent=100, received=301, **numbers)
    connection = only(lived(told(end), 90 * SECOND))
    assert (connection.bytes_sent, connection.bytes_received) == (100, 300)
    assert connection.counts == (100, 300, 5, 6, 0)
    assert (connection.start, connection.end, connection.kernel_totals) == (Start.INHERITED, Ended.OBSERVED, True)
    assert connection.role is Role.CLIENT
    assert lived(told(end), 90 * SECOND, older_told=False) == []  # it may be older than the agent
    assert lived(told(End().socket(State.SYN_SENT, segments_in=0)), 90 * SECOND) == []


def test_a_socket_that_closes_late_is_no_other_connection() -> None:
    """The connection was given up before, and has been counted."""
    followed = table(limit=16)
    silent = End(peer=("192.0.2.9", 9)).handshake()
    followed.update(Batch(told(silent), 0, 0, silent.time_ns))
    crowd = [
        End(isn=10_000 + number, local=("192.0.2.1", 1000 + number), time_ns=11 * SECOND).handshake()
        for number in range(40)
    ]
    _, ended = followed.update(Batch(told(*crowd), 0, 0, 12 * SECOND))
    assert any(connection.peer.port == 9 for connection in ended)
    late = End(peer=("192.0.2.9", 9), time_ns=13 * SECOND).socket(State.ESTABLISHED, sent=7)
    followed.update(Batch(told(late), 0, 0, 13 * SECOND))
    _, ended = followed.update(Batch(told(late)[:0], 0, 0, 90 * SECOND))
    assert not any(connection.peer.port == 9 for connection in ended)
    again = End(peer=("192.0.2.9", 9), time_ns=91 * SECOND).socket(State.ESTABLISHED, sent=8)
    followed.update(Batch(told(again), 0, 0, 91 * SECOND))
    _, ended = followed.update(Batch(told(again)[:0], 0, 0, 190 * SECOND))
    assert [connection.bytes_sent for connection in ended if connection.peer.port == 9] == [8]


def test_a_fin_that_was_lost_is_no_byte() -> None:
    """The kernel counts it among those that were received, and says that it was."""
    end = End().handshake().sends("FA", 1, 1).socket(State.FIN_WAIT2, received=301, fin_received=1)
    assert only(lived(told(end), then_ns=90 * SECOND)).bytes_received == 300


def test_what_is_older_than_the_agent_is_told_apart() -> None:
    """By the first look at sockets; without one, by what packets add up to until the kernel first says more."""
    numbers = {"snd_una": 2101, "snd_nxt": 2101, "write_seq": 2101, "rcv_nxt": 9001, "bytes_acked": 1101}
    old = End(isn=1000, peer_isn=5000).socket(State.ESTABLISHED, State.ESTABLISHED, sent=1100, received=4000, **numbers)
    old.sends("PA", 1101, 4001, 200).socket(State.ESTABLISHED, sent=1300, received=4000, segments_out=6)
    assert only(lived(told(old), 90 * SECOND)).counts == (200, 0, 1, 0, 0)
    middle = End().sends("PA", 1, 1, 100).gets("A", 1, 101)
    closing = {"sent": 900, "received": 500, "segments_out": 9, "segments_in": 8}
    middle.socket(State.ESTABLISHED, **closing)
    assert only(lived(told(middle), 90 * SECOND)).counts == (900, 500, 9, 8, 0)  # its handshake was lost
    assert only(lived(told(middle), 90 * SECOND, older_told=False)).counts == (100, 0, 1, 1, 0)


def test_active_connections_are_told_once_for_each_packet() -> None:
    """Those that are open, as they are by now; what takes a slot again is another."""
    end = End().handshake().sends("PA", 1, 1, 100)
    followed = table()
    followed.update(Batch(told(end), 0, 0, end.time_ns))
    (now,) = followed.active(end.time_ns)
    assert (now.bytes_sent, now.packets_sent, now.end, now.end_ns) == (100, 3, None, end.time_ns)
    assert list(followed.active(end.time_ns)) == []
    more = End(time_ns=11 * SECOND).gets("PA", 1, 101, 50)
    followed.update(Batch(told(more), 0, 0, more.time_ns))
    assert [(now.bytes_received, now.packets_received) for now in followed.active(more.time_ns)] == [(50, 2)]
    followed.update(Batch(told(End(time_ns=12 * SECOND).gets("R", 51).socket(State.ESTABLISHED)), 0, 0, 12 * SECOND))
    assert list(followed.active(13 * SECOND)) == []
    followed.update(Batch(told(more)[:0], 0, 0, 20 * SECOND))
    next_ = End(isn=77, peer_isn=99, time_ns=21 * SECOND).handshake()
    followed.update(Batch(told(next_), 0, 0, next_.time_ns))
    assert [now.packets_sent for now in followed.active(next_.time_ns)] == [2]
