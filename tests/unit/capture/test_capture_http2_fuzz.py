"""The probe's reading of HTTP/2 on the host, under sanitizers: against libFuzzer, and cut in every possible way."""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests import fuzzing
from tests.fuzzing import (
    AGAIN,
    ANSWER,
    GAP,
    LOADING,
    LONG,
    OVERLAP,
    PEER,
    REPORTING,
    SEGMENT,
    build,
    case,
)  # fmt: skip

SECONDS = 5

DATA, HEADERS, SETTINGS, CONTINUATION = 0, 1, 4, 9
PADDED, PRIORITY = 0x08, 0x20
PREFACE_BYTES, FRAME_BYTES = 24, 9

TRACE, SPAN = b"0af7651916cd43dd8448eb211c80319c", b"b7ad6b7169203331"
VALUE = b"00-%s-%s-01" % (TRACE, SPAN)
OTHER = b"00-80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-00"
IDS = f"{TRACE.decode()}:{SPAN.decode()}"


def frame(kind: int, payload: bytes = b"", flags: int = 4) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", 1) + payload


def literal(value: bytes = VALUE, name: bytes = b"traceparent", representation: bytes = b"\0") -> bytes:
    """A field without Huffman coding and without an index, RFC 7541 section 6.2."""
    return representation + bytes([len(name)]) + name + bytes([len(value)]) + value


FIELD = literal()
BLOCK = b"\x83\x86" + literal(b"/x.Y/Z", b":path", b"\x40") + FIELD + literal(b"a=b", b"tracestate")
GREETING = frame(SETTINGS, bytes(36), 0) + frame(8, bytes(4), 0)
CALL = frame(HEADERS, BLOCK) + frame(DATA, b"hello")


def blocks() -> list[bytes]:
    """Header blocks with ids, and some that only look as if they had."""
    return [
        BLOCK, BLOCK.replace(FIELD, literal(representation=b"\x40")), literal(representation=b"\x10") + BLOCK[:9],
        FIELD, FIELD + FIELD, FIELD + literal(OTHER), FIELD + bytes(4000), bytes(4000) + FIELD, bytes(5000) + FIELD,
        literal(representation=b"\x01"), literal(representation=b"\x80"), literal(VALUE.upper()), FIELD[1:],
        literal(VALUE[:-1]), literal(VALUE + b"0"), literal(b"01" + VALUE[2:]), literal(b"ff" + VALUE[2:]),
        literal(VALUE.replace(TRACE, b"0" * 32)), literal(VALUE.replace(SPAN, b"0" * 16)), literal(VALUE[:-2] + b"zz"),
        literal(name=b"Traceparent"), literal(name=b"traceparens"), literal(name=b"xtraceparent"), b"\x0btra" + FIELD,
        b"\x0btra\x0btra" + FIELD, b"\x40\x88" + bytes(8) + b"\xa8" + bytes(40), b"",
    ]  # fmt: skip


def seeds() -> Iterator[bytes]:
    """Each block in frames of every shape, whole and cut, with what else happens to segments."""
    for block in blocks():
        headers = frame(HEADERS, block)
        padded = frame(HEADERS, bytes([7]) + block + bytes(7), PADDED | 4)
        prior = frame(HEADERS, bytes(5) + block, PRIORITY | 4)
        both = frame(HEADERS, bytes([70]) + bytes(5) + block + FIELD[:70], PADDED | PRIORITY)
        yield case(GREETING + headers + padded + prior + both + CALL)
        yield case(GREETING + headers + CALL, (LONG, 90), (SEGMENT, 60), (SEGMENT, 60), (PEER, 0), (ANSWER, 1), seq=2)
        yield case(GREETING + headers + CALL, (LOADING | LONG, 200), (REPORTING | LONG, 200), seq=0xFFFFFFE1)
        yield case(GREETING + headers + CALL, (LONG, 100), (GAP, 40), (SEGMENT, 60), (AGAIN, 100), (OVERLAP, 0x4040))
        yield case(frame(DATA, headers) + frame(CONTINUATION, block) + headers[:9] + CALL)
    for cut in range(1, PREFACE_BYTES + len(GREETING + CALL)):
        yield case(GREETING + CALL + CALL, (LONG, cut))
        yield case(GREETING + CALL + CALL, (LONG, PREFACE_BYTES), *((LONG, 1 + cut % 11),) * 60)
    for frames in (5 * 128 - 6, 6 * 128 - 6):  # about as many as are read of a segment with the preface, and without
        yield case(frame(SETTINGS) * frames + CALL * 8)
        yield case(frame(SETTINGS) * frames + CALL * 8, (LONG, PREFACE_BYTES))
    yield case(b"\xff\xff\xff\x01\x0c" + CALL * 3)


WORDS = [
    FIELD, FIELD[:14], VALUE, b"\x0btraceparent", b"\x0btra", b"\x37", GREETING, CALL, frame(SETTINGS), OTHER,
    frame(HEADERS), frame(HEADERS, FIELD)[:9], frame(HEADERS, bytes([0]), 12)[:10], bytes(3),
]  # fmt: skip


def test_no_frames_mislead_the_probe(tmp_path: Path) -> None:
    """For a bounded time: exactly the ids that a slow parser sees at the same places, and no stray read."""
    assert fuzzing.fuzz("fuzz_http2.c", tmp_path, seeds(), seconds=SECONDS, words=WORDS) > 5_000


def reported(driver: Path, inputs: Iterable[bytes]) -> list[dict[int, str]]:
    """By input: where behind the preface a frame begins of which ids were reported, and these."""
    return [{at - PREFACE_BYTES: ids for at, ids in found.items()} for found in fuzzing.reported(driver, inputs)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prints what is reported."""
    return build("fuzz_http2.c", tmp_path_factory.mktemp("http2") / "driver", "-DPRINTS_REPORTS")


def test_ids_are_found_wherever_their_block_is_whole(driver: Path) -> None:
    """Cut anywhere but in the preface, and from a block to the end of its ids: its frame tells them."""
    stream, calls = GREETING + CALL + CALL, [len(GREETING), len(GREETING + CALL)]
    in_block = BLOCK.index(FIELD) + len(FIELD)
    cuts = range(len(stream))
    found = reported(driver, (case(stream, (LONG, PREFACE_BYTES + cut)) for cut in cuts))
    for cut, ids in zip(cuts, found, strict=True):
        whole = [at for at in calls if not at + FRAME_BYTES <= cut < at + FRAME_BYTES + in_block]
        assert ids == dict.fromkeys(whole, IDS), cut


@pytest.mark.parametrize(
    ("block", "good"),
    [(block, number in (0, 1, 2, 3, 6, 7)) for number, block in enumerate(blocks())],
    ids=map(str, range(len(blocks()))),
)
def test_only_a_literal_traceparent_counts(driver: Path, block: bytes, good: bool) -> None:
    """Written out, good, and the only one: in frames of every shape, and never in another frame than HEADERS."""
    frames = [
        frame(HEADERS, block), frame(HEADERS, bytes([7]) + block + bytes(7), PADDED),
        frame(HEADERS, bytes(5) + block, PRIORITY),
        frame(HEADERS, bytes([len(FIELD), *bytes(5)]) + block + FIELD, PADDED | PRIORITY),
    ]  # fmt: skip
    assert reported(driver, map(case, frames)) == [{0: IDS} if good else {}] * 4
    others = [frame(kind, block) for kind in range(16) if kind != HEADERS]
    assert reported(driver, map(case, others)) == [{}] * 15
