"""What Telegraf's `inputs.execd` says to a program that it has started, and how it wants to be spoken to.

https://github.com/influxdata/telegraf/tree/v1.39.3/plugins/inputs/execd: it asks for metrics by a line on standard
input or by a signal, ends a program by closing its input, and takes a line on standard error for an error, unless it
says what it is. If it stands still, so does whoever writes to it: here nobody does.
"""

import logging
import os
import select
import signal

ASK = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LINE_BYTES = select.PIPE_BUF - 8  # what a pipe that can be written takes without waiting; Telegraf reads up to 64 KiB


def hang_up() -> None:
    """Let Telegraf see the end of both outputs before we end: else it takes its own closing of them for an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
    os.close(nowhere)


class Orders:
    """Telegraf's orders: to tell, or to end.

    Args:
        stdin: where they come, beside signals; None: nowhere.
    """

    def __init__(self, stdin: int | None) -> None:
        self._stdin = stdin
        self._asked = False
        self.over = False
        self.heard = False  # any order to tell, ever

    def listen(self) -> None:
        """Take signals for orders: as soon as possible, because before that they end the process."""
        for number in ASK:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        del number, frame
        self._asked = True

    def _read(self) -> None:
        while self._stdin is not None and select.select([self._stdin], [], [], 0)[0]:
            said = os.read(self._stdin, 1 << 16)
            self._asked |= b"\n" in said
            if not said:
                self.over, self._stdin = True, None

    def take(self) -> bool:
        """Whether to tell now: somebody has asked since the last call."""
        self._read()
        asked, self._asked = self._asked, False
        self.heard |= asked
        return asked


class Flushes:
    """When to tell: whenever Telegraf asks; and by an interval, until it has asked once.

    Args:
        orders: Telegraf's.
        interval_ns: 0: never.
        now_ns: on a monotonic clock.
    """

    def __init__(self, orders: Orders, interval_ns: int, now_ns: int) -> None:
        self._orders, self._interval_ns, self._next_ns = orders, interval_ns, now_ns + interval_ns

    def due(self, now_ns: int) -> bool:
        """Whether that is now."""
        if self._orders.take():
            return True
        if not self._interval_ns or self._orders.heard or now_ns < self._next_ns:
            return False
        self._next_ns += self._interval_ns * (1 + (now_ns - self._next_ns) // self._interval_ns)
        return True


class Log(logging.Handler):
    """Writes log lines as Telegraf takes them, and never waits for it.

    Args:
        stderr: where they go.
    """

    def __init__(self, stderr: int) -> None:
        super().__init__()
        self._stderr, self._lost = stderr, 0
        self._writable = select.poll()
        self._writable.register(stderr, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, a line of Telegraf's for each of its own; what nobody takes is counted and left out."""
        if self._lost and self._say(f"W! {self._lost} lines could not be said here: nobody read them"):
            self._lost = 0
        level = "E" if record.levelno >= logging.ERROR else record.levelname[:1]
        for line in self.format(record).splitlines():
            self._lost += not self._say(f"{level}! {line}")

    def _say(self, line: str) -> bool:
        if not self._writable.poll(0):
            return False
        try:
            os.write(self._stderr, line.encode(errors="replace")[:_LINE_BYTES] + b"\n")
        except OSError:
            return False  # closed: there is nobody left to tell
        return True
