"""Conversations that a TCP stack can have, each between the two hosts of a lane, and the spans that must come of it.

A scenario is a function of a lane and of the first of its ten ports. It asserts what its programs see, and returns
the spans; the segments are tcpdump's affair.
"""

import errno
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.kernel.hosts import Direction, Lane, Packet, Policy, settle

FIN, SYN, RST, PUSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
IPPROTO_MPTCP = 262
PORTS_EACH = 10


@dataclass(frozen=True)
class Span:
    """What is expected of one span; `None` stands for a number that cannot be known beforehand."""

    kind: str
    reason: str
    initiator: str | None
    sent: int
    received: int
    retransmits: int | None = None


def client(reason: str, initiator: str | None, sent: int = 0, received: int = 0, **more: int) -> Span:
    """The span of the end that sent the SYN."""
    return Span("client", reason, initiator, sent, received, **more)


def server(reason: str, initiator: str | None, sent: int = 0, received: int = 0, **more: int) -> Span:
    """The span of the other end."""
    return Span("server", reason, initiator, sent, received, **more)


def both(first: str, sent: int, received: int) -> list[Span]:
    """Two spans of a connection that ended in order, closed first by the client or by the server."""
    client_first = first == "client"
    return [
        client("fin", "local" if client_first else "peer", sent, received),
        server("fin", "peer" if client_first else "local", received, sent),
    ]


@dataclass(frozen=True)
class Place:
    """What of a lane decides whether a scenario makes sense there: IP version; wire, loopback, relay or router."""

    family: int
    way: str


Scenario = Callable[[Lane, int], list[Span]]
SCENARIOS: dict[str, tuple[Scenario, Callable[[Place], bool]]] = {}


def scenario(where: Callable[[Place], bool] = lambda place: place.way != "router") -> Callable[[Scenario], Scenario]:
    """Register a scenario, for the lanes on which it makes sense."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = function, where
        return function

    return register


def relayed(place: Place) -> bool:
    """The wire does what it is told."""
    return place.way == "relay"


class NotHere(Exception):  # noqa: N818 - no fault, a fact
    """This kernel cannot have the conversation, and why."""


# Tools of the programs.


def read(end: socket.socket, count: int) -> int:
    """Read so many bytes."""
    left = count
    while left:
        part = end.recv(min(left, 1 << 16))
        assert part, f"the connection ended {left} bytes early"
        left -= len(part)
    return count


def read_to_end(end: socket.socket) -> int:
    """Read until the other end has closed; how many bytes that was."""
    count = 0
    while part := end.recv(1 << 16):
        count += len(part)
    return count


def talk(one: socket.socket, other: socket.socket, there: int, back: int) -> None:
    """A request and its response."""
    one.sendall(b"q" * there)
    read(other, there)
    other.sendall(b"r" * back)
    read(one, back)


def close(first: socket.socket, second: socket.socket) -> None:
    """Close in order: one end, then the other once it has read that."""
    first.shutdown(socket.SHUT_WR)
    assert read_to_end(second) == 0
    second.close()
    with suppress(ConnectionResetError):
        read_to_end(first)
    first.close()


def connect_error(one: socket.socket, lane: Lane, port: int) -> int:
    """The error of a connect that blocks: one that polls could take it off the socket before its end."""
    one.settimeout(None)
    return one.connect_ex((lane.server_address, port))


def pump(ends: tuple[socket.socket, socket.socket], count: int) -> None:
    """So many bytes in both directions at the same time."""
    threads = [threading.Thread(target=end.sendall, args=(b"b" * count,)) for end in ends]
    threads += [threading.Thread(target=read, args=(end, count)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kernel_counts(lane: Lane, port: int) -> dict[str, int]:
    """What `ss -ti` says of the client's end of a connection."""
    said = lane.client.run("ss", "-tinHO", "dport", "=", f":{port}")
    found = {name: int(value) for name, value in re.findall(r"\b(bytes_\w+|segs_\w+):(\d+)", said)}
    retransmits = re.search(r"\bretrans:\d+/(\d+)", said)
    return {**found, "retransmits": int(retransmits[1]) if retransmits else 0}


@contextmanager
def meddling(lane: Lane, port: int, policy: Policy) -> Iterator[None]:
    """Have a relay treat a scenario's own packets so, and none that an earlier one still has under way."""
    assert lane.relay

    def own(packet: Packet, way: Direction) -> list[Packet]:
        ends = struct.unpack_from("!HH", packet, tcp_offset(packet))
        return policy(packet, way) if any(0 <= end - port < PORTS_EACH for end in ends) else [packet]

    with lane.relay.policy(own):
        yield


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) & 1 else 0)
    total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF & ~((total & 0xFFFF) + (total >> 16))


def tcp_offset(packet: Packet) -> int:
    """Where the TCP header of a packet without IPv6 extensions begins."""
    return (packet[0] & 0xF) * 4 if packet[0] >> 4 == 4 else 40


def flags_of(packet: Packet) -> int:
    """The TCP flags of such a packet; 0 for anything else than TCP."""
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    return packet[tcp_offset(packet) + 13] if protocol == socket.IPPROTO_TCP else 0


def payload_of(packet: Packet) -> int:
    """The payload bytes of such a packet."""
    at = tcp_offset(packet)
    return len(packet) - at - (packet[at + 12] >> 4) * 4


@contextmanager
def congestion_control(*ends: socket.socket) -> Iterator[None]:
    """Have ends react to loss and marks as RFC 5681 says."""
    for end in ends:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    yield


# Conversations in order.


@scenario(lambda _: True)
def request_and_response(lane: Lane, port: int) -> list[Span]:
    """Three requests over one connection."""
    one, other = lane.pair(port)
    for _ in range(3):
        talk(one, other, 100, 2000)
    settle(0.05)
    counts = kernel_counts(lane, port)
    assert (counts["bytes_sent"], counts["bytes_received"]) == (300, 6000)
    close(one, other)
    return both("client", 300, 6000)


@scenario(lambda _: True)
def bulk_both_ways(lane: Lane, port: int) -> list[Span]:
    """A megabyte each way at once."""
    count = 1 << 20
    one, other = lane.pair(port)
    pump((one, other), count)
    settle()
    counts = kernel_counts(lane, port)
    assert counts["bytes_received"] == counts["bytes_acked"] - 1 == count
    close(other, one)
    first, second = both("server", count, count)
    return [Span(**{**vars(first), "retransmits": counts["retransmits"]}), second]


@scenario()
def half_close(lane: Lane, port: int) -> list[Span]:
    """The client has said all and still listens."""
    one, other = lane.pair(port)
    one.sendall(b"x" * 1000)
    one.shutdown(socket.SHUT_WR)
    assert read_to_end(other) == 1000
    other.sendall(b"y" * 30_000)
    settle()
    other.sendall(b"y" * 30_000)
    other.close()
    assert read_to_end(one) == 60_000
    one.close()
    return both("client", 1000, 60_000)


@scenario()
def many_small_writes(lane: Lane, port: int) -> list[Span]:
    """A hundred writes without delay, each a segment."""
    one, other = lane.pair(port)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(100):
        one.sendall(b"small")
    read(other, 500)
    close(one, other)
    return both("client", 500, 0)


@scenario()
def deferred_accept(lane: Lane, port: int) -> list[Span]:
    """The listener waits for data and drops the bare ACK of the handshake."""
    with lane.listen(port, TCP_DEFER_ACCEPT=5) as listener:
        one = lane.dialling()
        one.connect((lane.server_address, port))
        settle(0.1)
        one.sendall(b"first")
        other, _ = listener.accept()
    read(other, 5)
    close(one, other)
    return both("client", 5, 0)


@scenario()
def urgent_data(lane: Lane, port: int) -> list[Span]:
    """A byte out of band between others, left in its place."""
    one, other = lane.pair(port)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    one.sendall(b"before")
    one.send(b"!", socket.MSG_OOB)
    one.sendall(b"behind")
    read(other, 13)
    close(one, other)
    return both("client", 13, 0)


@scenario(lambda place: place.family == 4 and place.way != "router")
def mapped_addresses(lane: Lane, port: int) -> list[Span]:
    """IPv6 sockets that talk IPv4."""
    listener = lane.server.socket(socket.AF_INET6)
    listener.bind((f"::ffff:{lane.server_address}", port))
    listener.listen()
    one = lane.client.socket(socket.AF_INET6)
    one.connect((f"::ffff:{lane.server_address}", port))
    other, _ = listener.accept()
    listener.close()
    talk(one, other, 10, 10)
    close(one, other)
    return both("client", 10, 10)


@scenario()
def header_extensions(lane: Lane, port: int) -> list[Span]:
    """IPv4 options; IPv6 hop-by-hop and destination options."""
    with lane.listen(port) as listener:
        one = lane.dialling()
        if lane.family == 4:
            one.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01" * 8)
        else:
            padding = bytes([0, 0, 1, 4, 0, 0, 0, 0])
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, padding)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, padding)
        one.connect((lane.server_address, port))
        other, _ = listener.accept()
    talk(one, other, 50_000, 10)
    close(one, other)
    return both("client", 50_000, 10)


@scenario()
def fast_open(lane: Lane, port: int) -> list[Span]:
    """The first connection fetches a cookie, the second one carries data in its SYN."""
    with lane.listen(port, TCP_FASTOPEN=8) as listener:
        for _ in range(2):
            one = lane.dialling()
            one.setblocking(True)  # else it does not wait for the cookie
            one.sendto(b"f" * 50, socket.MSG_FASTOPEN, (lane.server_address, port))
            other, _ = listener.accept()
            read(other, 50)
            close(one, other)
    return 2 * both("client", 50, 0)


@scenario()
def multipath(lane: Lane, port: int) -> list[Span]:
    """Multipath TCP, whose subflows are TCP connections."""
    try:
        lane.client.socket(lane.domain, protocol=IPPROTO_MPTCP).close()
    except OSError as error:
        raise NotHere(f"this kernel makes no MPTCP sockets: {error.strerror}") from None
    with lane.listen(port, protocol=IPPROTO_MPTCP) as listener:
        one = lane.dialling(protocol=IPPROTO_MPTCP)
        one.connect((lane.server_address, port))
        other, _ = listener.accept()
    talk(one, other, 3000, 5000)
    close(one, other)
    settle()
    return both("client", 3000, 5000)


@scenario()
def congestion_marks(lane: Lane, port: int) -> list[Span]:
    """ECN: offered in the handshake; where the wire marks packets, ECE comes back and CWR answers."""
    for where in {lane.client, lane.server}:
        where.sysctl("ipv4/tcp_ecn", 1)
    marked = 0

    def mark(packet: Packet, way: Direction) -> list[Packet]:
        nonlocal marked
        if way.name == "to_server" and payload_of(packet) > 1000 and marked < 5:
            marked += 1
            return [experienced(packet)]
        return [packet]

    one, other = lane.pair(port)
    if lane.relay:
        with congestion_control(one, other), meddling(lane, port, mark):
            pump((one, other), 200_000)
        assert marked == 5
    else:
        pump((one, other), 200_000)
    close(one, other)
    for where in {lane.client, lane.server}:
        where.sysctl("ipv4/tcp_ecn", 2)
    return both("client", 200_000, 200_000)


def experienced(packet: Packet) -> Packet:
    """The packet with Congestion Experienced in its IP header (RFC 3168)."""
    changed = bytearray(packet)
    if packet[0] >> 4 == 4:
        changed[1] |= 3
        changed[10:12] = b"\0\0"
        changed[10:12] = struct.pack("!H", checksum(bytes(changed[: tcp_offset(packet)])))
    else:
        changed[1] |= 0x30
    return bytes(changed)


@scenario(lambda place: place.way == "wire")
def twins(lane: Lane, port: int) -> list[Span]:
    """Two hosts with a connection each on their own loopback, alike in all four numbers."""
    address, pairs = "127.0.0.1" if lane.family == 4 else "::1", []
    for where in (lane.client, lane.server):
        listener, one = where.socket(lane.domain), where.socket(lane.domain)
        listener.bind((address, port))
        listener.listen()
        one.bind((address, port + 1))
        one.connect((address, port))
        pairs.append((one, listener.accept()[0]))
        listener.close()
    for number, pair in enumerate(pairs):
        talk(*pair, 100 + number, 2000 + number)
    for pair in pairs:
        close(*pair)
    return [*both("client", 100, 2000), *both("client", 101, 2001)]


@scenario(lambda place: place.way == "loopback")
def self_connect(lane: Lane, port: int) -> list[Span]:
    """A socket that dials its own address and so answers itself."""
    one = lane.dialling(port)
    one.connect((lane.client_address, port))
    one.sendall(b"me" * 50)
    assert read(one, 100) == 100
    one.close()
    return [Span("internal", "fin", "local", 100, 100)]


@scenario()
def keep_alive(lane: Lane, port: int) -> list[Span]:
    """An idle connection whose client asks twice whether it is still there."""
    one, other = lane.pair(port)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1)):
        one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    talk(one, other, 10, 10)
    settle(2.5)
    close(one, other)
    return both("client", 10, 10)


@scenario()
def zero_window(lane: Lane, port: int) -> list[Span]:
    """A reader that does not read: the window closes, is probed, and opens again."""
    with lane.listen(port) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one = lane.dialling()
        one.connect((lane.server_address, port))
        other, _ = listener.accept()
    one.setblocking(False)
    sent, deadline = 0, time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            sent += one.send(b"z" * 10_000)
        except BlockingIOError:
            time.sleep(0.05)
    one.settimeout(60)
    read(other, sent)
    close(one, other)
    return both("client", sent, 0)


# Endings.


@scenario()
def reset_by_linger(lane: Lane, port: int) -> list[Span]:
    """The client aborts."""
    one, other = lane.pair(port)
    one.sendall(b"abc")
    read(other, 3)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    with suppress(ConnectionResetError):
        raise AssertionError(other.recv(1))
    other.close()
    return [client("reset", "local", 3, 0), server("reset", "peer", 0, 3)]


@scenario()
def refused(lane: Lane, port: int) -> list[Span]:
    """Nobody listens."""
    with lane.dialling() as one:
        assert connect_error(one, lane, port) == errno.ECONNREFUSED
    return [client("refused", "peer")]


@scenario()
def closed_with_unread_data(lane: Lane, port: int) -> list[Span]:
    """The server closes without reading what has come: RST instead of FIN."""
    one, other = lane.pair(port)
    one.sendall(b"u" * 500)
    settle(0.1)
    other.close()
    with suppress(ConnectionResetError):
        raise AssertionError(one.recv(1))
    one.close()
    return [client("reset", "peer", 500, 0), server("reset", "local", 0, 500)]


@scenario()
def data_after_close(lane: Lane, port: int) -> list[Span]:
    """The server has closed for good when more data comes: its kernel answers with RST."""
    one, other = lane.pair(port)
    other.close()
    assert one.recv(1) == b""
    one.sendall(b"late")
    settle(0.1)
    one.close()
    return [client("reset", "peer", 4, 0), server("reset", "local", 0, 0)]


@scenario()
def listener_closed(lane: Lane, port: int) -> list[Span]:
    """The connection is established but never accepted, and its listener goes."""
    listener = lane.listen(port)
    one = lane.dialling()
    one.connect((lane.server_address, port))
    settle(0.1)
    listener.close()
    with suppress(ConnectionResetError):
        raise AssertionError(one.recv(1))
    one.close()
    return [client("reset", "peer"), server("reset", "local")]


@scenario()
def backlog_full(lane: Lane, port: int) -> list[Span]:
    """A listener whose backlog is full leaves SYNs without an answer."""
    with lane.listen(port, backlog=0) as listener:
        first = lane.dialling()
        first.connect((lane.server_address, port))
        settle(0.1)
        with lane.dialling(TCP_SYNCNT=1) as second:
            assert connect_error(second, lane, port) == errno.ETIMEDOUT
        accepted, _ = listener.accept()
    close(first, accepted)
    return [*both("client", 0, 0), client("timeout", None)]


@scenario()
def syn_cookies(lane: Lane, port: int) -> list[Span]:
    """A handshake of which the server remembers nothing until its last ACK."""
    lane.server.sysctl("ipv4/tcp_syncookies", 2)
    one, other = lane.pair(port)
    lane.server.sysctl("ipv4/tcp_syncookies", 1)
    talk(one, other, 100, 100)
    close(one, other)
    return both("client", 100, 100)


@scenario()
def time_wait_reused(lane: Lane, port: int) -> list[Span]:
    """The server closes first, and the same client port is back while the server's end is in TIME_WAIT."""
    for _ in range(2):
        one, other = lane.pair(port, client_port=port + 1)
        talk(one, other, 10, 20)
        close(other, one)
        settle(0.05)
    return 2 * both("server", 10, 20)


@scenario()
def crafted_flags(lane: Lane, port: int) -> list[Span]:
    """Segments that no stack sends: to a closed port, to a listener, and into a connection, with its numbers wrong."""
    every = [0, FIN, FIN | SYN, FIN | PUSH | URG, SYN | RST, RST, RST | ACK, ACK, PUSH | ACK, URG, 0xFF, ECE | CWR]
    with lane.listen(port) as listener:
        one = lane.dialling(port + 2)
        one.connect((lane.server_address, port))
        other, _ = listener.accept()
        with raw(lane) as send:
            for flags in every:
                for source, destination, payload in ((port + 1, port + 3, b""), (port + 1, port, b"p" * 7)):
                    send(segment(lane, source, destination, 1000, 0, flags, payload))
                if not flags & (SYN | RST):
                    send(segment(lane, port + 2, port, 1 << 30, 1 << 30, flags, b""))
            settle()
    talk(one, other, 10, 10)
    close(one, other)
    return both("client", 10, 10)


def segment(lane: Lane, source: int, destination: int, seq: int, ack: int, flags: int, payload: bytes) -> bytes:
    """A TCP segment from the client to the server."""
    header = struct.pack("!HHIIBBHHH", source, destination, seq, ack, 5 << 4, flags, 512, 0, 0)
    addresses = [socket.inet_pton(lane.domain, end) for end in (lane.client_address, lane.server_address)]
    pseudo = b"".join(addresses) + struct.pack("!II", len(header) + len(payload), socket.IPPROTO_TCP)
    if lane.family == 4:
        pseudo = b"".join(addresses) + struct.pack("!HH", socket.IPPROTO_TCP, len(header) + len(payload))
    total = checksum(pseudo + header + payload)
    return header[:16] + struct.pack("!H", total) + header[18:] + payload


@contextmanager
def raw(lane: Lane) -> Iterator[Callable[[bytes], object]]:
    """A way to send crafted segments from the client."""
    with lane.client.socket(lane.domain, socket.SOCK_RAW, socket.IPPROTO_TCP) as sender:
        sender.bind((lane.client_address, 0))
        yield lambda data: sender.sendto(data, (lane.server_address, 0))


# What takes a wire that can be told.


@scenario(relayed)
def simultaneous_open(lane: Lane, port: int) -> list[Span]:
    """Both ends dial each other, and their SYNs cross."""
    one, other = lane.dialling(port), lane.server.socket(lane.domain)
    other.bind((lane.server_address, port + 1))
    with held(lane, port):
        for end, to in ((one, (lane.server_address, port + 1)), (other, (lane.client_address, port))):
            end.setblocking(False)
            assert end.connect_ex(to) == errno.EINPROGRESS
        settle(0.1)
    settle(0.1)
    for end in (one, other):
        end.settimeout(60)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    talk(one, other, 10, 20)
    close(one, other)
    return [Span("internal", "fin", "local", 10, 20), Span("internal", "fin", "peer", 20, 10)]


@contextmanager
def held(lane: Lane, port: int) -> Iterator[None]:
    """Packets wait on the wire until the end of the block; nothing overtakes them."""
    waiting: list[tuple[Direction, Packet]] = []

    def hold(packet: Packet, way: Direction) -> list[Packet]:
        waiting.append((way, packet))
        return []

    def deliver() -> None:
        for way, packet in waiting[:]:
            way.deliver(packet)
            waiting.remove((way, packet))

    with meddling(lane, port, hold):
        yield
        deliver()
        settle(0.05)
    deliver()


@scenario(relayed)
def simultaneous_close(lane: Lane, port: int) -> list[Span]:
    """Both ends close before either has heard of it."""
    one, other = lane.pair(port)
    talk(one, other, 10, 20)
    settle(0.1)
    with held(lane, port):
        one.shutdown(socket.SHUT_WR)
        other.shutdown(socket.SHUT_WR)
        settle(0.05)
    settle(0.1)
    one.close()
    other.close()
    return [client("fin", "local", 10, 20), server("fin", "local", 20, 10)]


@scenario(relayed)
def abandoned_connect(lane: Lane, port: int) -> list[Span]:
    """The client gives up before anybody has answered."""
    with lane.listen(port), held(lane, port), lane.dialling() as one:
        one.setblocking(False)
        assert one.connect_ex((lane.server_address, port)) == errno.EINPROGRESS
        settle(0.1)
        one.close()
    settle()
    return [client("aborted", "local"), server("reset", "peer")]


@scenario(relayed)
def connect_into_nothing(lane: Lane, port: int) -> list[Span]:
    """Nobody answers the SYN."""
    with meddling(lane, port, lambda packet, _: []), lane.dialling(TCP_SYNCNT=1) as one:
        assert connect_error(one, lane, port) == errno.ETIMEDOUT
    return [client("timeout", None)]


@scenario(relayed)
def host_gone(lane: Lane, port: int) -> list[Span]:
    """The wire goes dead under a connection: one end gives up, the other hears of it when the wire is back."""
    one, other = lane.pair(port)
    talk(one, other, 10, 20)
    settle(0.5)  # until the response is acknowledged, delayed as that may be
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
    with meddling(lane, port, lambda packet, _: []):
        one.sendall(b"lost")
        with suppress(TimeoutError):
            raise AssertionError(one.recv(1))
        one.close()
        settle(0.1)
    other.sendall(b"anybody?")
    with suppress(ConnectionResetError):
        raise AssertionError(other.recv(1))
    other.close()
    return [client("timeout", None, 14, 20), server("reset", "peer", 28, 10)]


@scenario(relayed)
def unreachable(lane: Lane, port: int) -> list[Span]:
    """A router says by ICMP that there is no such host."""

    def say_so(packet: Packet, way: Direction) -> list[Packet]:
        if flags_of(packet) & SYN:
            way.other.deliver(icmp_unreachable(lane, packet))
        return []

    with meddling(lane, port, say_so), lane.dialling() as one:
        assert connect_error(one, lane, port) == errno.EHOSTUNREACH
    return [client("unreachable", None)]


def icmp_unreachable(lane: Lane, packet: Packet) -> Packet:
    """Host unreachable (RFC 792), address unreachable (RFC 4443), from the server's address."""
    source, destination = (socket.inet_pton(lane.domain, end) for end in (lane.server_address, lane.client_address))
    if lane.family == 4:
        body = struct.pack("!BBHI", 3, 1, 0, 0) + packet[:28]
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_ICMP, 0)
        head = head[:10] + struct.pack("!H", checksum(head + source + destination))
    else:
        body = struct.pack("!BBHI", 1, 3, 0, 0) + packet
        pseudo = source + destination + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
        body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
        head = struct.pack("!IHBB", 0x60000000, len(body), socket.IPPROTO_ICMPV6, 64)
    return head + source + destination + body


@scenario(relayed)
def loss_and_reordering(lane: Lane, port: int) -> list[Span]:
    """One data segment in twenty is lost, one in twenty overtaken."""
    count, chance = 300_000, random.Random(port)
    late: dict[str, Packet] = {}

    def disturb(packet: Packet, way: Direction) -> list[Packet]:
        if not payload_of(packet):
            return [packet]
        draw = chance.random()
        if draw < 0.05:
            return []
        if draw < 0.1 and way.name not in late:
            late[way.name] = packet
            return []
        return [packet, *([late.pop(way.name)] if way.name in late else [])]

    one, other = lane.pair(port)
    with congestion_control(one, other), meddling(lane, port, disturb):
        pump((one, other), count)
        settle()
    counts = kernel_counts(lane, port)
    assert counts["bytes_sent"] - counts["bytes_retrans"] == counts["bytes_received"] == count
    assert counts["retransmits"] > 5
    close(one, other)
    first, second = both("client", count, count)
    return [Span(**{**vars(first), "retransmits": counts["retransmits"]}), second]


@scenario(relayed)
def time_wait_answers(lane: Lane, port: int) -> list[Span]:
    """The last FIN comes a second time, and the end that waits acknowledges it again; then what is out of place."""
    assert lane.relay
    last: list[Packet] = []

    def remember(packet: Packet, way: Direction) -> list[Packet]:
        if way.name == "to_client" and flags_of(packet) & FIN:
            last.append(packet)
        return [packet]

    one, other = lane.pair(port)
    with meddling(lane, port, remember):
        talk(one, other, 10, 20)
        close(one, other)
        settle(0.1)
    for _ in range(2):
        lane.relay.to_client.deliver(last[0])
        settle(0.05)
    return both("client", 10, 20)


@scenario(relayed)
def fragments(lane: Lane, port: int) -> list[Span]:
    """The wire breaks every packet with data into IP fragments, and the second comes first."""
    numbers = iter(range(1, 1 << 16))
    one, other = lane.pair(port)
    with meddling(
        lane, port, lambda packet, _: fragmented(packet, next(numbers)) if payload_of(packet) > 100 else [packet]
    ):
        talk(one, other, 20_000, 20_000)
        settle(0.1)
    close(one, other)
    return both("client", 20_000, 20_000)


def fragmented(packet: Packet, identifier: int) -> list[Packet]:
    """A packet as two fragments (RFC 791; RFC 8200, section 4.5), in the wrong order."""
    if packet[0] >> 4 == 6:
        cut = 64
        heads = [
            packet[:4] + struct.pack("!HB", 8 + len(body), 44) + packet[7:40]
            + struct.pack("!BxHI", packet[6], place, identifier) + body
            for body, place in ((packet[40 : 40 + cut], 1), (packet[40 + cut :], cut))
        ]  # fmt: skip
        return heads[::-1]
    header = (packet[0] & 0xF) * 4
    cut = 64
    parts = []
    for body, place in ((packet[header : header + cut], 0x2000), (packet[header + cut :], cut // 8)):
        head = packet[:2] + struct.pack("!HHH", header + len(body), identifier, place) + packet[8:10] + b"\0\0"
        head += packet[12:header]
        parts.append(head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body)
    return parts[::-1]


# Addresses that change on the way.


@scenario(lambda place: place.way == "router")
def service_behind_router(lane: Lane, port: int) -> list[Span]:
    """The client dials a service address, which a router turns into the server's; the server sees the router's."""
    with lane.listen(port) as listener:
        one = lane.dialling()
        one.connect((SERVICE[lane.family], port))
        other, _ = listener.accept()
    talk(one, other, 5000, 50_000)
    close(one, other)
    return both("client", 5000, 50_000)


@scenario(lambda place: place.way == "wire")
def service_on_this_host(lane: Lane, port: int) -> list[Span]:
    """The client's own netfilter turns a service address into the server's, as kube-proxy does it."""
    lane.client.run("nft", "-f", "-", input=destination_nat(lane.family, "output", port, lane.server_address, port + 1))
    with lane.listen(port + 1) as listener:
        one = lane.dialling()
        one.connect((SERVICE[lane.family], port))
        other, _ = listener.accept()
    talk(one, other, 5000, 50_000)
    close(one, other)
    lane.client.run("nft", "flush", "ruleset")
    return both("client", 5000, 50_000)


SERVICE = {4: "192.0.2.80", 6: "2001:db8::80"}


def destination_nat(family: int, hook: str, port: int, address: str, to_port: int) -> str:
    """A ruleset for nft that answers for a service address."""
    kind, to = ("ip", f"{address}:{to_port}") if family == 4 else ("ip6", f"[{address}]:{to_port}")
    return f"""table {kind} services {{
        chain translate {{
            type nat hook {hook} priority -100;
            {kind} daddr {SERVICE[family]} tcp dport {port} dnat to {to}
        }}
    }}"""


def rewritten_before_tcp(name: str, lane: Lane, direction: str, peer: tuple[str, int]) -> tuple[str, int]:
    """The peer that TCP finds in a received segment's headers, where the host itself has put another there."""
    if name == "service_on_this_host" and direction == "receive" and peer[0] == lane.server_address:
        return SERVICE[lane.family], peer[1] - 1
    return peer
