"""A Collector with every component that the configurations name which we show; it takes longer to build."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.collector import CACHE, CONTRIB, VERSION, Collector, free_port, made_of
from tests.peers.go import asked_for
from tests.peers.server import PATIENCE_S, REPOSITORY

CORE = "go.opentelemetry.io/collector"
COMPONENTS = {
    "receivers": [f"{CORE}/receiver/otlpreceiver"],
    "processors": [
        f"{CORE}/processor/memorylimiterprocessor",
        f"{CONTRIB}/processor/filterprocessor",
        f"{CONTRIB}/processor/tailsamplingprocessor",
        f"{CONTRIB}/processor/transformprocessor",
    ],
    "exporters": [
        f"{CORE}/exporter/otlpexporter",
        f"{CORE}/exporter/otlphttpexporter",
        f"{CONTRIB}/exporter/clickhouseexporter",
        f"{CONTRIB}/exporter/fileexporter",
        f"{CONTRIB}/exporter/loadbalancingexporter",
    ],
    "connectors": [
        f"{CONTRIB}/connector/servicegraphconnector v0.158.0",  # the module proxy has no checksum of v0.159.0
        f"{CONTRIB}/connector/spanmetricsconnector",
    ],
    "extensions": [f"{CONTRIB}/extension/storage/filestorage"],
}
BINARY = CACHE / f"collector-contrib-{VERSION}-{sum(map(len, COMPONENTS.values()))}" / "otelcol-tcpio-shown"

ELASTIC_COMPONENTS = {
    "receivers": COMPONENTS["receivers"],
    "processors": [f"{CORE}/processor/memorylimiterprocessor"],
    "exporters": [f"{CONTRIB}/exporter/elasticsearchexporter", f"{CONTRIB}/exporter/opensearchexporter"],
}
"""In a Collector of their own, since not every module proxy has these."""
ELASTIC_BINARY = CACHE / f"collector-elastic-{VERSION}-{sum(map(len, ELASTIC_COMPONENTS.values()))}" / BINARY.name

CONFIGURATIONS = REPOSITORY / "config" / "collector"


def build() -> Path:
    """The Collector's binary, built if it is not in the cache.

    Raises:
        LookupError: there is no Go here to build it with, or the build failed; the message says which.
    """
    asked_for(BINARY.parent)
    return made_of(COMPONENTS, BINARY)


def build_elastic() -> Path:
    """The same, for Elasticsearch and OpenSearch; raises what `build` does."""
    asked_for(ELASTIC_BINARY.parent)
    return made_of(ELASTIC_COMPONENTS, ELASTIC_BINARY)


@contextmanager
def shown(
    directory: Path, *names: str, overrides: dict[str, Any] | None = None, **environment: str
) -> Iterator[Collector]:
    """Run configurations that we show, together as they stand, but for where they listen and what a test overrides.

    Args:
        directory: for what it says and keeps.
        names: of the files in config/collector, without their ending.
        overrides: what goes on top of them.
        environment: variables that they read.
    """
    made = Collector(free_port(), free_port(), directory, None, environment=environment, binary=build())
    made.shown = tuple(CONFIGURATIONS / f"{name}.yaml" for name in names)
    endpoints = {"grpc": made.grpc_port, "http": made.http_port}
    protocols = {name: {"endpoint": f"127.0.0.1:{port}"} for name, port in endpoints.items()}
    telemetry = {"metrics": {"level": "none"}, "logs": {"level": "warn"}}
    top = {"receivers": {"otlp": {"protocols": protocols}}, "service": {"telemetry": telemetry}}
    made.configuration = merged(top, overrides or {})
    made.start()
    try:
        yield made
    finally:
        made.stop()


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two configurations as a Collector puts them together: mappings key by key, of all else the other's."""
    both = {
        key: merged(one[key], value) if isinstance(value, dict) and isinstance(one.get(key), dict) else value
        for key, value in other.items()
    }
    return {**one, **both}


def send(collector: Collector, signal: str, requests: list[bytes]) -> None:
    """Send OTLP/JSON requests to a Collector; asserts that it takes them."""
    for request in requests:
        url, headers = f"http://127.0.0.1:{collector.http_port}/v1/{signal}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, request, headers), timeout=PATIENCE_S) as response:
            assert json.loads(response.read()).get("partialSuccess", {}) == {}
