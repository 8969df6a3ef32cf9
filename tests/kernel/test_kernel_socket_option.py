"""The program that runs at every setsockopt of the host: it takes tags, and nothing else is any different."""

import ctypes
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tcpio_otel.capture.control import ContextSources, Filters
from tcpio_otel.capture.libbpf import INSTRUCTION, Library
from tcpio_otel.capture.loaders import Loader
from tcpio_otel.capture.probe import Probe, cgroup_root
from tests.kernel import hosts
from tests.kernel.harness import AGENT, Agent, Namespace, agent, attached, logs, segments, spans, wait_for
from tests.kernel.tagging import IDLE_TAGS, LEVEL, OTHER, REFUSED, TAKEN, connection, give

TAGGING = Path(__file__).with_name("tagging.py")
WALK = Path(__file__).with_name("option_walk.c")
Result = TypeVar("Result")


@contextmanager
def attached_agent(directory: Path) -> Iterator[Agent]:
    """An agent by libbpf, whose program is the one to test."""
    with agent(
        directory, "run", "--otlp-file", str(directory / "data"),
        TCPIO_CAPTURE_LOADER="libbpf", TCPIO_FILE_ROTATE="1GiB",
    ) as running:  # fmt: skip
        assert "attached at option" in running.stderr()
        yield running


@contextmanager
def attached_probe() -> Iterator[None]:
    """An agent's programs without an agent behind them, for what no record comes of."""
    with Probe(
        filters=Filters(ports=[(1, 1)]), memory_bytes=1 << 20, loader=Loader.LIBBPF,
        contexts=ContextSources(socket_tags=True, http_headers=True),
    ) as probe:  # fmt: skip
        assert "option" in probe.hooks()
        yield


def without_agent(measure: Callable[[], Result]) -> Result:
    """What is measured while no agent is attached, another's neither: one that comes in between spoils it."""
    for _ in range(3):
        with suppress(AssertionError):
            wait_for(lambda: not attached(), "agents to end")
        before = attached()
        result = measure()
        if not before and not attached():
            return result
    pytest.skip("other agents are at work on this host")


def alone(running: Agent) -> None:
    """Leave off where another agent is attached as well: what one refuses, another may take."""
    (hooks,) = re.findall(r"attached at (.*)", running.stderr())
    if attached() > len(hooks.split(", ")):
        pytest.skip("other agents are at work on this host")


def tagging(namespace: Namespace, *arguments: str) -> dict[str, Any]:
    """What a program of tagging.py prints."""
    answers: dict[str, Any] = json.loads(namespace.run(sys.executable, str(TAGGING), *arguments).stdout)
    return answers


# Options that are longer than a page.

TABLES = {"iptables-legacy": "10.{}.{}.{}/32", "ip6tables-legacy": "fd00:a:b:c:d:1{:x}:1{:x}:1{:x}/128"}
RULES = (0, 1, 20, 30, 300, 15_000)
"""Below a page, about one, and far beyond."""


def _rules(address: str, count: int) -> str:
    lines = [
        f"[{number}:{60 * number}] -A FORWARD -s {address.format(number >> 14, number >> 7 & 127, number & 127)}"
        f" -p tcp -m tcp --dport {number % 60_000 + 1} -j DROP"
        for number in range(count)
    ]
    chains = [f":{chain} ACCEPT [3:180]" for chain in ("INPUT", "FORWARD", "OUTPUT")]
    return "\n".join(["*filter", *chains, *lines, "COMMIT", ""])


def _restored(namespace: Namespace, table: str, rules: str) -> str:
    """Have rules in force, and say which are, with counters."""
    namespace.run(f"{table}-restore", "-c", input=rules)
    saved = namespace.run(f"{table}-save", "-c", "-t", "filter").stdout
    return "".join(line for line in saved.splitlines(keepends=True) if not line.startswith("#"))


@pytest.mark.parametrize("table", TABLES, ids=[f"libbpf-{table}" for table in TABLES])
def test_tables_of_thousands_of_rules_arrive_whole(namespace: Namespace, table: str) -> None:
    """Replaced tables, of any size, are in force to the last rule and counter, as without the agent."""
    if not shutil.which(f"{table}-restore"):
        pytest.skip(f"{table} is not installed")
    try:
        namespace.run(table, "-t", "filter", "-S")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{table} does not work here: {error.stderr.strip()}")
    wanted = [_rules(TABLES[table], count) for count in (*RULES, *RULES[::-1])]
    assert without_agent(lambda: [_restored(namespace, table, rules) for rules in wanted]) == wanted
    with attached_probe():
        assert [_restored(namespace, table, rules) for rules in wanted] == wanted


# Other programs of the kind.

CGROUP_SOCKOPT, SETSOCKOPT = 25, 22
LOAD_WORD, LOAD_POINTER, STORE_CONSTANT, STORE_WORD = 0x61, 0x79, 0x62, 0x63
MOVE_CONSTANT, MOVE, ADD, EXIT = 0xB7, 0xBF, 0x07, 0x95
UNLESS_EQUAL, IF_ABOVE, IF_AT_MOST = 0x55, 0x2D, 0xD6
VALUE, VALUE_END, OPTION_LEVEL, OPTION_NAME, OPTION_LENGTH = 8, 16, 24, 28, 32
"""Offsets in `struct bpf_sockopt`."""

Instruction = tuple[int, int, int, int]
REFUSE = [(MOVE_CONSTANT, 0, 0, 0), (EXIT, 0, 0, 0)]


def _set_length(length: int) -> list[Instruction]:
    return [(MOVE_CONSTANT, 2, 0, length), (STORE_WORD, 1 | 2 << 4, OPTION_LENGTH, 0)]


ACCEPT = _set_length(-1)
"""The kernel's own code does not see the option."""


def rewrite(value: int) -> list[Instruction]:
    """Four bytes in the place of the option's value."""
    body = [(STORE_CONSTANT, 3, 0, value), *_set_length(4)]
    return [
        (LOAD_POINTER, 3 | 1 << 4, VALUE, 0), (LOAD_POINTER, 4 | 1 << 4, VALUE_END, 0), (MOVE, 5 | 3 << 4, 0, 0),
        (ADD, 5, 0, 4), (IF_ABOVE, 5 | 4 << 4, len(body), 0), *body,
    ]  # fmt: skip


def on(level: int, name: int, do: list[Instruction]) -> list[Instruction]:
    """Do it to one option."""
    return [
        (LOAD_WORD, 2 | 1 << 4, OPTION_LEVEL, 0), (UNLESS_EQUAL, 2, len(do) + 2, level),
        (LOAD_WORD, 2 | 1 << 4, OPTION_NAME, 0), (UNLESS_EQUAL, 2, len(do), name), *do,
    ]  # fmt: skip


LEAVE = [
    (LOAD_WORD, 2 | 1 << 4, OPTION_LENGTH, 0), (IF_AT_MOST, 2, 2, 4096), *_set_length(0),
    (MOVE_CONSTANT, 0, 0, 1), (EXIT, 0, 0, 0),
]  # fmt: skip
"""How every such program ends: let pass, and what is longer than a page as it is."""

RECEIVE_BUFFER, REWRITTEN_BUFFER = 50_000, 70_000
MEDDLER = [
    *on(socket.SOL_SOCKET, socket.SO_RCVBUF, rewrite(REWRITTEN_BUFFER)),
    *on(socket.IPPROTO_TCP, socket.TCP_NODELAY, rewrite(0)),
    *on(socket.IPPROTO_TCP, socket.TCP_CONGESTION, rewrite(int.from_bytes(b"reno", "little"))),
    *on(socket.SOL_SOCKET, socket.SO_SNDBUF, REFUSE),
    *on(socket.SOL_SOCKET, socket.SO_PRIORITY, ACCEPT),
    *LEAVE,
]


class _LoadOptions(ctypes.Structure):
    """The start of `struct bpf_prog_load_opts`."""

    _fields_ = (("size", ctypes.c_size_t), ("attempts", ctypes.c_int), ("expected_attach_type", ctypes.c_uint32))


@contextmanager
def attached_program(instructions: list[Instruction]) -> Iterator[None]:
    """A cgroup/setsockopt program that is not ours, where ours is attached too."""
    library, options = Library(), _LoadOptions(ctypes.sizeof(_LoadOptions), 1, SETSOCKOPT)
    code = b"".join(INSTRUCTION.pack(*instruction) for instruction in instructions)
    with ExitStack() as stack:
        program = library.bpf_prog_load(
            CGROUP_SOCKOPT, b"meddler", b"GPL", code, len(instructions), ctypes.byref(options)
        )
        stack.callback(os.close, library.check(program, "load a program"))
        cgroup = os.open(cgroup_root(), os.O_RDONLY)
        stack.callback(os.close, cgroup)
        link = library.bpf_link_create(program, cgroup, SETSOCKOPT, None)
        stack.callback(os.close, library.check(link, "attach it"))
        yield


def observed() -> dict[str, Any]:
    """What becomes of the options that MEDDLER has a say in, of one that it leaves alone, and of a tag."""
    seen: dict[str, Any] = {}

    def attempt(what: str, level: int, name: int, value: bytes, shown: int = 4) -> None:
        with socket.socket() as one:
            answer = give(one.fileno(), value, len(value), name, level)
            seen[what] = answer, one.getsockopt(level, name, shown)

    for what, length in (("", 4), (", a page", 4096), (", over a page", 5000)):
        attempt(f"SO_RCVBUF{what}", socket.SOL_SOCKET, socket.SO_RCVBUF, _padded(RECEIVE_BUFFER, length))
        attempt(f"TCP_NODELAY{what}", socket.IPPROTO_TCP, socket.TCP_NODELAY, _padded(1, length))
        attempt(f"SO_SNDBUF{what}", socket.SOL_SOCKET, socket.SO_SNDBUF, _padded(REWRITTEN_BUFFER, length))
        attempt(f"SO_PRIORITY{what}", socket.SOL_SOCKET, socket.SO_PRIORITY, _padded(3, length))
        attempt(f"TCP_KEEPCNT{what}", socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _padded(7, length))
    attempt("TCP_CONGESTION", socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"nv", 16)
    client, server = connection()
    with client, server:
        seen["tag"] = give(client.fileno(), TAKEN)
    return seen


def _padded(value: int, length: int) -> bytes:
    return value.to_bytes(4, sys.byteorder) + bytes(length - 4)


@pytest.mark.parametrize("first", ["libbpf-ours_first", "libbpf-theirs_first"])
def test_what_another_program_does_to_an_option_stays_done(first: str) -> None:
    """A value that it rewrote, refused or accepted is what it made of it, and tags are taken beside it."""
    before = without_agent(observed)
    with attached_program(MEDDLER):
        alone = without_agent(observed)
    with ExitStack() as stack:
        programs = [attached_probe(), attached_program(MEDDLER)]
        for program in programs if first.endswith("ours_first") else reversed(programs):
            stack.enter_context(program)
        together = observed()
    assert alone["SO_RCVBUF"] == (0, _padded(2 * REWRITTEN_BUFFER, 4))
    assert {what for what in before if before[what] != alone[what]} == set(before) - {
        "tag", "TCP_KEEPCNT", "TCP_KEEPCNT, a page", "TCP_KEEPCNT, over a page",
    }  # fmt: skip
    assert alone["tag"] == errno.ENOPROTOOPT
    assert together == alone | {"tag": 0}


# Every option there is.

UNSTEADY = {
    (socket.SOL_SOCKET, 49): "SO_INCOMING_CPU: which CPU the handshake ran on",
    (socket.SOL_SOCKET, 55): "SO_MEMINFO: the memory of a socket's options counts what the agent keeps of the socket",
    (socket.SOL_SOCKET, 57): "SO_COOKIE: every socket has its own",
    (socket.IPPROTO_IP, 52): "IP_PROTOCOL: the local port, where the socket is not raw",
    (socket.IPPROTO_TCP, 11): "TCP_INFO: times that were measured",
    (socket.IPPROTO_TCP, 24): "TCP_TIMESTAMP: a clock",
    (socket.IPPROTO_TCP, 26): "TCP_CC_INFO: times that were measured",
}
"""Options whose value is another one each time; what the calls answered is compared all the same."""


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """option_walk.c, compiled."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("walk") / "option_walk"
    subprocess.run([compiler, "-O1", "-o", program, WALK], check=True)
    return program


Call = tuple[str, int, int, int, str]
"""Socket, level, name, length and value."""


def walked(namespace: Namespace, walk: Path, how: str) -> dict[Call, tuple[str, ...]]:
    """What the kernel answered to each call: both errnos, and what getsockopt shows."""
    answers = {}
    for line in namespace.run(str(walk), how).stdout.splitlines():
        kind, level, name, length, value, *answer = line.split(" ")
        unsteady = (int(level), int(name)) in UNSTEADY
        answers[kind, int(level), int(name), int(length), value] = tuple(answer[:2] if unsteady else answer)
    return answers


def differences(one: dict[Call, Any], other: dict[Call, Any]) -> dict[Call, tuple[Any, Any]]:
    """The calls that were answered in two ways, and how."""
    assert one.keys() == other.keys()
    return {call: (one[call], other[call]) for call in one if one[call] != other[call]}


def test_every_other_option_does_as_without_the_agent(namespace: Namespace, walk: Path) -> None:
    """Whatever its level, name, length and value, on TCP and UDP: errno and getsockopt are the same, but for a tag."""
    without = without_agent(lambda: walked(namespace, walk, "whole"))
    with attached_probe():
        changed = differences(without, walked(namespace, walk, "whole"))
    assert len(without) > 30_000
    tags = [(kind, LEVEL, name, 24, value)
            for kind in ("tcp4c", "tcp6c") for name in (1, 2) for value in ("zeros", "ones")]  # fmt: skip
    assert changed == {tag: (without[tag], ("0", *without[tag][1:])) for tag in tags}
    assert {without[tag][0] for tag in tags} == {str(errno.ENOPROTOOPT)}


def test_values_that_are_not_there_are_refused_as_by_any_program(namespace: Namespace, walk: Path) -> None:
    """Where there is any such program the kernel reads the value before it looks at the option; ours adds nothing."""
    with attached_program(LEAVE):
        theirs = walked(namespace, walk, "short")
    with attached_probe():
        assert not differences(theirs, walked(namespace, walk, "short"))


# Processes without privileges.


def test_a_process_tags_its_own_connections_and_nothing_else(tmp_path: Path, namespace: Namespace) -> None:
    """Without privileges its connections can be tagged; the rest gets the kernel's own answer, and leaves no trace."""
    users: tuple[list[str], ...] = ([], ["root"])
    without = without_agent(lambda: [tagging(namespace, *user, "refused") for user in users])
    with ExitStack() as stack:
        running = stack.enter_context(attached_agent(tmp_path))
        alone(running)
        assert set(tagging(namespace, "own").values()) == {0}
        assert [tagging(namespace, *user, "refused") for user in users] == without
        assert set(tagging(namespace, "misplaced").values()) == {errno.EFAULT}
        ours, _ = (stack.enter_context(end) for end in connection())
        denied = tagging(namespace, "take", str(os.getpid()), str(ours.fileno()))
        assert denied["pidfd_getfd"] == errno.EPERM
        assert denied["open"] in (errno.EACCES, errno.ENXIO)
        alone(running)
        assert running.stop() == 0
    assert {0} & set(without[0].values()) == set()
    assert {errno.ENOPROTOOPT, errno.EINVAL, errno.EBADF, errno.ENOTSOCK} <= set(without[0].values())
    written = "".join(path.read_text() for path in (tmp_path / "data").iterdir())
    assert TAKEN[:16].hex() in written
    assert OTHER[:16].hex() in written
    assert REFUSED[:8].hex() not in written


def test_two_agents_both_get_a_tag(tmp_path: Path, namespace: Namespace) -> None:
    """What one of them has taken, the other is told as well."""
    places = [tmp_path / name for name in ("one", "other")]
    with attached_agent(places[0]) as one, attached_agent(places[1]) as other:
        assert set(tagging(namespace, "own").values()) == {0}
        assert one.stop() == other.stop() == 0
    for place in places:
        assert TAKEN[:16].hex() in "".join(path.read_text() for path in (place / "data").iterdir())


def test_a_flood_of_tags_on_an_idle_connection_is_taken_no_further(tmp_path: Path, namespace: Namespace) -> None:
    """Of 200,000 the first few are taken, what is sent makes room for more, and every packet is in the ledger."""
    capture, count = tmp_path / "lo.pcap", 200_000
    with attached_agent(tmp_path) as running:
        alone(running)
        with namespace.tcpdump(capture):
            flooded = tagging(namespace, "flood", str(count))
        alone(running)
        assert running.stop() == 0
    assert flooded["answers"] == [0, errno.ENOPROTOOPT]
    assert flooded["taken"] == IDLE_TAGS + 1
    assert flooded["after"] == 0
    (client,) = [span for span in spans(tmp_path / "data")
                 if span["attributes"]["network.local.port"] == flooded["port"]]  # fmt: skip
    assert len(client.get("links", ())) <= IDLE_TAGS + 2
    ledger = running.ledger()
    assert ledger["dropped"] == 0
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]
    assert missing_and_extra(tmp_path, capture) == (0, 0)


def test_a_flood_from_many_connections_costs_no_other_a_packet_unseen(tmp_path: Path, namespace: Namespace) -> None:
    """While two processes tag as often as they can, what another sends is recorded, or the ledger counts its loss."""
    capture, ports = tmp_path / "lo.pcap", ("4242", "4243")
    with attached_agent(tmp_path) as running, ExitStack() as stack:
        floods = []
        for port in ports:
            command = [*("ip", "netns", "exec", namespace.name), sys.executable, str(TAGGING), "flood_many", port, "64"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            floods.append(stack.enter_context(process))
            assert process.stdout is not None
            assert process.stdout.readline() == "flooding\n"
        with namespace.tcpdump(capture, "tcp and not portrange 4242-4243"):
            namespace.traffic("exchange", "4", "100", "100", "20000")
        counted = [json.loads(process.communicate("")[0]) for process in floods]
        assert running.stop() == 0
    ledger = running.ledger()
    missing, extra = missing_and_extra(tmp_path, capture)
    assert sum(process["taken"] for process in counted) > 1000
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"] + ledger["dropped"]
    assert extra == 0
    assert missing <= ledger["dropped"]


def missing_and_extra(directory: Path, capture: Path) -> tuple[int, int]:
    """How many segments of a capture of loopback an agent did not record, and how many it did too often."""
    replayed = directory / "replayed"
    subprocess.run([*AGENT, "run", "--source", f"pcap:{capture}", "--otlp-file", str(replayed)], check=True)
    theirs = segments(logs(replayed))
    ports = {(segment[2], segment[4]) for segment in theirs}
    ours = segments(
        [log for log in logs(directory / "data")
         if "tcp.seq" in log and (log["network.local.port"], log["network.peer.port"]) in ports]
    )  # fmt: skip
    assert theirs
    missing = theirs - ours
    if hosts.KERNEL < (5, 17):  # of two received ones that are wholly alike the second may be missing
        missing = Counter(
            {segment: n for segment, n in missing.items() if segment[0] != "receive" or not ours[segment]}
        )
    return missing.total(), (ours - theirs).total()
