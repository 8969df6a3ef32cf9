"""All backends that can run here, filled by the Collectors that we show with what the agent recorded."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml

from tests.integration.captured import Story
from tests.peers import clickhouse, jaeger, loki, prometheus, victorialogs
from tests.peers.collector_contrib import CONFIGURATIONS, send, shown

PEERS = {"sql": clickhouse, "logsql": victorialogs, "logql": loki, "http": jaeger, "promql": prometheus}
"""By the language in which they are asked."""

TOGETHER = (("clickhouse",), ("victorialogs", "jaeger", "prometheus"), ("loki",))
"""What one Collector can fill: of those that keep the same signal it would fill the last."""


@dataclass(frozen=True)
class Backends:
    """They are running, and have everything."""

    running: dict[str, Any] = field(default_factory=dict)
    """By language."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why others are not, likewise."""

    def ask(self, language: str, query: str, trace: str = "") -> list[Any]:
        """The answer to a query in one of the languages of the page; `trace` is what the query calls so.

        Where there is nobody to ask, the test is skipped, and says why.
        """
        backend = self.of(language)
        match language:
            case "sql":
                answer = backend.query(query, trace=trace)
            case "http":
                found = re.fullmatch(r"GET /api/(\w+)\?(.*)", query)
                assert found, query
                answer = backend.get(found[1], **dict(parse_qsl(found[2])))
            case _:
                answer = backend.query(query.replace("{trace}", trace))
        assert isinstance(answer, list)
        return answer

    def of(self, language: str) -> Any:
        """Who understands a language; where that is nobody, the test is skipped."""
        if language in self.missing:
            pytest.skip(self.missing[language])
        return self.running[language]


def _taken(names: list[str]) -> set[str]:
    """The signals that the configurations of that name have a pipeline for."""
    shown_ones = [yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text()) for name in names]
    return {pipeline.partition("/")[0] for one in shown_ones for pipeline in one["service"]["pipelines"]}


@contextmanager
def backends(directory: Path, story: Story) -> Iterator[Backends]:
    """Start them, and have Collectors fill them."""
    made = Backends()
    with ExitStack() as stack:
        for language, peer in PEERS.items():
            try:
                made.running[language] = stack.enter_context(peer.started(directory))
            except LookupError as reason:
                made.missing[language] = str(reason)
        names = {PEERS[language].__name__.rpartition(".")[2]: one for language, one in made.running.items()}
        # Compressed blocks are the affair of ClickHouse's server, which chdb is without.
        overrides = {"exporters": {"clickhouse": {"compress": "none"}}}
        endpoints = {f"{name.upper()}_ENDPOINT": one.endpoint for name, one in names.items()}
        for together in TOGETHER:
            filled = [name for name in together if name in names]
            if not filled:
                continue
            with shown(
                directory, *filled, overrides=overrides if "clickhouse" in filled else {}, **endpoints
            ) as filling:
                for signal in _taken(filled):
                    send(filling, signal, story.requests(signal))
        if "logsql" in made.running:
            made.running["logsql"].flush()
        yield made
