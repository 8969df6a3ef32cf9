"""A live view of this host's connections on a terminal, or one plain table: which of them is it, and is it the network?

As in `agent`, what runs with privileges comes first; imports of everything else stand in the functions that follow.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from socket import socket
from typing import TYPE_CHECKING, Any, Self

from tcpio_otel.agent import IDLE_S, Stop, attribution, batches, connection_table, listen_to_nat, opened, printing
from tcpio_otel.clock import boot_ns
from tcpio_otel.config import Config
from tcpio_otel.errors import EnvironmentFault, InputError, UsageError
from tcpio_otel.keyboard import BACKSPACE, DOWN, ENTER, ESCAPE, GONE, HOME, PAGE_DOWN, PAGE_UP, UP, Keyboard
from tcpio_otel.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from tcpio_otel.attribution.peers import Peers
    from tcpio_otel.attribution.workloads import Workloads
    from tcpio_otel.batch import Batch
    from tcpio_otel.board import Board, Choice, Totals
    from tcpio_otel.connections.table import ConnectionTable
    from tcpio_otel.pipeline import Source

logger = logging.getLogger(__name__)

KEY_S = 0.05
"""How long a key may wait."""

LOOK_SHARE = 20
"""Asking the kernel about its sockets takes at most one part in so many of the time."""

NOTES_LIMIT = 100
"""How much of what is logged meanwhile is kept to be said afterwards."""

_OTHER_LINES = 4  # than rows: two above, the heading, one below


def top(config: Config, *, interval_s: float, once: bool, sort: str, by_workload: bool, text: str) -> int:
    """Show connections until stopped, or once; returns the exit code.

    Args:
        config: what to capture.
        interval_s: time between two refreshes; of what is shown once, the time that it covers, if no duration is set.
        once: print one plain table, as is done where standard output is no terminal.
        sort: what rows are sorted by, as `board.Sort` has it.
        by_workload: a row for each workload, not for each connection.
        text: only rows that hold it.

    Raises:
        TcpioError: what stands in the way; also when standard output cannot be written.
    """
    if sys.stdout is None:
        raise UsageError("top prints to standard output, which is closed")
    # A terminal without a cursor, such as that of an editor, is a file to us.
    live = not once and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    once = not live and config.capture_file is None
    ledger, stop = Ledger(), Stop(None if once else config.duration)
    heard: list[socket] = []
    with (
        stop.on_signals(),
        opened(config, ledger, lambda: heard.extend(listen_to_nat(config)), idle_s=KEY_S if live else IDLE_S) as (
            source,
            vocabulary,
        ),
        ExitStack() as stack,
    ):
        from tcpio_otel.board import FADE_NS, Choice, Sort
        from tcpio_otel.summary import ledger_line

        table = connection_table(config, vocabulary, source, summary_interval_s=0)
        fade_ns = FADE_NS if live and not source.paced else None
        stages = _Stages(source, ledger, table, *attribution(config, heard, stack), fade_ns)
        choice = Choice(Sort(sort), text=text, by_workload=by_workload)
        printed = False
        with printing(sys.stdout):
            if live:
                with _Screen(stages, ledger, choice, int(interval_s * 1e9), stop) as screen:
                    fault = _show(source, stages, screen, stop)
            else:
                begin = _window(stages, config, interval_s, stop) if once else _nothing
                fault = stages.read(batches(source, stop), begin)
                stages.refresh()
                sys.stdout.write(_plain(stages.board, choice))
                sys.stdout.flush()
            printed = True
        if not printed:
            return 0
        stages.read(source.finish())
        logger.info("%s", ledger_line(ledger.balance()))
    if fault:
        raise fault
    return 0


def _nothing() -> None:
    """What is done between batches where nothing is."""


def _window(stages: _Stages, config: Config, interval_s: float, stop: Stop) -> Callable[[], None]:
    """What to call after each batch so that rates are of the wanted time, however long loading took before it."""
    begun = False

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            stages.refresh()
            stop.within(interval_s if config.duration is None else config.duration)

    return begin


def _show(source: Source, stages: _Stages, screen: _Screen, stop: Stop) -> InputError | None:
    """Show what a source yields while it does; of a file, what it has come to, until that was seen."""
    if not source.paced:
        return stages.read(batches(source, stop), screen.step)
    fault = stages.read(batches(source, stop))
    while not stop():
        screen.step(IDLE_S)
    return fault


def _plain(board: Board, choice: Choice) -> str:
    """All rows as a plain table."""
    from tcpio_otel.listing import CONNECTIONS, WORKLOADS, plain

    if choice.by_workload:
        return plain(WORKLOADS, board.groups(choice))
    everything = sys.maxsize
    return plain(CONNECTIONS, [*board.connections(choice, 0, everything), *board.ended(choice, everything)])


class _Stages:
    """What batches go through on their way to a board, and what the kernel says of its sockets in between."""

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        table: ConnectionTable,
        workloads: Workloads | None,
        peers: Peers | None,
        fade_ns: int | None,
    ) -> None:
        from tcpio_otel.board import Board
        from tcpio_otel.connections.rates import Rates

        self._source, self._ledger, self._table = source, ledger, table
        self._workloads, self._peers = workloads, peers
        self._rates, self._now_ns = Rates(table), 0
        self.board = Board(table, self._rates, workloads, peers, fade_ns)
        self._look_due_ns: float = 0

    def read(self, found: Iterable[Batch], between: Callable[[], None] = _nothing) -> InputError | None:
        """Take in what comes; returns what ended it, if something did: what came before it is worth showing."""
        try:
            for batch in found:
                self._take(batch)
                between()
        except InputError as fault:
            if not self._now_ns:
                raise
            return fault
        return None

    def _take(self, batch: Batch) -> None:
        table = self._table
        slots, ended = table.update(batch)
        if self._workloads:
            self._workloads.assign(batch, table.flows, table.owned)
        if self._peers:
            self._peers.assign(batch, table.flows, slots, table.births, table.renew)
        self.board.take(batch, slots, ended)
        self._now_ns = batch.now_ns
        self._ledger.exported(len(slots))

    def refresh(self) -> Totals:
        """Have the board as of the last batch."""
        if (now_ns := boot_ns()) >= self._look_due_ns:
            try:
                self._rates.look(self._source.look())
            except EnvironmentFault as fault:
                logger.warning("totals and round-trip times of open connections are not the kernel's: %s", fault)
                self._look_due_ns = math.inf
            else:
                self._look_due_ns = now_ns + LOOK_SHARE * (boot_ns() - now_ns)
        return self.board.refresh(self._now_ns)


class _Notes(logging.Handler):
    """What is logged while the screen is ours: kept, and said afterwards to those who would have said it."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[logging.LogRecord] = deque(maxlen=NOTES_LIMIT)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._kept.append(record)
        if record.levelno >= logging.WARNING:
            self.last = record.getMessage()

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Stand in for the handlers of the root logger."""
        root = logging.getLogger()
        handlers, root.handlers = root.handlers, [self]
        try:
            yield
        finally:
            root.handlers = handlers
            for record in self._kept:
                root.handle(record)


class _Screen:
    """A terminal that shows a board and obeys keys, as a context manager that leaves it as it was."""

    def __init__(self, stages: _Stages, ledger: Ledger, choice: Choice, interval_ns: int, stop: Stop) -> None:
        from tcpio_otel.board import Totals

        self._stages, self._ledger, self._choice, self._stop = stages, ledger, choice, stop
        self._interval_ns, self._due_ns = interval_ns, 0
        self._first, self._shown = 0, 1  # of the rows that there are, and how many of them
        self._paused = self._helped = False
        self._typed: str | None = None  # while a filter is
        self._suspended = False
        self._totals = Totals()
        self._size = (0, 0)
        self._notes = _Notes()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._notes.instead())
            before = signal.signal(signal.SIGTSTP, self._suspend)
            stack.callback(signal.signal, signal.SIGTSTP, before)
            self._terminal = stack.enter_context(ExitStack())
            self._take_terminal()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _take_terminal(self) -> None:
        from rich.console import Console
        from rich.live import Live

        has_keys = sys.stdin is not None and sys.stdin.isatty()
        self._keyboard = self._terminal.enter_context(Keyboard(sys.stdin.fileno() if has_keys else None))
        # COLUMNS and LINES would say for good how large the terminal once was.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._console = Console(file=sys.stdout, _environ=environment)
        self._live = self._terminal.enter_context(
            Live(console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        )

    def _suspend(self, number: int, frame: object) -> None:
        del number, frame
        self._suspended = True

    def step(self, timeout_s: float = 0) -> None:
        """Do what keys say, have the figures renewed when it is time, and show what has changed."""
        if self._suspended:
            self._terminal.close()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._suspended, self._size = False, (0, 0)
            self._take_terminal()
        pressed = self._keyboard.pressed(timeout_s)
        for key in pressed:
            self._obey(key)
        now_ns = boot_ns()
        due = now_ns >= self._due_ns and not self._paused
        if due:
            self._totals, self._due_ns = self._stages.refresh(), now_ns + self._interval_ns
        size = self._console.size
        if due or pressed or size != self._size:
            self._size = size
            self._live.update(self._page(*size), refresh=True)

    # Keys.

    def _obey(self, key: str) -> None:
        if key == GONE:
            self._stop.ask()
        elif self._typed is not None:
            self._type(key)
        elif key == "q":
            self._stop.ask()
        elif key in ("?", "h"):
            self._helped = not self._helped
        elif key in ("p", " "):
            self._paused = not self._paused
        elif key == "w":
            self._choose(by_workload=not self._choice.by_workload)
        elif key == "/":
            self._typed = self._choice.text
        elif key == ESCAPE:
            self._helped = False
            self._choose(text="")
        else:
            self._sort_or_scroll(key)

    def _sort_or_scroll(self, key: str) -> None:
        from tcpio_otel.listing import SORT_KEYS

        steps = {UP: -1, DOWN: 1, PAGE_UP: -self._shown, PAGE_DOWN: self._shown, HOME: -self._first}
        if key in steps:
            last = max(0, self._totals.connections - 1)
            self._first = min(max(0, self._first + steps[key]), last)
        elif (sort := SORT_KEYS.get(key)) is not None:
            again = sort is self._choice.sort
            self._choose(sort=sort, reverse=again and not self._choice.reverse)

    def _type(self, key: str) -> None:
        if key == ENTER:
            self._typed = None
            return
        if key == ESCAPE:
            self._typed, text = None, ""
        elif key == BACKSPACE:
            text = self._typed = (self._typed or "")[:-1]
        elif len(key) == 1 and key.isprintable():
            text = self._typed = (self._typed or "") + key
        else:
            return
        self._choose(text=text)

    def _choose(self, **changed: Any) -> None:
        self._choice, self._first = dataclasses.replace(self._choice, **changed), 0

    # What is shown.

    def _page(self, width: int, height: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from tcpio_otel import listing

        if self._helped:
            return Group(*listing.help_lines(width)[:height])
        rows = self._rows(width, max(1, height - _OTHER_LINES))
        rows += [Text()] * (height - _OTHER_LINES + 1 - len(rows))
        last = listing.foot(width) if self._typed is None else listing.prompt(self._typed, width)
        head = listing.head(self._totals, self._ledger.balance(), width)
        status = listing.status(self._choice, self._notes.last, width, paused=self._paused)
        return Group(*[head, status, *rows[: max(0, height - _OTHER_LINES + 1)], last][:height])

    def _rows(self, width: int, room: int) -> list[Text]:
        """The heading and as many rows as there is room for; what has ended gets what is left of that, or a third."""
        from tcpio_otel.listing import CONNECTIONS, WORKLOADS, lines

        board, choice = self._stages.board, self._choice
        if choice.by_workload:
            groups = board.groups(choice)[self._first :][:room]
            self._shown = max(1, len(groups))
            return lines(WORKLOADS, groups, choice, width)
        rows, ended = board.connections(choice, self._first, room), board.ended(choice, room)
        ended = ended[: max(room - len(rows), room // 3)]
        rows = rows[: room - len(ended)]
        self._shown = max(1, len(rows))
        return lines(CONNECTIONS, [*rows, *ended], choice, width)
