"""Processes in cgroups that are named as runtimes name them, and what the agent says whose their packets are."""

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kernel.harness import Namespace

PORT = 8800

MEMBER = """
import os, socket, sys, time
port, cgroup, next_cgroup = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def enter(directory):
    with open(directory + "/cgroup.procs", "w") as processes:
        processes.write(str(os.getpid()))
def wait(word):
    print(word, flush=True)
    sys.stdin.readline()
enter(cgroup)
with socket.create_connection(("127.0.0.1", port)) as client:
    client.sendall(b"x" * 100)
    assert client.recv(1000)
    if next_cgroup:
        time.sleep(1)  # what comes within one batch is said to be where the last of it was
        enter(next_cgroup)
        client.sendall(b"y" * 100)
        assert client.recv(1000)
        client.sendall(b"z" * 100)
        assert client.recv(1000)
    wait("talked")
enter(os.path.dirname(cgroup) if cgroup.endswith("below") else sys.argv[4])
wait("left")
"""
SERVER = """
import os, socket, sys, threading
with open(sys.argv[2] + "/cgroup.procs", "w") as processes:
    processes.write(str(os.getpid()))
def serve(connection):
    with connection:
        while data := connection.recv(1000):
            connection.sendall(data)
with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128) as listener:
    print("listens", flush=True)
    while True:
        threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""


class Tree:
    """Directories of a test's own in a hierarchy of cgroups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: list[Path] = []

    def make(self, path: str) -> Path:
        """A cgroup and those above it; they go when the test does."""
        whole = self.root
        for name in path.split("/"):
            whole /= name
            if not whole.exists():
                whole.mkdir()
                self._made.append(whole)
        return whole

    def remove(self, whole: Path) -> None:
        """Now."""
        whole.rmdir()
        self._made.remove(whole)

    def close(self) -> None:
        """Remove what is left, the innermost first."""
        for whole in reversed(self._made):
            whole.rmdir()


@contextmanager
def running(namespace: Namespace, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program in the namespace, once it has said its first word."""
    process = subprocess.Popen(
        # Not by `ip netns exec`, which mounts another /sys, and with it hides the cgroups.
        ["nsenter", f"--net=/run/netns/{namespace.name}", sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a member take its next step."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()


Said = list[tuple[dict[str, str], dict[str, Any]]]
"""Items of a signal, each with the attributes of its Resource."""

LOGS = ("resourceLogs", "scopeLogs", "logRecords")
SPANS = ("resourceSpans", "scopeSpans", "spans")


def said(file: Path, keys: tuple[str, str, str]) -> Said:
    """What a file of OTLP/JSON has of a signal."""
    found: Said = []
    for line in file.read_text().splitlines():
        for resource in json.loads(line).get(keys[0], []):
            attributes = {
                each["key"]: each["value"].get("stringValue", "") for each in resource["resource"]["attributes"]
            }
            found += [(attributes, item) for scope in resource[keys[1]] for item in scope[keys[2]]]
    return found


def client_port(item: dict[str, Any]) -> int:
    """The port of the client's end, in a log record or a span of either end."""
    ports = {
        each["key"]: int(each["value"]["intValue"])
        for each in item["attributes"]
        if each["key"] in ("network.local.port", "network.peer.port")
    }
    (port,) = (port for port in ports.values() if port != PORT)
    return port


def packets(directory: Path) -> Said:
    """Packet records that the agent has written."""
    return said(directory / "logs.jsonl", LOGS)


def connections(directory: Path) -> Said:
    """Connection spans likewise."""
    return said(directory / "traces.jsonl", SPANS)


def at_client(found: Said) -> Said:
    """Those of the clients' ends."""
    return [
        (attributes, item)
        for attributes, item in found
        if any(
            each["key"] == "network.peer.port" and int(each["value"]["intValue"]) == PORT for each in item["attributes"]
        )
    ]


def identifier() -> str:
    """A container id that nobody else has."""
    return uuid.uuid4().hex + uuid.uuid4().hex


def pod() -> str:
    """A pod's uid."""
    return str(uuid.uuid4())


NAMES: dict[str, Callable[[str, str], str]] = {
    "containerd": lambda uid, container: (
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid.replace('-', '_')}.slice/"
        f"cri-containerd-{container}.scope"
    ),
    "cri-o": lambda uid, container: f"kubepods/besteffort/pod{uid}/crio-{container}",
    "docker": lambda uid, container: (
        f"kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice/docker-{container}.scope"
    ),
    "": lambda uid, container: f"kubepods/burstable/pod{uid}/{container}",
}
CLASSES = {"containerd": "Burstable", "cri-o": "BestEffort", "docker": "Guaranteed", "": "Burstable"}
