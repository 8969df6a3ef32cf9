"""What the chart gives a pod is enough for the agent, and none of it can go."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from tcpio_otel.capture.libbpf import Library
from tcpio_otel.capture.probe import cgroup_root
from tests.peers import helm as peer
from tests.peers.go import or_skip
from tests.peers.kubernetes import build, control_plane
from tests.peers.pod import CHART, CONFIGURATION, NODE, render, started, talk, wait_for

Start = Callable[..., AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Helm is found."""
    return or_skip(lambda: peer.environment(tmp_path_factory.mktemp("helm")))


@pytest.fixture
def start(helm: dict[str, str], tmp_path: Path) -> Start:
    """Starts the pod of the DaemonSet with a command, perhaps without a capability."""

    def start(*arguments: str, without: str = "") -> AbstractContextManager[subprocess.Popen[str]]:
        pod, files = render(helm)
        if without:
            pod["containers"][0]["securityContext"]["capabilities"]["add"].remove(without)
        return started(pod, files, NODE, tmp_path, arguments)

    return start


def logs(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each log record's attributes, and those of its Resource."""

    def plain(attributes: list[dict[str, Any]]) -> dict[str, Any]:
        return {entry["key"]: next(iter(entry["value"].values())) for entry in attributes}

    for line in (directory / "logs.jsonl").read_text().splitlines():
        for resource in json.loads(line)["resourceLogs"]:
            for scope in resource["scopeLogs"]:
                for record in scope["logRecords"]:
                    yield plain(record["attributes"]), plain(resource["resource"]["attributes"])


def test_check(start: Start) -> None:
    """`helm test` finds nothing amiss, and the host's cgroups where the chart mounts them."""
    with start("check", "-c", CONFIGURATION) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"/host{cgroup_root()}" in said
    assert not [line for line in said.splitlines() if line.startswith("NO")]


def test_run(start: Start, tmp_path: Path) -> None:
    """From a pod's namespaces, what the host sends is recorded, and said to be the node's; no capability is left."""
    with start("run", "-c", CONFIGURATION) as process:
        wait_for(process, "recording to")
        port = str(talk())
        time.sleep(1)  # more than the latency of a ring
        threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert len(threads) > 1
    assert all("CapEff:\t0000000000000000" in status for status in threads)
    found = [resource for record, resource in logs(tmp_path / "files") if port in map(str, record.values())]
    assert len(found) >= 10  # at both ends: a handshake, data, and how it ended
    assert {resource["host.name"] for resource in found} == {"node-a"}
    machine_id = Path("/etc/machine-id").read_text().strip()
    assert {resource["host.id"] for resource in found} == {machine_id}
    assert "python" in {resource["service.name"][:6] for resource in found}


def test_watch(start: Start) -> None:
    """The command of the notes shows packets."""
    with start("watch", "-c", CONFIGURATION) as process:
        wait_for(process, "RADDR:RPORT")
        port = talk()
        wait_for(process, f"127.0.0.1:{port}")


@pytest.mark.parametrize("capability", ["BPF", "PERFMON", "NET_ADMIN"])
def test_each_capability_is_needed(start: Start, capability: str) -> None:
    """Without any one of them the agent ends, and says which is missing."""
    with start("run", "-c", CONFIGURATION, without=capability) as process:
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 3
    assert f"CAP_{capability}" in said


def test_without_syslog(start: Start) -> None:
    """Without it the agent runs, and `check` says what it costs where the kernel then hides its symbols."""
    with start("check", "-c", CONFIGURATION, without="SYSLOG") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 1:
        assert "--  kallsyms" in said


@pytest.fixture
def profile() -> Path:
    """The chart's seccomp profile."""
    if find_library("seccomp") is None:
        pytest.skip("libseccomp is not installed: no profile can be loaded")
    return CHART / "seccomp" / "tcpio-otel.json"


def test_seccomp_profile_forbids(profile: Path) -> None:
    """Under it even root makes no namespace and mounts nothing."""
    for command in (["unshare", "--uts", "true"], ["mount", "-t", "tmpfs", "none", "/mnt"]):
        under = [sys.executable, "-m", "tests.peers.seccomp", str(profile), *command]
        result = subprocess.run(
            ["setpriv", "--no-new-privs", *under], cwd=CHART.parents[1], capture_output=True, text=True, check=False
        )
        assert result.returncode
        assert "not permitted" in result.stderr or "denied" in result.stderr, result.stderr


def test_seccomp_profile(helm: dict[str, str], profile: Path, tmp_path: Path) -> None:
    """Under the chart's Localhost profile the agent loads the probe, records and sends; the filter is in force."""
    pod, files = render(helm, "seccompProfile.type=Localhost", f"seccompProfile.localhostProfile={profile.name}")
    with started(pod, files, NODE, tmp_path, ["run", "-c", CONFIGURATION], profiles=profile.parent) as process:
        wait_for(process, "recording to")
        port = str(talk())
        time.sleep(1)
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert "Seccomp:\t2" in status
    assert any(port in map(str, record.values()) for record, _ in logs(tmp_path / "files"))


def test_published_contexts(helm: dict[str, str], tmp_path: Path) -> None:
    """The read-only mount of the host's /sys/fs/bpf lets the agent at a map there: it sees that this one is foreign."""
    mounted = tmp_path / "bpf"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", mounted], check=True)
    try:
        (mounted / "otel").mkdir()
        descriptor = Library().bpf_map_create(9, b"traces_ctx_v1", 4, 4, 16, None)
        pin = ctypes.CDLL("libbpf.so.1").bpf_obj_pin
        assert pin(descriptor, str(mounted / "otel" / "traces_ctx_v1").encode()) == 0
        os.close(descriptor)
        pod, files = render(helm, "config.correlation.published_contexts=true")
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "host-bpf")
        assert volume["hostPath"]["path"] == "/sys/fs/bpf"
        volume["hostPath"]["path"] = str(mounted)
        with started(pod, files, NODE, tmp_path, ["run", "-c", CONFIGURATION]) as process:
            wait_for(process, "/sys/fs/bpf/otel/traces_ctx_v1 has another layout")
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_pods_are_watched(helm: dict[str, str], tmp_path: Path) -> None:
    """With the service account of the chart the agent watches its node's pods, and keeps their names in its volume."""
    or_skip(build)
    (tmp_path / "cluster").mkdir()
    with control_plane(tmp_path / "cluster") as cluster:
        for node in ("node-a", "node-b"):
            spec = {"nodeName": node, "containers": [{"name": "main", "image": "main"}]}
            cluster.create("/api/v1/namespaces/default/pods", {"metadata": {"name": f"on-{node}"}, "spec": spec})
        kubeconfig = cluster.kubeconfig(tmp_path / "kubeconfig")
        command = ["helm", "install", "agent", str(CHART), f"--kubeconfig={kubeconfig}"]
        subprocess.run(command, env=helm, capture_output=True, check=True)
        pod, files = render(helm, "config.kubernetes.enabled=true")
        assert pod["automountServiceAccountToken"]
        # What the API server and the kubelet add to a pod.
        account = tmp_path / "account"
        account.mkdir()
        (account / "token").write_text(cluster.token("default", pod["serviceAccountName"]))
        (account / "ca.crt").write_bytes(cluster.ca_file.read_bytes())
        (account / "token").chmod(0o600)
        mount = {"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
        pod["volumes"].append({"name": "token", "hostPath": {"path": str(account)}})
        pod["containers"][0]["volumeMounts"].append(mount)
        server = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
        pod["containers"][0]["env"] += [{"name": name, "value": value} for name, value in server.items()]
        with started(pod, files, NODE, tmp_path, ["run", "-c", CONFIGURATION], networks=()) as process:
            wait_for(process, "watching the pods of node node-a: 1 known")
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    kept = json.loads((tmp_path / "cache" / "pods.json").read_text())
    assert [item["metadata"]["name"] for item in kept["items"]] == ["on-node-a"]
