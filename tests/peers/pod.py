"""The container of a rendered pod, started as a kubelet and a runtime would: its mounts, variables and capabilities.

Its root is that of an image or, where none is given, an empty one with this machine's programs and this repository in
it, which saves building one. What is the runtime's own comes as containerd has it: namespaces for mounts, network and
cgroups, a /sys/fs/cgroup that begins at the pod, a /dev/shm, and no new privileges. Its own seccomp and LSM profiles
are missing; one of the pod's is loaded.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tcpio_otel.capture.probe import cgroup_root
from tests.peers.image import Image

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "helm" / "tcpio-otel"
CONFIGURATION = "/etc/tcpio-otel/tcpio-otel.yaml"
NODE = {"spec.nodeName": "node-a", "status.hostIP": "192.0.2.1"}
PROGRAMS = ("/usr", "/bin", "/lib", "/lib64", "/sbin", sys.prefix, sys.base_prefix, str(REPOSITORY))


def render(helm: Mapping[str, str], *settings: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The pod of the DaemonSet, and the files of its ConfigMap: for this host's cgroups and without an API server."""
    settings = (f"config.capture.cgroup=/host{cgroup_root()}", "config.kubernetes.enabled=false", *settings)
    command = ["helm", "template", "agent", str(CHART), *(f"--set={setting}" for setting in settings)]
    text = subprocess.run(command, env=helm, capture_output=True, text=True, check=True).stdout
    found = {found["kind"]: found for found in yaml.safe_load_all(text) if found}
    return found["DaemonSet"]["spec"]["template"]["spec"], found["ConfigMap"]["data"]


def _without_image(directory: Path) -> Iterator[str]:
    """Commands that put this machine's programs and this repository into `directory`."""
    q = shlex.quote
    yield f"mount -t tmpfs none {directory}"
    kept: list[str] = []
    for source in sorted(set(PROGRAMS)):  # what is within another comes after it
        if os.path.exists(source) and not any(source.startswith(f"{parent}/") for parent in kept):
            kept.append(source)
            yield f"mkdir -p {q(f'{directory}{source}')} && mount --rbind -o ro {q(source)} {q(f'{directory}{source}')}"
    yield f"mkdir -p {directory}/{{etc,proc,sys,dev}} && cp /etc/ld.so.cache {directory}/etc"


def _as_root_of(
    directory: Path, pod: Mapping[str, Any], files: Mapping[str, str], writable: Path, image: Image | None
) -> Iterator[str]:
    """Commands that make `directory` the root of the pod's container."""
    q = shlex.quote
    if image:
        yield f"mount --bind {q(str(image.root))} {directory}"
    else:
        yield from _without_image(directory)
    yield f"mount --rbind /proc {directory}/proc && mount --rbind /dev {directory}/dev"
    yield f"mount -t tmpfs -o size=64m,nosuid,nodev,noexec none {directory}/dev/shm"
    yield f"mount -t sysfs -o ro none {directory}/sys && mount -t cgroup2 -o ro none {directory}/sys/fs/cgroup"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in pod["containers"][0]["volumeMounts"]:
        volume, target = volumes[mount["name"]], f"{directory}{mount['mountPath']}"
        source = str(writable / mount["name"])
        if "configMap" in volume:
            Path(source).mkdir()
            for name, text in files.items():
                Path(source, name).write_text(text)
        elif "emptyDir" in volume:
            Path(source).mkdir()
        else:
            source = volume["hostPath"]["path"]
        make = f"touch {q(target)}" if os.path.isfile(source) else f"mkdir -p {q(target)}"
        yield f"{make} && mount --rbind {q(source)} {q(target)}"
        if mount.get("readOnly"):
            yield f"mount -o remount,bind,ro {q(target)}"
    if pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]:
        yield f"mount -o remount,bind,ro {directory}"


def _variables(pod: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, str]:
    """Those of the container; `fields` are what the downward API says."""
    given: dict[str, str] = {}
    for entry in pod["containers"][0]["env"]:
        text = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        given[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], text)
    return given


@contextmanager
def started(
    pod: Mapping[str, Any],
    files: Mapping[str, str],
    fields: Mapping[str, str],
    directory: Path,
    arguments: Sequence[str],
    profiles: Path | None = None,
    networks: Sequence[str] = ("--net",),
    image: Image | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """The container's process, with both its outputs in one pipe; killed at the end if it still runs.

    Args:
        pod: its spec; the one container has no Secrets.
        files: what its ConfigMap has.
        fields: what the downward API says.
        directory: where the volumes are kept that it can write to, each by its name.
        arguments: in place of those of the container.
        profiles: the kubelet's directory of seccomp profiles; it must be in the repository.
        networks: the options of `unshare` for a network namespace; none: the host's, from where a test's servers are
            reached.
        image: what the container's command and its root come from.
    """
    container = pod["containers"][0]
    security = container["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert not security["privileged"]
    kept = ",".join(["-all", *(f"+{name.lower()}" for name in security["capabilities"]["add"])])
    root, cgroup = directory / "root", cgroup_root() / f"tcpio-test-pod-{os.getpid()}"
    root.mkdir()
    cgroup.mkdir()
    inside = ["setpriv", f"--reuid={security['runAsUser']}", f"--bounding-set={kept}", "--inh-caps=-all"]
    inside += [] if security["allowPrivilegeEscalation"] else ["--no-new-privs"]
    if profiles and security["seccompProfile"]["type"] == "Localhost":
        profile = profiles / security["seccompProfile"]["localhostProfile"]
        inside += ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "tests.peers.seccomp", str(profile)]
    inside += [*(container["command"] if image else [sys.executable, "-m", "tcpio_otel.cli"]), *arguments]
    steps = ["set -e", *_as_root_of(root, pod, files, directory, image)]
    given = image.environment if image else {"PATH": os.environ["PATH"]}
    environment = [f"{name}={value}" for name, value in (given | _variables(pod, fields)).items()]
    steps += [f"exec chroot {root} {shlex.join(['env', '-i', *environment, *inside])}"]
    unshare = ["unshare", "--mount", "--cgroup", *networks, "bash", "-c", "; ".join(steps)]
    enter = f"echo $$ > {cgroup}/cgroup.procs; exec {shlex.join(unshare)}"
    process = subprocess.Popen(["bash", "-c", enter], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        cgroup.rmdir()


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process says until it says this."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    raise AssertionError("".join(said))


def talk() -> int:
    """Send something over loopback; the server's port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
    return port
