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

ALONE = {"elasticsearch": "0.120.0", "opensearch": "0.138.0"}
"""Exporters in a Collector of their own, with the last version of each that a module proxy was found to have."""

CONFIGURATIONS = REPOSITORY / "config" / "collector"


def build() -> Path:
    """The Collector's binary, built if it is not in the cache.

    Raises:
        LookupError: there is no Go here to build it with, or the build failed; the message says which.
    """
    asked_for(BINARY.parent)
    return made_of(COMPONENTS, BINARY)


def build_alone(name: str) -> Path:
    """The Collector with the exporter of one name, and nothing else; raises what `build` does."""
    version = ALONE[name]
    binary = CACHE / f"collector-{name}-{version}" / BINARY.name
    asked_for(binary)
    components = {
        "receivers": COMPONENTS["receivers"],
        "processors": [f"{CORE}/processor/memorylimiterprocessor"],
        "exporters": [f"{CONTRIB}/exporter/{name}exporter"],
    }
    return made_of(components, binary, version)


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
    (name, *_) = names
    binary = build_alone(name) if name in ALONE else build()
    made = Collector(free_port(), free_port(), directory, None, environment=environment, binary=binary)
    made.shown = tuple(CONFIGURATIONS / f"{name}.yaml" for name in names)
    telemetry = {"metrics": {"level": "none"}, "logs": {"level": "warn"}}
    top = {"receivers": made.receivers, "service": {"telemetry": telemetry}}
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
