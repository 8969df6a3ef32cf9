"""A real OpenTelemetry Collector, built once by its own builder, started for a test, and asked what it received."""

import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.peers.server import listening

VERSION = "0.159.0"
CACHE = Path(os.environ.get("TCPIO_CACHE", Path.home() / ".cache" / "tcpio-otel"))
CONTRIB = "github.com/open-telemetry/opentelemetry-collector-contrib"
COMPONENTS = {
    "receivers": ["go.opentelemetry.io/collector/receiver/otlpreceiver"],
    "processors": [
        "go.opentelemetry.io/collector/processor/memorylimiterprocessor",
        f"{CONTRIB}/processor/k8sattributesprocessor",
    ],
    "exporters": ["go.opentelemetry.io/collector/exporter/otlpexporter", f"{CONTRIB}/exporter/fileexporter"],
}
BINARY = CACHE / f"collector-{VERSION}-{sum(map(len, COMPONENTS.values()))}" / "otelcol-tcpio-test"
"""Another set of components is another Collector: its directory says how many they are."""


def build() -> Path:
    """The Collector's binary, built if it is not in the cache.

    Raises:
        LookupError: there is no Go here to build it with, or the build failed; the message says which.
    """
    return made_of(COMPONENTS, BINARY)


def made_of(components: dict[str, list[str]], binary: Path, version: str = VERSION) -> Path:
    """A Collector made of these components, built if it is not in the cache; raises what `build` does.

    A component is a module's path, with a version after a space where it is not the Collector's own.
    """
    if binary.exists():
        return binary
    if shutil.which("go") is None:
        raise LookupError("Go is not installed: a Collector cannot be built")
    binary.parent.mkdir(parents=True, exist_ok=True)
    manifest = binary.parent / "manifest.yaml"
    modules = {
        kind: [{"gomod": module if " " in module else f"{module} v{version}"} for module in named]
        for kind, named in components.items()
    }
    manifest.write_text(json.dumps({"dist": {"name": binary.name, "output_path": str(binary.parent)}, **modules}))
    builder = CACHE / f"builder-{version}"
    environment = {**os.environ, "GOBIN": str(builder), "CGO_ENABLED": "0"}
    for command in (
        ["go", "install", f"go.opentelemetry.io/collector/cmd/builder@v{version}"],
        [str(builder / "builder"), "--config", str(manifest)],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            said = " / ".join(result.stderr.strip().splitlines()[-2:])
            raise LookupError(f"the Collector does not build here: {said}")
    return binary


def free_port() -> int:
    """A port of loopback that nobody listens on, and that the kernel gives to nobody who connects."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return int(probe.getsockname()[1])


@dataclass
class Collector:
    """A Collector that is running."""

    grpc_port: int
    http_port: int
    directory: Path
    tls: dict[str, str] | None
    process: subprocess.Popen[bytes] | None = None
    configuration: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    binary: Path = BINARY
    shown: tuple[Path, ...] = ()
    """Files that it reads first: what it is configured with then comes on top of them."""
    address: str = "127.0.0.1"
    """Where it listens; asked it is over loopback."""

    @property
    def receivers(self) -> dict[str, Any]:
        """OTLP by both protocols, with TLS or without."""
        tls = {"tls": self.tls} if self.tls else {}
        ports = {"grpc": self.grpc_port, "http": self.http_port}
        protocols = {name: {"endpoint": f"{self.address}:{port}", **tls} for name, port in ports.items()}
        return {"otlp": {"protocols": protocols}}

    def _default(self) -> dict[str, Any]:
        """OTLP in, and one file out."""
        pipeline = {"receivers": ["otlp"], "exporters": ["file"]}
        return {
            "receivers": self.receivers,
            "exporters": {"file": {"path": str(self.directory / "received.json"), "append": True}},
            "service": {
                "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
                "pipelines": dict.fromkeys(("logs", "traces", "metrics"), pipeline),
            },
        }

    def start(self) -> None:
        """Start it, and wait until it listens."""
        path = self.directory / "collector.yaml"
        path.write_text(json.dumps(self.configuration or self._default()))
        files = [argument for file in (*self.shown, path) for argument in ("--config", str(file))]
        log = self.directory / "collector.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [self.binary, *files], stdout=output, stderr=output, env={**os.environ, **self.environment}
            )
        for port in (self.grpc_port, self.http_port):
            listening(self.process, port, log)

    def stop(self) -> None:
        """Stop it; it writes out what it has."""
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def received(self, resources: str, scopes: str, items: str) -> list[dict[str, Any]]:
        """The items of a signal that it has written: all, once it was stopped; before, those of whole lines."""
        found = []
        for line in (self.directory / "received.json").read_text().rpartition("\n")[0].splitlines():
            for resource in json.loads(line).get(resources, []):
                for scope in resource[scopes]:
                    found += scope[items]
        return found


@contextmanager
def collector(directory: Path, tls: dict[str, str] | None = None, address: str = "127.0.0.1") -> Iterator[Collector]:
    """Start a Collector with OTLP in by gRPC and HTTP, and a file out."""
    running = Collector(free_port(), free_port(), directory, tls, address=address)
    running.start()
    try:
        yield running
    finally:
        running.stop()
