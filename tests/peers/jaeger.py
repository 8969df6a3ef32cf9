"""The real Jaeger, built once, started for a test with its spans in memory, and asked over its API."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.collector import free_port
from tests.peers.go import programs
from tests.peers.server import get, serving

MODULE = "github.com/jaegertracing/jaeger"
VERSION = "1.76.0"
"""Of the module: that is the version of Jaeger 1, and in the same commit cmd/jaeger is Jaeger 2.13."""


def build() -> Path:
    """Its binary, built if it is not in the cache; raises what `programs` does."""
    return programs("jaeger", MODULE, f"v{VERSION}", {"jaeger": f"{MODULE}/cmd/jaeger"}, slow=True) / "jaeger"


@dataclass(frozen=True)
class Jaeger:
    """One that is running."""

    url: str
    otlp_port: int

    @property
    def endpoint(self) -> str:
        """Where a Collector sends to."""
        return f"127.0.0.1:{self.otlp_port}"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer."""
        return json.loads(get(f"{self.url}/api/{path}", **parameters))["data"]


def _configuration(otlp: int, query: int, unused: int) -> dict[str, Any]:
    """OTLP in, by gRPC; the API out."""
    return {
        "extensions": {
            "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 10_000}}}},
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": {"endpoint": f"127.0.0.1:{query}"},
                "grpc": {"endpoint": f"127.0.0.1:{unused}"},
            },
        },
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": f"127.0.0.1:{otlp}"}}}},
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query"],
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
            "telemetry": {"metrics": {"level": "none"}},
        },
    }


@contextmanager
def started(directory: Path) -> Iterator[Jaeger]:
    """Start it on loopback."""
    otlp, query, unused = free_port(), free_port(), free_port()
    configuration = directory / "jaeger.yaml"
    configuration.write_text(json.dumps(_configuration(otlp, query, unused)))
    with serving([build(), "--config", configuration], query, directory / "jaeger.log") as url:
        yield Jaeger(url, otlp)
