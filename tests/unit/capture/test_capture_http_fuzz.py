"""The probe's reading of HTTP heads on the host, under sanitizers: against libFuzzer, and cut in every possible way."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fuzzing
from tests.fuzzing import (
    AGAIN,
    ANNOUNCE,
    ANSWER,
    GAP,
    KEEPING,
    LOADING,
    LONG,
    OVERLAP,
    PEER,
    REPORTING,
    SEGMENT,
    build,
    reported,
)  # fmt: skip

SECONDS = 10

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTHER_TRACE, OTHER_SPAN = "80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1"
TRACEPARENT = f"traceparent: 00-{TRACE}-{SPAN}-01\r\n"
OTHER = f"traceparent: 00-{OTHER_TRACE}-{OTHER_SPAN}-00\r\n"
B3 = f"b3: {OTHER_TRACE}-{OTHER_SPAN}-1-05e3ac9a4f6e3b90\r\n"
IDS, OTHER_IDS = f"{TRACE}:{SPAN}", f"{OTHER_TRACE}:{OTHER_SPAN}"


def case(stream: str, *steps: tuple[int, int], seq: int = 1) -> bytes:
    """An input of fuzz_http.c: a stream, and steps with their lengths."""
    return fuzzing.case(stream.encode(), *steps, seq=seq)


def get(*headers: str, target: str = "/") -> str:
    return f"GET {target} HTTP/1.1\r\nHost: example\r\n{''.join(headers)}\r\n"


def post(body: str, *headers: str) -> str:
    return f"POST / HTTP/1.1\r\n{''.join(headers)}Content-Length: {len(body)}\r\n\r\n{body}"


def streams() -> list[str]:
    """Requests that have ids, and requests that only look as if they had."""
    inner = get(OTHER)
    chunked = f"POST / HTTP/1.1\r\n{TRACEPARENT}Transfer-Encoding: chunked\r\n\r\n"
    return [
        get(TRACEPARENT), get(B3), get(B3, TRACEPARENT), get(TRACEPARENT, B3), get("a: b\r\n", TRACEPARENT, "c: d\r\n"),
        get(TRACEPARENT).replace("\r", ""), get(TRACEPARENT.upper()), get(TRACEPARENT.title()),
        get(TRACEPARENT.replace(": ", ":")), get(TRACEPARENT.replace(": ", ": \t  \t")),
        get(TRACEPARENT.replace(": ", " : ")), get(TRACEPARENT.replace("\r", " \t\r")),
        get(TRACEPARENT.replace(" 00-", " cc-").replace("\r", "-what comes later\r")),
        get(TRACEPARENT.replace("\r", "-what does not belong\r")), get(TRACEPARENT.replace(" 00-", " ff-")),
        get(TRACEPARENT.replace(TRACE, "0" * 32)), get(TRACEPARENT.replace(SPAN, "0" * 16)),
        get(TRACEPARENT.replace(SPAN, SPAN.upper())), get(TRACEPARENT, OTHER), get(TRACEPARENT, TRACEPARENT),
        get(B3, B3), get(f"b3: {SPAN}-{OTHER_SPAN}\r\n"), get(f"b3: {TRACE}-{SPAN}\r\n"), get("b3: 0\r\n"),
        get(f"b3: {TRACE}-{SPAN}-d\r\n"), get(f"b3: {SPAN}-{OTHER_SPAN}-0-{SPAN}\r\n"), get("traceparent: \r\n", B3),
        get(target=f"/?{TRACEPARENT.strip()}"), get(f"x: {TRACEPARENT}"), get(f"x-{TRACEPARENT}"),
        get(f"x: y\r\n {TRACEPARENT}"), get(TRACEPARENT, " folded\r\n"), get(TRACEPARENT.replace(": ", ":\r\n ")),
        get() + TRACEPARENT, get() + get(TRACEPARENT), get(TRACEPARENT) + get() + get(OTHER), get(TRACEPARENT) * 8,
        post(inner), post(inner, TRACEPARENT) + get(), post(inner, TRACEPARENT) + get(OTHER), chunked + inner,
        post(inner, "content-length: 0\r\n"), f"POST / HTTP/1.1\r\nContent-Length: 0000000005\r\n\r\n12345{inner}",
        f"POST / HTTP/1.1\r\nContent-Length: 5\r\n 0\r\n\r\n12345{inner}", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + inner,
        "POST HTTP/1.1\r\n" + get(TRACEPARENT), "GET / HTTP/1.1\r\n" + TRACEPARENT + "\r\n", "\r\n" + get(TRACEPARENT),
        "HTTP/1.1 200 OK\r\n" + TRACEPARENT + "\r\n", get("".join(f"c{i}: d\r\n" for i in range(90)), TRACEPARENT),
        get(f"x: {'y' * 5000}\r\n", TRACEPARENT), get(TRACEPARENT, f"traceparent:{' ' * 140}\r\n", B3),
    ]  # fmt: skip


def traps() -> list[bytes]:
    """Segments cut, lost or interrupted just where a careless reader would report ids that the request has not."""
    inner = get(OTHER)
    first, second, long = get(target="/a"), post(inner), "GET /longer HTTP/1.1\r\n"
    begin, head = len(first), len(second) - len(inner)
    encoded = f"POST / HTTP/1.1\r\n{TRACEPARENT}Transfer-Encoding:{' ' * 130}chunked\r\n\r\n"
    many = "".join(f"c{i}: defghi\r\n" for i in range(80))
    return [
        # A body that looks like a request, in a segment of its own, behind a head that cannot be read.
        case(second, (SEGMENT, 8), (SEGMENT, head - 8)),
        case(first + second, (SEGMENT, begin), (SEGMENT, 8), (SEGMENT, head - 8)),
        case(first + second, (SEGMENT, begin), (GAP, head)),
        case(first + "\r\n" + second, (SEGMENT, begin), (SEGMENT, head + 2)),
        case(encoded + inner, (SEGMENT, len(encoded) - 4)),
        # A second header that is long, or among many others, or folded.
        case(f"{long}{TRACEPARENT}traceparent: {'z' * 130}\r\n\r\n", (SEGMENT, 220)),
        case(f"{long}traceparent: {'z' * 130}\r\n{B3}\r\n", (SEGMENT, 160)),
        case(f"{long}{TRACEPARENT}{OTHER}{many}\r\n", (SEGMENT, 120)),
        case(f"{long}{TRACEPARENT}{many}{OTHER}\r\n"),
        case(f"{long}{TRACEPARENT} folded\r\n\r\n", (SEGMENT, len(long + TRACEPARENT))),
        # Another request behind one whose length stood in an earlier segment, or behind as many as are read of one.
        case(post("12345", TRACEPARENT) + inner, (SEGMENT, 107)),
        case(get(TRACEPARENT) * 6 + get(OTHER)),
        # Another program on the same CPU, once ids were found and before the rest of the head is kept.
        case(f"{long}x{OTHER}b3: {TRACE}-{SPAN}\r\n\r\n", (SEGMENT, len(long) + 1), (REPORTING | SEGMENT, 123)),
        case(f"{long}a: b\r\nc: d\r\n\r\n", (KEEPING | SEGMENT, len(long) + 6)),
    ]  # fmt: skip


def seeds() -> Iterator[bytes]:
    """The traps, and each stream whole, in small segments, and with what else happens to segments."""
    yield from traps()
    for stream in streams():
        half = len(stream) // 2
        yield case(stream)
        yield case(stream, (SEGMENT, 40), (SEGMENT, 40), (ANSWER, 0), (SEGMENT, 60), (ANSWER, 0))
        yield case(stream, (LONG, half), (AGAIN, 30), (OVERLAP, 0x1405), (ANNOUNCE, 0), (PEER, 0), seq=0xFFFFFFE0)
        yield case(stream, (SEGMENT, 50), (GAP, 20), (SEGMENT, 30), (AGAIN, 100), (ANSWER, 0))
        yield case(stream, (LOADING | SEGMENT, 50), (REPORTING | LONG, half))
        yield case(stream, (KEEPING | SEGMENT, 50), (REPORTING | SEGMENT, 40), (REPORTING | LONG, half))
        yield case(stream, *((SEGMENT, 1 + i) for i in range(20)))


WORDS = [word.encode() for word in (
    "traceparent:", "tracestate:", "b3:", "Content-Length: ", "Transfer-Encoding: ", "GET ", "POST ", "PUT ", "PRI ",
    " HTTP/1.1\r\n", " HTTP/1.0\n", "\r\n", "\r\n\r\n", "\n\n", "\r\n ", "\t", "-00", "-01", "-d", "00-", "ff-",
    TRACE, SPAN, TRACEPARENT, OTHER, B3, get(TRACEPARENT), post("12345"), "0" * 16, " " * 8,
)]  # fmt: skip


def test_no_stream_misleads_the_probe(tmp_path: Path) -> None:
    """For a bounded time: no ids that a slow parser of the whole stream does not see, none missed, no stray read."""
    assert fuzzing.fuzz("fuzz_http.c", tmp_path, seeds(), seconds=SECONDS, words=WORDS) > 10_000


def pieces(stream: str, cuts: tuple[int, ...]) -> bytes:
    return case(stream, *((LONG, end - start) for start, end in itertools.pairwise((0, *cuts))))


def expected(requests: list[tuple[str, str]], cuts: tuple[int, ...]) -> dict[int, str]:
    """All ids, up to the first request whose own first line is cut: there the probe stops until the peer answers."""
    found, start = {}, 0
    for request, ids in requests:
        if any(start < cut <= start + request.index("\n") for cut in cuts):
            break
        if ids:
            found[start] = ids
        start += len(request)
    return found


@pytest.mark.parametrize(
    ("requests", "most_cuts"),
    [
        ([(get(TRACEPARENT), IDS)], 2),
        ([(get(TRACEPARENT.replace("tracep", "TraceP").replace(": ", ": \t "), "c: d\r\n").replace("\r", ""), IDS)], 2),
        ([(get(B3, TRACEPARENT, target=f"/?{OTHER.strip()}"), IDS)], 2),
        ([(get(f"b3: {OTHER_TRACE}-{OTHER_SPAN}\r\n", f"x-{TRACEPARENT}"), OTHER_IDS)], 2),
        ([(get(TRACEPARENT, OTHER), "")], 2),
        ([(get(TRACEPARENT.upper(), B3), "")], 2),
        ([(post(get(OTHER)), "")], 2),
        ([(get(TRACEPARENT), IDS), (post("12345", OTHER), OTHER_IDS)], 2),
        ([(get(f"x: {'y' * 4200}\r\n", TRACEPARENT), IDS)], 1),
    ],
    ids=["traceparent", "case, blanks, line feeds", "both, and a decoy", "b3", "two", "upper-case", "body", "pipelined",
         "long"],
)  # fmt: skip
def test_it_does_not_matter_where_a_head_is_cut(
    tmp_path: Path, requests: list[tuple[str, str]], most_cuts: int
) -> None:
    """In one, two and three segments, cut anywhere: the same ids, at the request's first byte."""
    driver = build("fuzz_http.c", tmp_path / "driver", "-DPRINTS_REPORTS")
    stream = "".join(request for request, _ in requests)
    all_cuts = [cuts for n in range(most_cuts + 1) for cuts in itertools.combinations(range(1, len(stream)), n)]
    found = reported(driver, (pieces(stream, cuts) for cuts in all_cuts))
    assert len(found) == len(all_cuts)
    for cuts, ids in zip(all_cuts, found, strict=True):
        assert ids == expected(requests, cuts), cuts
