"""What Telegraf says to a program, and what a program says to Telegraf, through real pipes and signals."""

import fcntl
import logging
import os
import signal
from collections.abc import Iterator

import pytest

from tcpio_otel.execd import ASK, Flushes, Log, Orders


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # the test has closed it


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts handlers back."""
    before = {number: signal.getsignal(number) for number in ASK}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_lines_ask_and_the_end_of_input_ends(pipe: tuple[int, int]) -> None:
    """Several lines at once are one order; without a line there is none."""
    orders = Orders(pipe[0])
    assert (orders.take(), orders.over, orders.heard) == (False, False, False)
    os.write(pipe[1], b"\n\n\n")
    assert (orders.take(), orders.take(), orders.heard) == (True, False, True)
    os.write(pipe[1], b"x")
    assert not orders.take()
    os.write(pipe[1], b"\n")
    os.close(pipe[1])
    assert (orders.take(), orders.over) == (True, True)
    assert not orders.take()


@pytest.mark.parametrize("number", ASK)
def test_signals_ask(signals: None, number: int) -> None:
    """Also where no input is listened to."""
    orders = Orders(None)
    orders.listen()
    os.kill(os.getpid(), number)
    assert (orders.take(), orders.take()) == (True, False)


def test_the_interval_counts_until_telegraf_asks(pipe: tuple[int, int]) -> None:
    """Late or not, the next is due at a multiple of it; from the first order on orders alone count."""
    flushes = Flushes(Orders(pipe[0]), 100, 1000)
    assert [flushes.due(now) for now in (1000, 1099, 1100, 1101, 1350, 1399, 1400)] == [
        False, False, True, False, True, False, True,
    ]  # fmt: skip
    os.write(pipe[1], b"\n")
    assert [flushes.due(now) for now in (1401, 1402, 9000)] == [True, False, False]
    never = Flushes(Orders(None), 0, 0)
    assert not never.due(1 << 60)


def test_each_line_says_its_level(pipe: tuple[int, int]) -> None:
    """Those of a traceback too; and none is too long for Telegraf's reader."""
    log = Log(pipe[1])
    log.setFormatter(logging.Formatter("%(message)s"))
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.handle(logging.LogRecord("", level, "", 0, "a\nb", (), None))
    assert os.read(pipe[0], 1 << 16).decode().splitlines() == [
        f"{level}! {line}" for level in "DIWEE" for line in ("a", "b")
    ]
    log.handle(logging.LogRecord("", logging.INFO, "", 0, "x" * 100_000, (), None))
    (line,) = os.read(pipe[0], 1 << 20).splitlines()
    assert len(line) < 4096


def test_nobody_waits_for_who_does_not_read(pipe: tuple[int, int]) -> None:
    """What could not be said is counted, and that is said as soon as somebody reads; a closed pipe is no error."""
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 14)
    log = Log(pipe[1])

    def say(text: str) -> None:
        log.handle(logging.LogRecord("", logging.INFO, "", 0, text, (), None))

    for _ in range(2000):
        say("x" * 98)
    told = os.read(pipe[0], 1 << 20).splitlines()
    say("again")
    lost = 2000 - len(told)
    assert os.read(pipe[0], 1 << 20).decode().splitlines() == [
        f"W! {lost} lines could not be said here: nobody read them", "I! again",
    ]  # fmt: skip
    os.close(pipe[0])
    say("to nobody")
