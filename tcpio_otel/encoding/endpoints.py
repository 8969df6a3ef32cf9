"""Addresses as text, and the `tcpio` columns of a connection: what every format of a packet record shares."""

from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop

from tcpio_otel.batch import IPV4_PREFIX, Direction

HEADER = f" {'CPU':>3} {'LADDR':>15}:{'LPORT':<5}      {'RADDR':>15}:{'RPORT':<5} {'BYTES':>6}  FLAGS"
"""The heading of `tcpio.d`, as the Solaris and illumos documentation prints it; rows stand one column off, as there."""

ARROWS: dict[int, str] = {Direction.RECEIVE: "<-", Direction.TRANSMIT: "->"}
DIRECTIONS: dict[int, str] = {Direction.RECEIVE: "receive", Direction.TRANSMIT: "transmit"}


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
    return f"{bracketed(local):>16}:{local_port:<5} {ARROWS[direction]} {bracketed(peer):>16}:{peer_port:<5} "


def payload_text(payload_bytes: int) -> str:
    """The BYTES column, with the blanks behind it."""
    return f"{payload_bytes:6d}  "
