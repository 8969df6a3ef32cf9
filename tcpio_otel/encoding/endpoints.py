"""Addresses as text, and the `tcpio` columns of a connection: what every format of a packet record shares."""

from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop

from tcpio_otel.batch import IPV4_PREFIX, Direction

HEADER = " %3s %15s:%-5s      %15s:%-5s %6s  %s" % ("CPU", "LADDR", "LPORT", "RADDR", "RPORT", "BYTES", "FLAGS")
"""The heading of `tcpio.d`, as the Solaris and illumos documentation prints it; rows stand one column off, as there."""

ARROWS = {Direction.RECEIVE: "<-", Direction.TRANSMIT: "->"}
DIRECTIONS = {Direction.RECEIVE: "receive", Direction.TRANSMIT: "transmit"}


@lru_cache(maxsize=1 << 16)
def address_text(address: bytes) -> str:
    """An address of 16 bytes as text: dotted for IPv4-mapped, RFC 5952 for others."""
    if address.startswith(IPV4_PREFIX):
        return inet_ntop(AF_INET, address[12:])
    return inet_ntop(AF_INET6, address)


def network_type(address: bytes) -> str:
    """`network.type` of an address of 16 bytes."""
    return "ipv4" if address.startswith(IPV4_PREFIX) else "ipv6"


@lru_cache(maxsize=1 << 16)
def bracketed(address: bytes) -> str:
    """An address as it stands before a port: IPv6 in brackets, which `tcpio.d` did not do and nobody could read."""
    text = address_text(address)
    return text if address.startswith(IPV4_PREFIX) else f"[{text}]"


def columns(local: bytes, local_port: int, peer: bytes, peer_port: int, direction: int) -> str:
    """The part of a `tcpio` row between CPU and BYTES, with the blank behind it."""
    return "%16s:%-5d %s %16s:%-5d " % (  # noqa: UP031 - the format is tcpio.d's own
        bracketed(local),
        local_port,
        ARROWS[Direction(direction)],
        bracketed(peer),
        peer_port,
    )


def payload_text(payload_bytes: int) -> str:
    """The BYTES column, with the blanks behind it."""
    return f"{payload_bytes:6d}  "
