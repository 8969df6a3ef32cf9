"""Pods that come, change and go while their processes talk: cgroups and traffic are real, and so is the API server."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tcpio_otel.capture.probe import cgroup_root
from tests.kernel.cgroups import (
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
    running,
)
from tests.kernel.harness import Agent, Namespace, agent, wait_for
from tests.peers.go import or_skip
from tests.peers.kubernetes import RBAC, ControlPlane, build, control_plane

PODS = "/api/v1/namespaces/default/pods"
NODE, ACCOUNT = "node-1", "tcpio-otel"
WAIT_S = 10
"""Longer than the agent takes to ask again, once the API server has restarted."""

RUNTIMES = [runtime for runtime in NAMES if runtime]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ControlPlane]:
    """An API server in which the agent's account may list and watch pods, and nothing else."""
    or_skip(build)
    (tmp_path / "cluster").mkdir()
    with control_plane(tmp_path / "cluster") as made:
        made.account(ACCOUNT)
        made.allow(ACCOUNT, {"resources": ["pods"], "verbs": ["list", "watch"]})
        yield made


class Fleet:
    """Pods of one node: objects, cgroups, and a process in each that talks to a server."""

    def __init__(self, cluster: ControlPlane, namespace: Namespace, tree: Tree, home: Path) -> None:
        self._cluster, self._namespace, self._tree, self._home = cluster, namespace, tree, home
        self.names: dict[str, str] = {}  # of pods by container

    def run(self, count: int, tier: str, then: Callable[[], None] = lambda: None) -> list[str]:
        """Pods that talk at once, all together; their names. Their processes and cgroups go, `then` they do."""
        with ExitStack() as stack:
            made = [self._start(stack, tier) for _ in range(count)]
            for member, _, cgroup in made:
                go_on(member)
                self._tree.remove(cgroup)
        then()
        for _, name, _ in made:
            assert self._cluster.call("DELETE", f"{PODS}/{name}?gracePeriodSeconds=0").status == 200
        return [name for _, name, _ in made]

    def start(self, stack: ExitStack, tier: str) -> tuple[Any, str]:
        """One that stays: its process and its name."""
        member, name, _ = self._start(stack, tier)
        return member, name

    def talk(self, stack: ExitStack, name: str) -> None:
        """Another process in the container of a pod that stays."""
        (container,) = (container for container, pod in self.names.items() if pod == name)
        cgroup = next(self._tree.root.glob(f"**/*{container}*"))
        stack.enter_context(running(self._namespace, MEMBER, str(PORT), str(cgroup), "", str(self._home)))

    def _start(self, stack: ExitStack, tier: str) -> tuple[Any, str, Path]:
        name, container = f"pod-{uuid.uuid4().hex[:12]}", identifier()
        spec = {"nodeName": NODE, "containers": [{"name": "main", "image": "main:1"}]}
        created = self._cluster.create(PODS, {"metadata": {"name": name, "labels": {"tier": tier}}, "spec": spec})
        runtime = RUNTIMES[len(self.names) % len(RUNTIMES)]
        self.names[container] = name
        cgroup = self._tree.make(NAMES[runtime](created["metadata"]["uid"], container))
        status = {"name": "main", "containerID": f"{runtime}://{container}", "image": "main:1", "imageID": "x"}
        body = {"status": {"containerStatuses": [{**status, "ready": True, "restartCount": 0}]}}
        member = stack.enter_context(
            running(self._namespace, MEMBER, str(PORT), str(cgroup), "", str(self._home))
        )  # fmt: skip
        # A kubelet says so later than the process talks, too.
        assert self._cluster.call("PATCH", f"{PODS}/{name}/status", body).status == 200
        return member, name, cgroup


def test_every_packet_is_its_pods_whatever_happens_to_the_api_server(
    cluster: ControlPlane, namespace: Namespace, tmp_path: Path
) -> None:
    """Fifty pods, relabelled and deleted; the server restarts, and the right to ask it goes and comes back."""
    tree, settings = Tree(cgroup_root()), kubernetes(cluster, tmp_path)
    with ExitStack() as stack:
        stack.callback(tree.close)
        home = tree.make(f"test-{uuid.uuid4().hex}.slice")
        fleet = Fleet(cluster, namespace, tree, home)
        watcher = stack.enter_context(agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), **settings))
        stack.enter_context(running(namespace, SERVER, str(PORT), str(home)))
        wait_for(lambda: f"watching the pods of node {NODE}" in watcher.stderr(), "the watch")
        staying = [fleet.start(stack, "before")[1] for _ in range(10)]
        fleet.run(15, "before")

        again = watches_again(watcher)
        cluster.restart()
        fleet.run(15, "before", again)

        assert cluster.call("DELETE", f"{RBAC}/clusterrolebindings/{ACCOUNT}").status == 200
        cluster.restart()  # a watch that is open goes on
        wait_for(lambda: "403 pods is forbidden" in watcher.stderr(), "the refusal", 90)
        (unlucky,) = fleet.run(1, "before")
        time.sleep(WAIT_S + 2)  # longer than anybody waits for it
        again = watches_again(watcher)
        cluster.bind(ACCOUNT)
        again()
        fleet.run(10, "before")

        for name in staying:
            cluster.call("PATCH", f"{PODS}/{name}", {"metadata": {"labels": {"tier": "after"}}})
        time.sleep(2)  # until the server has told of it
        with ExitStack() as more:
            for name in staying:
                fleet.talk(more, name)
        assert watcher.stop() == 0
    check(watcher, tmp_path / "out", fleet, staying, unlucky)


def watches_again(watcher: Agent) -> Callable[[], None]:
    """Wait until the agent has said once more that it watches; from now on."""
    said = "watching the pods of node"
    before = watcher.stderr().count(said)

    def wait() -> None:
        wait_for(lambda: watcher.stderr().count(said) > before, "the watch again", 120)
        time.sleep(1)

    return wait


def kubernetes(cluster: ControlPlane, directory: Path) -> dict[str, str]:
    """Variables by which the agent watches pods, with the rights that its chart gives it."""
    kubeconfig = cluster.kubeconfig(directory / "kubeconfig", cluster.token("default", ACCOUNT))
    return {
        "TCPIO_KUBERNETES_ENABLED": "true",
        "TCPIO_KUBERNETES_NODE_NAME": NODE,
        "TCPIO_KUBERNETES_KUBECONFIG": str(kubeconfig),
        "TCPIO_KUBERNETES_LABELS": "tier",
        "TCPIO_KUBERNETES_WAIT": f"{WAIT_S}s",
    }


def check(watcher: Agent, directory: Path, fleet: Fleet, staying: list[str], unlucky: str) -> None:
    """Every record of a client's end is its pod's, by name, container and label."""
    tiers: dict[str, set[str]] = {}
    for found in (packets(directory), connections(directory)):
        seen, ports = set(), {}
        for whose, item in at_client(found):
            name = fleet.names[whose["container.id"]]
            assert ports.setdefault(client_port(item), name) == name
            if name == unlucky:
                assert "k8s.pod.name" not in whose
                continue
            assert whose["k8s.pod.name"] == whose["service.name"] == name
            assert whose["k8s.namespace.name"] == "default"
            assert whose["k8s.node.name"] == NODE
            assert whose.get("k8s.container.name", "main") == "main"
            tiers.setdefault(name, set()).add(whose["k8s.pod.label.tier"])
            seen.add(name)
        assert seen == set(fleet.names.values()) - {unlucky}
    assert {name for name, told in tiers.items() if "after" in told} == set(staying)
    assert len(tiers) == 50
    ledger = watcher.ledger()
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]
