"""Keys of a terminal: a real pseudo-terminal, typed into."""

import os
import pty
import termios
from contextlib import suppress

import pytest

from tcpio_otel import keyboard
from tcpio_otel.keyboard import Keyboard, keys


@pytest.mark.parametrize(
    ("sent", "pressed"),
    [
        ("q", ["q"]),
        ("/nginx\r", ["/", "n", "g", "i", "n", "x", keyboard.ENTER]),
        ("\x1b[A\x1bOB", [keyboard.UP, keyboard.DOWN]),
        ("\x1b[5~\x1b[6~\x1b[H", [keyboard.PAGE_UP, keyboard.PAGE_DOWN, keyboard.HOME]),
        ("\x1b", [keyboard.ESCAPE]),
        ("\x7f", [keyboard.BACKSPACE]),
        ("a\x1b[1;5Cb\x1b[15~", ["a", "b"]),
        ("é", ["é"]),
    ],
)
def test_what_a_terminal_sends_is_keys(sent: str, pressed: list[str]) -> None:
    """Characters, and names for the rest; a sequence that nobody knows is no heap of characters."""
    assert keys(sent) == pressed


def test_keys_come_at_once_and_the_terminal_is_as_before() -> None:
    """No Enter is needed, nothing is echoed; afterwards both are as they were, whatever happened."""
    theirs, ours = pty.openpty()
    before = termios.tcgetattr(ours)
    with suppress(RuntimeError), Keyboard(ours) as board:
        assert board.pressed() == []
        os.write(theirs, "oé".encode()[:2])
        assert board.pressed(5) == ["o"]
        os.write(theirs, "é".encode()[1:])
        assert board.pressed(5) == ["é"]
        assert not termios.tcgetattr(ours)[3] & (termios.ECHO | termios.ICANON)
        assert termios.tcgetattr(ours)[3] & termios.ISIG
        raise RuntimeError("a fault")
    assert termios.tcgetattr(ours) == before
    with Keyboard(ours) as board:
        os.close(theirs)
        assert board.pressed(5) == [keyboard.GONE]
    os.close(ours)


def test_without_a_terminal_no_key_is_pressed() -> None:
    """As when standard input is a pipe."""
    with Keyboard(None) as board:
        assert board.pressed() == []
