"""Text to configuration values and back."""

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.config_values import Bytes, Network, PortRange, Seconds, Source, Url, parse, parse_pairs, show
from tcpio_otel.export.settings import Protocol


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Seconds, "250ms", 0.25),
        (Seconds, "5s", 5),
        (Seconds, "1.5", 1.5),
        (Seconds, "2m", 120),
        (Seconds, "1h", 3600),
        (Seconds, "1.1ms", 0.0011),
        (Bytes, "64MiB", 64 << 20),
        (Bytes, "1MB", 1_000_000),
        (Bytes, "10 KiB", 10_240),
        (Bytes, "4096", 4096),
        (int, "131072", 131_072),
        (int, "-1", -1),
        (PortRange, "443", (443, 443)),
        (PortRange, "8000-8999", (8000, 8999)),
        (Network, "192.0.2.0/24", ipaddress.ip_network("192.0.2.0/24")),
        (Network, "192.0.2.8", ipaddress.ip_network("192.0.2.8/32")),
        (Network, "2001:db8::1/32", ipaddress.ip_network("2001:db8::/32")),
        (Path, "/etc/ca.pem", Path("/etc/ca.pem")),
        (Url, "https://[::1]:4318/otlp", "https://[::1]:4318/otlp"),
        (Source, "pcap:a file.pcap", "pcap:a file.pcap"),
        (Protocol, " grpc ", Protocol.GRPC),
    ],
)
def test_a_value_is_read_as_people_write_it(kind: object, text: str, value: object) -> None:
    """Durations and sizes carry units, ports are ranges, addresses are networks of one."""
    assert parse(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "texts", "wanted"),
    [
        (Seconds, ["", "-1s", "5 parsecs", "1e3", "inf", "9" * 400, "1,5s"], "a duration such as 250ms"),
        (Bytes, ["", "64 MB/s", "-1", "1.5MiB", "9" * 400], "a size such as 64MiB"),
        (int, ["", "many", "1.0", "0x10", "9" * 5000], "a whole number"),
        (PortRange, ["", "https", "65536", "9-8", "1-", "-1", "1-2-3"], "a port such as 443"),
        (Network, ["", "192.0.2.0/33", "192.0.2", "example.org", "::/129"], "a network such as 192.0.2.0/24"),
        (Path, ["", "a\0b"], "a path"),
        (Url, ["", "localhost:4317", "http://", "ftp://h", "http://h:99999", "http://h:0", "http://a b", "http://[::1"],
         "a URL such as http"),
        (Source, ["", "eth0", "pcap:"], "live, or pcap:FILE"),
        (Protocol, ["http", "GRPC"], "one of grpc, http/protobuf, http/json"),
    ],
)  # fmt: skip
def test_what_is_no_such_value_is_told_what_would_be(kind: object, texts: list[str], wanted: str) -> None:
    """The message completes the sentence "... is not ..."."""
    for text in texts:
        with pytest.raises(ValueError, match=wanted):
            parse(kind, text)


@given(
    st.one_of(
        st.floats(1e-6, 1e9).map(Seconds),
        st.integers(0, 1 << 48).map(Bytes),
        st.lists(st.integers(0, 65535), min_size=2, max_size=2).map(lambda ends: PortRange(sorted(ends))),
        st.ip_addresses().map(lambda address: ipaddress.ip_network(address)),
    )
)
def test_what_is_shown_reads_back_the_same(value: object) -> None:
    """`config` prints nothing that `--config` would read differently, to the last bit of a duration."""
    kind = Network if isinstance(value, Network) else type(value)
    text = str(show(value))
    assert parse(kind, text) == value


def test_pairs_are_percent_decoded() -> None:
    """Commas, equals signs and any script fit into a value."""
    assert parse_pairs("a=b%2Cc, d = e=f ,,g=,h%20i=gr%C3%BC%C3%9Fe") == {
        "a": "b,c",
        "d": "e=f",
        "g": "",
        "h i": "grüße",
    }


@pytest.mark.parametrize("text", ["novalue", "=value", "a=b,c", "a=%zz", "a=100%", "a=%ff"])
def test_pairs_are_whole_or_nothing(text: str) -> None:
    """One malformed pair makes the whole list wrong, as the specification of resources wants it."""
    with pytest.raises(ValueError, match="a list such as name=value"):
        parse_pairs(text)
