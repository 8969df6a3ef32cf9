"""Lines to a pipe of which the reader reads, stops, comes back late, or goes."""

import fcntl
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpio_otel.export import stdout
from tcpio_otel.export.stdout import StdoutTransport, wait_until_read
from tcpio_otel.export.transport import Accepted, Refused, Retry
from tcpio_otel.payload import Request, Signal

LINE = b"m f=%08di 1\n"


def request(lines: int) -> Request:
    """Lines, one an item."""
    return Request(Signal.LOGS, b"".join(LINE % number for number in range(lines)), lines, lines)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pipe of the least size that there is, and little patience."""
    monkeypatch.setattr(stdout, "WAIT_MS", 20)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1)
    yield read, write
    for end in (read, write):
        os.close(end)


def transport(output: int) -> StdoutTransport:
    """One that is alone."""
    return StdoutTransport(output, threading.Lock())


def test_what_is_read_is_what_was_sent(pipe: tuple[int, int]) -> None:
    """However slowly, and by several at once: no line is cut, none is lost."""
    read, write = pipe
    turn, whole = threading.Lock(), request(3000)
    senders = [threading.Thread(target=StdoutTransport(write, turn).send, args=(whole,)) for _ in range(2)]
    for sender in senders:
        sender.start()
    found = b""
    while len(found) < 2 * len(whole.body):
        found += os.read(read, 700)
    for sender in senders:
        sender.join()
    assert sorted(found.splitlines(keepends=True)) == sorted(2 * whole.body.splitlines(keepends=True))


def test_a_reader_that_stops_gets_the_rest_later(pipe: tuple[int, int]) -> None:
    """What it has already is counted, and never sent a second time; in the meantime there are whole lines."""
    read, write = pipe
    to, whole = transport(write), request(1000)
    found = b""
    while not isinstance(reply := to.send(whole), Accepted):
        assert isinstance(reply, Retry)
        found += os.read(read, 1 << 16)
        assert found.endswith(b"\n")
        assert reply.taken == found.count(b"\n")
    found += os.read(read, 1 << 16)
    assert found == whole.body
    assert to.send(request(1)) == Accepted()
    assert os.read(read, 1 << 16) == LINE % 0


def test_a_line_that_is_too_long_for_one_write_comes_whole(pipe: tuple[int, int]) -> None:
    """Though not at once."""
    read, write = pipe
    body = b"x" * (3 * select.PIPE_BUF) + b"\n"
    to, long = transport(write), Request(Signal.LOGS, body + LINE % 1, 2)
    found = b""
    while not isinstance(to.send(long), Accepted):
        found += os.read(read, 1 << 16)
    assert found + os.read(read, 1 << 16) == long.body


def test_a_reader_that_has_gone_is_said(pipe: tuple[int, int]) -> None:
    """At once: nobody will ever read it."""
    read, write = pipe
    to, whole = transport(write), request(1000)
    taken = to.send(whole)
    assert isinstance(taken, Retry)
    os.dup2(write, read)  # closes the only reader
    assert to.send(whole) == Refused("reader_gone", "whoever read it has gone", taken.taken)
    wait_until_read(write, 0.01)


def test_a_full_disk_is_said() -> None:
    """As files say it."""
    with Path("/dev/full").open("wb") as full:
        assert transport(full.fileno()).send(request(1)) == Refused(
            "write_failed", "cannot write: No space left on device"
        )


def test_the_end_waits_until_everything_is_read(pipe: tuple[int, int], tmp_path: Path) -> None:
    """So long, and no longer; a file needs nobody."""
    read, write = pipe
    os.write(write, b"x")
    began = time.monotonic()
    wait_until_read(write, 0.05)
    assert time.monotonic() - began > 0.04
    reader = threading.Timer(0.05, os.read, (read, 1))
    reader.start()
    wait_until_read(write, 600)
    reader.join()
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        file.flush()
        wait_until_read(file.fileno(), 600)
