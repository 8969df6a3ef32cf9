"""What the kernel says of translated connections to who is behind them."""

import ipaddress
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.attribution import translations
from tcpio_otel.attribution.translations import Translations
from tcpio_otel.batch import IPV4_PREFIX, Endpoint

TCP, UDP = 6, 17


def end(text: str, port: int) -> Endpoint:
    """An endpoint of records."""
    parsed = ipaddress.ip_address(text)
    return Endpoint(parsed.packed if parsed.version == 6 else IPV4_PREFIX + parsed.packed, port)


CLIENT, SERVICE, BACKEND = end("10.244.0.2", 41000), end("10.96.0.10", 80), end("10.244.0.3", 8080)
NODE = end("10.0.7.1", 23456)


def attribute(kind: int, value: bytes) -> bytes:
    """`struct nlattr` and its value."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def tuple_of(kind: int, source: Endpoint, destination: Endpoint, protocol: int = TCP) -> bytes:
    """CTA_TUPLE_*, nested as the kernel does it."""
    version6 = not source.address.startswith(IPV4_PREFIX)
    addresses = b"".join(
        attribute(number + 2 * version6, each.address if version6 else each.address[12:])
        for number, each in ((1, source), (2, destination))
    )
    ports = b"".join(
        attribute(number, struct.pack("!H", each.port)) for number, each in ((2, source), (3, destination))
    )
    nested = 1 << 15
    inner = attribute(1 | nested, addresses) + attribute(2 | nested, attribute(1, bytes([protocol])) + ports)
    return attribute(kind | nested, inner)


def message(
    original: tuple[Endpoint, Endpoint], reply: tuple[Endpoint, Endpoint], protocol: int = TCP, kind: int = 0x100
) -> bytes:
    """A connection as `ctnetlink` tells of it."""
    status = attribute(3, struct.pack("!I", 0x20))
    body = bytes(4) + tuple_of(1, *original, protocol) + tuple_of(2, *reply, protocol) + status
    return struct.pack("=IHHII", 16 + len(body), kind, 0x600, 0, 0) + body


@pytest.fixture
def known() -> Iterator[Translations]:
    """Nothing so far."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Translations(ours)


def test_both_ends_learn_who_the_other_is(known: Translations) -> None:
    """The client of a Service: which pod; that pod, behind its node's address: which client."""
    known.learn(message((CLIENT, SERVICE), (BACKEND, NODE)))
    assert known.peer(CLIENT, SERVICE) == BACKEND
    assert known.peer(BACKEND, NODE) == CLIENT
    assert known.peer(SERVICE, CLIENT) is None


def test_what_is_not_translated_is_nobody_else(known: Translations) -> None:
    """Where one direction alone is, the other end is who it seems to be."""
    known.learn(message((CLIENT, SERVICE), (BACKEND, CLIENT)))
    assert known.peer(CLIENT, SERVICE) == BACKEND
    assert known.peer(BACKEND, CLIENT) is None


def test_ipv6_and_many_messages_in_one(known: Translations) -> None:
    """As a dump of the table answers."""
    ours, service, theirs = end("fd00::2", 5000), end("fd96::10", 443), end("fd00::3", 8443)
    other = end("10.244.0.9", 42000)
    known.learn(message((ours, service), (theirs, ours)) + message((other, SERVICE), (BACKEND, other)))
    assert known.peer(ours, service) == theirs
    assert known.peer(other, SERVICE) == BACKEND


def test_others_than_tcp_and_other_messages_are_let_be(known: Translations) -> None:
    """DNS by UDP is translated as well; and netlink has ends and errors of its own."""
    known.learn(message((CLIENT, SERVICE), (BACKEND, CLIENT), UDP))
    known.learn(message((CLIENT, SERVICE), (BACKEND, CLIENT), kind=3))
    assert known.peer(CLIENT, SERVICE) is None


def test_the_oldest_go_when_there_are_too_many(known: Translations, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is told of again is young again."""
    monkeypatch.setattr(translations, "LIMIT", 3)
    clients = [end("10.244.0.2", 41000 + number) for number in range(4)]
    for number in (0, 1, 2, 0, 3):
        known.learn(message((clients[number], SERVICE), (BACKEND, clients[number])))
    assert [known.peer(client, SERVICE) for client in clients] == [BACKEND, None, BACKEND, BACKEND]


_PORTS = st.integers(0, 65535)
_ENDS = st.builds(
    lambda number, port: Endpoint(IPV4_PREFIX + number.to_bytes(4), port), st.integers(0, 2**32 - 1), _PORTS
)


@given(st.tuples(_ENDS, _ENDS), st.tuples(_ENDS, _ENDS))
def test_the_usual_way_and_the_long_one_read_alike(
    original: tuple[Endpoint, Endpoint], reply: tuple[Endpoint, Endpoint]
) -> None:
    """TCP over IPv4 is read as a whole, where the kernel lays it out as it does today."""
    told = message(original, reply)
    assert translations._usual(told, 20) == translations._walked(told, 20, len(told)) == (original, reply)
    assert translations._usual(message(original, reply, UDP), 20) is None


@given(st.data())
def test_nothing_that_is_cut_or_altered_is_an_obstacle(data: st.DataObject) -> None:
    """What came before it is known, and no error escapes."""
    whole = message((CLIENT, SERVICE), (BACKEND, NODE))
    at = data.draw(st.integers(0, len(whole)))
    spoilt = data.draw(st.one_of(st.just(whole[:at]), st.binary(max_size=64).map(lambda found: whole[:at] + found)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        known = Translations(ours)
        known.learn(whole + spoilt)
        assert known.peer(CLIENT, SERVICE) is not None
