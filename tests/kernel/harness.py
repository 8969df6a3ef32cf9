"""Real traffic in a namespace, the agent as its users start it, and what both left behind."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.emitted import account, in_files

AGENT = [sys.executable, "-m", "tcpio_otel.cli"]
PROGRAM_NAME = slice(64, 80)  # in struct bpf_prog_info
TRAFFIC = Path(__file__).with_name("programs.py")
START_S = 120.0
"""How long an agent may take to start: kernels under emulation are slow."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace of the test's own."""

    name: str

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command], check=True, capture_output=True, text=True, **options
        )

    def traffic(self, program: str, *arguments: str) -> dict[str, Any]:
        """Run a function of programs.py in it, and return what it counted."""
        counted: dict[str, Any] = json.loads(self.run(sys.executable, str(TRAFFIC), program, *arguments).stdout)
        return counted

    @contextmanager
    def tcpdump(self, path: Path, *expression: str) -> Iterator[None]:
        """Capture its loopback to a file."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "tcpdump", "-i", "lo", "-U", "--immediate-mode", "-s", "128",
             "-B", "16384", "-w", str(path), *(expression or ("tcp",))],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if "listening on" in line:
                break
        try:
            yield
            time.sleep(0.3)
        finally:
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            process.wait()
        assert "0 packets dropped by kernel" in said, said


@dataclass(frozen=True)
class Drawing:
    """Open connections over which a client draws bytes whenever it is told to."""

    process: "subprocess.Popen[str]"
    port: int

    def draw(self) -> tuple[int, int]:
        """Once more: how many bytes came in all, and the server's smoothed round-trip times in us, added up."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        counted, rtt_us = json.loads(self.process.stdout.readline())
        return counted, rtt_us

    def end(self) -> None:
        """Close the connections."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def drawing(namespace: Namespace, connections: int, size: int) -> Iterator[Drawing]:
    """So many connections in a namespace, over each of which `size` bytes are drawn at a time."""
    program = ["ip", "netns", "exec", namespace.name, sys.executable, str(TRAFFIC), "draw", str(connections), str(size)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout
        yield Drawing(process, int(process.stdout.readline()))


@contextmanager
def new_namespace() -> Iterator[Namespace]:
    """A network namespace whose only device is its loopback, up."""
    name = f"tcpio-test-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Namespace(name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


class Agent:
    """A `tcpio-otel` command that is running, and its two outputs."""

    def __init__(self, process: subprocess.Popen[str], out: Path, said: Path) -> None:
        self.process, self._out, self._said = process, out, said

    @property
    def pid(self) -> int:
        """Of the agent."""
        return self.process.pid

    def stdout(self) -> str:
        """What it printed."""
        return self._out.read_text()

    def stderr(self) -> str:
        """What it said."""
        return self._said.read_text()

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does, and return its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # the interpreter says where every thread is
            self.process.wait()
            raise AssertionError(f"it did not stop within {START_S} s:\n{self.stderr()[-8000:]}") from None

    def ledger(self) -> dict[str, int]:
        """The last line that tells where every packet went, as numbers."""
        lines = [line for line in self.stderr().splitlines() if "seen " in line and " = exported " in line]
        assert "UNACCOUNTED" not in lines[-1], lines[-1]
        found = dict(re.findall(r"(seen|exported|filtered|sampled|dropped|in flight) (\d+)", lines[-1]))
        return {name: int(count) for name, count in found.items()}


@contextmanager
def agent(directory: Path, *arguments: str, **environment: str) -> Iterator[Agent]:
    """Start the agent and wait until its probe is attached."""
    directory.mkdir(exist_ok=True)
    out, said = directory / "stdout", directory / "stderr"
    with out.open("w") as out_file, said.open("w") as said_file:
        process = subprocess.Popen(
            [*AGENT, *arguments], stdout=out_file, stderr=said_file, text=True, cwd=directory,
            env={
                **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONFAULTHANDLER": "1", **environment,
            },
        )  # fmt: skip
    running = Agent(process, out, said)
    try:
        ready = "recording to" if arguments[0] == "run" else "capturing"
        wait_for(lambda: ready in running.stderr() or process.poll() is not None, "the agent", START_S)
        assert process.poll() is None, running.stderr()
        yield running
        if "--otlp-file" in arguments:
            if process.poll() is None:
                running.stop(signal.SIGTERM)
            given = [pair.partition("=")[0] for pair in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")]
            account(in_files(directory / arguments[arguments.index("--otlp-file") + 1], given))
    finally:
        if process.poll() is None:
            running.stop(signal.SIGTERM)


def attached() -> int:
    """How many programs of ours are loaded on this host, says the kernel."""
    libbpf, found, identifier = ctypes.CDLL("libbpf.so.1"), 0, ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(identifier, ctypes.byref(identifier)) == 0:
        program = libbpf.bpf_prog_get_fd_by_id(identifier)
        if program < 0:
            continue  # it has gone in between
        info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        libbpf.bpf_obj_get_info_by_fd(program, info, ctypes.byref(size))
        os.close(program)
        found += info.raw[PROGRAM_NAME].startswith(b"tcpio_")
    return found


def resident_bytes(pid: int, of: str = "VmRSS") -> int:
    """Memory of a process now; `RssAnon` is its own alone, without files and rings."""
    return 1024 * int(re.findall(rf"{of}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


def wait_for(condition: Any, what: str, timeout_s: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def spans(directory: Path) -> list[dict[str, Any]]:
    """The spans in OTLP/JSON files, with their attributes as plain values."""
    found = _items(directory, "traces", "resourceSpans", "scopeSpans", "spans")
    return [span | {"attributes": plain(span["attributes"])} for span in found]


def logs(directory: Path) -> list[dict[str, Any]]:
    """The attributes of the log records in OTLP/JSON files."""
    return [
        plain(record["attributes"]) for record in _items(directory, "logs", "resourceLogs", "scopeLogs", "logRecords")
    ]


def logs_with_ids(directory: Path) -> list[dict[str, Any]]:
    """The same, with name, time, body and ids among them."""
    found = _items(directory, "logs", "resourceLogs", "scopeLogs", "logRecords")
    kept = ("eventName", "traceId", "spanId")
    return [
        plain(record["attributes"])
        | {name: record.get(name, "") for name in kept}
        | {"body": record["body"]["stringValue"], "time_ns": int(record["timeUnixNano"])}
        for record in found
    ]


def _items(directory: Path, signal_name: str, resources: str, scopes: str, items: str) -> list[dict[str, Any]]:
    return [
        item
        for path in sorted(directory.glob(f"{signal_name}*.jsonl"))
        for line in path.read_text().splitlines()
        for resource in json.loads(line)[resources]
        for scope in resource[scopes]
        for item in scope[items]
    ]


def plain(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    """OTLP/JSON attributes as a dictionary."""
    return {
        entry["key"]: int(entry["value"]["intValue"])
        if "intValue" in entry["value"]
        else next(iter(entry["value"].values()))
        for entry in attributes
    }


SEGMENT = (
    "network.io.direction", "network.local.address", "network.local.port", "network.peer.address", "network.peer.port",
    "tcp.seq", "tcp.ack", "tcp.flags", "tcp.payload.size", "tcp.window",
)  # fmt: skip


def only(namespace: Namespace) -> dict[str, str]:
    """Let the agent record that network alone: sums are over all that it saw."""
    return {"TCPIO_CAPTURE_NETWORK_NAMESPACE": f"/run/netns/{namespace.name}"}


Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Labels and values by name."""


def scrape(url: str) -> Samples:
    """What Prometheus would be told."""
    samples: Samples = {}
    with urllib.request.urlopen(url, timeout=20) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def segments(records: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    """The multiset of segments among records, by everything that a capture shows as well."""
    return Counter(tuple(record[name] for name in SEGMENT) for record in records)
