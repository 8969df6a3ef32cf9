"""Keys of a terminal, one by one and without waiting, while nothing of them is shown; it is as before afterwards."""

import codecs
import os
import re
import select
import termios
import tty
from contextlib import suppress
from typing import Self

ESCAPE, ENTER, BACKSPACE, GONE = "escape", "enter", "backspace", "gone"
UP, DOWN, PAGE_UP, PAGE_DOWN, HOME = "up", "down", "page up", "page down", "home"

# What terminals send (ECMA-48, xterm's ctlseqs), in both of their modes.
_NAMES = {
    "\x1b[A": UP, "\x1bOA": UP, "\x1b[B": DOWN, "\x1bOB": DOWN, "\x1b[5~": PAGE_UP, "\x1b[6~": PAGE_DOWN,
    "\x1b[H": HOME, "\x1bOH": HOME, "\x1b[1~": HOME, "\x1b": ESCAPE, "\r": ENTER, "\n": ENTER, "\x7f": BACKSPACE,
    "\b": BACKSPACE,
}  # fmt: skip
_KEY = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)


def keys(text: str) -> list[str]:
    """The keys behind what a terminal sent: a character each, or a name; sequences that nobody knows are left out."""
    found = [_NAMES.get(key, key) for key in _KEY.findall(text)]
    return [key for key in found if not key.startswith("\x1b")]


class Keyboard:
    """The keys of a terminal, as a context manager; Ctrl-C and Ctrl-Z go on being signals.

    Args:
        descriptor: of the terminal; None: there is none, and no key is ever pressed.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def __enter__(self) -> Self:
        if self._descriptor is not None:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            with suppress(termios.error):  # it has hung up, and nobody sees how it is
                termios.tcsetattr(self._descriptor, termios.TCSAFLUSH, self._before)

    def pressed(self, timeout_s: float = 0) -> list[str]:
        """The keys pressed since the last call, or within a time; `GONE` where there is no terminal any more."""
        if self._descriptor is None:
            select.select([], [], [], timeout_s)
            return []
        ready, _, _ = select.select([self._descriptor], [], [], timeout_s)
        if not ready:
            return []
        try:
            read = os.read(self._descriptor, 4096)
        except OSError:  # EIO: it has hung up
            read = b""
        return keys(self._decoder.decode(read)) if read else [GONE]
