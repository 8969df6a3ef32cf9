"""The control plane that other tests rely on does what a cluster's does."""

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from urllib3.exceptions import HTTPError

from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane, build, control_plane

PODS = "/api/v1/namespaces/default/pods"


@pytest.fixture(scope="module", autouse=True)
def _control_plane_is_built() -> None:
    or_skip(build)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def create_pod(cluster: ControlPlane, name: str, node: str) -> str:
    """Create a pod on a node; the version of it that was stored."""
    spec = {"nodeName": node, "containers": [{"name": "main", "image": "main"}]}
    pod = cluster.create(PODS, {"metadata": {"name": name}, "spec": spec})
    return str(pod["metadata"]["resourceVersion"])


def names(cluster: ControlPlane, node: str) -> list[str]:
    """The pods of a node."""
    found = cluster.call("GET", f"/api/v1/pods?fieldSelector=spec.nodeName={node}").json()
    return [pod["metadata"]["name"] for pod in found["items"]]


def create_account(cluster: ControlPlane, name: str) -> None:
    """Create a service account that may read pods in its own namespace."""
    group = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
    metadata = {"metadata": {"name": name}}
    cluster.create("/api/v1/namespaces/default/serviceaccounts", metadata)
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    cluster.create(f"{group}/roles", {**metadata, "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": "default"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    cluster.create(f"{group}/rolebindings", {**metadata, "subjects": [subject], "roleRef": role})


def watch(cluster: ControlPlane, version: str) -> dict[str, Any]:
    """The one thing that a watch from a version says."""
    path = f"{PODS}?watch=1&timeoutSeconds=1&resourceVersion={version}"
    (line,) = cluster.call("GET", path).data.splitlines()
    event: dict[str, Any] = json.loads(line)
    return event


def wait_until_refused(cluster: ControlPlane, token: str) -> None:
    deadline = time.monotonic() + 30
    while cluster.call("GET", PODS, token=token).status != 401:
        assert time.monotonic() < deadline, "the token is not refused"
        time.sleep(0.2)


def test_pods_of_a_node(cluster: ControlPlane) -> None:
    """A pod is listed on the node that its spec names, and on no other."""
    create_pod(cluster, "here", "node-a")
    create_pod(cluster, "there", "node-b")
    assert names(cluster, "node-a") == ["here"]


def test_status_of_a_pod(cluster: ControlPlane) -> None:
    """A test can write the address that a kubelet would have written."""
    create_pod(cluster, "addressed", "node-c")
    status = {"status": {"podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}]}}
    answer = cluster.call("PATCH", f"{PODS}/addressed/status", status)
    assert answer.json()["status"]["podIP"] == "10.0.0.7"


def test_role_of_an_account(cluster: ControlPlane) -> None:
    """A service account with a role for pods lists those of its namespace, and nothing else."""
    create_account(cluster, "reader")
    token = cluster.token("default", "reader")
    refused = ["/api/v1/pods", "/api/v1/namespaces/default/secrets", f"{PODS}/here"]
    assert cluster.call("GET", PODS, token=token).status == 200
    assert [cluster.call("GET", path, token=token).status for path in refused] == [403, 403, 403]
    assert cluster.call("GET", PODS, token="nobody's").status == 401


def test_token_expires(cluster: ControlPlane) -> None:
    """A token of one second is good at first and refused soon after."""
    create_account(cluster, "brief")
    token = cluster.token("default", "brief", seconds=1)
    assert cluster.call("GET", PODS, token=token).status == 200
    wait_until_refused(cluster, token)


def test_token_of_a_deleted_account(cluster: ControlPlane) -> None:
    """A token is refused once its account is deleted."""
    create_account(cluster, "gone")
    token = cluster.token("default", "gone")
    cluster.call("DELETE", "/api/v1/namespaces/default/serviceaccounts/gone")
    wait_until_refused(cluster, token)


def test_restart(cluster: ControlPlane) -> None:
    """A restarted server has the same pods, takes its earlier tokens, and ends a watch from before with 410 Gone."""
    old = create_pod(cluster, "kept", "node-d")
    create_pod(cluster, "newer", "node-e")
    create_account(cluster, "kept")
    token = cluster.token("default", "kept")
    cluster.restart()
    assert names(cluster, "node-d") == ["kept"]
    assert cluster.call("GET", PODS, token=token).status == 200
    assert watch(cluster, old)["object"]["code"] == 410


def test_open_watch_at_stop(cluster: ControlPlane) -> None:
    """A watch that is open when the server stops ends soon, and a stopped server answers nobody."""
    with ThreadPoolExecutor() as executor:
        ended = executor.submit(cluster.call, "GET", f"{PODS}?watch=1&timeoutSeconds=50")
        time.sleep(0.5)
        cluster.stop()
        assert ended.result(20).status == 200
    with pytest.raises(HTTPError):
        cluster.call("GET", PODS)
    cluster.start()


def test_compaction(tmp_path: Path) -> None:
    """Without the server's cache, a watch from a version that was compacted away ends with 410 Gone."""
    with control_plane(tmp_path, "--watch-cache=false") as cluster:
        old = create_pod(cluster, "first", "node-a")
        create_pod(cluster, "second", "node-a")
        assert watch(cluster, old)["object"]["metadata"]["name"] == "second"
        cluster.compact()
        assert watch(cluster, old)["object"]["code"] == 410


def test_server_that_does_not_start(tmp_path: Path) -> None:
    """The error has the end of the server's log, and nothing is left running."""
    message = r"kube-apiserver ended with 1:\n(.*\n)*.*no-such-flag"
    with pytest.raises(RuntimeError, match=message), control_plane(tmp_path, "--no-such-flag"):
        pass
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, capture_output=True).stdout


def test_kubeconfig(cluster: ControlPlane, tmp_path: Path) -> None:
    """The kubeconfig file lets kubectl in as admin."""
    file = cluster.kubeconfig(tmp_path / "kubeconfig")
    command = [str(cluster.kubectl), f"--kubeconfig={file}", "auth", "whoami"]
    assert "system:masters" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
