"""docs/attributes.md, its tables, and what the agent really says of a capture."""

import struct
from pathlib import Path
from types import ModuleType

import pytest
from opentelemetry.semconv.schemas import Schemas

from tcpio_otel import names
from tests.emitted import Emitted, account, in_files, in_lines, undeclared, unseen
from tests.generators import generator
from tests.unit.core.test_core_cli import called

SYN, ACK, PUSH, RST, FIN = 2, 16, 24, 20, 17


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator."""
    return generator("generate_attributes")


def test_generated_files_are_up_to_date(generate: ModuleType) -> None:
    """Whoever changes a name runs `python config/generate_attributes.py`."""
    for path, content in generate.FILES.items():
        assert path.read_text() == content(), f"run python config/generate_attributes.py: {path} is out of date"


def test_what_is_said_to_be_opentelemetry_s_is(generate: ModuleType) -> None:
    """Names without `tcp` are in the installed package, but for two; names with it are not; the schema is its own."""
    known = generate.conventions()
    declared = {*names.ATTRIBUTES, *names.INSTRUMENTS}
    ours = {name for name in declared if generate.origin(name, known) == generate.OURS}
    assert {name for name in ours if not name.startswith(("tcp.", "tcpio."))} == {names.OVERFLOW, names.POD_QOS}
    assert not {name for name in known if name.startswith(("tcp.", "tcpio."))}
    assert names.SCHEMA_URL in {schema.value for schema in Schemas}


def segment(number: int, sent: bool, port: int, fields: tuple[int, int, int, int], payload: bytes = b"") -> bytes:
    """A frame of a capture: a segment of a conversation with port 443."""
    flags, seq, ack, window = fields
    ends, ports = (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])), (port, 443)
    if not sent:
        ends, ports = ends[::-1], ports[::-1]
    size = 40 + len(payload)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, size, 0, 0, 64, 6, 0) + ends[0] + ends[1]
    tcp = struct.pack(">HHIIBBHHH", *ports, seq, ack, 80, flags, window, 0, 0)
    return struct.pack("<IIII", 1_700_000_000, number * 1000, size, size) + ip + tcp + payload


def capture(path: Path) -> Path:
    """A conversation with a retransmit and a shut window, one that is refused, one that is reset; and no TCP."""
    story: list[tuple[bool, int, tuple[int, int, int, int], bytes]] = [
        (True, 5001, (SYN, 9, 0, 100), b""),
        (False, 5001, (SYN | ACK, 70, 10, 100), b""),
        (True, 5001, (ACK, 10, 71, 100), b""),
        (True, 5001, (PUSH, 10, 71, 100), b"question"),
        (True, 5001, (PUSH, 10, 71, 100), b"question"),
        (False, 5001, (PUSH, 71, 18, 0), b"answer"),
        (False, 5001, (FIN, 77, 18, 100), b""),
        (True, 5001, (FIN, 18, 78, 100), b""),
        (False, 5001, (ACK, 78, 19, 100), b""),
        (True, 5002, (SYN, 9, 0, 100), b""),
        (False, 5002, (RST, 0, 10, 0), b""),
        (True, 5003, (SYN, 9, 0, 100), b""),
        (False, 5003, (SYN | ACK, 70, 10, 100), b""),
        (True, 5003, (ACK, 10, 71, 100), b""),
        (True, 5003, (RST, 10, 71, 100), b""),
    ]
    frames = b"".join(
        segment(number, sent, port, fields, payload) for number, (sent, port, fields, payload) in enumerate(story)
    )
    datagram = struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + bytes(8) + bytes(8)
    frames += struct.pack("<IIII", 1_700_000_001, 0, 28, 28) + datagram
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101) + frames)
    return path


def test_what_is_said_of_a_capture_is_declared(tmp_path: Path) -> None:
    """Log records, spans, their events, metrics; and by far the most of what needs no kernel is among them."""
    source = capture(tmp_path / "made.pcap")
    assert called("run", "--source", f"pcap:{source}", "--otlp-file", str(tmp_path / "out"))[0] == 0
    found = in_files(tmp_path / "out")
    account(found)
    assert found.span_events == set(names.SPAN_EVENTS)
    assert found.records == {names.PACKET_EVENT, names.CONNECTION_SPAN}
    assert {name for name, _, _ in found.instruments} == set(names.INSTRUMENTS) - {
        names.DROPS.name,
        names.ROUND_TRIPS.name,
    }


def test_lines_about_a_capture_are_declared(tmp_path: Path) -> None:
    """Every measurement but that of drops, which a capture does not know of."""
    source = capture(tmp_path / "made.pcap")
    code, stdout, _ = called("telegraf", "--once", "--packets", "--port", "443", "--source", f"pcap:{source}")
    assert code == 0
    found = in_lines(stdout)
    account(found)
    assert {measurement for measurement, _, _ in found.lines} == {"tcp_packet", "tcp_connection", "tcp_peer", "tcpio"}


def test_what_is_not_declared_is_found() -> None:
    """A name, a type, a place, a unit, or a point's attribute that nobody has declared."""
    packet, span = names.On.PACKET, names.On.SPAN
    found = Emitted(
        attributes={
            (packet, "tcp.sek", "int"),
            (packet, names.SEQ, "string"),
            (span, names.SEQ, "int"),
            (span, "tcp.peer.k8s.pod.label.app", "string"),
            (span, "tcp.peer.host.name", "string"),
        },
        records={"tcp.paket"},
        span_events={"tcp.sin"},
        instruments={("tcp.io", "bit", names.Kind.SUM), ("tcp.oi", "By", names.Kind.SUM)},
        by={("tcp.io", names.ROLE), ("tcp.io", names.FAULT)},
        faults={"skipped not IP", "tired"},
        lines={
            ("tcp_peer", "int", "seq"),
            ("tcp_packet", "int", "seq"),
            ("tcp_packet", "string", "ack"),
            ("tcpio", "field", "skipped not IP"),
            ("tcp_peer", "tag", "pod"),
        },
    )
    assert undeclared(found) == [
        "fault tired",
        "int seq of tcp_peer",
        "int tcp.sek on PACKET",
        "int tcp.seq on SPAN",
        "record tcp.paket",
        "span event tcp.sin",
        "string ack of tcp_packet",
        "string tcp.peer.host.name on SPAN",
        "string tcp.seq on PACKET",
        "sum tcp.io in bit",
        "sum tcp.oi in By",
        "tag pod of tcp_peer",
        "tcp.io by tcpio.fault",
    ]
    assert "tcp.seq on EVENT" in unseen(found)
    assert "tcp.peer.k8s.pod.label.*" not in unseen(found)
