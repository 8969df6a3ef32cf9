"""The probe's packet code on the host, under sanitizers, against whatever libFuzzer thinks of."""

import struct
from pathlib import Path

from tests import fuzzing

SECONDS = 10
TCP = struct.pack("!HHIIBBHHH", 443, 50000, 1, 2, 5 << 4, 0x18, 512, 0, 0)


def _ipv6(next_header: int, rest: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(rest), next_header, 64) + bytes(range(32)) + rest


def seeds() -> list[bytes]:
    """Packets that lead into each branch: IPv4 with options, IPv6 with every extension, fragments, other protocols."""
    ipv4 = struct.pack("!BBHHHBBH8s", 0x45, 0, 40, 1, 0, 64, 6, 0, bytes(range(8)))
    options = bytes([0x47]) + ipv4[1:] + bytes(8)
    hop, authentication = bytes([60, 0]) + bytes(6), bytes([6, 4]) + bytes(22)
    destination, fragment = bytes([44, 0]) + bytes(6), bytes([51, 0, 0, 1]) + bytes(4)
    chain = hop + destination + fragment + authentication
    return [
        ipv4 + TCP, options + TCP + b"payload", _ipv6(6, TCP), _ipv6(0, chain + TCP), _ipv6(17, TCP),
        _ipv6(0, b"".join(bytes([0, 0]) + bytes(6) for _ in range(9)) + TCP), ipv4[:6] + b"\0\x10" + ipv4[8:] + TCP,
    ]  # fmt: skip


def test_no_packet_misleads_the_probe(tmp_path: Path) -> None:
    """For a bounded time: no read out of bounds, and all that is decoded stands in the packet."""
    assert fuzzing.fuzz("fuzz_packet.c", tmp_path, seeds(), seconds=SECONDS, longest_bytes=256) > 100_000
