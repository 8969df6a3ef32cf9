"""What a running agent shows on a terminal, and says in its log elsewhere: rates, open connections, the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tcpio_otel.ledger import Balance


@dataclass(frozen=True)
class Talker:
    """An open connection among the busiest: its ends as text, its process, and what it carried."""

    local: str
    peer: str
    process: str
    packets: int
    payload_bytes: int


@dataclass(frozen=True)
class Status:
    """Totals since the start, at one moment of a monotonic clock."""

    at_ns: int
    packets: int
    payload_bytes: int
    open_connections: int
    spans: int
    balance: Balance
    talkers: Sequence[Talker] = ()


def quantity(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 12.3 k, 4.56 M."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            text = f"{number:.0f}" if prefix == "" else f"{number:.3g}"
            return f"{text} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError("unreachable: the loop returns at T")


def ledger_line(balance: Balance) -> str:
    """The ledger as an equation, reasons in brackets: the last line of every run."""

    def reasons(counts: dict[str, int]) -> str:
        text = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        return f"{sum(counts.values())}" + (f" ({text})" if text else "")

    line = (
        f"seen {balance.seen} = exported {balance.exported} + filtered {reasons(balance.filtered)}"
        f" + sampled {balance.sampled} + dropped {reasons(balance.dropped)} + in flight {balance.in_flight}"
    )
    return line if balance.difference == 0 else f"{line} + UNACCOUNTED {balance.difference}"


def rates(now: Status, before: Status) -> tuple[float, float]:
    """Packets and payload bytes a second between two moments."""
    seconds = max((now.at_ns - before.at_ns) / 1e9, 1e-9)
    return (now.packets - before.packets) / seconds, (now.payload_bytes - before.payload_bytes) / seconds


def log_line(now: Status, before: Status) -> str:
    """One plain line for a log."""
    packets, payload = rates(now, before)
    return (
        f"{quantity(packets)} packets/s, {quantity(payload, 'B')}/s, {now.open_connections} open connections, "
        f"{now.spans} spans; {ledger_line(now.balance)}"
    )


def screen(now: Status, before: Status, destination: str) -> RenderableType:
    """The live view: rates, where the records go, and the busiest connections."""
    packets, payload = rates(now, before)
    head = Table.grid(padding=(0, 2))
    for name, value in (
        ("packets", f"{quantity(packets)}/s"),
        ("payload", f"{quantity(payload, 'B')}/s"),
        ("connections", f"{now.open_connections} open, {now.spans} spans"),
        ("exported", f"{now.balance.exported} packets to {destination}"),
        ("in flight", str(now.balance.in_flight)),
        ("dropped", Text(str(sum(now.balance.dropped.values())), style="bold red" if now.balance.dropped else "")),
    ):
        head.add_row(Text(name, style="dim"), value)
    talkers = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("LOCAL", "PEER", "PROCESS"):
        talkers.add_column(column, overflow="fold")
    for column in ("PACKETS", "BYTES"):
        talkers.add_column(column, justify="right")
    for talker in now.talkers:
        talkers.add_row(
            Text(talker.local),
            Text(talker.peer),
            Text(talker.process),
            quantity(talker.packets),
            quantity(talker.payload_bytes, "B"),
        )
    return Group(head, Text(), talkers, Text("Ctrl-C stops the agent", style="dim"))
