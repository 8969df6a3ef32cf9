"""The real VictoriaLogs, built once, started for a test, and asked over its API."""

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

MODULE = "github.com/VictoriaMetrics/VictoriaLogs"
VERSION = "1.52.1"


def build() -> Path:
    """Its binary, built if it is not in the cache; raises what `programs` does."""
    package = f"{MODULE}/app/victoria-logs"
    return programs("victorialogs", MODULE, f"v{VERSION}", {"victoria-logs": package}, slow=True) / "victoria-logs"


@dataclass(frozen=True)
class VictoriaLogs:
    """One that is running."""

    url: str

    @property
    def endpoint(self) -> str:
        """Where a Collector sends to."""
        return self.url

    def query(self, query: str) -> list[dict[str, Any]]:
        """The rows that a LogsQL query finds; every value is a string."""
        return [json.loads(line) for line in get(f"{self.url}/select/logsql/query", query=query).splitlines()]

    def stats(self, query: str, *, over_time: bool) -> list[dict[str, Any]]:
        """The series, or the single figures, that a LogsQL query with a stats pipe finds in the last hour."""
        kind, step = ("stats_query_range", {"step": "20s"}) if over_time else ("stats_query", {})
        end = time.time()
        span = {"start": str(end - 3600), "end": str(end)} if over_time else {"time": str(end)}
        answer = get(f"{self.url}/select/logsql/{kind}", query=query, **span, **step)
        found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
        return found

    def flush(self) -> None:
        """Have what was sent be found by queries."""
        get(f"{self.url}/internal/force_flush")


@contextmanager
def started(directory: Path) -> Iterator[VictoriaLogs]:
    """Start it with an empty store in a directory, on loopback."""
    port = free_port()
    flags = [f"-storageDataPath={directory / 'victorialogs'}", f"-httpListenAddr=127.0.0.1:{port}"]
    with serving([build(), *flags], port, directory / "victorialogs.log") as url:
        yield VictoriaLogs(url)
