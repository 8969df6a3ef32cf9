"""A real Kubernetes node on this machine: containerd, runc, CNI, kubelet; with a control plane, a whole cluster.

It has a network namespace, a mount namespace and cgroups of its own, below which everything that it starts is found and
ended. So nothing of it stays: no bridge, no rule, no mount. No registry is asked: images are imported.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import trustme

from tests.kernel.harness import wait_for
from tests.kernel.hosts import Host, host
from tests.peers.go import programs
from tests.peers.kubernetes import VERSION, ControlPlane, control_plane

NAME = "node-a"
ADDRESS = "10.213.0.2"
PODS = "10.213.64.0/24"
SERVICES, API_SERVICE = "10.213.128.0/20", "10.213.128.1"
"""Nobody else sees these: they are in the node's own network namespace."""

PLUGINS = Path("/usr/lib/cni")
TOOLS = "localhost/tcpio-otel-test/busybox:1"
"""An image with busybox: what a sandbox waits in, and what tests talk by."""

PATIENCE_S = 120.0

# What the kubelet would set for the whole machine; it finds it set.
KERNEL = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def build() -> Path:
    """The directory of kubelet, kube-proxy and controllers, built if they are not in the cache.

    Raises:
        LookupError: they cannot be built here, or what a node needs besides is missing; the message says what.
    """
    if os.geteuid():
        raise LookupError("needs root: a node mounts, and makes namespaces and cgroups")
    for program in ("containerd", "runc", "nft", "busybox"):
        if shutil.which(program) is None:
            raise LookupError(f"{program} is not installed: no node can run")
    if b"/ld-" in Path(shutil.which("busybox") or "").read_bytes()[:4096]:
        raise LookupError("busybox is not static (busybox-static is): no node can run")
    if not (PLUGINS / "ptp").exists():
        raise LookupError(f"no CNI plugins in {PLUGINS} (containernetworking-plugins): no node can run")
    major, minor, patch = VERSION.split(".")
    stamps = {"gitVersion": f"v{VERSION}", "gitMajor": major, "gitMinor": minor}
    names = ("kubelet", "kube-controller-manager", "kube-scheduler", "kube-proxy")
    return programs(
        "kubernetes-node",
        "k8s.io/kubernetes",
        f"v{VERSION}",
        {name: f"k8s.io/kubernetes/cmd/{name}" for name in names},
        link=" ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamps.items()),
        sibling=f"v0.{minor}.{patch}",
    )


class Cgroups:
    """A cgroup of a node's own, in each hierarchy that there is."""

    def __init__(self, name: str) -> None:
        kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
        roots = {kind: [Path(point) for point in kinds if kinds[point] == kind] for kind in ("cgroup", "cgroup2")}
        if not roots["cgroup2"]:
            raise LookupError("no cgroup v2 is mounted: no node can run")
        self.is_v1 = bool(roots["cgroup"])
        self._unified = roots["cgroup2"][0]
        if not self.is_v1:
            (self._unified / "cgroup.subtree_control").write_text("+cpu +cpuset +memory +pids")
        self._all = [root / name for root in (*roots["cgroup"], self._unified)]
        self.home = self._unified / name / "system"

    def __enter__(self) -> Self:
        for each in self._all:
            each.mkdir()
        self.home.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        whole = self.home.parent
        (whole / "cgroup.kill").write_text("1")
        wait_for(lambda: "populated 0" in (whole / "cgroup.events").read_text(), "the node's processes to end")
        for each in self._all:
            for directory, _, _ in os.walk(each, topdown=False):
                _remove(Path(directory))


def _remove(cgroup: Path) -> None:
    """Processes leave a hierarchy of v1 a moment after they have left v2's."""
    deadline = time.monotonic() + 10
    while True:
        try:
            cgroup.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@dataclass(frozen=True)
class Container:
    """A container that runs, as the runtime has it."""

    identifier: str
    pid: int
    name: str
    pod: str
    pod_uid: str


class Node:
    """A node whose runtime is up.

    Attributes:
        directory: where it keeps everything.
        authority: of the kubelet's certificate, and of those that it takes from clients.
        static_pods: a directory; what is put there runs.
        profiles: the kubelet's directory of seccomp profiles.
    """

    def __init__(self, directory: Path, network: Host, cgroups: Cgroups, authority: trustme.CA) -> None:
        self.directory, self.network, self.authority = directory, network, authority
        self.static_pods = directory / "static"
        self.profiles = directory / "lib" / "kubelet" / "seccomp"
        self._cgroups = cgroups
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for made in (self.static_pods, self.profiles, directory / "kernel", directory / "log"):
            made.mkdir(parents=True)
        self._mounts = self._new_mounts()

    def _new_mounts(self) -> str:
        """Options of `nsenter` for a mount namespace in which a node's usual places are this one's."""
        steps = ["set -e", "mount --make-rshared /", "mount -t tmpfs run /run"]
        steps += [f"mount --bind {self.directory}/{name} /var/{name}" for name in ("lib", "log")]
        for name, value in KERNEL.items():
            file = self.directory / "kernel" / name.replace("/", "-")
            file.write_text(value)
            steps.append(f"mount --bind {file} /proc/sys/{name}")
        steps += ["echo ready", "exec sleep infinity"]
        holder = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", "\n".join(steps)], stdout=subprocess.PIPE, preexec_fn=self._enter
        )
        self._processes["holder"] = holder
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n", "the node's mounts cannot be made"
        return f"--mount=/proc/{holder.pid}/ns/mnt"

    def _enter(self) -> None:
        (self._cgroups.home / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, *command: str, **options: Any) -> str:
        """Run a command among the node's mounts and in its network; what it printed."""
        with self.network.inside():
            result = subprocess.run(
                ["nsenter", self._mounts, *command], capture_output=True, text=True, check=False, **options
            )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout

    def start(self, name: str, *command: str | Path, ready: Callable[[], bool] = lambda: True) -> None:
        """Start a program of the node's, and wait until it is ready.

        Raises:
            RuntimeError: it does not come up; the message has the end of its log.
        """
        with self._log(name).open("ab") as log, self.network.inside():
            process = subprocess.Popen(
                ["nsenter", self._mounts, *command], stdout=log, stderr=log, preexec_fn=self._enter
            )
        self._processes[name] = process
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                end = "\n".join(self._log(name).read_text().splitlines()[-20:])
                raise RuntimeError(f"{name} does not come up ({process.returncode}):\n{end}")
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        """Stop a program of the node's."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Reap what has ended with the cgroup, and remove the images."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.directory / "lib" / "containerd", ignore_errors=True)

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def load(self, archive: Path) -> None:
        """Take the images out of an archive as Docker or the OCI lay it out."""
        self.run("ctr", "--namespace=k8s.io", "images", "import", str(archive))
        archive.unlink()

    def containers(self) -> list[Container]:
        """Those of pods, without what the runtime itself keeps for each pod."""
        found = []
        for line in self.run("ctr", "--namespace=k8s.io", "tasks", "list").splitlines()[1:]:
            identifier, pid, status = line.split()
            known = json.loads(self.run("ctr", "--namespace=k8s.io", "containers", "info", identifier))["Labels"]
            if status == "RUNNING" and known["io.cri-containerd.kind"] == "container":
                label = "io.kubernetes.{}".format
                name, pod, uid = (known[label(each)] for each in ("container.name", "pod.name", "pod.uid"))
                found.append(Container(identifier, int(pid), name, pod, uid))
        return found

    def start_runtime(self) -> None:
        """Start containerd, and give it the images that are always needed."""
        network = {
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": PODS}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        networks = self.directory / "networks"
        networks.mkdir()
        (networks / "pods.conflist").write_text(json.dumps(network))
        configuration = self.directory / "containerd.toml"
        configuration.write_text(
            f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{TOOLS}"
restrict_oom_score_adj = true  # lowering it takes CAP_SYS_RESOURCE, which root may lack
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = "{networks}"
"""
        )
        answers = ["nsenter", self._mounts, "ctr", "version"]
        self.start(
            "containerd",
            "containerd",
            f"--config={configuration}",
            ready=lambda: subprocess.run(answers, capture_output=True, check=False).returncode == 0,
        )
        self.load(busybox(self.directory / "busybox.tar"))

    def start_kubelet(self, cluster: ControlPlane | None) -> None:
        """Start the kubelet, for static pods alone or as a node of a cluster."""
        certificate, client_ca = self.directory / "kubelet.pem", self.directory / "kubelet-ca.pem"
        self.authority.issue_cert(ADDRESS, NAME).private_key_and_cert_chain_pem.write_to_path(certificate)
        self.authority.cert_pem.write_to_path(client_ca)
        asks = cluster is not None
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": asks, "cacheTTL": "1s"},
                "x509": {"clientCAFile": str(client_ca)},
            },
            "authorization": {
                "mode": "Webhook" if asks else "AlwaysAllow",
                "webhook": {"cacheAuthorizedTTL": "1s", "cacheUnauthorizedTTL": "1s"},
            },
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(certificate),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroups.home.parent.name}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "staticPodPath": str(self.static_pods),
            "fileCheckFrequency": "1s",
            "evictionHard": {"nodefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "makeIPTablesUtilChains": False,
            "resolvConf": "",
            "healthzPort": 0,
        }
        file = self.directory / "kubelet.json"
        file.write_text(json.dumps(configuration))
        kubeconfig = [f"--kubeconfig={cluster.kubeconfig(self.directory / 'kubeconfig')}"] if cluster else []
        flags = [f"--config={file}", f"--hostname-override={NAME}", f"--node-ip={ADDRESS}"]
        self.start("kubelet", build() / "kubelet", *flags, *kubeconfig)

    def join(self, cluster: ControlPlane) -> None:
        """Start the kubelet and what else makes a cluster; return when the node is ready."""
        kubeconfig = f"--kubeconfig={cluster.kubeconfig(self.directory / 'kubeconfig')}"
        own = cluster.directory
        self.start(
            "kube-controller-manager", build() / "kube-controller-manager", kubeconfig, "--leader-elect=false",
            "--secure-port=0", "--bind-address=127.0.0.1", f"--root-ca-file={own / 'ca.pem'}",
            f"--service-account-private-key-file={own / 'accounts.pem'}",
        )  # fmt: skip
        self.start("kube-scheduler", build() / "kube-scheduler", kubeconfig, "--leader-elect=false", "--secure-port=0")
        self.start_kubelet(cluster)
        proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": PODS,
            "clientConnection": {"kubeconfig": str(self.directory / "kubeconfig")},
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "hostnameOverride": NAME,
        }
        file = self.directory / "kube-proxy.json"
        file.write_text(json.dumps(proxy))
        self.start("kube-proxy", build() / "kube-proxy", f"--config={file}")
        wait_for(lambda: self._is_ready(cluster), "the node to be ready", PATIENCE_S)

    def leave(self) -> None:
        """Stop what `join` has started; containers go on."""
        for name in [name for name in self._processes if name not in ("holder", "containerd")]:
            self.stop(name)

    @staticmethod
    def _is_ready(cluster: ControlPlane) -> bool:
        found = cluster.call("GET", f"/api/v1/nodes/{NAME}")
        if found.status != 200:
            return False
        conditions = found.json()["status"].get("conditions", [])
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def busybox(path: Path) -> Path:
    """An image with busybox, which waits unless told otherwise, as an archive."""
    program = shutil.which("busybox")
    assert program
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.add(os.path.realpath(program), "bin/busybox")
        for name in ("sh", "sleep", "wget", "httpd", "nc", "cat"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        for name in ("tmp", "www"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o777
            archive.addfile(directory)
    content = layer.getvalue()
    configuration = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [TOOLS], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("config.json", json.dumps(configuration).encode()),
            ("layer.tar", content),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@contextmanager
def machine(directory: Path, authority: trustme.CA) -> Iterator[Node]:
    """A machine with containerd, and no kubelet yet; the caller is in its network.

    Raises:
        LookupError: it cannot be had here; the message says why.
        RuntimeError: something does not come up.
    """
    build()
    name = f"tcpio-node-{os.getpid()}"
    with ExitStack() as stack:
        network = stack.enter_context(host(name))
        stack.enter_context(network.inside())
        network.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "wire")  # that leads nowhere
        network.run("ip", "link", "set", "wire", "up")
        network.run("ip", "addr", "add", f"{ADDRESS}/24", "dev", "eth0")
        network.run("ip", "link", "set", "eth0", "up")
        network.run("ip", "route", "add", "default", "dev", "eth0")
        network.sysctl("ipv4/ip_forward", 1)
        cgroups = Cgroups(name)
        made: list[Node] = []
        stack.callback(lambda: [node.close() for node in made])
        stack.enter_context(cgroups)
        made.append(Node(directory, network, cgroups, authority))
        made[0].start_runtime()
        yield made[0]


@contextmanager
def node(directory: Path) -> Iterator[tuple[Node, ControlPlane]]:
    """A cluster of one node that is ready; the caller is in its network.

    Raises:
        LookupError: it cannot be had here; the message says why.
        RuntimeError: something does not come up.
    """
    (directory / "cluster").mkdir()
    with machine(directory, authority := trustme.CA()) as made:
        client, ca = directory / "kubelet-client.pem", directory / "api-kubelet-ca.pem"
        certificate = authority.issue_cert("apiserver", common_name="apiserver", organization_name="system:masters")
        certificate.private_key_and_cert_chain_pem.write_to_path(client)
        authority.cert_pem.write_to_path(ca)
        flags = [
            f"--service-cluster-ip-range={SERVICES}", f"--kubelet-client-certificate={client}",
            f"--kubelet-client-key={client}", f"--kubelet-certificate-authority={ca}",
            "--kubelet-preferred-address-types=InternalIP",
        ]  # fmt: skip
        with control_plane(directory / "cluster", *flags, address=ADDRESS, service=API_SERVICE) as cluster:
            try:
                made.join(cluster)
                yield made, cluster
            finally:
                made.leave()  # the API server would wait for whoever still asks it
