"""A captured frame to the TCP segment in it: link layers, IPv4, IPv6 and its extensions."""

import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

from tcpio_otel.batch import IPV4_PREFIX

IPV6_EXTENSIONS_LIMIT = 8
"""As many as the probe follows (bpf/packet.h)."""


_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = 0x0800, 0x86DD
_VLAN_TAGS = (0x8100, 0x88A8, 0x9100)
_ADDRESS_FAMILIES = (2, 10, 24, 28, 30)  # AF_INET, then AF_INET6 of Linux, NetBSD and OpenBSD, FreeBSD, Darwin
_BYTE_ORDERS: tuple[Literal["big", "little"], ...] = ("big", "little")
_NO_ADDRESSES = bytes(12)
_LOOPBACK_HARDWARE = 772  # ARPHRD_LOOPBACK, <linux/if_arp.h>
_DIRECTIONS = {0: False, 4: True}  # PACKET_HOST and PACKET_OUTGOING, <linux/if_packet.h>
_TCP, _FRAGMENT, _AUTHENTICATION = 6, 44, 51
_HOP_BY_HOP, _ROUTING, _DESTINATION = 0, 43, 60

_U16 = struct.Struct(">H").unpack_from
_COOKED = struct.Struct(">2H10xH").unpack_from
_COOKED_V2 = struct.Struct(">H6xHB").unpack_from
_IPV4_HEADER = struct.Struct(">BxH2xHxB2x4s4s").unpack_from
_IPV6_HEADER = struct.Struct(">4xHBx16s16s").unpack_from
_TCP_HEADER = struct.Struct(">HHIIBBH2x2x").unpack_from


class Skipped(Exception):  # noqa: N818 - no error: most frames of a capture may be something else
    """A frame without a TCP header to read; its argument says why, in a few words that can be counted."""


class Segment(NamedTuple):
    """A TCP segment and what its link layer adds.

    Addresses are 16 bytes, IPv4 mapped. `outgoing` is what a cooked header says of the direction, None for no word;
    `loopback` says that the frame ran over a loopback interface, so both of its ends are here.
    """

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
    loopback: bool


def decode(link_type: int, frame: bytes, wire_bytes: int) -> Segment:
    """Decode a frame.

    Payload is counted by the IP header (Ethernet pads short frames), or, where that says 0 (a super-packet too long
    for its length field), by `wire_bytes`, the frame's length on the wire. Of a fragmented packet the first fragment
    counts, with the payload that it carries.

    Raises:
        Skipped: it holds no TCP header, or too little of it was captured.
    """
    link_layer = LINK_LAYERS.get(link_type)
    if link_layer is None:
        raise Skipped(f"link type {link_type}")
    try:
        offset, outgoing, loopback = link_layer(frame)
        version = frame[offset] >> 4
        if version == 4:
            source, destination, header_bytes, ip_bytes = _ipv4(frame, offset)
        elif version == 6:
            source, destination, header_bytes, ip_bytes = _ipv6(frame, offset)
        else:
            raise Skipped("not IP")
        source_port, destination_port, seq, ack, data_offset, flags, window = _TCP_HEADER(frame, offset + header_bytes)
    except (struct.error, IndexError):
        raise Skipped("truncated") from None
    if data_offset < 0x50:
        raise Skipped("malformed")
    payload_bytes = (ip_bytes or wire_bytes - offset) - header_bytes - (data_offset >> 4) * 4
    return Segment(
        source,
        destination,
        source_port,
        destination_port,
        seq,
        ack,
        flags,
        window,
        max(0, payload_bytes),
        outgoing,
        loopback,
    )


_Network = tuple[int, bool | None, bool]
"""Where the IP header begins, what is said of the direction, and whether this is a loopback interface."""


def _ethernet(frame: bytes) -> _Network:
    (ethertype,) = _U16(frame, 12)
    # Linux gives the frames of its loopback interface no addresses at all.
    return _behind_tags(frame, ethertype, 14), None, frame[:12] == _NO_ADDRESSES


def _linux_cooked(frame: bytes) -> _Network:
    packet_type, hardware, ethertype = _COOKED(frame)
    return _behind_tags(frame, ethertype, 16), _DIRECTIONS.get(packet_type), hardware == _LOOPBACK_HARDWARE


def _linux_cooked_v2(frame: bytes) -> _Network:
    ethertype, hardware, packet_type = _COOKED_V2(frame)
    return _behind_tags(frame, ethertype, 20), _DIRECTIONS.get(packet_type), hardware == _LOOPBACK_HARDWARE


def _bsd_loopback(frame: bytes) -> _Network:
    # The family is in the order of the host that captured, which may not be that of this one. Tunnels have this
    # header too, so it does not tell a loopback interface.
    if not {int.from_bytes(frame[:4], order) for order in _BYTE_ORDERS}.intersection(_ADDRESS_FAMILIES):
        raise Skipped("not IP")
    return 4, None, False


def _raw(_: bytes) -> _Network:
    return 0, None, False


LINK_LAYERS: dict[int, Callable[[bytes], _Network]] = {
    0: _bsd_loopback,
    1: _ethernet,
    12: _raw,
    14: _raw,  # OpenBSD
    101: _raw,
    108: _bsd_loopback,
    113: _linux_cooked,
    228: _raw,  # IPv4 only
    229: _raw,  # IPv6 only
    276: _linux_cooked_v2,
}
"""The link layers understood, by their numbers in https://www.tcpdump.org/linktypes.html."""


def _behind_tags(frame: bytes, ethertype: int, offset: int) -> int:
    """The offset of an IP header behind the VLAN tags that may stand at `offset` (IEEE 802.1Q, 802.1ad)."""
    while ethertype in _VLAN_TAGS:
        (ethertype,) = _U16(frame, offset + 2)
        offset += 4
    if ethertype not in (_ETHERTYPE_IPV4, _ETHERTYPE_IPV6):
        raise Skipped("not IP")
    return offset


def _ipv4(frame: bytes, offset: int) -> tuple[bytes, bytes, int, int]:
    """Source, destination, length of the header, length of the packet."""
    first, ip_bytes, fragment, protocol, source, destination = _IPV4_HEADER(frame, offset)
    if protocol != _TCP:
        raise Skipped("not TCP")
    if fragment & 0x1FFF:
        raise Skipped("fragment")
    header_bytes = (first & 0x0F) * 4
    if header_bytes < 20:
        raise Skipped("malformed")
    return IPV4_PREFIX + source, IPV4_PREFIX + destination, header_bytes, ip_bytes


def _ipv6(frame: bytes, offset: int) -> tuple[bytes, bytes, int, int]:
    """Source, destination, length of the header and its extensions (RFC 8200, section 4), length of the packet."""
    payload_bytes, following, source, destination = _IPV6_HEADER(frame, offset)
    header_bytes = 40
    for _ in range(IPV6_EXTENSIONS_LIMIT):
        if following == _TCP:
            break
        at = offset + header_bytes
        if following == _FRAGMENT:
            if _U16(frame, at + 2)[0] & 0xFFF8:
                raise Skipped("fragment")
            header_bytes += 8
        elif following == _AUTHENTICATION:
            header_bytes += (frame[at + 1] + 2) * 4  # RFC 4302, section 2.2
        elif following in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            header_bytes += (frame[at + 1] + 1) * 8
        else:
            break
        following = frame[at]
    if following != _TCP:
        raise Skipped("not TCP")
    return source, destination, header_bytes, payload_bytes and payload_bytes + 40
