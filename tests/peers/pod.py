"""The container of a rendered pod, started as a kubelet and a runtime would: its mounts, variables and capabilities.

There is no image: its root is an empty one, read-only, with this machine's programs and this repository in it. What is
the runtime's own comes as containerd has it: namespaces for mounts, network and cgroups, a /sys/fs/cgroup that begins
at the pod, and no new privileges. Its own seccomp and LSM profiles are missing; one of the pod's is loaded.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tcpio_otel.capture.probe import cgroup_root

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("/usr", "/bin", "/lib", "/lib64", "/sbin", sys.prefix, sys.base_prefix, str(REPOSITORY))


def _as_root_of(directory: Path, pod: Mapping[str, Any], files: Mapping[str, str], writable: Path) -> Iterator[str]:
    """Commands that make `directory` the root of the pod's container."""
    q = shlex.quote
    yield f"mount -t tmpfs none {directory}"
    kept: list[str] = []
    for source in sorted(set(PROGRAMS)):  # what is within another comes after it
        if os.path.exists(source) and not any(source.startswith(f"{parent}/") for parent in kept):
            kept.append(source)
            yield f"mkdir -p {q(f'{directory}{source}')} && mount --rbind -o ro {q(source)} {q(f'{directory}{source}')}"
    yield f"mkdir -p {directory}/{{etc,proc,sys,dev}} && cp /etc/ld.so.cache {directory}/etc"
    yield f"mount --rbind /proc {directory}/proc && mount --rbind /dev {directory}/dev"
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
        yield f"mount -o remount,ro {directory}"


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
    inside += [sys.executable, "-m", "tcpio_otel.cli", *arguments]
    steps = ["set -e", *_as_root_of(root, pod, files, directory)]
    steps += [f"exec chroot {root} {shlex.join(inside)}"]
    unshare = ["unshare", "--mount", "--cgroup", *networks, "bash", "-c", "; ".join(steps)]
    enter = f"echo $$ > {cgroup}/cgroup.procs; exec {shlex.join(unshare)}"
    environment = {"PATH": os.environ["PATH"], **_variables(pod, fields)}
    process = subprocess.Popen(
        ["bash", "-c", enter], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        cgroup.rmdir()
