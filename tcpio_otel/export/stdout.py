"""Requests to standard output, for a reader that may stop reading: whole lines, and never a long wait."""

import fcntl
import os
import select
import stat
import struct
import termios
import threading
import time

from tcpio_otel.export.transport import Accepted, Refused, Reply, Retry
from tcpio_otel.payload import Request

WAIT_MS = 1000
"""For how long a request waits before it counts as stuck."""

_LOOK_S = 0.005


class StdoutTransport:
    """Writes requests of lines to a pipe, a file or a terminal.

    A pipe that can be written takes `PIPE_BUF` bytes at once and without waiting, so no line is ever cut, even if the
    reader comes back after we have gone, and the thread never hangs in a write. A request that is tried again goes on
    where it stopped.

    Args:
        output: file descriptor.
        turn: held while writing, by all who write there.
    """

    def __init__(self, output: int, turn: threading.Lock) -> None:
        self.destination = "standard output"
        self._output, self._turn = output, turn
        self._writable = select.poll()
        self._writable.register(output, select.POLLOUT)
        self._request: Request | None = None
        self._written = self._lines = 0

    def send(self, request: Request) -> Reply:
        """Write what of a request is not written yet; each of its items is a line."""
        if request is not self._request:
            self._request, self._written, self._lines = request, 0, 0
        body = request.body
        while self._written < len(body):
            most = self._written + select.PIPE_BUF
            end = body.rfind(b"\n", self._written, most) + 1 or most
            try:
                with self._turn:
                    if not self._writable.poll(WAIT_MS):
                        return Retry("nobody reads it", taken=self._lines)
                    end = self._written + os.write(self._output, body[self._written : end])
            except BrokenPipeError:
                return Refused("reader_gone", "whoever read it has gone", self._lines)
            except OSError as error:
                return Refused("write_failed", f"cannot write: {error.strerror}", self._lines)
            self._lines += body.count(b"\n", self._written, end)
            self._written = end
        return Accepted()

    def close(self) -> None:
        """Nothing to let go of: others may still write."""


def wait_until_read(output: int, timeout_s: float) -> None:
    """Wait until a pipe is empty, or nobody can empty it any more.

    What a program of Telegraf's leaves there when it ends may be lost: Telegraf closes its end then
    (internal/process/process.go calls os/exec.Cmd.Wait while it reads).
    """
    if not stat.S_ISFIFO(os.fstat(output).st_mode):
        return
    gone = select.poll()
    gone.register(output, 0)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not gone.poll(0):
        (left,) = struct.unpack("i", fcntl.ioctl(output, termios.FIONREAD, b"\0" * 4))
        if not left:
            return
        time.sleep(_LOOK_S)
