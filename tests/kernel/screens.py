"""What a person sees: the real command in a real terminal, by tmux, and a slow link that loses packets to look at."""

import queue
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.kernel import hosts
from tests.kernel.harness import TRAFFIC, wait_for

NETWORK, CLIENT, SERVER = "10.198.0.0/24", "10.198.0.1", "10.198.0.2"
SMALL_PACKET = 200  # bytes: what is no larger carries no data here, and is not lost


class Terminal:
    """A terminal of so many columns and lines with a shell in it, as a context manager."""

    def __init__(self, columns: int, lines: int) -> None:
        self._size = ("-x", str(columns), "-y", str(lines))
        self._server = f"tcpio-test-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> Self:
        shell = "env -u BASH_ENV PS1='ready> ' bash --norc --noprofile"
        self._tmux("-f", "/dev/null", "new-session", "-d", *self._size, "-c", str(Path(__file__).parents[2]), shell)
        self.wait("ready>")
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def _tmux(self, *command: str) -> str:
        done = subprocess.run(["tmux", "-L", self._server, *command], check=True, capture_output=True, text=True)
        return done.stdout

    def screen(self, *, styled: bool = False) -> str:
        """What is seen now; with the sequences that make its colours, if they are wanted."""
        return self._tmux("capture-pane", "-p", *(["-e"] if styled else []))

    def lines(self) -> list[str]:
        """The same, line by line."""
        return self.screen().splitlines()

    def press(self, *keys: str) -> None:
        """Press keys; names are tmux's, such as Enter and C-c."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text and Enter."""
        self._tmux("send-keys", "-l", text)
        self.press("Enter")

    def resize(self, columns: int, lines: int) -> None:
        """Give it another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def state(self) -> tuple[str, str]:
        """Whether the other screen is shown, and whether the cursor is: "1" or "0" each."""
        alternate, cursor = self._tmux("display-message", "-p", "#{alternate_on} #{cursor_flag}").split()
        return alternate, cursor

    def wait(self, pattern: str, timeout_s: float = 60) -> re.Match[str]:
        """Wait until a pattern is seen."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found.extend(re.finditer(pattern, self.screen(), re.M))
            return bool(found)

        try:
            wait_for(seen, f"{pattern!r} on the screen", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.screen()}") from None
        return found[0]

    def child(self) -> int:
        """The process that the shell runs."""
        shell = self._tmux("display-message", "-p", "#{pane_pid}").strip()
        (child,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        return int(child)


class Slow:
    """A policy of a relay: every packet comes later, and one in so many of those with data to the server never."""

    def __init__(self, delay_s: float, lost_in: int) -> None:
        self._delay_s, self._lost_in, self._carrying = delay_s, lost_in, 0
        self._queue: queue.SimpleQueue[tuple[float, hosts.Direction, bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slow link")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def __call__(self, packet: bytes, way: hosts.Direction) -> list[bytes]:
        """Nothing at once."""
        if way.name == "to_server" and len(packet) > SMALL_PACKET:
            self._carrying += 1
            if self._carrying % self._lost_in == 0:
                return []
        self._queue.put((time.monotonic() + self._delay_s, way, packet))
        return []

    def _run(self) -> None:
        while (due := self._queue.get()) is not None:
            when, way, packet = due
            time.sleep(max(0.0, when - time.monotonic()))
            way.deliver(packet)


@dataclass(frozen=True)
class Link:
    """Two hosts with a slow link between them."""

    client: hosts.Host
    server: hosts.Host

    def start(self, where: hosts.Host, program: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start a program of programs.py there; it ends with its standard input."""
        command = ["ip", "netns", "exec", where.name, sys.executable, str(TRAFFIC), program, *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def link(delay_s: float, lost_in: int) -> Iterator[Link]:
    """Two hosts, and a link that takes so long in each direction and loses one in so many packets of the client's."""
    name = f"tcpio-test-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        client, server = (stack.enter_context(hosts.host(f"{name}-{end}")) for end in "cs")
        relay = stack.enter_context(hosts.Relay(client, server))
        for host, address in ((client, CLIENT), (server, SERVER)):
            hosts.add_address(host, "tun0", f"{address}/24")
        stack.enter_context(relay.policy(stack.enter_context(Slow(delay_s, lost_in))))
        yield Link(client, server)
