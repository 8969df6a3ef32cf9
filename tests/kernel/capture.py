"""tcpdump's account of the segments that a host's stack sent and received, read with dpkt: the oracle."""

import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dpkt

from tests.kernel.hosts import Host

Segment = tuple[str, str, int, str, int, int, int, int, int, int]
"""Direction, local address and port, peer address and port, sequence, acknowledgement, flag bits, payload, window."""

FIN, PUSH, CWR = 0x01, 0x08, 0x80
_LINKTYPE_SLL2, _SLL2_HEADER, _OUTGOING = 276, struct.Struct("!HHIHBB8s"), 4
_LOOPBACK_INDEX = 1
_IPV4, _IPV6 = 0x0800, 0x86DD
_EXTENSIONS = {0, 43, 60}
_FRAGMENT = 44


@contextmanager
def tcpdump(where: Host, path: Path) -> Iterator[None]:
    """Capture everything on every device of a host to a file."""
    command = ["tcpdump", "-i", "any", "-y", "LINUX_SLL2", "-U", "--immediate-mode", "-s", "256", "-B", "32768"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", where.name, *command, "-w", str(path), "ip or ip6"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "listening on" in line:
            break
    assert "listening on" in said, said
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        process.wait()
    assert "\n0 packets dropped by kernel" in said, said


def segments(path: Path) -> Counter[Segment]:
    """Every TCP segment in a capture, as often as the host's stack saw it: twice what passed its loopback."""
    found: Counter[Segment] = Counter()
    with path.open("rb") as file:
        reader = dpkt.pcap.Reader(file)
        assert reader.datalink() == _LINKTYPE_SLL2
        partial: dict[Any, _Datagram] = {}
        for _, frame in reader:
            protocol, _, index, _, kind, _, _ = _SLL2_HEADER.unpack_from(frame)
            packet = frame[_SLL2_HEADER.size :]
            datagram = _ipv4(packet, partial) if protocol == _IPV4 else _ipv6(packet, partial)
            if datagram is None:
                continue
            source, destination, tcp, length = datagram
            header = dpkt.tcp.TCP(tcp)
            rest = (header.seq, header.ack, header.flags & 0xFF, length - header.off * 4, header.win)
            sent = ("transmit", source, header.sport, destination, header.dport, *rest)
            received = ("receive", destination, header.dport, source, header.sport, *rest)
            if index == _LOOPBACK_INDEX or kind == _OUTGOING:
                found[sent] += 1
            if index == _LOOPBACK_INDEX or kind != _OUTGOING:
                found[received] += 1
    return found


@dataclass
class _Datagram:
    """What has come of a datagram until now."""

    pieces: dict[int, bytes] = field(default_factory=dict)
    length: int = -1


def _ipv4(packet: bytes, partial: dict[Any, _Datagram]) -> tuple[str, str, bytes, int] | None:
    length, identifier, fragment = struct.unpack_from("!2xHHH", packet)
    header = (packet[0] & 0xF) * 4
    if packet[9] != socket.IPPROTO_TCP:
        return None
    source, destination = (socket.inet_ntop(socket.AF_INET, packet[at : at + 4]) for at in (12, 16))
    whole = _reassembled(
        partial, (source, destination, identifier), (fragment & 0x1FFF) * 8, bool(fragment & 0x2000),
        packet[header:], length - header,
    )  # fmt: skip
    return whole and (source, destination, *whole)


def _ipv6(packet: bytes, partial: dict[Any, _Datagram]) -> tuple[str, str, bytes, int] | None:
    length, following = struct.unpack_from("!4xHB", packet)
    source, destination = (socket.inet_ntop(socket.AF_INET6, packet[at : at + 16]) for at in (8, 24))
    at, offset, more, identifier = 40, 0, False, 0
    while following in _EXTENSIONS or following == _FRAGMENT:
        if following == _FRAGMENT:
            following, place, identifier = struct.unpack_from("!BxHI", packet, at)
            offset, more = place & 0xFFF8, bool(place & 1)
            at += 8
        else:
            following, size = struct.unpack_from("!BB", packet, at)
            at += (size + 1) * 8
    if following != socket.IPPROTO_TCP:
        return None
    whole = _reassembled(
        partial, (source, destination, identifier), offset, more, packet[at:], length + 40 - at
    )  # fmt: skip
    return whole and (source, destination, *whole)


def _reassembled(
    partial: dict[Any, _Datagram], key: Any, offset: int, more: bool, data: bytes, length: int
) -> tuple[bytes, int] | None:
    """The head of a datagram and its length, once all of its fragments are there (in any order, none overlapping)."""
    if not offset and not more:
        return data, length
    datagram = partial.setdefault(key, _Datagram())
    datagram.pieces[offset] = data.ljust(length, b"\0")[:length]
    if not more:
        datagram.length = offset + length
    if sum(map(len, datagram.pieces.values())) != datagram.length:
        return None
    del partial[key]
    return b"".join(piece for _, piece in sorted(datagram.pieces.items())), datagram.length


def cut(segment: Segment, count: int, size: int) -> list[Segment]:
    """A super-packet as the segments that a device without segmentation offload sends in its place."""
    *ends, seq, ack, flags, payload, window = segment
    parts = []
    for number in range(count):
        first, last = number == 0, number == count - 1
        mask = 0xFF if last else 0xFF & ~(FIN | PUSH)
        if not first:
            mask &= ~CWR
        parts.append(
            (*ends, (seq + number * size) % 2**32, ack, flags & mask,
             payload - (count - 1) * size if last else size, window)
        )  # fmt: skip
    return parts  # type: ignore[return-value]
