"""The pods of a node, watched at a real API server: what changes, what stands in the way, and what is kept."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import kubernetes
import pytest

from tcpio_otel.attribution.kubernetes import NodePods, connected
from tcpio_otel.attribution.pods import Wanted, attributes_of
from tcpio_otel.errors import EnvironmentFault
from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane, build, control_plane

LABELS = Wanted(labels=["tier"])


@pytest.fixture(scope="module", autouse=True)
def _control_plane_is_built() -> None:
    or_skip(build)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server without a cache of its own, so that what was compacted away is gone at once."""
    with control_plane(tmp_path_factory.mktemp("cluster"), "--watch-cache=false") as running:
        yield running


@pytest.fixture
def node() -> str:
    """A node that no other test has pods on."""
    return f"node-{uuid.uuid4().hex[:8]}"


def create(cluster: ControlPlane, node: str, name: str, **labels: str) -> str:
    """Create a pod; its uid."""
    spec = {"nodeName": node, "containers": [{"name": "main", "image": "main:1"}]}
    pod = cluster.create(
        "/api/v1/namespaces/default/pods", {"metadata": {"name": name, "labels": labels}, "spec": spec}
    )
    return str(pod["metadata"]["uid"])


def remove(cluster: ControlPlane, name: str) -> None:
    """Delete a pod at once."""
    answer = cluster.call("DELETE", f"/api/v1/namespaces/default/pods/{name}?gracePeriodSeconds=0")
    assert answer.status == 200, answer.data


def soon(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait until a condition holds: a list tells of pods before the watch after it says that all is well."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tier(pods: NodePods, uid: str) -> str | None:
    """The label of a pod, as it is known; None while it is not."""
    pod = pods[uid]
    return None if pod is None else attributes_of(pod, "")["k8s.pod.label.tier"]


def watching(cluster: ControlPlane, node: str, directory: Path, **options: Any) -> NodePods:
    """A watch of a node's pods, as admin or with a token."""
    token = options.pop("token", None)
    api = connected(cluster.kubeconfig(directory / "kubeconfig", token))
    return NodePods(api, node, LABELS, **options)


def test_pods_come_change_and_go(cluster: ControlPlane, node: str, tmp_path: Path) -> None:
    """More than one page of them, older than the watch and younger; those of another node are none of ours."""
    old = [create(cluster, node, f"{node}-{number}", tier="a") for number in range(12)]
    other = create(cluster, f"{node}-other", f"{node}-elsewhere", tier="a")
    clock = [0.0]
    with watching(cluster, node, tmp_path, clock=lambda: clock[0]) as pods:
        soon(lambda: all(tier(pods, uid) == "a" for uid in old))
        young = create(cluster, node, f"{node}-young", tier="a")
        soon(lambda: tier(pods, young) == "a")
        path = f"/api/v1/namespaces/default/pods/{node}-3"
        cluster.call("PATCH", path, {"metadata": {"labels": {"tier": "b"}}})
        soon(lambda: tier(pods, old[3]) == "b")
        version = pods.version
        remove(cluster, f"{node}-5")
        last = create(cluster, node, f"{node}-last", tier="a")
        soon(lambda: tier(pods, last) == "a")
        assert tier(pods, old[5]) == "a"  # its last records may still come
        assert pods.version > version
        clock[0] = 1000.0
        remove(cluster, f"{node}-last")
        soon(lambda: pods[old[5]] is None)
        assert pods[other] is None
        soon(lambda: pods.fault == "")


def test_a_server_that_restarts_costs_nothing(
    cluster: ControlPlane, node: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is known stays known; what changed meanwhile is learnt, and each turn is said."""
    caplog.set_level("INFO")
    first = create(cluster, node, f"{node}-first", tier="a")
    with watching(cluster, node, tmp_path) as pods:
        soon(lambda: tier(pods, first) == "a")
        cluster.stop()
        soon(lambda: pods.fault)
        assert tier(pods, first) == "a"
        cluster.start()
        second = create(cluster, node, f"{node}-second", tier="a")
        remove(cluster, f"{node}-first")
        cluster.compact()
        soon(lambda: tier(pods, second) == "a")
        soon(lambda: pods.fault == "")
    said = [record.getMessage() for record in caplog.records if record.name.endswith("watch")]
    assert [turn for turn, _ in groupby(message.split(":")[0] for message in said)] == [
        f"watching the pods of node {node}",
        f"the pods of node {node} are not up to date; the API server",
        f"watching the pods of node {node}",
    ]


def test_a_history_that_is_gone_is_begun_anew(cluster: ControlPlane, node: str, tmp_path: Path) -> None:
    """410 Gone: the pods are listed again, and those that went meanwhile are found out."""
    first = create(cluster, node, f"{node}-first", tier="a")
    with watching(cluster, node, tmp_path) as pods:
        soon(lambda: tier(pods, first) == "a")
        pods._watch._position = "1"
        second = create(cluster, node, f"{node}-second", tier="a")
        cluster.compact()
        cluster.restart()  # ends the watch, and the next one asks for what is gone
        soon(lambda: tier(pods, second) == "a")
        third = create(cluster, node, f"{node}-third", tier="a")
        soon(lambda: tier(pods, third) == "a")
        soon(lambda: pods.fault == "")


def test_what_is_not_allowed_is_said_and_mended_without_a_restart(
    cluster: ControlPlane, node: str, tmp_path: Path
) -> None:
    """RBAC that comes late, and a token that expires and is replaced in its file."""
    uid, name = create(cluster, node, f"{node}-first", tier="a"), f"reader-{node}"
    cluster.account(name)
    token = cluster.token("default", name)
    with watching(cluster, node, tmp_path, token=token) as pods:
        soon(lambda: pods.fault)
        assert re.match(r"403 pods is forbidden: .*cannot list resource", pods.fault)
        assert pods[uid] is None
        cluster.allow(name, {"resources": ["pods"], "verbs": ["list", "watch"]})
        soon(lambda: tier(pods, uid) == "a")
        soon(lambda: pods.fault == "")


def test_a_token_that_expires_is_read_again(
    cluster: ControlPlane, node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod has it: the kubelet writes another one in time, and the agent goes on without a restart."""
    uid, name, files = (
        create(cluster, node, f"{node}-first", tier="a"),
        f"brief-{node}",
        kubernetes.config.incluster_config,
    )
    cluster.account(name)
    cluster.allow(name, {"resources": ["pods"], "verbs": ["list", "watch"]})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.port))
    monkeypatch.setattr(files, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(files, "SERVICE_CERT_FILENAME", str(cluster.ca_file))
    (tmp_path / "token").write_text(cluster.token("default", name, seconds=10))
    with NodePods(connected(None), node, LABELS) as pods:
        soon(lambda: tier(pods, uid) == "a")
        time.sleep(10)
        cluster.restart()
        soon(lambda: pods.fault.startswith("401"))
        (tmp_path / "token").write_text(cluster.token("default", name))
        young = create(cluster, node, f"{node}-young", tier="a")
        soon(lambda: tier(pods, young) == "a", 200)
        soon(lambda: pods.fault == "")


def test_pods_are_kept_across_restarts(cluster: ControlPlane, node: str, tmp_path: Path) -> None:
    """Known before the server has said a word; of their objects only what attributes are made of is kept."""
    uid = create(cluster, node, f"{node}-first", tier="a")
    cache = tmp_path / "pods.json"
    with watching(cluster, node, tmp_path, cache=cache) as pods:
        soon(lambda: tier(pods, uid) == "a")
    assert {"containers", "managedFields"}.isdisjoint(re.findall(r'"(\w+)":', cache.read_text()))
    with NodePods(
        connected(cluster.kubeconfig(tmp_path / "kubeconfig", "nobody's")), node, LABELS, cache=cache
    ) as pods:
        assert tier(pods, uid) == "a"
        soon(lambda: pods.fault)
        assert pods.fault.startswith("401")
        assert tier(pods, uid) == "a"
    with watching(cluster, f"{node}-other", tmp_path, cache=cache) as pods:
        soon(lambda: pods._watch._position)
        assert pods[uid] is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"node": "NODE", "items": [{"metadata": {}}]}', '{"node": "NODE"}']
)
def test_a_file_that_was_cut_short_is_no_obstacle(
    cluster: ControlPlane, node: str, tmp_path: Path, content: str
) -> None:
    """It is said, and the server is asked."""
    uid, cache = create(cluster, node, f"{node}-first", tier="a"), tmp_path / "pods.json"
    cache.write_text(content.replace("NODE", node))
    with watching(cluster, node, tmp_path, cache=cache) as pods:
        soon(lambda: tier(pods, uid) == "a")
    assert json.loads(cache.read_text())["node"] == node


def test_no_way_to_the_server_is_one_line(tmp_path: Path) -> None:
    """Neither a pod's account nor the file that was named."""
    for kubeconfig in (None, tmp_path / "absent", tmp_path):
        with pytest.raises(EnvironmentFault) as caught:
            connected(kubeconfig)
        assert "\n" not in str(caught.value)
