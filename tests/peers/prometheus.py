"""The real Prometheus, built once, started for a test, and asked over its API. It takes metrics by OTLP."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from tests.integration.collector import free_port
from tests.kernel.harness import wait_for
from tests.peers.go import programs
from tests.peers.server import get, serving

MODULE = "github.com/prometheus/prometheus"
VERSION = "0.316.0"
"""Of the module: Prometheus 3.16."""


def build() -> Path:
    """Its binary, built if it is not in the cache; raises what `programs` does."""
    return (
        programs("prometheus", MODULE, f"v{VERSION}", {"prometheus": f"{MODULE}/cmd/prometheus"}, slow=True)
        / "prometheus"
    )


Labels = dict[str, str]


@dataclass(frozen=True)
class Prometheus:
    """One that is running."""

    url: str

    @property
    def endpoint(self) -> str:
        """Where a Collector sends to."""
        return self.url

    def query(self, query: str) -> list[tuple[Labels, float]]:
        """The samples of an instant query; of a native histogram, how many it has counted."""
        answer = json.loads(get(f"{self.url}/api/v1/query", query=query))
        return [
            (each["metric"], float(each["value"][1] if "value" in each else each["histogram"][1]["count"]))
            for each in answer["data"]["result"]
        ]


@contextmanager
def started(directory: Path, scraped: str = "") -> Iterator[Prometheus]:
    """Start it with an empty store in a directory, on loopback; it scrapes one agent (host and port), or nobody."""
    port = free_port()
    configuration = directory / "prometheus.yml"
    job = {"job_name": "tcpio-otel", "honor_labels": True, "scrape_interval": "3s", "scrape_timeout": "3s"}
    job["convert_classic_histograms_to_nhcb"] = True
    job["static_configs"] = [{"targets": [scraped]}]
    configuration.write_text(json.dumps({"scrape_configs": [job] if scraped else []}))
    flags = [f"--config.file={configuration}", f"--storage.tsdb.path={directory / 'prometheus'}"]
    flags += [f"--web.listen-address=127.0.0.1:{port}", "--web.enable-otlp-receiver"]
    flags += ["--query.lookback-delta=1h"]  # filled once, it may be asked long after
    with serving([build(), *flags], port, directory / "prometheus.log") as url:
        wait_for(lambda: _is_ready(url), "Prometheus to be ready")
        yield Prometheus(url)


def _is_ready(url: str) -> bool:
    """Whether it has opened its store: it listens before, and refuses."""
    try:
        get(f"{url}/-/ready")
    except HTTPError:
        return False
    return True
