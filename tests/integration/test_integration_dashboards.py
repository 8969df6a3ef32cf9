"""The Grafana dashboards that we show: generated, they name what the agent sends, and backends answer their queries."""

import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tcpio_otel import names
from tests.generators import generator
from tests.integration.backends import Backends
from tests.integration.captured import LOST_ANSWERS, LOST_REQUESTS, TURNED_AWAY, Story
from tests.kernel.harness import plain
from tests.peers.server import REPOSITORY

DASHBOARDS = REPOSITORY / "config" / "dashboards"
Panels = dict[str, dict[str, Any]]

MACROS = {
    r"\$__timeFilter\((\w+)\)": r"\1 >= now() - INTERVAL 1 HOUR AND \1 <= now()",
    r"\$__timeInterval\((\w+)\)": r"toStartOfInterval(toDateTime(\1), INTERVAL 20 SECOND)",
    r"\$__rate_interval": "1h",
}
"""What Grafana's data sources make of them, for a dashboard that shows the last hour."""


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator."""
    return generator("generate_dashboards")


def panels(name: str) -> Panels:
    """Those of a dashboard, by title."""
    found = json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]
    return {panel["title"]: panel for panel in found}


def query_of(panel: dict[str, Any]) -> str:
    """As it stands there."""
    (target,) = panel["targets"]
    return str(target.get("rawSql") or target["expr"])


def filled_in(panel: dict[str, Any], trace: str) -> str:
    """The query as it leaves Grafana."""
    query = query_of(panel).replace("${trace}", trace)
    for macro, text in MACROS.items():
        query = re.sub(macro, text, query)
    assert "$" not in query
    return query


LANGUAGES = {"connections": "sql", "packets": "logsql", "traffic": "promql", "agents": "promql"}
NAMES = tuple(path.stem for path in sorted(DASHBOARDS.glob("*.json")))
SHOWN = [(name, title) for name in NAMES for title in panels(name)]


def test_they_are_up_to_date(generate: ModuleType) -> None:
    """Whoever changes a query runs `python config/generate_dashboards.py`."""
    assert {path.stem for path in generate.FILES} == set(NAMES)
    for path, content in generate.FILES.items():
        assert path.read_text() == content(), f"run python config/generate_dashboards.py: {path} is out of date"


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_their_own_place(name: str) -> None:
    """None is over another or over the edge, and each asks the data source that was chosen."""
    cells: set[tuple[int, int]] = set()
    (source, *_) = json.loads((DASHBOARDS / f"{name}.json").read_text())["templating"]["list"]
    for panel in panels(name).values():
        place = panel["gridPos"]
        own = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells
        assert place["x"] + place["w"] <= 24
        cells |= own
        assert panel["datasource"] == {"type": source["query"], "uid": "${source}"}


def sent(story: Story) -> set[str]:
    """Every attribute that the agent sent, and every other that it may send."""

    def attributes(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from plain(node.get("attributes", []))
            for value in node.values():
                yield from attributes(value)
        elif isinstance(node, list):
            for value in node:
                yield from attributes(value)

    requests = [json.loads(request) for signal in ("logs", "traces", "metrics") for request in story.requests(signal)]
    return set(attributes(requests)) | names.ATTRIBUTES.keys()


def test_every_field_exists(story: Story) -> None:
    """All that dashboards and the page of queries name, in whatever language."""
    known = sent(story)
    sql = "\n".join(query_of(panel) for panel in panels("connections").values())
    page = (REPOSITORY / "docs" / "queries.md").read_text()
    attributes = re.findall(r"Attributes\['([^']+)'\]", sql + page)
    logsql = "\n".join(query_of(panel) for panel in panels("packets").values())
    fields = re.findall(r"\b[a-z0-9_]+(?:\.[a-z0-9_]+)+\b", logsql + page.replace("`", ""))
    of_the_agent = {field for field in fields if field.startswith(("tcp.", "k8s.", "network."))}
    assert len(attributes) > 20
    assert len(of_the_agent) > 5
    events = {names.PACKET_EVENT, names.CONNECTION_SPAN, names.CONNECTION_SUMMARY, names.REQUEST_EVENT}
    assert (set(attributes) | of_the_agent) - events - known == set()


def test_every_metric_exists(filled: Backends) -> None:
    """In Prometheus, under the name by which it is asked for, with the labels by which it is grouped."""
    promql = "\n".join(query_of(panel) for name in ("agents", "traffic") for panel in panels(name).values())
    there = filled.ask("promql", '{__name__=~".+"}')
    metrics = {labels["__name__"] for labels, _ in there}
    labels_named = re.compile(r"by \(([^)]*)\)|\{(\w+)=[^}]*\}")
    grouped = {label for found in labels_named.findall(promql) for label in "".join(found).split(", ")}
    assert grouped - {label for labels, _ in there for label in labels} <= {"error_type"}  # nothing has failed
    named = set(re.findall(r"\b(?:tcp|tcpio|otel)_\w+", labels_named.sub("", promql)))
    assert len(named) > 10
    assert named <= metrics


@pytest.mark.parametrize(("name", "title"), SHOWN, ids=["-".join(pair).replace(" ", "_") for pair in SHOWN])
def test_a_backend_answers_it(filled: Backends, story: Story, name: str, title: str) -> None:
    """By the way that Grafana's data source asks it: with something, but for what has not happened."""
    panel = panels(name)[title]
    query = filled_in(panel, story.trace_id)
    kind = panel["targets"][0].get("queryType")
    rows: list[Any]
    if name == "packets" and kind != "instant":
        rows = filled.of("logsql").stats(query, over_time=kind == "statsRange")
    else:
        rows = filled.ask(LANGUAGES[name], query)
    assert bool(rows) == (title != "Dropped, by why")


def test_figures_are_right(filled: Backends, story: Story) -> None:
    """Those of single numbers and of series, by what happened."""

    def of(title: str) -> list[dict[str, Any]]:
        return filled.ask("sql", filled_in(panels("connections")[title], story.trace_id))

    connections = len(story.asked) + 1 + 1 + TURNED_AWAY  # with one that was refused, and those to a full backlog
    assert of("Connections that ended") == [{"connections": connections}]
    assert of("Connections that failed")[0]["failed"] == pytest.approx(2 / connections)
    assert 0 < of("Segments sent again")[0]["again"] < 0.2
    assert 0 < of("Round trip, 95 of 100 below")[0]["seconds"] < 1
    again = of("Segments sent again, by who sent them")
    by = {service: sum(int(row["again"]) for row in again if row["ServiceName"] == service) for service in (
        "payments", "checkout"
    )}  # fmt: skip
    assert by["payments"] >= 1
    assert by["checkout"] >= LOST_REQUESTS + 1
    assert by["payments"] <= 3 * LOST_ANSWERS
    failed = of("Connections that failed, by why")
    assert sorted((row["error"], int(row["connections"])) for row in failed) == [
        ("connection_refused", 1), ("connection_reset", 1),
    ]  # fmt: skip
