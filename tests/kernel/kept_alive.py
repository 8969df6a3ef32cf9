"""Requests over kept-alive connections, in clear text or under TLS, and the programs' own log of whose each byte is."""

import os
import random
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import trustme

from tcpio_otel.correlation.tag import tag
from tests.kernel.hosts import PATIENCE_S, Lane

Ids = tuple[str, str]
"""A trace id and a span id, in hexadecimal."""

LARGEST = 30_000


@dataclass
class Entry:
    """One request, as one end has it: the offsets of its bytes in both directions of the connection."""

    ids: Ids
    sent: tuple[int, int]
    received: tuple[int, int]


@dataclass
class Journal:
    """What one end of a connection served, in order; `client_port` says which connection."""

    client_port: int
    server: bool
    entries: list[Entry] = field(default_factory=list)


class Wire:
    """A socket that counts what crosses it."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.sent, self.received = end, 0, 0

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.end.sendall(data)
        self.sent += len(data)

    def read(self) -> bytes:
        """Whatever has come; empty at the end."""
        data = self.end.recv(1 << 16)
        self.received += len(data)
        return data


class Clear:
    """Messages as they are."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._rest = wire, b""

    def write(self, message: bytes) -> None:
        """Send a message, head and body apart, as many programs do."""
        head, body = message.split(b"\r\n\r\n", 1)
        self._wire.send(head + b"\r\n\r\n")
        if body:
            self._wire.send(body)

    def read(self, enough: Callable[[bytes], bool]) -> bytes:
        """A message: bytes until there are enough; empty at the end."""
        found = self._rest
        while not enough(found):
            if not (more := self._wire.read()):
                return b""
            found += more
        self._rest = b""
        return found


class Secret:
    """Messages under TLS 1.3, with every byte of ciphertext counted."""

    def __init__(self, wire: Wire, context: ssl.SSLContext, *, server: bool) -> None:
        self._wire = wire
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=None if server else "server.test"
        )
        self._pump(self._tls.do_handshake)

    def _pump(self, step: Callable[[], object]) -> bool:
        """Take a step, and let what it needs cross the wire; false at the end."""
        while True:
            try:
                step()
            except ssl.SSLWantReadError:
                self._flush()
                if not (more := self._wire.read()):
                    return False
                self._incoming.write(more)
            else:
                self._flush()
                return True

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._wire.send(data)

    def write(self, message: bytes) -> None:
        """Send a message."""
        self._pump(lambda: self._tls.write(message))

    def read(self, enough: Callable[[bytes], bool]) -> bytes:
        """A message: bytes until there are enough; empty at the end."""
        found = bytearray()
        while not enough(bytes(found)):
            if not self._pump(lambda: found.extend(self._tls.read(1 << 16))):
                return b""
        return bytes(found)


def _whole(data: bytes) -> bool:
    """Whether an HTTP message is all there."""
    head, blank, body = data.partition(b"\r\n\r\n")
    lengths = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(blank) and len(body) >= lengths[0]


def _message(first: str, headers: list[str], body: bytes) -> bytes:
    lines = [first, *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Traffic:
    """Clients and servers on a lane, each with a journal.

    `header` puts a traceparent into each request; `tags` has both ends tag their sockets, the server by a span of its
    own. `tls` hides everything; then the ids cross the wire where nobody can read them.
    """

    lane: Lane
    port: int
    header: bool
    tags: bool
    tls: bool
    seed: int
    journals: list[Journal] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        authority = trustme.CA()
        self._server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("server.test").configure_cert(self._server_tls)
        self._client_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(self._client_tls)

    def run(self, connections: int, requests: int) -> None:
        """So many kept-alive connections at a time, so many requests on each, one after the other."""
        with self.lane.listen(self.port, backlog=connections) as listener:
            threads = [
                threading.Thread(target=self._guarded, args=(self._client, number, requests))
                for number in range(connections)
            ]
            for thread in threads:
                thread.start()
            for _ in threads.copy():
                end, (_, client_port, *_) = listener.accept()
                end.settimeout(PATIENCE_S)
                threads.append(threading.Thread(target=self._guarded, args=(self._server, end, client_port)))
                threads[-1].start()
            for thread in threads:
                thread.join()
        if self.faults:
            raise self.faults[0]

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as fault:
            self.faults.append(fault)

    def _talker(self, wire: Wire, *, server: bool) -> Clear | Secret:
        if not self.tls:
            return Clear(wire)
        return Secret(wire, self._server_tls if server else self._client_tls, server=server)

    def _client(self, number: int, requests: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        with self.lane.dialling() as end:
            end.connect((self.lane.server_address, self.port))
            wire, journal = Wire(end), Journal(end.getsockname()[1], server=False)
            self.journals.append(journal)
            talker = self._talker(wire, server=False)
            for _ in range(requests):
                trace, span = os.urandom(16).hex(), os.urandom(8).hex()
                headers = [f"X-Ids: {trace}-{span}", f"Host: {'x' * chance.randrange(40)}"]
                if self.header:
                    headers.insert(chance.randrange(3), f"traceparent: 00-{trace}-{span}-01")
                body = bytes(chance.choice((0, 0, chance.randrange(100), chance.randrange(LARGEST))))
                sent, received = wire.sent, wire.received
                if self.tags:
                    tag(end, f"00-{trace}-{span}-01")
                talker.write(_message("POST /work HTTP/1.1", headers, body))
                assert talker.read(_whole)
                journal.entries.append(Entry((trace, span), (sent, wire.sent), (received, wire.received)))

    def _server(self, end: socket.socket, client_port: int) -> None:
        chance = random.Random(self.seed * 1000 + client_port)
        with end:
            wire, journal = Wire(end), Journal(client_port, server=True)
            self.journals.append(journal)
            talker = self._talker(wire, server=True)
            while True:
                sent, received = wire.sent, wire.received
                if not (request := talker.read(_whole)):
                    return
                line = next(line for line in request.split(b"\r\n") if line.startswith(b"X-Ids: "))
                trace, span = line[7:].decode().split("-")
                if self.tags:
                    span = os.urandom(8).hex()
                    tag(end, f"00-{trace}-{span}-01")
                body = bytes(chance.choice((0, chance.randrange(100), chance.randrange(LARGEST))))
                talker.write(_message("HTTP/1.1 200 OK", [], body))
                journal.entries.append(Entry((trace, span), (sent, wire.sent), (received, wire.received)))
