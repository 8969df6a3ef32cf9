"""Tracked connections to the ends behind NAT: who really is at the other end of a socket's tuple.

What the kernel tells of its table (`conntrack.listen`) is read by a thread; who asks gets what is known by now.
"""

import errno
import logging
import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Self

from tcpio_otel.attribution.conntrack import NEW
from tcpio_otel.batch import IPV4_PREFIX, Endpoint

logger = logging.getLogger(__name__)

LIMIT = 1 << 17
"""Ends that are kept, some 400 bytes each; beyond it the oldest go."""

_TCP = 6
_READ_BYTES = 1 << 18
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_FAMILY_BYTES = 4  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ORIGINAL, _REPLY = 1, 2  # CTA_TUPLE_*
_IP, _PROTOCOL = 1, 2  # CTA_TUPLE_*
_SOURCES, _DESTINATIONS = (1, 3), (2, 4)  # CTA_IP_V4_SRC, CTA_IP_V6_SRC; likewise
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3  # CTA_PROTO_*


class Translations:
    """Who is behind NAT that this network namespace does, as a context manager around the thread that reads of it.

    Args:
        heard: of `conntrack.listen`; closed at the end.

    Attributes:
        lost: how often the kernel said that messages did not fit into the socket's buffer.
    """

    def __init__(self, heard: socket.socket) -> None:
        self._heard = heard
        self._peers: dict[tuple[Endpoint, Endpoint], Endpoint] = {}
        self._thread = threading.Thread(target=self._run, name="translations", daemon=True)
        self._wake = socket.socketpair()
        self.lost = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._wake:
            end.close()
        self._thread.join()
        self._heard.close()

    def peer(self, local: Endpoint, peer: Endpoint) -> Endpoint | None:
        """Who really is the peer of a socket with this tuple; None where that is no other, or not known (yet)."""
        return self._peers.get((local, peer))

    def learn(self, messages: bytes) -> None:
        """Take in what the kernel said: netlink messages, one after the other."""
        at = 0
        while at + _HEADER.size <= len(messages):
            length, kind, *_ = _HEADER.unpack_from(messages, at)
            if length < _HEADER.size:
                break
            if kind == NEW:
                self._take(messages, at + _HEADER.size + _FAMILY_BYTES, min(at + length, len(messages)))
            at += length + 3 & ~3

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._heard, self._wake[0]], [], [])
            if self._wake[0] in ready:
                return
            try:
                self.learn(self._heard.recv(_READ_BYTES))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    logger.warning("translations (NAT) are not followed any more: %s", error.strerror)
                    return
                self.lost += 1

    def _take(self, messages: bytes, start: int, end: int) -> None:
        found = _usual(messages, start) if start + _USUAL_BYTES <= end else None
        found = found or _walked(messages, start, end)
        if found is None:
            return
        original, reply = found
        # The client's socket knows the original tuple, the server's the other way's.
        for (local, peer), real in ((original, reply[0]), (reply, original[0])):
            if real != peer:
                self._peers.pop((local, peer), None)  # what comes again is young again
                self._peers[local, peer] = real
        while len(self._peers) > LIMIT:
            del self._peers[next(iter(self._peers))]


Way = tuple[Endpoint, Endpoint]
"""Source and destination of one direction of a connection."""

_NESTED = 1 << 15
_USUAL_BYTES = 104


def _one_way(kind: int, fill: bytes) -> bytes:
    """A tuple of TCP over IPv4 as the kernel writes it, with `fill` for every byte that may be another."""
    address, port = 4 * fill, 4 * fill  # with what pads it
    parts = (
        (52, kind | _NESTED, b""),
        (20, _IP | _NESTED, b""), (8, _SOURCES[0], address), (8, _DESTINATIONS[0], address),
        (28, _PROTOCOL | _NESTED, b""), (5, _NUMBER, bytes([_TCP]) + 3 * fill),
        (6, _SOURCE_PORT, port), (6, _DESTINATION_PORT, port),
    )  # fmt: skip
    return b"".join(_ATTRIBUTE.pack(length, attribute) + value for length, attribute, value in parts)


def _both_ways(fill: bytes) -> int:
    return int.from_bytes(_one_way(_ORIGINAL, fill) + _one_way(_REPLY, fill))


_USUAL = _both_ways(b"\0")
_FIXED = ~(_USUAL ^ _both_ways(b"\xff"))


def _usual(messages: bytes, start: int) -> tuple[Way, Way] | None:
    """The two ways of a connection, at a fifth of the time, if it is TCP over IPv4 and laid out as ever."""
    both = messages[start : start + _USUAL_BYTES]
    if int.from_bytes(both) & _FIXED != _USUAL:
        return None
    original, reply = (
        (
            Endpoint(IPV4_PREFIX + way[12:16], int.from_bytes(way[40:42])),
            Endpoint(IPV4_PREFIX + way[20:24], int.from_bytes(way[48:50])),
        )
        for way in (both[:52], both[52:])
    )
    return original, reply


def _walked(messages: bytes, start: int, end: int) -> tuple[Way, Way] | None:
    """The same, attribute by attribute; None where it is not TCP."""
    tuples = {kind: (first, last) for kind, first, last in _attributes(messages, start, end)}
    if _ORIGINAL not in tuples or _REPLY not in tuples:
        return None
    original, reply = (_tuple(messages, *tuples[kind]) for kind in (_ORIGINAL, _REPLY))
    return (original, reply) if original and reply else None


def _attributes(messages: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Attributes between two places: the type of each, and from where to where its value reaches."""
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(messages, start)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE, start + _ATTRIBUTE.size, min(start + length, end)
        start += length + 3 & ~3


def _tuple(messages: bytes, start: int, end: int) -> Way | None:
    """Source and destination of a tracked direction; None where it is not TCP."""
    values: dict[tuple[int, int], bytes] = {
        (part, kind): messages[first:last]
        for part, inner, outer in _attributes(messages, start, end)
        if part in (_IP, _PROTOCOL)
        for kind, first, last in _attributes(messages, inner, outer)
    }
    if values.get((_PROTOCOL, _NUMBER)) != bytes([_TCP]):
        return None
    ends = []
    for kinds, port in ((_SOURCES, _SOURCE_PORT), (_DESTINATIONS, _DESTINATION_PORT)):
        address = next((values[_IP, kind] for kind in kinds if (_IP, kind) in values), b"")
        number = values.get((_PROTOCOL, port), b"")
        if len(address) not in (4, 16) or len(number) != 2:
            return None
        ends.append(Endpoint(IPV4_PREFIX + address if len(address) == 4 else address, int.from_bytes(number)))
    return ends[0], ends[1]
