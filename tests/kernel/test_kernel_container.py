"""The agent in a container that a kubelet, containerd and runc make of what the chart renders, under their seccomp."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from tcpio_otel import __version__
from tests.kernel.cgroups import LOGS, said
from tests.kernel.harness import plain, wait_for
from tests.peers import helm as peer
from tests.peers import image, node
from tests.peers.go import or_skip
from tests.peers.node import Container, Node, machine
from tests.peers.pod import CHART, render

IMAGE = f"localhost/tcpio-otel:{__version__}"
CAPABILITIES = {12: "NET_ADMIN", 34: "SYSLOG", 38: "PERFMON", 39: "BPF"}
PORT = 8080
SECCOMP = {"RuntimeDefault": "", "Localhost": "tcpio-otel.json"}


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Helm is found."""
    return or_skip(lambda: peer.environment(tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A machine whose kubelet runs static pods, with the agent's image; the tests are in its network."""
    or_skip(node.build)
    name = or_skip(lambda: image.build("libbpf"))
    directory = tmp_path_factory.mktemp("node")
    with ExitStack() as stack:
        made = or_skip(lambda: stack.enter_context(machine(directory, trustme.CA())))
        archive = directory / "image.tar"
        image.buildah("push", "--quiet", name, f"docker-archive:{archive}:{IMAGE}")
        made.load(archive)
        (made.profiles / SECCOMP["Localhost"]).write_bytes((CHART / "seccomp" / "tcpio-otel.json").read_bytes())
        made.start_kubelet(None)
        yield made


@dataclass
class Pod:
    """A static pod."""

    node: Node
    name: str

    def container(self, name: str) -> Container | None:
        """One of its containers, while it runs."""
        found = [each for each in self.node.containers() if each.pod == f"{self.name}-{node.NAME}"]
        return next((each for each in found if each.name == name), None)

    def said(self) -> str:
        """What its containers printed."""
        logs = self.node.directory.glob(f"log/pods/default_{self.name}-*/*/*.log")
        return "\n".join(path.read_text() for path in logs)


@contextmanager
def static_pod(where: Node, name: str, spec: dict[str, Any]) -> Iterator[Pod]:
    """Have the kubelet run a pod for a while."""
    file = where.static_pods / f"{name}.json"
    metadata = {"name": name, "namespace": "default"}
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
    try:
        yield Pod(where, name)
    finally:
        file.unlink()


@contextmanager
def agent(
    where: Node, helm: dict[str, str], directory: Path, name: str, *settings: str, command: str = "run"
) -> Iterator[Pod]:
    """The pod of the DaemonSet, as a static one: what would come from the API server lies in a directory."""
    spec, files = render(helm, "image.repository=localhost/tcpio-otel", "image.pullPolicy=Never", *settings)
    for file, text in files.items():
        (directory / file).write_text(text)
    del spec["serviceAccountName"]
    spec["restartPolicy"] = "Never"
    for volume in spec["volumes"]:
        if "configMap" in volume:
            del volume["configMap"]
            volume["hostPath"] = {"path": str(directory)}
    spec["containers"][0]["args"][0] = command
    with static_pod(where, name, spec) as pod:
        yield pod


@pytest.fixture(scope="module")
def talkers(here: Node) -> Iterator[Pod]:
    """A pod of two containers; one asks the other over loopback, again and again."""
    tools = {"image": node.TOOLS, "imagePullPolicy": "Never"}
    ask = f"while :; do wget -q -O /dev/null http://127.0.0.1:{PORT}/; sleep 0.2; done"
    server = {"name": "server", "command": ["httpd", "-f", "-p", str(PORT), "-h", "/www"], **tools}
    client = {"name": "client", "command": ["sh", "-c", ask], **tools}
    spec = {"terminationGracePeriodSeconds": 1, "containers": [server, client]}
    with static_pod(here, "talkers", spec) as pod:
        wait_for(lambda: pod.container("server") and pod.container("client"), "two containers")
        yield pod


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


@pytest.mark.parametrize("kind", SECCOMP)
def test_run(here: Node, helm: dict[str, str], talkers: Pod, tmp_path: Path, kind: str) -> None:
    """It records what other pods say on their loopback, by container and pod, with the rights that the chart gives."""
    settings = [f"seccompProfile.type={kind}", f"seccompProfile.localhostProfile={SECCOMP[kind]}"]
    with agent(here, helm, tmp_path, kind.lower(), *settings) as pod:
        wait_for(lambda: "recording to" in pod.said(), "the agent")
        container = pod.container("tcpio-otel")
        assert container, pod.said()
        time.sleep(2)  # of traffic
        found = status(container.pid)
        (files,) = here.directory.glob(f"lib/kubelet/pods/{container.pod_uid}/volumes/*/files")
        os.kill(container.pid, signal.SIGTERM)
        wait_for(lambda: not pod.container("tcpio-otel"), "the agent to end")
        records = said(files / "logs.jsonl", LOGS)
        told = pod.said()
    assert found["Seccomp"] == "2"
    assert found["NoNewPrivs"] == "1"
    assert found["CapEff"] == "0" * 16
    assert int(found["CapBnd"], 16) == sum(1 << number for number in CAPABILITIES)
    assert "UNACCOUNTED" not in told
    assert " = exported " in told
    of_port = [
        (resource, attributes)
        for resource, item in records
        if PORT in ((attributes := plain(item["attributes"]))["network.local.port"], attributes["network.peer.port"])
    ]
    for name in ("server", "client"):
        member = talkers.container(name)
        assert member
        own = [each for each in of_port if each[0].get("container.id") == member.identifier]
        assert {resource["k8s.pod.uid"].replace("-", "") for resource, _ in own} == {member.pod_uid.replace("-", "")}
        assert {resource["k8s.pod.qos_class"] for resource, _ in own} == {"BestEffort"}
        assert len(own) >= 10
        end = "network.local.port" if name == "server" else "network.peer.port"
        assert {attributes[end] for _, attributes in own} == {PORT}


def test_check(here: Node, helm: dict[str, str], tmp_path: Path) -> None:
    """`check` finds nothing amiss under the runtime's default profile, and all that takes SYSLOG."""
    with agent(here, helm, tmp_path, "check", command="check") as pod:
        wait_for(lambda: pod.said() and not pod.container("tcpio-otel"), "the check to end")
        told = pod.said()
    found = {words[1]: words[0] for line in told.splitlines() if (words := line.split(" ", 3)[3].split())}
    assert "NO" not in found.values(), told
    assert found["kallsyms"] == "ok", told
