"""The container image: what is in it, and what the chart's pod does with it for a root."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tcpio_otel import __version__, privileges
from tests.integration.collector import collector
from tests.kernel.harness import plain
from tests.peers import helm as peer
from tests.peers import image as images
from tests.peers.go import or_skip
from tests.peers.image import REPOSITORY, Image
from tests.peers.kubernetes import build, control_plane
from tests.peers.pod import CONFIGURATION, NODE, render, started, talk, wait_for

PROTOCOLS = {"libbpf": "grpc", "bcc": "http/protobuf"}
"""What each image sends by: so both transports are seen to work."""

TOOLS = re.compile(
    r"(clang|llvm|gcc|g\+\+|cpp|cc|c\+\+|c99|as|ld|ar|make|pip)(-?[\d.]+)?|ld\.(bfd|gold|lld)|.*-gcc|.*-ld"
)

pytestmark = pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return or_skip(lambda: peer.environment(tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="module", params=PROTOCOLS)
def image(request: pytest.FixtureRequest) -> Iterator[Image]:
    """Each target of the Dockerfile."""
    with images.mounted(or_skip(lambda: images.build(request.param))) as made:
        yield made


@pytest.fixture
def loader(image: Image) -> str:
    """What the image is for."""
    return image.name.rpartition(":")[2]


@pytest.fixture(scope="module")
def plainly_built() -> Iterator[Image]:
    """What comes of a build without a target."""
    with images.mounted(or_skip(images.build)) as made:
        yield made


def files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file() or path.is_symlink())


def test_without_a_target(plainly_built: Image) -> None:
    """A plain build gives the image for kernels with BTF; nothing to compile with is in it, nor what builds leave."""
    root = plainly_built.root
    found = [path.relative_to(root) for path in files(root)]
    assert not [path for path in found if path.parent.name in ("bin", "sbin") and TOOLS.fullmatch(path.name)]
    assert not [path for path in found if path.suffix in (".h", ".a") or path.name.startswith(("libclang", "libLLVM"))]
    assert not [path for path in found if "cache" in path.parts and {"apt", "pip"} & set(path.parts)]
    assert not list((root / "var/lib/apt/lists").iterdir())
    assert not (root / "src").exists()
    assert not (root / "etc/pip.conf").exists()


def test_both_probes(image: Image, loader: str) -> None:
    """Each image has the object for libbpf, and the source for BCC; one has what compiles that."""
    (capture,) = image.root.glob("opt/tcpio-otel/lib/python3*/site-packages/tcpio_otel/capture")
    assert (capture / "tcpio.bpf.o").read_bytes().startswith(b"\x7fELF")
    assert (capture / "tcpio.bcc").exists()
    assert any(image.root.glob("usr/lib/*/libbcc.so.0")) == (loader == "bcc")


def test_what_it_says_of_itself(image: Image) -> None:
    """Registries and runtimes learn version and licences; it runs as the one user that is given capabilities."""
    assert image.config["Labels"].items() >= {
        "org.opencontainers.image.title": "tcpio-otel",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-only",
    }.items()  # fmt: skip
    assert image.config["User"] == "0"
    assert (image.config["Entrypoint"], image.config["Cmd"]) == (["tcpio-otel"], ["run"])


def test_licences(image: Image) -> None:
    """The texts of both come with it."""
    texts = {path.name: path for path in image.root.glob("opt/tcpio-otel/lib/python3*/**/tcpio_otel-*/licenses/**/*")}
    assert "Apache License" in texts["LICENSE"].read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in texts["COPYING"].read_text()


def test_version(image: Image, helm: dict[str, str], tmp_path: Path) -> None:
    """The chart's command finds the agent, of this version."""
    pod, configuration = render(helm)
    with started(pod, configuration, NODE, tmp_path, ["--version"], image=image) as process:
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, f"tcpio-otel {__version__}\n")


def test_check(image: Image, loader: str, helm: dict[str, str], tmp_path: Path) -> None:
    """`helm test` finds nothing amiss."""
    pod, configuration = render(helm, f"config.capture.loader={loader}")
    with started(pod, configuration, NODE, tmp_path, ["check", "-c", CONFIGURATION], image=image) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert not [line for line in said.splitlines() if line.startswith("NO")]


def test_run(image: Image, loader: str, helm: dict[str, str], tmp_path: Path) -> None:
    """On a read-only root, packets of the host are recorded by the image's own loader, and arrive at a Collector."""
    with collector(tmp_path) as receiver:
        protocol = PROTOCOLS[loader]
        port = receiver.grpc_port if protocol == "grpc" else receiver.http_port
        pod, configuration = render(
            helm,
            f"config.capture.loader={loader}",
            f"otlp.endpoint=http://127.0.0.1:{port}",
            f"otlp.protocol={protocol}",
        )
        arguments = ["run", "-c", CONFIGURATION]
        with started(pod, configuration, NODE, tmp_path, arguments, networks=(), image=image) as process:
            wait_for(process, "recording to")
            assert mount_options(process.pid)["/"].startswith("ro")
            ports = {talk() for _ in range(3)}
            threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        receiver.stop()
        assert all("CapEff:\t0000000000000000" in status for status in threads)
        records = [
            plain(record["attributes"]) for record in receiver.received("resourceLogs", "scopeLogs", "logRecords")
        ]
    for port in ports:
        flags = {
            record["tcp.flags"]
            for record in records
            if port in (record.get("network.local.port"), record.get("network.peer.port"))
        }
        assert {"SYN", "SYN|ACK"} <= flags


def test_pods_are_watched(image: Image, helm: dict[str, str], tmp_path: Path) -> None:
    """The image has the client of Kubernetes: by it the agent watches its node's pods at an API server."""
    or_skip(build)
    (tmp_path / "cluster").mkdir()
    with control_plane(tmp_path / "cluster") as cluster:
        spec = {"nodeName": NODE["spec.nodeName"], "containers": [{"name": "main", "image": "main"}]}
        cluster.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "one"}, "spec": spec})
        known = tmp_path / "known"
        known.mkdir()
        (known / "ca.crt").write_bytes(cluster.ca_file.read_bytes())
        kubeconfig = yaml.safe_load(cluster.kubeconfig(known / "kubeconfig").read_text())
        kubeconfig["clusters"][0]["cluster"]["certificate-authority"] = "/known/ca.crt"
        (known / "kubeconfig").write_text(json.dumps(kubeconfig))
        pod, configuration = render(
            helm, "config.kubernetes.enabled=true", "config.kubernetes.kubeconfig=/known/kubeconfig"
        )
        pod["volumes"].append({"name": "known", "hostPath": {"path": str(known)}})
        pod["containers"][0]["volumeMounts"].append({"name": "known", "mountPath": "/known", "readOnly": True})
        arguments = ["run", "-c", CONFIGURATION]
        with started(pod, configuration, NODE, tmp_path, arguments, networks=(), image=image) as process:
            wait_for(process, "watching the pods of node node-a: 1 known")
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said


def test_without_a_builder(tmp_path: Path) -> None:
    """`make image` says what it needs where there is none of it."""
    for program in ("make", "sed", "id"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    result = subprocess.run(
        ["make", "image"], cwd=REPOSITORY, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode
    assert result.stdout == "None of docker, podman and buildah works here: please install one\n"


def test_bcc_is_missed(helm: dict[str, str], plainly_built: Image, tmp_path: Path) -> None:
    """Where the plain image would need BCC, it says so in one line, and ends."""
    pod, configuration = render(helm, "config.capture.loader=bcc")
    with started(pod, configuration, NODE, tmp_path, ["run", "-c", CONFIGURATION], image=plainly_built) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 3, said
    assert "BCC" in said.splitlines()[-1]


def mount_options(pid: int) -> dict[str, str]:
    """Options of the mounts that a process sees, by where they are."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {line.split()[4]: line.split()[5] for line in lines}
