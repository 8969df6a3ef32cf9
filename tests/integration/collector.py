"""A real OpenTelemetry Collector, built once by its own builder, started for a test, and asked what it received."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = "0.159.0"
CACHE = Path(os.environ.get("TCPIO_CACHE", Path.home() / ".cache" / "tcpio-otel"))
CONTRIB = "github.com/open-telemetry/opentelemetry-collector-contrib"
COMPONENTS = {
    "receivers": ["go.opentelemetry.io/collector/receiver/otlpreceiver"],
    "processors": [f"{CONTRIB}/processor/k8sattributesprocessor"],
    "exporters": ["go.opentelemetry.io/collector/exporter/otlpexporter", f"{CONTRIB}/exporter/fileexporter"],
}
# Another set of components is another Collector.
BINARY = CACHE / f"collector-{VERSION}-{sum(map(len, COMPONENTS.values()))}" / "otelcol-tcpio-test"
MANIFEST = json.dumps(
    {
        "dist": {"name": BINARY.name, "output_path": str(BINARY.parent)},
        **{kind: [{"gomod": f"{module} v{VERSION}"} for module in modules] for kind, modules in COMPONENTS.items()},
    }
)


def build() -> Path:
    """The Collector's binary, built if it is not in the cache.

    Raises:
        LookupError: there is no Go here to build it with, or the build failed; the message says which.
    """
    if BINARY.exists():
        return BINARY
    if shutil.which("go") is None:
        raise LookupError("Go is not installed: a Collector cannot be built")
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    manifest = BINARY.parent / "manifest.yaml"
    manifest.write_text(MANIFEST)
    environment = {**os.environ, "GOBIN": str(CACHE / "bin"), "CGO_ENABLED": "0"}
    for command in (
        ["go", "install", f"go.opentelemetry.io/collector/cmd/builder@v{VERSION}"],
        [str(CACHE / "bin" / "builder"), "--config", str(manifest)],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LookupError(f"the Collector does not build here: {result.stderr.strip().splitlines()[-1]}")
    return BINARY


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
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

    def _default(self) -> dict[str, Any]:
        """OTLP in by both protocols, with TLS or without, and one file out."""
        tls = {"tls": self.tls} if self.tls else {}
        protocols = {
            name: {"endpoint": f"127.0.0.1:{port}", **tls}
            for name, port in (("grpc", self.grpc_port), ("http", self.http_port))
        }
        pipeline = {"receivers": ["otlp"], "exporters": ["file"]}
        return {
            "receivers": {"otlp": {"protocols": protocols}},
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
        with (self.directory / "collector.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, "--config", path], stdout=log, stderr=log, env={**os.environ, **self.environment}
            )
        deadline = time.monotonic() + 30
        for port in (self.grpc_port, self.http_port):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert self.process.poll() is None, (self.directory / "collector.log").read_text()
                    assert time.monotonic() < deadline, "the Collector does not listen"
                    time.sleep(0.05)

    def stop(self) -> None:
        """Stop it; it writes out what it has."""
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def received(self, resources: str, scopes: str, items: str) -> list[dict[str, Any]]:
        """The items of a signal that it has written, once it was stopped."""
        found = []
        for line in (self.directory / "received.json").read_text().splitlines():
            for resource in json.loads(line).get(resources, []):
                for scope in resource[scopes]:
                    found += scope[items]
        return found


@contextmanager
def collector(directory: Path, tls: dict[str, str] | None = None) -> Iterator[Collector]:
    """Start a Collector with OTLP in by gRPC and HTTP, and a file out."""
    running = Collector(free_port(), free_port(), directory, tls)
    running.start()
    try:
        yield running
    finally:
        running.stop()
