"""Captures that are damaged in any way: what can be read is read, and one documented error says the rest."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcpio_otel.capture.pcap import PcapSource
from tcpio_otel.errors import InputError
from tcpio_otel.ledger import Ledger
from tests.integration.test_integration_collector import capture

ANYTHING = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path) -> tuple[int, bool]:
    """How many records a file gives, and whether an InputError ended it; nothing else may."""
    ledger, records, said = Ledger(), 0, ""
    try:
        with PcapSource(path, ledger) as source:
            for batch in source:
                records += len(batch)
    except InputError as error:
        said = str(error)
    assert ledger.balance().seen == records
    assert "\n" not in said
    assert not said or str(path) in said
    return records, bool(said)


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\xd4\xc3\xb2\xa1\x02\0\x04\0", b"\x0a\x0d\x0d\x0a", b"\x1f\x8b\x08"]),
)
@ANYTHING
def test_garbage_is_an_input_error(tmp_path: Path, garbage: bytes, magic: bytes) -> None:
    """Random bytes, with and without the beginning of a real file."""
    path = tmp_path / "garbage"
    path.write_bytes(magic + garbage)
    records, failed = read(path)
    assert failed or records


@given(st.lists(st.tuples(st.integers(0, 1303), st.integers(0, 255)), min_size=1, max_size=8))
@ANYTHING
def test_a_damaged_capture_raises_nothing_else(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    """Any bytes of a good capture changed: lengths, link types and headers that lie."""
    path = capture(tmp_path / "damaged.pcap", 22)
    content = bytearray(path.read_bytes())
    for at, value in damage:
        if at < len(content):
            content[at] = value
    path.write_bytes(content)
    read(path)


def test_a_capture_cut_off_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    """Every possible cut: the packets before it come out, and the cut is said."""
    whole = capture(tmp_path / "whole.pcap", 5).read_bytes()
    header, packet = 24, 16 + 40
    for size in range(len(whole)):
        path = tmp_path / "cut.pcap"
        path.write_bytes(whole[:size])
        records, failed = read(path)
        assert records == max(0, (size - header) // packet)
        assert failed == (records == 0 or (size - header) % packet != 0)


@pytest.mark.parametrize("length", [2**31 - 1, 2**32 - 1])
def test_a_length_that_lies_does_not_take_the_memory(tmp_path: Path, length: int) -> None:
    """A corrupt length is an error, not an allocation of gigabytes."""
    path = capture(tmp_path / "lies.pcap", 3)
    content = bytearray(path.read_bytes())
    content[24 + 8 : 24 + 12] = length.to_bytes(4, "little")
    path.write_bytes(content)
    assert read(path) == (0, True)
