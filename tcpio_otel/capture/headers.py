"""Captured frames to TCP headers: link layers, IPv4, IPv6 and its extensions."""

import struct
from typing import NamedTuple

from tcpio_otel.batch import IPV4_PREFIX

PACKET_OUTGOING = 4  # <linux/if_packet.h>, the direction in cooked captures
PACKET_HOST = 0

_ETHERNET, _NULL, _RAW_OLD, _RAW_BSD, _RAW, _LOOP, _SLL, _IPV4, _IPV6, _SLL2 = (
    1,
    0,
    12,
    14,
    101,
    108,
    113,
    228,
    229,
    276,
)
_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = 0x0800, 0x86DD
_VLAN_TAGS = (0x8100, 0x88A8, 0x9100)
_TCP, _FRAGMENT, _AUTHENTICATION = 6, 44, 51
_EXTENSIONS = (0, 43, 60)  # hop-by-hop, routing, destination options (RFC 8200, section 4)
_TCP_HEADER = struct.Struct(">HHIIBBH")


class Skipped(Exception):  # noqa: N818 - no error: most frames of a capture may be something else
    """A frame that holds no TCP header; its argument says why, in a few words for a count."""


class Decoded(NamedTuple):
    """A TCP segment in a frame. `outgoing` is what a cooked header says of its direction, None for no word."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload_bytes: int
    outgoing: bool | None


def supported(link_type: int) -> bool:
    """Whether frames of a link type (https://www.tcpdump.org/linktypes.html) can be decoded."""
    return link_type in (_ETHERNET, _NULL, _RAW_OLD, _RAW_BSD, _RAW, _LOOP, _SLL, _IPV4, _IPV6, _SLL2)


def decode(link_type: int, frame: bytes, wire_bytes: int) -> Decoded:
    """Decode a frame.

    Args:
        link_type: of the interface.
        frame: what was captured of it.
        wire_bytes: its length on the wire.

    Raises:
        Skipped: it holds no TCP header, or too little of it was captured.
    """
    try:
        offset, outgoing = _network_offset(link_type, frame)
        return _internet(frame, offset, wire_bytes, outgoing)
    except (IndexError, struct.error):
        raise Skipped("truncated") from None


def _network_offset(link_type: int, frame: bytes) -> tuple[int, bool | None]:
    """Where the IP header begins, and what the link layer says of the direction."""
    if link_type == _ETHERNET:
        return _behind_tags(frame, 12), None
    if link_type == _SLL:
        return _behind_tags(frame, 14), _cooked(int.from_bytes(frame[0:2]))
    if link_type == _SLL2:
        kind = frame[10]
        ethertype = int.from_bytes(frame[0:2])
        if ethertype not in (_ETHERTYPE_IPV4, _ETHERTYPE_IPV6, *_VLAN_TAGS):
            raise Skipped("not IP")
        # A tag that was not taken off stands behind the cooked header, with the protocol last.
        return (20 if ethertype not in _VLAN_TAGS else _behind_tags(frame[:2] + frame[20:], 0) + 18), _cooked(kind)
    if link_type in (_NULL, _LOOP):
        return 4, None
    return 0, None


def _cooked(kind: int) -> bool | None:
    return {PACKET_OUTGOING: True, PACKET_HOST: False}.get(kind)


def _behind_tags(frame: bytes, at: int) -> int:
    """The offset behind an EtherType at `at` and the VLAN tags that may precede it."""
    ethertype = int.from_bytes(frame[at : at + 2])
    while ethertype in _VLAN_TAGS:
        at += 4
        ethertype = int.from_bytes(frame[at : at + 2])
    if ethertype not in (_ETHERTYPE_IPV4, _ETHERTYPE_IPV6):
        raise Skipped("not IP")
    return at + 2


def _internet(frame: bytes, offset: int, wire_bytes: int, outgoing: bool | None) -> Decoded:
    version = frame[offset] >> 4
    # Ethernet pads short frames, so the IP header's own length counts; super-packets say 0 there.
    on_wire = wire_bytes - offset
    if version == 4:
        total = int.from_bytes(frame[offset + 2 : offset + 4]) or on_wire
        if frame[offset + 9] != _TCP:
            raise Skipped("not TCP")
        if int.from_bytes(frame[offset + 6 : offset + 8]) & 0x1FFF:
            raise Skipped("fragment")
        header = (frame[offset] & 0x0F) * 4
        source, destination = (IPV4_PREFIX + frame[at : at + 4] for at in (offset + 12, offset + 16))
    elif version == 6:
        payload = int.from_bytes(frame[offset + 4 : offset + 6])
        total = payload + 40 if payload else on_wire
        header = _behind_extensions(frame, offset)
        source, destination = frame[offset + 8 : offset + 24], frame[offset + 24 : offset + 40]
    else:
        raise Skipped("not IP")
    return _tcp(frame, offset + header, total - header, source, destination, outgoing)


def _behind_extensions(frame: bytes, offset: int) -> int:
    """The length of an IPv6 header with its extensions, up to a TCP header."""
    following, at = frame[offset + 6], offset + 40
    while following != _TCP:
        if following == _FRAGMENT:
            if int.from_bytes(frame[at + 2 : at + 4]) & 0xFFF8:
                raise Skipped("fragment")
            length = 8
        elif following == _AUTHENTICATION:
            length = (frame[at + 1] + 2) * 4
        elif following in _EXTENSIONS:
            length = (frame[at + 1] + 1) * 8
        else:
            raise Skipped("not TCP")
        following, at = frame[at], at + length
    return at - offset


def _tcp(frame: bytes, at: int, tcp_bytes: int, source: bytes, destination: bytes, outgoing: bool | None) -> Decoded:
    if len(frame) < at + 20:
        raise Skipped("truncated")
    source_port, destination_port, seq, ack, length, flags, window = _TCP_HEADER.unpack_from(frame, at)
    header = (length >> 4) * 4
    if header < 20:
        raise Skipped("bad TCP header")
    return Decoded(
        source,
        destination,
        source_port,
        destination_port,
        seq,
        ack,
        flags,
        window,
        max(0, tcp_bytes - header),
        outgoing,
    )
