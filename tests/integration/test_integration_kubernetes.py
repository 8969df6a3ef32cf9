"""The Collector that we show, reading from a real API server, adds what it knows of pods to what the agent sends."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcpio_otel import privileges
from tcpio_otel.capture.probe import cgroup_root
from tests.integration.collector import BINARY, Collector, free_port
from tests.kernel.cgroups import (
    LOGS,
    MEMBER,
    NAMES,
    PORT,
    SERVER,
    SPANS,
    Tree,
    at_client,
    go_on,
    identifier,
    running,
    said,
)
from tests.kernel.harness import agent, new_namespace
from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane, build, control_plane

SHOWN = Path(__file__).parents[2] / "config" / "collector" / "kubernetes.yaml"
PODS = "/api/v1/namespaces/default/pods"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server."""
    if missing := privileges.missing_to_load():
        pytest.skip(f"needs {', '.join(f'CAP_{name.name}' for name in missing)}: run the tests as root")
    or_skip(build)
    with control_plane(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def enriching(cluster: ControlPlane, directory: Path) -> Collector:
    """The Collector as it is shown, but for where it listens, whom it asks as, and where it writes."""
    shown = yaml.safe_load(SHOWN.read_text())
    made = Collector(free_port(), free_port(), directory, None)
    protocols = shown["receivers"]["otlp"]["protocols"]
    protocols["grpc"]["endpoint"] = f"127.0.0.1:{made.grpc_port}"
    protocols["http"]["endpoint"] = f"127.0.0.1:{made.http_port}"
    (processor,) = shown["processors"].values()
    processor["auth_type"] = "kubeConfig"
    shown["exporters"] = {"file": {"path": str(directory / "received.json")}}
    for pipeline in shown["service"]["pipelines"].values():
        pipeline["exporters"] = ["file"]
    shown["service"]["telemetry"] = {"metrics": {"level": "none"}}
    made.configuration = shown
    made.environment = {"KUBECONFIG": str(cluster.kubeconfig(directory / "kubeconfig"))}
    return made


def test_the_configuration_that_we_show_is_valid() -> None:
    """As it stands, for the Collector itself."""
    result = subprocess.run(
        [BINARY, "validate", "--config", SHOWN], capture_output=True, text=True, check=False,
        env={**os.environ, "OTLP_ENDPOINT": "gateway:4317"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_collector_names_our_pods(cluster: ControlPlane, tmp_path: Path) -> None:
    """By container id and by pod uid, for packets and spans; what is no pod's stays as it was."""
    tree, container = Tree(cgroup_root()), identifier()
    metadata: dict[str, Any] = {"name": "web-5c6f-x", "labels": {"pod-template-hash": "5c6f"}}
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5c6f", "uid": str(uuid.uuid4())}
    metadata["ownerReferences"] = [{**owner, "controller": True}]
    spec = {"nodeName": "node-1", "containers": [{"name": "main", "image": "main:1"}]}
    uid = cluster.create(PODS, {"metadata": metadata, "spec": spec})["metadata"]["uid"]
    status = {"name": "main", "containerID": f"containerd://{container}", "image": "main:1", "imageID": "x"}
    body = {"status": {"podIP": "192.0.2.9", "containerStatuses": [{**status, "ready": True, "restartCount": 0}]}}
    assert cluster.call("PATCH", f"{PODS}/web-5c6f-x/status", body).status == 200
    receiver = enriching(cluster, tmp_path)
    receiver.start()
    try:
        home, pause = tree.make(f"test-{uuid.uuid4().hex}.slice"), identifier()
        cgroup, sandbox = (tree.make(NAMES["containerd"](uid, each)) for each in (container, pause))
        flags = ["--otlp-endpoint", f"http://127.0.0.1:{receiver.http_port}", "--port", str(PORT)]
        with (
            new_namespace() as namespace,
            agent(tmp_path / "agent", "run", *flags),
            running(namespace, SERVER, str(PORT), str(home)),
            running(namespace, MEMBER, str(PORT), str(cgroup), "", str(home)) as member,
            running(namespace, MEMBER, str(PORT), str(sandbox), "", str(home)) as other,
        ):
            go_on(member)
            go_on(other)
    finally:
        receiver.stop()
        tree.close()
    for keys in (LOGS, SPANS):
        found = at_client(said(tmp_path / "received.json", keys))
        assert {whose["container.id"] for whose, _ in found} == {container, pause}
        for whose, _ in found:
            assert (whose["k8s.pod.name"], whose["k8s.namespace.name"]) == ("web-5c6f-x", "default")
            assert (whose["k8s.node.name"], whose["k8s.pod.uid"]) == ("node-1", uid)
            assert whose["k8s.replicaset.name"] == "web-5c6f"
            named = "main" if whose["container.id"] == container else None
            assert whose.get("k8s.container.name") == named
    hosts = [whose for whose, _ in said(tmp_path / "received.json", LOGS) if "container.id" not in whose]
    assert hosts
    assert not any("k8s.pod.name" in whose for whose in hosts)
