"""What `top` shows: connections and workloads as tables of any width, ranked, filtered, and how they end."""

import dataclasses
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.text import Text

from tcpio_otel import listing
from tcpio_otel.attribution.cgroups import Cgroups, Hierarchy
from tcpio_otel.attribution.naming import Kind, Known, Meaning
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import Batch, Mark, State
from tcpio_otel.board import ENDED_LIMIT, FADE_NS, Board, Choice, Row, Sort, Totals
from tcpio_otel.cli import SORTS
from tcpio_otel.connections.rates import Rates
from tcpio_otel.ledger import Balance
from tests.story import SECOND, End, table, told
from tests.unit.attribution.test_attribution_cgroups import ID, inode

WIDTHS = [200, 120, 80, 60, 40]


class Peers:
    """What somebody knows of peers: the first connection's is a pod behind a Service."""

    def __init__(self) -> None:
        service = Meaning(Kind.SERVICE, (("k8s.service.name", "shop"),))
        self.known = [Known(service, None, Meaning(Kind.POD, (("k8s.pod.name", "shop-0"),)))]

    def __getitem__(self, number: int) -> Known:
        return self.known[number]


class Host:
    """A host whose connections are told, batch by batch, to a board."""

    def __init__(self, fade_ns: int | None = FADE_NS, workloads: Workloads | None = None, named: bool = False) -> None:
        self.table, self.workloads = table(limit=10_000), workloads
        self.board = Board(self.table, Rates(self.table), workloads, Peers() if named else None, fade_ns)  # type: ignore[arg-type]

    def hears(self, *ends: End) -> None:
        """Take in what ends have told since the last time."""
        batch = Batch(told(*ends), 0, 0, max(end.time_ns for end in ends))
        for end in ends:
            end.records.clear()
        slots, ended = self.table.update(batch)
        if self.workloads:
            self.workloads.assign(batch, self.table.flows, self.table.owned)
        self.board.take(batch, slots, ended)

    def rows(self, count: int = 100, first: int = 0, **choice: object) -> list[Row]:
        """Rows of what is open."""
        return self.board.connections(Choice(**choice), first, count)  # type: ignore[arg-type]


def opened(number: int, sent: int, received: int = 1, pid: int = 77) -> End:
    """A connection that has sent and received so much."""
    end = End(local=("192.0.2.1", 40000 + number), pid=pid).handshake()
    return end.sends("PA", 1, 1, sent).gets("PA", 1, 1 + sent, received)


def reset(end: End) -> End:
    """The peer aborts it."""
    return end.gets("RA", 2, 1000).socket(State.ESTABLISHED, error=104)


def refused(number: int) -> End:
    """Nobody listens there."""
    end = End(local=("192.0.2.1", 50000 + number)).sends("S", state=State.SYN_SENT)
    return end.gets("RA", ack=1, state=State.SYN_SENT).socket(State.SYN_SENT, error=111)


def ports(rows: list[Row]) -> list[int]:
    """Which connections these are."""
    return [int(row.local.rpartition(":")[2]) - 40000 for row in rows]


@pytest.fixture
def host() -> Host:
    """Four connections that differ in everything that can be sorted by."""
    made = Host()
    ends = [opened(0, 100, 9000), opened(1, 5000, 10), opened(2, 20, 700), opened(3, 1, 1)]
    made.hears(*ends)
    ends[2].sends("PA", 1, 702, 20, marks=Mark.RETRANSMIT)
    ends[3].gets("FA", 2, 2)
    made.hears(*ends[2:])
    made.board.refresh(12 * SECOND)
    for number, rtt_us in enumerate((10, 30, 20, 40)):
        end = End(local=("192.0.2.1", 40000 + number))
        end.socket(State.ESTABLISHED, State.ESTABLISHED, 10, 10, rtt_smoothed_us=rtt_us, retransmits=number)
        made.board._rates.look(told(end))
    made.hears(opened(0, 100).sends("PA", 101, 9001, 40))
    made.board.refresh(14 * SECOND)
    return made


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (Sort.OUT, [0, 1, 2, 3]),
        (Sort.RTT, [3, 1, 2, 0]),
        (Sort.RETRANSMITS, [3, 2, 1, 0]),
        (Sort.AGE, [0, 1, 2, 3]),
        (Sort.STATE, [3, 0, 1, 2]),
    ],
)
def test_rows_come_in_the_order_that_was_asked_for(host: Host, sort: Sort, order: list[int]) -> None:
    """Most first, what is equal by bytes and then by age; and the other way round."""
    assert ports(host.rows(sort=sort)) == order
    turned = ports(host.rows(sort=sort, reverse=True))
    assert turned[-1] == order[0]
    assert ports(host.rows(2, 1, sort=sort)) == order[1:3]


def test_rates_lead_what_they_are_of() -> None:
    """By bytes a second out, in, and both together; a retransmit of the last interval, and none of one before."""
    made, ends = Host(), [opened(0, 100, 9000), opened(1, 5000, 10), opened(2, 20, 700)]
    made.hears(*ends)
    made.board.refresh(12 * SECOND)
    assert [ports(made.rows(sort=sort)) for sort in (Sort.OUT, Sort.IN, Sort.BYTES)] == [
        [1, 0, 2],
        [0, 2, 1],
        [0, 1, 2],
    ]
    assert [row.out_rate for row in made.rows()] == [2500, 50, 10]
    made.hears(ends[2].sends("PA", 1, 701, 20, marks=Mark.RETRANSMIT))
    totals = made.board.refresh(14 * SECOND)
    assert ports(made.rows(sort=Sort.RETRANSMIT_RATE))[0] == 2
    assert [row.out_rate for row in made.rows()] == [0, 0, 0]
    assert totals == Totals(0.5, 10, 0.5, 3)
    assert made.board.refresh(15 * SECOND).retransmits == 0
    assert {row.retransmit_rate for row in made.rows()} == {0}


def test_the_command_line_knows_the_same_orders() -> None:
    """By their names."""
    assert list(SORTS) == [sort.value for sort in Sort]
    assert set(listing.SORT_KEYS.values()) == set(Sort)


def test_a_row_says_what_is_known(host: Host) -> None:
    """Ends, process, direction, age, state, and the kernel's figures."""
    row = host.rows()[0]
    assert (row.process, row.local, row.arrow, row.peer) == ("app/77", "192.0.2.1:40000", "->", "192.0.2.2:443")
    assert (row.rtt_ms, row.retransmits, row.state, row.age_s, row.older) == (0.01, 0, "estab", 4, False)
    assert (row.out_rate, row.ended, row.failed) == (20, False, False)
    assert host.rows(sort=Sort.STATE)[0].state == "close-wait"


@pytest.mark.parametrize(
    ("text", "order"),
    [("app", [0, 1, 2, 3]), ("P/77", [0, 1, 2, 3]), (":40002", [2]), ("192.0.2.2:443", [0, 1, 2, 3]), ("nothing", [])],
)  # fmt: skip
def test_a_filter_leaves_those_that_hold_a_text(host: Host, text: str, order: list[int]) -> None:
    """In their ends or process, whatever its case."""
    assert ports(host.rows(text=text)) == order


def test_a_filter_sees_new_connections_and_processes(host: Host) -> None:
    """What was looked for once is looked for again where something has changed."""
    assert ports(host.rows(text="/99")) == []
    host.hears(opened(7, 10, pid=99))
    host.board.refresh(15 * SECOND)
    assert ports(host.rows(text="/99")) == [7]


def test_ended_connections_fade() -> None:
    """Those that failed come first, each says how it ended; after a while they are gone, and with them their rows."""
    made, normal, broken = Host(), opened(0, 10), opened(1, 999)
    made.hears(normal, broken)
    normal.sends("FA", 11, 2).gets("FA", 2, 12).sends("A", 12, 3).socket(State.FIN_WAIT2, sent=10, received=1)
    made.hears(normal, reset(broken), refused(0))
    made.board.refresh(11 * SECOND)
    assert made.rows() == []
    ended = made.board.ended(Choice(), 10)
    assert [(row.state, row.failed, row.ended) for row in ended] == [
        ("reset/peer", True, True), ("refused/peer", True, True), ("fin/local", False, True),
    ]  # fmt: skip
    assert [row.rtt_ms for row in ended] == [1.5, 1.5, 1.5]
    assert [row.state for row in made.board.ended(Choice(text="REFUSED"), 10)] == ["refused/peer"]
    assert len(made.board.ended(Choice(), 2)) == 2
    made.board.refresh(11 * SECOND + FADE_NS // 2)
    assert len(made.board.ended(Choice(), 10)) == 3
    made.board.refresh(11 * SECOND + FADE_NS)
    assert made.board.ended(Choice(), 10) == []


def test_a_capture_keeps_what_has_ended_within_bounds() -> None:
    """It has no now from which to fade; the failures do not make way for others."""
    made = Host(fade_ns=None)
    made.hears(*(refused(number) for number in range(100)))
    for start in range(0, ENDED_LIMIT + 50, 500):
        ends = [opened(number, 10) for number in range(start, start + 500)]
        made.hears(*ends)
        for end in ends:
            end.sends("FA", 11, 2).gets("FA", 2, 12).sends("A", 12, 3).socket(State.FIN_WAIT2, sent=10, received=1)
        made.hears(*ends)
    made.board.refresh(99 * SECOND)
    assert len(made.board.ended(Choice(), 10**6)) == ENDED_LIMIT + 100


def test_workloads_add_up(tmp_path: Path) -> None:
    """A container is one row whatever runs in it; what failed is counted from the start and does not fade."""
    container = tmp_path / f"docker-{ID}.scope"
    container.mkdir()
    made = Host(workloads=Workloads(Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)))
    inside = {"cgroup": inode(container), "process_name": b"nginx"}
    ends = [opened(0, 1000, 50), opened(1, 10, 1)]
    contained = End(local=("192.0.2.1", 40002)).handshake().sends("PA", 1, 1, 300, **inside)
    other = End(local=("192.0.2.1", 40003)).handshake().sends("PA", 1, 1, 200, **{**inside, "process_name": b"php"})
    made.hears(*ends, contained, other)
    made.hears(reset(ends[1]), refused(1), refused(2))
    contained.sends("PA", 1, 1, 300, marks=Mark.RETRANSMIT, **inside)
    made.hears(contained)
    made.board.refresh(12 * SECOND)
    groups = made.board.groups(Choice())
    assert [(group.workload, group.connections, group.out_rate, group.in_rate) for group in groups] == [
        ("app", 1, 500, 25), (ID[:12], 2, 250, 0),
    ]  # fmt: skip
    assert [(group.resets, group.failed_connects, group.failed) for group in groups] == [(1, 2, True), (0, 0, False)]
    assert [(group.retransmits, group.retransmit_rate) for group in groups] == [(0, 0), (1, 0.5)]
    assert [group.workload for group in made.board.groups(Choice(Sort.RETRANSMITS))] == [ID[:12], "app"]
    assert [group.workload for group in made.board.groups(Choice(reverse=True))] == [ID[:12], "app"]
    assert [group.workload for group in made.board.groups(Choice(text="APP"))] == ["app"]
    assert {row.process for row in made.rows()} == {"app/77", f"{ID[:12]}:nginx/77", f"{ID[:12]}:php/77"}
    assert len(made.rows(text=ID[:6])) == 2
    made.hears(reset(ends[0]))
    made.board.refresh(12 * SECOND + 2 * FADE_NS)
    assert [(group.connections, group.resets) for group in made.board.groups(Choice(text="app"))] == [(0, 2)]


def test_peers_have_names_where_somebody_knows_them() -> None:
    """A Service, and the pod behind it."""
    made = Host(named=True)
    made.hears(opened(0, 10))
    made.board.refresh(11 * SECOND)
    assert [row.peer_name for row in made.rows(text="SHOP-0")] == ["shop:shop-0"]


LONG = Row(
    process="a-name-that-is-fairly-long/1234567", local="[2001:db8:aaaa:bbbb:cccc:dddd:eeee:1]:65535", arrow="<-",
    peer="[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65534", peer_name="a-service:and-the-pod-behind-it-0",
    out_rate=123_456_789, in_rate=98_765, payload_bytes=10**15, rtt_ms=12345.6, retransmits=123_456,
    retransmit_rate=1234.5, age_s=10**8, older=True, state="fin-wait-1",
)  # fmt: skip
USUAL = Row(
    process="nginx/812", local="10.0.0.7:443", arrow="<-", peer="198.51.100.23:50312", peer_name="", out_rate=1000,
    in_rate=0, payload_bytes=2048, rtt_ms=12.3, retransmits=0, retransmit_rate=0, age_s=12, older=False, state="estab",
)  # fmt: skip
GONE = dataclasses.replace(
    USUAL, out_rate=None, in_rate=None, retransmit_rate=None, rtt_ms=None, state="reset/peer", failed=True
)
WIDE = dataclasses.replace(USUAL, process="日本語の長い名前のプロセス/9", peer_name="名前")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [[], [USUAL], [USUAL, GONE], [LONG, USUAL, GONE, WIDE]])
def test_no_line_is_wider_than_the_terminal(width: int, rows: list[Row]) -> None:
    """Every line of a table is one line, whatever is in it, and its columns stand under their titles."""
    found = listing.lines(listing.CONNECTIONS, rows, Choice(), width)
    assert len(found) == 1 + len(rows)
    assert {cell_len(line.plain) for line in found} == {cell_len(found[0].plain)}
    assert cell_len(found[0].plain) <= width
    assert all("\n" not in line.plain for line in found)


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (200, "PROCESS LOCAL PEER NAME OUT/s IN/s BYTES RTT ms RETR RETR/s AGE STATE"),
        (120, "PROCESS LOCAL PEER NAME OUT/s IN/s BYTES RTT ms RETR RETR/s AGE STATE"),
        (80, "PROCESS LOCAL PEER OUT/s IN/s RTT ms RETR STATE"),
        (60, "PROCESS PEER OUT/s IN/s RTT ms RETR STATE"),
        (40, "PEER OUT/s IN/s RETR STATE"),
        (20, "PEER"),
    ],
)
def test_columns_fall_away_by_rank(width: int, titles: str) -> None:
    """What says whether it was the network, and which connection, is the last to go."""
    heading = listing.lines(listing.CONNECTIONS, [LONG, GONE], Choice(), width)[0].plain
    assert heading.split() == titles.split()


def test_what_has_room_is_whole() -> None:
    """At 80 columns an ordinary row is complete; at 40 ports, rates and how it ended still are."""
    shown = [line.plain for line in listing.lines(listing.CONNECTIONS, [USUAL, GONE], Choice(), 80)]
    assert shown[1].split() == ["nginx/812", "10.0.0.7:443", "<-", "198.51.10…:50312", "1k", "0", "12.3", "0", "estab"]
    shown = [line.plain for line in listing.lines(listing.CONNECTIONS, [USUAL, GONE], Choice(), 40)]
    assert shown[1].split() == ["198.51.1…:50312", "1k", "0", "0", "estab"]
    assert shown[2].split() == ["198.51.1…:50312", "0", "reset"]
    full = listing.lines(listing.CONNECTIONS, [LONG], Choice(), 250)[1].plain
    for text in (LONG.process, LONG.local, LONG.peer, LONG.peer_name, LONG.state):
        assert text in full


def test_a_name_without_any_peers_name_leaves_no_gap() -> None:
    """The column of names is there where there are names."""
    assert "NAME" not in listing.lines(listing.CONNECTIONS, [USUAL], Choice(), 200)[0].plain


def styles(line: Text) -> list[str]:
    """How a line looks."""
    return [str(line.style), *(str(span.style) for span in line.spans)]


def test_what_is_wrong_stands_out() -> None:
    """Failures, retransmits, what is over; and by what the rows are sorted."""
    repeated = dataclasses.replace(USUAL, retransmit_rate=0.5)
    over = dataclasses.replace(GONE, failed=False)
    found = listing.lines(listing.CONNECTIONS, [USUAL, GONE, repeated, over], Choice(Sort.RTT), 120)
    assert [styles(line)[0] for line in found[1:]] == ["", "red", "yellow", "dim"]
    (marked,) = [span for span in found[0].spans if "reverse" in str(span.style)]
    assert found[0].plain[marked.start : marked.end].strip() == "RTT ms"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.2, "<1"), (0.7, "1"), (999, "999"), (1000, "1k"), (123_456, "123k"), (2.5e9, "2.5G")],
)
def test_numbers_take_five_cells(number: float, text: str) -> None:
    """Little is not nothing."""
    assert listing.short(number) == text


@pytest.mark.parametrize(
    ("seconds", "older", "text"),
    [
        (0.04, False, "0.0s"),
        (59, False, "59s"),
        (90, False, "1.5m"),
        (7200, True, ">2.0h"),
        (86400 * 300, True, ">300d"),
    ],
)
def test_ages(seconds: float, older: bool, text: str) -> None:
    """Of what was there before, the least that it can be."""
    assert listing.age(seconds, older) == text


@pytest.mark.parametrize("width", [*WIDTHS, 25, 10])
def test_the_other_lines_fit_too(width: int) -> None:
    """What there is no room for is left out from the end; what was not seen is said first."""
    balance = Balance(dropped={"ring_full": 12_345})
    totals = Totals(123_456, 7.5e9, 42, 65_432)
    typed = "a filter that is longer than the narrowest terminal"
    found = [
        listing.head(totals, balance, width), listing.head(totals, Balance(), width), listing.foot(width),
        listing.status(Choice(text="x" * 100), "a warning " * 10, width, paused=True), listing.prompt(typed, width),
        *listing.help_lines(width),
    ]  # fmt: skip
    assert all(cell_len(line.plain) <= width for line in found)
    if width >= 60:
        assert found[0].plain.startswith("not seen: ring_full 12345  123 k packets/s")
        assert found[1].plain.startswith("123 k packets/s  7.5 GB/s  65432 connections")
    assert found[4].plain.rstrip().endswith(typed[-7:])


def test_a_plain_table_is_for_scripts() -> None:
    """As many fields in every line as in the heading, none with a blank in it, numbers without units."""
    text = listing.plain(listing.CONNECTIONS, [USUAL, GONE, dataclasses.replace(LONG, process="a b/1")])
    heading, *rows = [line.split() for line in text.splitlines()]
    assert {len(row) for row in rows} == {len(heading)}
    usual, gone, long = (dict(zip(heading, row, strict=True)) for row in rows)
    assert usual == {
        "PROCESS": "nginx/812", "LOCAL": "10.0.0.7:443", "DIRECTION": "<-", "PEER": "198.51.100.23:50312", "NAME": "-",
        "OUT_BYTES/S": "1000", "IN_BYTES/S": "0", "BYTES": "2048", "RTT_MS": "12.300", "RETRANSMITS": "0",
        "RETRANSMITS/S": "0.00", "AGE_S": "12.0", "STATE": "estab",
    }  # fmt: skip
    assert (gone["OUT_BYTES/S"], gone["RTT_MS"], gone["STATE"]) == ("-", "-", "reset/peer")
    assert (long["PROCESS"], long["OUT_BYTES/S"], long["PEER"]) == ("a_b/1", "123456789", LONG.peer)


def test_names_of_processes_obey_no_terminal() -> None:
    """A process may call itself what it likes."""
    made = Host()
    made.hears(End().sends("S", state=State.SYN_SENT, process_name=b"\x1b[31mevil"))
    made.board.refresh(11 * SECOND)
    assert "\x1b" not in "".join(line.plain for line in listing.lines(listing.CONNECTIONS, made.rows(), Choice(), 120))
    assert re.search(r"x1b\[31mevil/77", made.rows()[0].process)
