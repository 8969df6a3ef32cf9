"""`tcpio-otel top` as a person sees it: in a terminal, with keys, on connections that the test makes."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tcpio_otel.capture.loaders import Loader
from tests.kernel import capture as recording
from tests.kernel.harness import AGENT, agent, wait_for
from tests.kernel.hosts import KERNEL, Host
from tests.kernel.screens import CLIENT, NETWORK, SERVER, Link, Terminal, link

NAME = Path(sys.executable).resolve().name
DELAY_S = 0.03  # each way
LOST_IN = 25
BYTES_S = 100_000
SINK, RESETTER, BACK = 9000, 9001, 9002

ASKED = KERNEL >= (5, 19)
"""Whether the kernel tells of its sockets whoever has no privilege."""

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")


@dataclass(frozen=True)
class Scene:
    """A slow link, who sends over it all the time, who sends the other way, and one who resets whoever comes."""

    link: Link
    pourer: "subprocess.Popen[str]"
    back: "subprocess.Popen[str]"

    def pid(self) -> int:
        """Of who sends: `ip netns exec` has become it."""
        return self.pourer.pid

    def asks(self, port: int) -> None:
        """A client connects, asks, and is disappointed."""
        with self.link.start(self.link.client, "ask", SERVER, str(port)) as asking:
            asking.communicate()


def by_ss(host: Host, port: int) -> tuple[float, int] | None:
    """Smoothed round-trip time in ms, and retransmits, of the connection to a port, by ss(8); None: there is none."""
    said = host.run("ss", "-tin", f"dport = :{port}")
    found = re.search(r"\srtt:([\d.]+)/", said)
    return (float(found[1]), int((re.findall(r"retrans:\d+/(\d+)", said) or ["0"])[0])) if found else None


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """The same for all: it takes a while until something has been lost."""
    with ExitStack() as stack:
        made = stack.enter_context(link(DELAY_S, LOST_IN))
        for program, where, address, port in (
            ("sink", made.server, SERVER, SINK),
            ("resetter", made.server, SERVER, RESETTER),
            ("sink", made.client, CLIENT, BACK),
        ):
            running = stack.enter_context(made.start(where, program, address, str(port)))
            assert running.stdout is not None
            assert running.stdout.readline() == "open\n"
            stack.callback(running.communicate)
        pourer = stack.enter_context(made.start(made.client, "pour", SERVER, str(SINK), str(BYTES_S)))
        stack.callback(pourer.communicate)
        back = stack.enter_context(made.start(made.server, "pour", CLIENT, str(BACK), "5000"))
        stack.callback(back.communicate)
        wait_for(lambda: by_ss(made.client, SINK) and by_ss(made.server, BACK), "both connections")
        yield Scene(made, pourer, back)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Large enough for every column."""
    with Terminal(140, 40) as made:
        yield made


def number(text: str) -> float:
    """What a short number stands for."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)


def start(terminal: Terminal, *arguments: str) -> None:
    """Start it, for the link alone, and wait until it shows something."""
    terminal.type(" ".join([*AGENT, "top", "--cidr", NETWORK, *arguments]))
    terminal.wait(r"^q quit")


def stopped(terminal: Terminal) -> None:
    """The terminal is as it was, with the ledger on it, and the shell takes what is typed."""
    terminal.wait(r"seen \d+ = exported \d+ \+ filtered")
    terminal.wait(r"ready> \Z|ready> *\n*\Z")
    assert "UNACCOUNTED" not in terminal.screen()
    assert terminal.state() == ("0", "1")
    terminal.type("stty -a")
    terminal.wait(r" icanon ")
    assert re.search(r" echo ", terminal.screen())


def row_of(terminal: Terminal, pattern: str) -> list[str]:
    """The fields of the first line that a pattern matches."""
    return terminal.wait(rf"^.*{pattern}.*$").group().split()


def test_it_says_which_connection_and_whether_it_was_the_network(terminal: Terminal, scene: Scene) -> None:
    """Process, ends, rates, round-trip time and retransmits of the one on the slow link; who was reset and refused."""
    start(terminal)
    for port in (RESETTER, 9):
        scene.asks(port)
    time.sleep(3)
    process, local, arrow, peer, out_rate, in_rate, moved, rtt_ms, retransmits, _, age, state = row_of(
        terminal, rf"-> {SERVER}:{SINK}"
    )
    assert process == f"{NAME}/{scene.pid()}"
    assert re.fullmatch(rf"{CLIENT}:\d+", local)
    assert (arrow, peer, in_rate, state) == ("->", f"{SERVER}:{SINK}", "0", "estab")
    assert BYTES_S / 2 < number(out_rate) < BYTES_S * 2
    assert number(moved) > BYTES_S
    if ASKED:
        assert 2 * DELAY_S * 1e3 <= float(rtt_ms) < 10 * DELAY_S * 1e3
    else:
        assert rtt_ms == "-"
    assert number(retransmits) > 0
    assert age.startswith(">")
    terminal.wait(rf"{NAME}/\d+ +{CLIENT}:\d+ -> {SERVER}:{RESETTER} .*reset/peer")
    terminal.wait(rf"{SERVER}:{RESETTER} <- {CLIENT}:\d+ .*reset/local")
    terminal.wait(rf"-> {SERVER}:9 .*refused/peer")
    head = terminal.wait(r"^(\S+ k?) ?packets/s  (\S+ k?B)/s  (\d+) connections")
    assert int(head[3]) >= 2
    wait_for(lambda: "refused" not in terminal.screen(), "what has ended to fade")
    terminal.press("q")
    stopped(terminal)


def test_the_rates_are_what_the_program_says(tmp_path: Path, scene: Scene) -> None:
    """Over some seconds, within what loss and waiting make of them; without a terminal it is one table, and no more."""
    with scene.link.start(scene.link.client, "pour", SERVER, str(SINK), "40000") as pourer:
        time.sleep(1)
        done = subprocess.run(
            [*AGENT, "top", "--duration", "4s", "--filter", f"/{pourer.pid}"],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        told = json.loads(pourer.communicate()[0])
    heading, row = done.stdout.splitlines()
    found = dict(zip(heading.split(), row.split(), strict=True))
    assert float(found["OUT_BYTES/S"]) == pytest.approx(told["sent"] / told["seconds"], rel=0.25)
    assert 0 < int(found["BYTES"]) <= told["sent"]
    assert (found["DIRECTION"], found["STATE"], found["PEER"]) == ("->", "estab", f"{SERVER}:{SINK}")
    assert " = exported " in done.stderr


@pytest.mark.skipif(not ASKED, reason="before 5.19 nobody without privileges may ask the kernel about its sockets")
def test_round_trip_times_are_those_of_ss(tmp_path: Path, scene: Scene) -> None:
    """Of connections that are open, while they are, the kernel's own; and so are their retransmits.

    The one that nothing is lost of has the link's, about.
    """
    for end, port, process in ((scene.link.client, SINK, scene.pourer), (scene.link.server, BACK, scene.back)):
        before, retransmits = by_ss(end, port)
        command = [*AGENT, "top", "--once", "--interval", "200ms", "--filter", f"/{process.pid}"]
        times_ms = [before]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as running:
            while running.poll() is None:
                times_ms.append(by_ss(end, port)[0])
            assert running.stdout is not None
            found = dict(zip(*(line.split() for line in running.stdout), strict=True))
        assert 0.9 * min(times_ms) <= float(found["RTT_MS"]) <= 1.1 * max(times_ms)
        assert retransmits <= int(found["RETRANSMITS"]) <= by_ss(end, port)[1]
    assert 2 * DELAY_S * 1e3 <= float(found["RTT_MS"]) < 4 * DELAY_S * 1e3


def test_keys(terminal: Terminal, scene: Scene) -> None:
    """Sort, the other way round, workloads, filter, pause, help, scroll, quit."""
    start(terminal, "--interval", "500ms", "--filter", f":{SINK}")
    terminal.wait(r"connections by out  with ':9000'")
    sender, receiver = rf"-> {SERVER}:{SINK}", rf"{SERVER}:{SINK} <-"

    def first() -> str:
        terminal.wait(r"^PROCESS")
        lines = terminal.lines()
        return lines[next(place for place, line in enumerate(lines) if line.startswith("PROCESS")) + 1]

    wait_for(lambda: re.search(sender, first()), "the sender first")
    terminal.press("i")
    terminal.wait("connections by in")
    wait_for(lambda: re.search(receiver, first()), "the receiver first")
    terminal.press("i")
    terminal.wait("by in reversed")
    wait_for(lambda: re.search(sender, first()), "the sender first again")
    for key, order in (("b", "bytes"), ("r", "rtt"), ("t", "retransmits"), ("T", "retransmit-rate"), ("a", "age"),
                       ("e", "state"), ("o", "out")):  # fmt: skip
        terminal.press(key)
        terminal.wait(rf"connections by {order}\s")
    terminal.press("Down")
    wait_for(lambda: re.search(receiver, first()), "the first row to scroll away")
    terminal.press("Home")
    wait_for(lambda: re.search(sender, first()), "it to come back")
    terminal.press("p")
    terminal.wait("^paused")
    time.sleep(1)
    stood_still = terminal.screen()
    time.sleep(2)
    assert terminal.screen() == stood_still
    terminal.press("Space")
    wait_for(lambda: "paused" not in terminal.screen(), "it to go on")
    wait_for(lambda: terminal.screen() != stood_still, "other figures")
    terminal.press("?")
    terminal.wait("pause: the figures stand still")
    terminal.press("?")
    terminal.wait("^PROCESS")
    terminal.press("Escape")
    wait_for(lambda: "with" not in terminal.screen(), "the filter to go")
    terminal.press("/", "n", "o", "t", "x", "BSpace", "h")
    terminal.wait("^/noth")
    wait_for(lambda: f"{SERVER}:{SINK}" not in terminal.screen(), "all rows to go")
    terminal.press("Enter")
    terminal.wait("with 'noth'")
    terminal.press("q")
    stopped(terminal)


def test_workloads(terminal: Terminal, scene: Scene) -> None:
    """One row for each program, with its resets and failed connects, which do not fade."""
    start(terminal)
    for port in (RESETTER, 9):
        scene.asks(port)
    terminal.press("w")
    heading = terminal.wait(r"^WORKLOAD.*$").group().split()
    wait_for(lambda: row_of(terminal, NAME)[-1] == "1", "the failed connect")
    row = dict(zip(heading, row_of(terminal, NAME), strict=True))
    assert (int(row["RST"]), int(row["FAIL"])) == (2, 1)
    assert int(row["CONN"]) >= 2
    wait_for(lambda: number(row_of(terminal, NAME)[heading.index("OUT/s")]) > BYTES_S / 2, "its rate")
    terminal.press("w")
    terminal.wait("^PROCESS")
    terminal.press("q")
    stopped(terminal)


def test_any_width_will_do(terminal: Terminal, scene: Scene) -> None:
    """Resized while it runs: nothing wraps, columns go by rank, and come back."""
    start(terminal, "--filter", f":{SINK}")
    terminal.wait(r"RETR/s")
    for columns, titles in (
        (40, "PEER OUT/s IN/s RETR STATE"),
        (80, "PROCESS LOCAL PEER OUT/s IN/s RTT ms RETR STATE"),
    ):
        terminal.resize(columns, 12)
        terminal.wait(rf"^ *{' +'.join(titles.split())}\s*$")
        wait_for(lambda: len([line for line in terminal.lines() if f":{SINK}" in line]) >= 2, "the rows")
        shown = terminal.lines()
        assert len(shown) == 12
        assert max(len(line) for line in shown) <= columns
        assert shown[1].startswith("connections by out")
        assert shown[-1].startswith("q quit")
    terminal.resize(40, 3)
    terminal.wait(r"packets/s")
    terminal.resize(140, 40)
    terminal.wait(r"RETR/s")
    terminal.press("q")
    stopped(terminal)


@pytest.mark.parametrize("by", ["SIGTERM", "Ctrl-C", "duration"])
def test_the_terminal_is_restored(terminal: Terminal, by: str) -> None:
    """However it is stopped, with the ledger printed and exit code 0."""
    start(terminal, *(["--duration", "4s"] if by == "duration" else []))
    assert terminal.state() == ("1", "0")
    if by == "SIGTERM":
        subprocess.run(["kill", "-TERM", str(terminal.child())], check=True)
    elif by == "Ctrl-C":
        terminal.press("C-c")
    stopped(terminal)
    terminal.type("clear; echo code $?")
    terminal.wait("^code 0")


def test_the_terminal_is_restored_after_a_fault(terminal: Terminal) -> None:
    """What went wrong is then readable."""
    fault = "from tcpio_otel import cli, top; del top._Screen._rows; cli.main(['top'])"
    terminal.type(f'{sys.executable} -c "{fault}"')
    terminal.wait("AttributeError: '_Screen' object has no attribute '_rows'")
    assert terminal.state() == ("0", "1")
    terminal.type("stty -a")
    terminal.wait(r" icanon ")


def test_it_can_be_put_aside(terminal: Terminal, scene: Scene) -> None:
    """Ctrl-Z gives the terminal back, `fg` takes it again."""
    start(terminal)
    terminal.press("C-z")
    terminal.wait("Stopped")
    assert terminal.state() == ("0", "1")
    terminal.type("fg")
    wait_for(lambda: terminal.state() == ("1", "0"), "the screen")
    terminal.wait(f"{SERVER}:{SINK}")
    terminal.press("q")
    stopped(terminal)


def test_by_bcc_packets_tell(terminal: Terminal, scene: Scene, lacks_bcc: str) -> None:
    """Rates and retransmits; of round-trip times nobody knows, and the log says why."""
    if lacks_bcc:
        pytest.skip(lacks_bcc)
    start(terminal, "--loader", Loader.BCC, "--filter", f":{SINK}", "--sort", "retransmits")
    terminal.wait("a probe by BCC has")

    def told() -> bool:
        row = row_of(terminal, rf"{SERVER}:{SINK} +\d")
        return BYTES_S / 2 < number(row[-8]) < BYTES_S * 2 and number(row[-4]) > 0

    wait_for(told, "rate and retransmits")
    assert row_of(terminal, rf"{SERVER}:{SINK} +\d")[-5] == "-"
    terminal.press("q")
    stopped(terminal)
    terminal.wait("WARNING totals and round-trip times of open connections are not the kernel's")


def test_a_capture_is_shown_as_of_its_end(terminal: Terminal, scene: Scene, tmp_path: Path) -> None:
    """In a terminal until it was seen, with what had ended by then; rates are those of the whole capture."""
    capture = tmp_path / "link.pcap"
    with recording.tcpdump(scene.link.client, capture):
        scene.asks(RESETTER)
        time.sleep(3)
    start(terminal, "--source", f"pcap:{capture}")
    row = row_of(terminal, rf"{SERVER}:{SINK} +\d")
    assert BYTES_S / 2 < number(row[row.index(f"{SERVER}:{SINK}") + 1]) < BYTES_S * 2
    assert row_of(terminal, rf"{SERVER}:{RESETTER}")[-1] == "reset/peer"
    time.sleep(12)
    assert "reset/peer" in terminal.screen()
    terminal.press("q")
    stopped(terminal)


def test_the_kernel_is_asked_without_privileges(tmp_path: Path) -> None:
    """About its sockets, by threads that have given up every capability; one that refuses, before 5.19, is told of."""
    with agent(tmp_path, "top", "--once", "--duration", "3s") as running:
        time.sleep(1)
        for thread in Path(f"/proc/{running.pid}/task").iterdir():
            assert "CapEff:\t0000000000000000" in (thread / "status").read_text()
        wait_for(lambda: running.process.poll() is not None, "its end")
    assert running.process.returncode == 0
    assert running.stdout().startswith("PROCESS")
    assert ("totals and round-trip times of open connections are not the kernel's" in running.stderr()) is not ASKED
