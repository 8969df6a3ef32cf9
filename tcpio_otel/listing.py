"""Rows of a board to lines: a table for a terminal of any width, or a plain one for scripts.

On a terminal nothing wraps. Columns have a least width and a rank; those of the lowest rank go first where there is no
room, and what room is left goes to those of the highest whose texts are longer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from tcpio_otel.board import Choice, Group, Row, Sort, Totals
from tcpio_otel.ledger import Balance
from tcpio_otel.summary import quantity

UNKNOWN = "-"
_NAME_CELLS = 3  # of a process, at least
_READABLE = 12
"""Less of a text than so many cells is not worth showing."""

_GAP = " "
_ELLIPSIS = "…"

KEYS: tuple[tuple[str, str], ...] = (
    ("q", "quit"),
    ("?", "this help, and back"),
    ("w", "connections, or workloads"),
    ("/", "show only what holds a text; Enter keeps it, Esc drops it"),
    ("p, space", "pause: the figures stand still"),
    ("o  i  b", "sort by bytes/s out, bytes/s in, bytes"),
    ("r", "sort by round-trip time"),
    ("t  T", "sort by retransmits, by retransmits/s"),
    ("a  e", "sort by age, by state"),
    ("", "the same once more: the other way round"),
    ("↑ ↓ PgUp PgDn Home", "scroll"),
)
SORT_KEYS = {
    "o": Sort.OUT,
    "i": Sort.IN,
    "b": Sort.BYTES,
    "r": Sort.RTT,
    "t": Sort.RETRANSMITS,
    "T": Sort.RETRANSMIT_RATE,
    "a": Sort.AGE,
    "e": Sort.STATE,
}

Line = TypeVar("Line", Row, Group)


def cut(text: str, width: int) -> str:
    """A text in at most so many cells, its end cut off."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + _ELLIPSIS


def cut_address(text: str, width: int) -> str:
    """An address with its port in at most so many cells: the port stays."""
    if len(text) <= width:
        return text
    address, _, port = text.rpartition(":")
    kept = width - len(port) - 2
    return f"{address[:kept]}{_ELLIPSIS}:{port}" if kept > 0 else cut(text, width)


def cut_process(text: str, width: int) -> str:
    """A process in at most so many cells: its number stays, if there is room for some of its name."""
    name, slash, pid = text.rpartition("/")
    kept = width - len(pid) - 1
    if cell_len(text) <= width or not slash or kept < _NAME_CELLS:
        return cut(text, width)
    return f"{cut(name, kept)}/{pid}"


def cut_state(text: str, width: int) -> str:
    """A state in at most so many cells: how it ended stays longer than who ended it."""
    return cut(text if len(text) <= width else text.partition("/")[0], width)


@dataclass(frozen=True)
class Column(Generic[Line]):
    """A column.

    Attributes:
        title: on a terminal.
        plain_title: for scripts, with the unit.
        rank: 0 is the last to go.
        least: its least width, in cells.
        text: of a row, on a terminal.
        plain: of a row, for scripts; None: the same.
        sort: what it is sorted by.
        stretches: whether it may take more than its least width.
        right: whether it is aligned to the right.
        cut: shortens a text to a width.
        optional: whether it is left out where no row has a text for it.
    """

    title: str
    plain_title: str
    rank: int
    least: int
    text: Callable[[Line], str]
    plain: Callable[[Line], str] | None = None
    sort: Sort | None = None
    stretches: bool = False
    right: bool = True
    cut: Callable[[str, int], str] = cut
    optional: bool = False


def short(number: float) -> str:
    """A number in at most five cells: 812, 1.23M; little more than nothing is not nothing."""
    return "<1" if 0 < number < 0.5 else quantity(number).replace(" ", "")


def rate(number: float | None) -> str:
    """A rate; nothing of a connection that has ended."""
    return "" if number is None else short(number)


def milliseconds(value: float | None) -> str:
    """A time in at most five cells."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def age(seconds: float, older: bool) -> str:
    """An age in at most six cells; of what is older than anybody looked, the least that it can be."""
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            text = f"{seconds / length:.0f}{unit}" if seconds >= 10 * length else f"{seconds / length:.1f}{unit}"
            break
    else:
        text = f"{seconds:.0f}s" if seconds >= 10 else f"{seconds:.1f}s"
    return f">{text}" if older else text


def plain_rate(number: float | None, digits: int = 0) -> str:
    """A rate for scripts."""
    return UNKNOWN if number is None else f"{number:.{digits}f}"


def plain_rtt(value: float | None) -> str:
    """A time in milliseconds, for scripts."""
    return UNKNOWN if value is None else f"{value:.3f}"


CONNECTIONS: tuple[Column[Row], ...] = (
    Column("PROCESS", "PROCESS", 6, 12, lambda row: row.process, stretches=True, right=False, cut=cut_process),
    Column("LOCAL", "LOCAL", 8, 15, lambda row: row.local, stretches=True, cut=cut_address),
    Column("", "DIRECTION", 7, 2, lambda row: row.arrow),
    Column("PEER", "PEER", 0, 15, lambda row: row.peer, stretches=True, right=False, cut=cut_address),
    Column("NAME", "NAME", 12, 12, lambda row: row.peer_name, stretches=True, right=False, optional=True),
    Column(
        "OUT/s", "OUT_BYTES/S", 1, 6, lambda row: rate(row.out_rate), lambda row: plain_rate(row.out_rate), Sort.OUT
    ),
    Column("IN/s", "IN_BYTES/S", 2, 6, lambda row: rate(row.in_rate), lambda row: plain_rate(row.in_rate), Sort.IN),
    Column(
        "BYTES", "BYTES", 11, 6, lambda row: short(row.payload_bytes), lambda row: f"{row.payload_bytes}", Sort.BYTES
    ),
    Column("RTT ms", "RTT_MS", 5, 6, lambda row: milliseconds(row.rtt_ms), lambda row: plain_rtt(row.rtt_ms), Sort.RTT),
    Column(
        "RETR", "RETRANSMITS", 3, 4, lambda row: short(row.retransmits), lambda row: f"{row.retransmits}",
        Sort.RETRANSMITS,
    ),
    Column(
        "RETR/s", "RETRANSMITS/S", 9, 6, lambda row: rate(row.retransmit_rate),
        lambda row: plain_rate(row.retransmit_rate, 2), Sort.RETRANSMIT_RATE,
    ),
    Column("AGE", "AGE_S", 10, 6, lambda row: age(row.age_s, row.older), lambda row: f"{row.age_s:.1f}", Sort.AGE),
    Column("STATE", "STATE", 4, 5, lambda row: row.state, sort=Sort.STATE, stretches=True, right=False, cut=cut_state),
)  # fmt: skip

WORKLOADS: tuple[Column[Group], ...] = (
    Column("WORKLOAD", "WORKLOAD", 0, 10, lambda row: row.workload, stretches=True, right=False),
    Column("CONN", "CONNECTIONS", 3, 5, lambda row: short(row.connections), lambda row: f"{row.connections}"),
    Column(
        "OUT/s", "OUT_BYTES/S", 1, 6, lambda row: rate(row.out_rate), lambda row: plain_rate(row.out_rate), Sort.OUT
    ),
    Column("IN/s", "IN_BYTES/S", 2, 6, lambda row: rate(row.in_rate), lambda row: plain_rate(row.in_rate), Sort.IN),
    Column(
        "RETR", "RETRANSMITS", 6, 5, lambda row: short(row.retransmits), lambda row: f"{row.retransmits}",
        Sort.RETRANSMITS,
    ),
    Column(
        "RETR/s", "RETRANSMITS/S", 7, 6, lambda row: rate(row.retransmit_rate),
        lambda row: plain_rate(row.retransmit_rate, 2), Sort.RETRANSMIT_RATE,
    ),
    Column("RST", "RESETS", 4, 4, lambda row: short(row.resets), lambda row: f"{row.resets}", Sort.STATE),
    Column(
        "FAIL", "FAILED_CONNECTS", 5, 4, lambda row: short(row.failed_connects), lambda row: f"{row.failed_connects}",
        Sort.STATE,
    ),
)  # fmt: skip


def fitted(columns: Sequence[Column[Line]], texts: Sequence[Sequence[str]], width: int) -> dict[int, int]:
    """The columns that fit into a width, by place, and how wide each is.

    Args:
        columns: in their order.
        texts: of each row, by column.
        width: in cells.
    """
    kept: list[int] = []
    room = width + len(_GAP)
    for place in sorted(range(len(columns)), key=lambda place: columns[place].rank):
        needed = columns[place].least + len(_GAP)
        if needed > room:
            break  # else a lesser column would stand where a greater one has no room
        if columns[place].optional and not any(row[place] for row in texts):
            continue
        kept.append(place)
        room -= needed
    widths = {place: columns[place].least for place in kept}
    for place in kept:
        if columns[place].stretches:
            wanted = max((cell_len(row[place]) for row in texts), default=0) - widths[place]
            grown = max(0, min(wanted, room))
            widths[place] += grown
            room -= grown
    return dict(sorted(widths.items()))


def _padded(text: str, width: int, *, right: bool) -> str:
    padding = " " * (width - cell_len(text))
    return padding + text if right else text + padding


def _cell(column: Column[Line], text: str, width: int) -> str:
    return _padded(column.cut(text, width), width, right=column.right)


def lines(columns: Sequence[Column[Line]], rows: Sequence[Line], choice: Choice, width: int) -> list[Text]:
    """The heading and a line for each row, none wider than a terminal."""
    texts = [[column.text(row) for column in columns] for row in rows]
    widths = fitted(columns, texts, width)
    heading = Text(no_wrap=True, style="bold")
    for number, (place, size) in enumerate(widths.items()):
        column = columns[place]
        heading.append(_GAP * (number > 0))
        heading.append(_cell(column, column.title, size), "reverse" if column.sort is choice.sort else "")
    found = [heading]
    for row, cells in zip(rows, texts, strict=True):
        shown = _GAP.join(_cell(columns[place], cells[place], size) for place, size in widths.items())
        found.append(Text(shown, no_wrap=True, style=_style(row)))
    return found


def _style(row: Row | Group) -> str:
    if row.failed:
        return "red"
    if isinstance(row, Row) and row.ended:
        return "dim"
    return "yellow" if row.retransmit_rate else ""


def plain(columns: Sequence[Column[Line]], rows: Iterable[Line]) -> str:
    """A table for scripts: a heading, a line a row, fields apart by blanks and none of them empty or with a blank."""
    table = [[column.plain_title for column in columns]]
    table += (["_".join((column.plain or column.text)(row).split()) or UNKNOWN for column in columns] for row in rows)
    widths = [max(cell_len(row[place]) for row in table) for place in range(len(columns))]
    return "".join(
        "  ".join(
            _padded(text, width, right=column.right) for column, text, width in zip(columns, row, widths, strict=True)
        ).rstrip()
        + "\n"
        for row in table
    )


def head(totals: Totals, balance: Balance, width: int) -> Text:
    """The first line: what goes on, and what of it was not seen; as much of it as there is room for."""
    parts = [(f"{quantity(totals.packets)} packets/s", ""), (f"{quantity(totals.payload_bytes, 'B')}/s", "")]
    parts += [(f"{totals.connections} connections", "")]
    parts += [(f"{short(totals.retransmits)} retransmits/s", "yellow" if totals.retransmits else "")]
    if balance.dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(balance.dropped.items()))
        parts.insert(0, (f"not seen: {reasons}", "bold red"))
    return _joined(parts, width)


def status(choice: Choice, note: str, width: int, *, paused: bool) -> Text:
    """The second line: which rows these are, and what the agent has said last."""
    order = f"by {choice.sort}" + (" reversed" if choice.reverse else "")
    parts = [("paused", "bold yellow")] if paused else []
    parts += [(f"{'workloads' if choice.by_workload else 'connections'} {order}", "dim")]
    if choice.text:
        parts.append((f"with {choice.text!r}", "bold"))
    if note:
        parts.append((note, "yellow"))
    return _joined(parts, width)


def _joined(parts: Sequence[tuple[str, str]], width: int) -> Text:
    line = Text(no_wrap=True)
    for number, (text, style) in enumerate(parts):
        room = width - cell_len(line.plain) - 2 * (number > 0)
        if room < min(cell_len(text), _READABLE):
            break
        line.append("  " * (number > 0))
        line.append(cut(text, room), style)
    return line


def foot(width: int) -> Text:
    """The last line: keys that get one further."""
    return Text(cut("q quit  ? help  w workloads  / filter  p pause  o i b r t T a e sort", width), "dim", no_wrap=True)


def prompt(typed: str, width: int) -> Text:
    """The last line while a filter is typed: its end is what is seen."""
    room = max(1, width - 2)
    while cell_len(typed) > room:
        typed = typed[1:]
    return Text.assemble(f"/{typed}", (" ", "reverse"), no_wrap=True)


def help_lines(width: int) -> list[Text]:
    """What the keys do."""
    longest = max(cell_len(keys) for keys, _ in KEYS)
    return [Text(cut(f"{_padded(keys, longest, right=False)}  {text}", width), no_wrap=True) for keys, text in KEYS]
