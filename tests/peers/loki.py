"""The real Loki, built once, started for a test as one process, and asked over its API."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.collector import free_port
from tests.peers.go import programs
from tests.peers.server import get, serving

MODULE = "github.com/grafana/loki/v3"
VERSION = "3.7.8"
PUSH_VERSION = "v0.0.0-20250630054201-94c0ba7b0952"
"""Of its module pkg/push, as its go.mod requires it."""

Labels = dict[str, str]


def build() -> Path:
    """Its binary, built if it is not in the cache; raises what `programs` does."""
    return (
        programs("loki", MODULE, f"v{VERSION}", {"loki": f"{MODULE}/cmd/loki"}, sibling=PUSH_VERSION, slow=True)
        / "loki"
    )


@dataclass(frozen=True)
class Loki:
    """One that is running."""

    url: str

    @property
    def endpoint(self) -> str:
        """Where a Collector sends to."""
        return self.url

    def query(self, query: str) -> list[tuple[Labels, str]]:
        """The samples of a metric query, or the lines of the last hour with their labels, oldest first."""
        path, parameters = f"{self.url}/loki/api/v1/query", {"query": query}
        if query.lstrip().startswith("{"):
            now = time.time_ns()
            span = {"start": str(now - 3600 * 10**9), "end": str(now), "direction": "forward", "limit": "1000"}
            path, parameters = f"{path}_range", parameters | span
        found: list[dict[str, Any]] = json.loads(get(path, **parameters))["data"]["result"]
        if found and "metric" in found[0]:
            return [(sample["metric"], sample["value"][1]) for sample in found]
        lines = [(when, each["stream"], line) for each in found for when, line in each["values"]]
        return [(labels, line) for _, labels, line in sorted(lines, key=lambda entry: int(entry[0]))]


def _configuration(port: int, grpc_port: int, store: Path) -> dict[str, Any]:
    """One process, no accounts, files in a directory."""
    address = "127.0.0.1"
    addresses = {"http_listen_address": address, "grpc_listen_address": address}
    ring = {"instance_addr": address, "kvstore": {"store": "inmemory"}}
    period = {"prefix": "index_", "period": "24h"}
    schema = {"from": "2020-01-01", "store": "tsdb", "object_store": "filesystem", "schema": "v13", "index": period}
    return {
        "auth_enabled": False,
        "analytics": {"reporting_enabled": False},
        # Without a scheduler: its ring is looked at too rarely for a test.
        "query_scheduler": {"use_scheduler_ring": False},
        "frontend_worker": {"frontend_address": f"{address}:{grpc_port}"},
        "server": {**addresses, "http_listen_port": port, "grpc_listen_port": grpc_port},
        "common": {"path_prefix": str(store), "replication_factor": 1, "ring": ring},
        "schema_config": {"configs": [schema]},
        "storage_config": {"filesystem": {"directory": str(store / "chunks")}},
    }


@contextmanager
def started(directory: Path) -> Iterator[Loki]:
    """Start it with an empty store in a directory, on loopback."""
    port = free_port()
    configuration = directory / "loki.yaml"
    configuration.write_text(json.dumps(_configuration(port, free_port(), directory / "loki")))
    with serving([build(), f"-config.file={configuration}"], port, directory / "loki.log") as url:
        yield Loki(url)
