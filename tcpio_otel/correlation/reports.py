"""Rows of `ContextTable` to the events that others see."""

from typing import Any

import numpy as np

from tcpio_otel.batch import ContextMark, Direction, Origin
from tcpio_otel.correlation.events import Link, Range, Request
from tcpio_otel.correlation.layout import REQUEST, Records

_TRANSMIT, _RECEIVE = int(Direction.TRANSMIT), int(Direction.RECEIVE)

LINK = np.dtype([(name, REQUEST[name]) for name in (
    "trace_id", "span_id", "began_ns", "last_ns", "begin", "end", "origin", "marks", "unplaced",
)])  # fmt: skip
"""What is kept of a request for the link of its connection's span."""


def links_of(requests: Records) -> Records:
    """Requests (dtype REQUEST, shape (n,)), as much of them as links need (dtype LINK, shape (n,))."""
    links = np.empty(len(requests), LINK)
    for name in LINK.names or ():
        links[name] = requests[name]
    return links


def link_of(request: Any, offset_ns: int) -> Link:
    """The link to a request (a row of REQUEST or LINK); `offset_ns` turns the records' times into Unix time."""
    ended_ns = max(int(request["last_ns"]), int(request["began_ns"]))
    shared = bool(request["marks"] & ContextMark.SHARED)
    received, sent = (Range(int(begin), int(end)) for begin, end in zip(request["begin"], request["end"], strict=True))
    return Link(
        trace_id=request["trace_id"].tobytes(),
        span_id=request["span_id"].tobytes(),
        origin=Origin(int(request["origin"])),
        shared=shared,
        start_ns=int(request["began_ns"]) + offset_ns,
        end_ns=ended_ns + offset_ns,
        sent=None if shared else sent,
        received=None if shared or (request["unplaced"] and not request["last_ns"]) else received,
    )


def request_of(request: Any, offset_ns: int) -> Request:
    """What is reported of a request (a row of REQUEST); `offset_ns` as for `link_of`."""
    first_ns, payload, packets = request["first_ns"], request["payload"], request["packets"]

    def time(value: Any) -> int | None:
        return int(value) + offset_ns if value else None

    return Request(
        link=link_of(request, offset_ns),
        slot=int(request["slot"]),
        first_sent_ns=time(first_ns[_TRANSMIT]),
        first_received_ns=time(first_ns[_RECEIVE]),
        last_acked_ns=time(request["acked_ns"][_TRANSMIT]),
        bytes_sent=int(payload[_TRANSMIT]),
        bytes_received=int(payload[_RECEIVE]),
        packets_sent=int(packets[_TRANSMIT]),
        packets_received=int(packets[_RECEIVE]),
        retransmits=int(request["retransmits"]),
        longest_gap_s=int(request["gap_ns"]) / 1e9,
    )
