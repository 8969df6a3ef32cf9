"""A trace as a person at a terminal reads it: spans, connections, packets, and the answer in words."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from tcpio_otel import names
from tests.demo.stage import SHOP_ADDRESS, STOCK_ADDRESS, Lost
from tests.demo.trace import CLIENT, ENDS, SERVER, Record, Request, Retransmit, Span, Trace

WIDTH = 100
FIRST, LAST = 6, 4
"""Packets shown of a request that has more, from either end; one that was sent twice is always shown."""

TITLE, FAINT, ALARM = "bold cyan", "bright_black", "bold red"


def show(console: Console, trace: Trace, lost: Lost | None, number: int) -> None:
    """Print a trace."""
    console.rule(f"[{TITLE}]Run {number}. {trace.run.title}", align="left", style=TITLE)
    console.print(f"\nTrace {trace.root.trace_id}", highlight=False)
    console.print(_line("", "span", "service", "kind", "start", "duration"), style=FAINT)
    for line in _tree(trace, trace.root):
        console.print(line)
    if inner := sum(span.kind not in (CLIENT, SERVER) for span in trace.spans):
        console.print(f"{count(inner, 'internal span')} left out", style=FAINT, highlight=False)
    _show_connections(console, trace)
    _show_packets(console, trace)
    console.print()
    console.print(Panel(_answer(trace, lost), title="Which packets, and was any retransmitted?", title_align="left"))
    console.print()


def show_missing(console: Console, run: str, complaints: Sequence[str]) -> None:
    """Print what a trace lacks."""
    for complaint in complaints:
        console.print(f"[{ALARM}]Missing in run {run}:[/] {escape(complaint)}", highlight=False)


def ms(value: float) -> str:
    """Milliseconds."""
    return f"{value:,.1f} ms"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


# Spans.


def _line(prefix: str, name: str, service: str, kind: str, start: str, duration: str) -> Text:
    return Text.assemble((prefix, FAINT), f"{name:<{50 - len(prefix)}}{service:<9}{kind:<8}{start:>14}{duration:>14}")


def _tree(trace: Trace, span: Span, first: str = "", rest: str = "") -> Iterable[Text]:
    """A span's line, those of its figures, and those of what is beneath it."""
    kind = "client" if span.kind == CLIENT else "server"
    name = f"{span.attributes.get('http.request.method', '')} {span.name.split()[-1]}"
    yield _line(
        first, span.asked if span.kind == CLIENT else name, span.service, kind,
        f"+{ms(trace.offset_ms(span.start_ns))}", ms(span.duration_ms),
    )  # fmt: skip
    children = trace.children(span)
    inner = rest + ("│  " if children else "   ")
    for record in (record for request in trace.requests for record in request.figures):
        if record.span_id == span.span_id:
            for line in _figures(record):
                yield Text.assemble((inner, FAINT), (line, "yellow" if _resent(record) else FAINT))
    for child in children:
        last = child is children[-1]
        yield from _tree(trace, child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _resent(record: Record) -> int:
    return int(record.attributes[names.RETRANSMITS])


def _figures(record: Record) -> Iterable[str]:
    told = record.attributes
    yield (
        f"tcp.request at the {record.at}: sent {told[names.BYTES_SENT]:,} B in "
        f"{count(told[names.PACKETS_SENT], 'packet')}, received {told[names.BYTES_RECEIVED]:,} B in "
        f"{told[names.PACKETS_RECEIVED]}, {count(_resent(record), 'retransmit')}"
    )
    times = {
        "took": names.REQUEST_DURATION,
        "first byte": names.FIRST_BYTE,
        "last ack": names.LAST_ACK,
        "longest gap": names.LONGEST_GAP,
    }
    yield "  " + ", ".join(f"{label} {ms(told[name] * 1e3)}" for label, name in times.items() if name in told)


# Connections.


def _show_connections(console: Console, trace: Trace) -> None:
    for connection in trace.connections:
        told = connection.attributes
        client = connection.kind == CLIENT
        console.print(
            f"\n[{TITLE}]tcp.connection[/] {told[names.CONNECTION_ID]}, the {'client' if client else 'server'}'s end: "
            f"{told[names.LOCAL_ADDRESS]}:{told[names.LOCAL_PORT]} {'→' if client else '←'} "
            f"{told[names.PEER_ADDRESS]}:{told[names.PEER_PORT]}\n"
            f"  {ms(connection.duration_ms)}, sent {told[names.BYTES_SENT]:,} B in "
            f"{count(told[names.PACKETS_SENT], 'packet')}, received {told[names.BYTES_RECEIVED]:,} B in "
            f"{told[names.PACKETS_RECEIVED]}, {count(told[names.RETRANSMITS], 'retransmit')}",
            highlight=False,
        )
        for request in trace.requests:
            for link in _links(connection, request):
                console.print(f"  {_link(request, link)}", highlight=False)
    if trace.unserved:
        console.print(
            f"[{FAINT}]{count(len(trace.unserved), 'packet')} of it served no request (handshakes, close) "
            "and stayed in the connection's own trace.",
            highlight=False,
        )


def _links(connection: Span, request: Request) -> list[dict[str, Any]]:
    ids = {request.client.span_id, request.server.span_id if request.server else ""}
    return [attributes for _, span_id, attributes in connection.links if span_id in ids]


def _link(request: Request, link: dict[str, Any]) -> str:
    ranges = [
        f"{what} {link[start]:,}-{link[end]:,}"
        for what, start, end in (
            ("sent", names.SENT_START, names.SENT_END), ("received", names.RECEIVED_START, names.RECEIVED_END),
        )
        if start in link
    ]  # fmt: skip
    return f"↳ {request.title:<27} by {link[names.CONTEXT_SOURCE] + ':':<12} bytes {', '.join(ranges)}"


# Packets.


def _show_packets(console: Console, trace: Trace) -> None:
    console.print(
        f"\n[{TITLE}]tcp.packet[/]: each as one end recorded it, shop {SHOP_ADDRESS} on the left, stock "
        f"{STOCK_ADDRESS} on the right",
        highlight=False,
    )
    for request in trace.requests:
        console.print(f"\n{request.title}: {count(len(request.packets), 'packet')}", highlight=False)
        for part in _chosen(request):
            if isinstance(part, Record):
                console.print(_packet(trace, request, part))
            else:
                console.print(f"{'…':>14}   {_left_out(part)}", style=FAINT, highlight=False)


def _chosen(request: Request) -> list[Record | list[Record]]:
    """The packets to show, and in their places those that are left out."""
    twice = {id(packet) for resent in request.retransmits for packet in (resent.first, resent.again)}
    middle = range(FIRST, len(request.packets) - LAST) if len(request.packets) > FIRST + LAST + 2 else ()
    chosen: list[Record | list[Record]] = []
    for number, packet in enumerate(request.packets):
        if number not in middle or id(packet) in twice:
            chosen.append(packet)
        elif chosen and isinstance(chosen[-1], list):
            chosen[-1].append(packet)
        else:
            chosen.append([packet])
    return chosen


def _left_out(packets: list[Record]) -> str:
    carrying = [packet for packet in packets if packet.payload_bytes]
    return f"{count(len(packets), 'packet')} left out, {len(carrying)} of them with payload; none was sent twice"


def _packet(trace: Trace, request: Request, packet: Record) -> Text:
    arrow = "──▶" if packet.sent == (packet.at == "shop") else "◀──"
    way = f"shop {arrow}      " if packet.at == "shop" else f"     {arrow} stock"
    segments = packet.attributes.get(names.GSO_SEGMENTS)
    notes, style = [f"{segments} segments"] if segments else [], "" if packet.payload_bytes else FAINT
    for resent in request.retransmits:
        if packet is resent.first:
            notes.append("arrived, but was sent again" if resent.arrived else "never arrived")
        if packet is resent.again:
            notes.append("retransmit")
        if packet is resent.again or (packet is resent.first and not resent.arrived):
            style = ALARM
    payload = f"{packet.payload_bytes:,} B" if packet.payload_bytes else ""
    offset = f"+{trace.offset_ms(packet.time_ns):,.3f} ms"
    flags = packet.attributes[names.FLAGS]
    return Text(f"{offset:>14}   {way}   {payload:>8}   {flags:<9}  {', '.join(notes)}".rstrip(), style=style)


# The answer.


def _answer(trace: Trace, lost: Lost | None) -> str:
    told = []
    for request in trace.requests:
        where = "; ".join(
            f"{at}: {request.count(at, sent=True)} sent, {request.count(at, sent=False)} received"
            for at in ENDS.values()
        )
        told.append(
            f"[bold]{request.title}[/]: {len(request.packets)} of the {trace.packets()} packets belong to it "
            f"({where}). {_retransmits(trace, request)}"
        )
    if lost:
        told.append(
            f"[{FAINT}]The wire itself says that it lost one packet, of {lost.payload_bytes} B to the shop, "
            f"at +{ms(trace.offset_ms(lost.time_ns))}."
        )
    return "\n".join(told)


def _retransmits(trace: Trace, request: Request) -> str:
    if not request.retransmits:
        return "Nothing was retransmitted."
    gap = max((float(record.attributes[names.LONGEST_GAP]) for record in request.figures), default=0.0) * 1e3
    worked = f"the stock worked for {ms(request.server.duration_ms)}, and " if request.server else ""
    return (
        f"[{ALARM}]Retransmitted.[/] "
        + " ".join(_what_happened(trace, resent) for resent in request.retransmits)
        + f" Of the {ms(request.client.duration_ms)} that the shop waited, {worked}the wire was silent for {ms(gap)}."
    )


def _what_happened(trace: Trace, resent: Retransmit) -> str:
    again = resent.again
    what = f"The {again.at} sent {again.payload_bytes:,} B"
    if resent.first is None:
        return f"{what} again at +{ms(trace.offset_ms(again.time_ns))}; the first time was not recorded."
    later = ms((again.time_ns - resent.first.time_ns) / 1e6)
    if resent.arrived:
        return f"{what} again after {later} without an acknowledgement, though they had arrived."
    return f"{what} that never arrived, and sent them again {later} later."
