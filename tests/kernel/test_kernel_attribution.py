"""Whose a connection is: real processes in cgroups that are named as runtimes name them, in this kernel's own trees."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcpio_otel.attribution.cgroups import memory_hierarchy
from tcpio_otel.capture.probe import cgroup_root
from tests.kernel.harness import Namespace, agent

PORT = 8800
UNIFIED, MEMORY = "unified", "memory of cgroup v1"

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


@pytest.fixture(params=[UNIFIED, MEMORY], ids=["libbpf-unified", "libbpf-v1"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """Room in one of the hierarchies that this kernel has."""
    root = cgroup_root() if request.param == UNIFIED else memory_hierarchy()
    if root is None:
        pytest.skip("this kernel's memory controller has no tree of cgroup v1")
    made = Tree(root)
    yield made
    made.close()


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


def resources(directory: Path, signal: str, keys: tuple[str, str, str]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """The items of a signal, each with the attributes of its Resource."""
    found: list[tuple[dict[str, str], dict[str, Any]]] = []
    for line in (directory / f"{signal}.jsonl").read_text().splitlines():
        for resource in json.loads(line)[keys[0]]:
            said = {each["key"]: each["value"]["stringValue"] for each in resource["resource"]["attributes"]}
            found += [(said, item) for scope in resource[keys[1]] for item in scope[keys[2]]]
    return found


def client_ports(item: dict[str, Any]) -> int:
    """The port of the client's end, in a log record or a span of either end."""
    ports = {
        each["key"]: int(each["value"]["intValue"])
        for each in item["attributes"]
        if each["key"] in ("network.local.port", "network.peer.port")
    }
    (port,) = (port for port in ports.values() if port != PORT)
    return port


def packets(directory: Path) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Packet records with their Resources."""
    return resources(directory, "logs", ("resourceLogs", "scopeLogs", "logRecords"))


def connections(directory: Path) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Connection spans with their Resources."""
    return resources(directory, "traces", ("resourceSpans", "scopeSpans", "spans"))


def at_client(found: list[tuple[dict[str, str], dict[str, Any]]]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Those of the clients' ends."""
    return [
        (said, item)
        for said, item in found
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


@pytest.mark.parametrize("place", ["straight", "below"])
def test_every_packet_and_span_is_its_containers(tmp_path: Path, namespace: Namespace, tree: Tree, place: str) -> None:
    """Four runtimes' names at once, and a server in a container of its own; also from a cgroup within the container."""
    server_id, server_uid = identifier(), pod()
    home = tree.make(f"test-{uuid.uuid4().hex}.slice")
    at_server = tree.make(NAMES["containerd"](server_uid, server_id))
    wanted: dict[str, tuple[str, str]] = {}  # pod and runtime by container
    with ExitStack() as stack:
        stack.enter_context(agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT)))
        stack.enter_context(running(namespace, SERVER, str(PORT), str(at_server)))
        members = []
        for runtime, name in NAMES.items():
            container, uid = identifier(), pod()
            wanted[container] = uid, runtime
            cgroup = tree.make(name(uid, container) + ("/below" if place == "below" else ""))
            members.append(
                stack.enter_context(running(namespace, MEMBER, str(PORT), str(cgroup), "", str(home)))
            )  # fmt: skip
        for member in members:
            go_on(member)
    for found in (packets(tmp_path / "out"), connections(tmp_path / "out")):
        ours = at_client(found)
        theirs = [each for each in found if each not in ours]
        assert {said["container.id"] for said, _ in ours} == set(wanted)
        for said, _ in ours:
            uid, runtime = wanted[said["container.id"]]
            assert said["k8s.pod.uid"] == uid
            assert said.get("container.runtime.name", "") == runtime
            assert said["k8s.pod.qos_class"] == CLASSES[runtime]
        assert theirs
        assert {(said["container.id"], said["k8s.pod.uid"]) for said, _ in theirs} == {(server_id, server_uid)}
        # Each end of a connection is in one Resource alone.
        assert len({(client_ports(item), said["container.id"]) for said, item in ours}) == len(wanted)


def test_a_process_that_moves_takes_its_connections_along(tmp_path: Path, namespace: Namespace, tree: Tree) -> None:
    """From what it reads after the move on; its span ends in the new home."""
    before, after = identifier(), identifier()
    home = tree.make(f"test-{uuid.uuid4().hex}.slice")
    first, second = (tree.make(f"system.slice/docker-{each}.scope") for each in (before, after))
    with (
        agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT)),
        running(namespace, SERVER, str(PORT), str(home)),
        running(namespace, MEMBER, str(PORT), str(first), str(second), str(home)) as member,
    ):
        go_on(member)
    sent = [
        (int(each["value"]["intValue"]), said["container.id"])
        for said, item in at_client(packets(tmp_path / "out"))
        for each in item["attributes"]
        if each["key"] == "tcp.payload.size" and each["value"]["intValue"] != "0"
    ]
    ids = [container for _, container in sent]
    assert ids[0] == before
    assert ids[-1] == after
    assert ids == sorted(ids, key=[before, after].index)
    ((said, _),) = at_client(connections(tmp_path / "out"))
    assert said["container.id"] == after


def test_a_container_that_is_gone_before_anybody_looks_is_named(
    tmp_path: Path, namespace: Namespace, tree: Tree
) -> None:
    """Made, used and removed within one latency: its records are read when its directory is not there any more."""
    container, uid = identifier(), pod()
    home = tree.make(f"test-{uuid.uuid4().hex}.slice")
    parent = NAMES["containerd"](uid, container).rpartition("/")[0]
    tree.make(parent)
    with (
        agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), TCPIO_CAPTURE_LATENCY="5s"),
        running(namespace, SERVER, str(PORT), str(home)),
    ):
        cgroup = tree.make(NAMES["containerd"](uid, container))
        with running(namespace, MEMBER, str(PORT), str(cgroup), "", str(home)) as member:
            go_on(member)
            tree.remove(cgroup)
    for found in (packets(tmp_path / "out"), connections(tmp_path / "out")):
        assert {(said["container.id"], said["k8s.pod.uid"]) for said, _ in at_client(found)} == {(container, uid)}


def test_connections_older_than_the_agent_are_their_containers(
    tmp_path: Path, namespace: Namespace, tree: Tree
) -> None:
    """Both ends of one that stays open and silent, as their processes' files tell."""
    container, server_container = identifier(), identifier()
    home = tree.make(f"test-{uuid.uuid4().hex}.slice")
    cgroup, at_server = (tree.make(f"docker/{each}") for each in (container, server_container))
    with (
        running(namespace, SERVER, str(PORT), str(at_server)),
        running(namespace, MEMBER, str(PORT), str(cgroup), "", str(home)),
        agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT)) as running_agent,
    ):
        assert running_agent.stop() == 0
    found = connections(tmp_path / "out")
    ours = at_client(found)
    assert {said["container.id"] for said, _ in ours} == {container}
    assert {said["container.id"] for said, item in found if (said, item) not in ours} == {server_container}


def test_a_program_of_the_host_is_itself(tmp_path: Path, namespace: Namespace) -> None:
    """Without a container the Resource is the unit's or the program's, and the agent's is for what is nobody's."""
    unified = Tree(cgroup_root())
    root, unit = str(unified.root), str(unified.make("system.slice/greeter@1.service"))
    environment = {
        "OTEL_SERVICE_NAME": "watcher",
        "OTEL_RESOURCE_ATTRIBUTES": "service.version=9,deployment.environment.name=test",
    }
    with (
        closing(unified),
        agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), **environment),
        running(namespace, SERVER, str(PORT), unit),
        running(namespace, MEMBER, str(PORT), root, "", root) as member,
    ):
        go_on(member)
    found = packets(tmp_path / "out")
    ours = at_client(found)
    program = os.path.basename(os.path.realpath(sys.executable))[:15]
    assert {said["service.name"] for said, _ in ours} == {program}
    assert {said["service.name"] for said, item in found if (said, item) not in ours} == {"greeter@1"}
    for said, _ in found:
        assert said["deployment.environment.name"] == "test"
        assert said["process.executable.name"] == program
        assert "service.version" not in said
        assert "container.id" not in said
