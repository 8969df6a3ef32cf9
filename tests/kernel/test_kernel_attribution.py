"""Whose a connection is: real processes in cgroups that are named as runtimes name them, in this kernel's own trees."""

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tcpio_otel.capture.loaders import WITHOUT
from tcpio_otel.capture.probe import cgroup_root, memory_hierarchy
from tests.kernel.cgroups import (
    CLASSES,
    MEMBER,
    NAMES,
    PORT,
    SERVER,
    Tree,
    at_client,
    client_port,
    connections,
    go_on,
    identifier,
    packets,
    pod,
    running,
)
from tests.kernel.harness import Namespace, agent

UNIFIED, MEMORY = "unified", "memory of cgroup v1"
KEEPS_ITS_MAKER = WITHOUT["tcpio_read"]


@pytest.fixture(params=[UNIFIED, MEMORY], ids=["libbpf-unified", "libbpf-v1"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """Room in one of the hierarchies that this kernel has."""
    root = cgroup_root() if request.param == UNIFIED else memory_hierarchy()
    if root is None:
        pytest.skip("this kernel's memory controller has no tree of cgroup v1")
    made = Tree(root)
    yield made
    made.close()


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
        assert {whose["container.id"] for whose, _ in ours} == set(wanted)
        for whose, _ in ours:
            uid, runtime = wanted[whose["container.id"]]
            assert whose["k8s.pod.uid"] == uid
            assert whose.get("container.runtime.name", "") == runtime
            assert whose["k8s.pod.qos_class"] == CLASSES[runtime]
        assert theirs
        assert {(whose["container.id"], whose["k8s.pod.uid"]) for whose, _ in theirs} == {(server_id, server_uid)}
        # Each end of a connection is in one Resource alone.
        assert len({(client_port(item), whose["container.id"]) for whose, item in ours}) == len(wanted)


def test_a_process_that_moves_takes_its_connections_along(tmp_path: Path, namespace: Namespace, tree: Tree) -> None:
    """From what it reads after the move on; its span ends in the new home."""
    before, after = identifier(), identifier()
    home = tree.make(f"test-{uuid.uuid4().hex}.slice")
    first, second = (tree.make(f"system.slice/docker-{each}.scope") for each in (before, after))
    with (
        agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT)) as watcher,
        running(namespace, SERVER, str(PORT), str(home)),
        running(namespace, MEMBER, str(PORT), str(first), str(second), str(home)) as member,
    ):
        go_on(member)
    if KEEPS_ITS_MAKER in watcher.stderr():
        pytest.skip(f"here, {KEEPS_ITS_MAKER}")
    sent = [
        (int(each["value"]["intValue"]), whose["container.id"])
        for whose, item in at_client(packets(tmp_path / "out"))
        for each in item["attributes"]
        if each["key"] == "tcp.payload.size" and each["value"]["intValue"] != "0"
    ]
    ids = [container for _, container in sent]
    assert ids[0] == before
    assert ids[-1] == after
    assert ids == sorted(ids, key=[before, after].index)
    ((whose, _),) = at_client(connections(tmp_path / "out"))
    assert whose["container.id"] == after


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
        assert {(whose["container.id"], whose["k8s.pod.uid"]) for whose, _ in at_client(found)} == {(container, uid)}


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
    assert {whose["container.id"] for whose, _ in ours} == {container}
    assert {whose["container.id"] for whose, item in found if (whose, item) not in ours} == {server_container}


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
    assert {whose["service.name"] for whose, _ in ours} == {program}
    assert {whose["service.name"] for whose, item in found if (whose, item) not in ours} == {"greeter@1"}
    for whose, _ in found:
        assert whose["deployment.environment.name"] == "test"
        assert whose["process.executable.name"] == program
        assert "service.version" not in whose
        assert "container.id" not in whose


def test_who_does_not_want_workloads_has_one_resource(tmp_path: Path, namespace: Namespace) -> None:
    """All is the agent's own then."""
    root = str(cgroup_root())
    with (
        agent(
            tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), TCPIO_ATTRIBUTION_WORKLOADS="false"
        ),  # fmt: skip
        running(namespace, SERVER, str(PORT), root),
        running(namespace, MEMBER, str(PORT), root, "", root) as member,
    ):
        go_on(member)
    for found in (packets(tmp_path / "out"), connections(tmp_path / "out")):
        assert {whose["service.name"] for whose, _ in found} == {"tcpio-otel"}
