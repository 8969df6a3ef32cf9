"""The names that an agent emitted, read from its files and lines, and compared with those that are declared."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tcpio_otel import names
from tcpio_otel.names import ATTRIBUTES, INSTRUMENTS, PEER_PREFIX, Kind, On
from tests.generators import generator

ENOUGH_BYTES = 64 << 20
"""Of a file: a flood of packets says no more by going on."""

_TYPES = {
    "stringValue": names.STRING, "intValue": names.INT, "doubleValue": names.DOUBLE, "boolValue": names.BOOLEAN,
    "arrayValue": names.STRINGS,
}  # fmt: skip
_PLACES = {
    names.PACKET_EVENT: On.PACKET,
    names.CONNECTION_SUMMARY: On.SUMMARY,
    names.REQUEST_EVENT: On.REQUEST,
}
_SIGNALS = {
    "logs": ("resourceLogs", "scopeLogs", "logRecords"),
    "traces": ("resourceSpans", "scopeSpans", "spans"),
    "metrics": ("resourceMetrics", "scopeMetrics", "metrics"),
}

Attributes = set[tuple[On, str, str]]
"""Where an attribute stood, its name, and its type."""


@dataclass
class Emitted:
    """What was seen."""

    attributes: Attributes = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    span_events: set[str] = field(default_factory=set)
    instruments: set[tuple[str, str, Kind]] = field(default_factory=set)
    by: set[tuple[str, str]] = field(default_factory=set)
    """Metrics, and what their points say."""
    faults: set[str] = field(default_factory=set)
    lines: set[tuple[str, str, str]] = field(default_factory=set)
    """Measurements; `tag`, a field's type, or `field` for one of whatever type; and names."""

    def add(self, other: "Emitted") -> None:
        """Take in what another has seen."""
        for name, found in vars(other).items():
            getattr(self, name).update(found)

    def _note(self, place: On, found: list[dict[str, Any]]) -> None:
        self.attributes |= {(place, each["key"], _TYPES[next(iter(each["value"]))]) for each in found}

    def log_record(self, record: dict[str, Any]) -> None:
        """A log record in OTLP/JSON."""
        self.records.add(record["eventName"])
        self._note(_PLACES[record["eventName"]], record["attributes"])

    def span(self, span: dict[str, Any]) -> None:
        """A span, likewise."""
        self.records.add(span["name"])
        self._note(On.SPAN, span["attributes"])
        for event in span.get("events", ()):
            self.span_events.add(event["name"])
            self._note(On.EVENT, event.get("attributes", []))
        for link in span.get("links", ()):
            self._note(On.LINK, link.get("attributes", []))

    def metric(self, metric: dict[str, Any]) -> None:
        """A metric, likewise."""
        name = metric["name"]
        if data := metric.get("sum"):
            kind = Kind.SUM if data.get("isMonotonic") else Kind.UP_DOWN
        else:
            kind = Kind.GAUGE if "gauge" in metric else Kind.HISTOGRAM
            data = metric.get("gauge") or metric["exponentialHistogram"]
        assert kind is Kind.GAUGE or data["aggregationTemporality"] == 2, f"{name} is not cumulative"
        self.instruments.add((name, metric["unit"], kind))
        for point in data["dataPoints"]:
            found = point.get("attributes", [])
            self._note(On.POINT, found)
            self.by |= {(name, each["key"]) for each in found}
            self.faults |= {each["value"]["stringValue"] for each in found if each["key"] == names.FAULT}


def in_files(directory: Path, given: Iterable[str] = ()) -> Emitted:
    """What is in OTLP/JSON files, but for attributes of Resources that the agent was given."""
    found = Emitted()
    takes = {"logs": found.log_record, "traces": found.span, "metrics": found.metric}
    for signal, (resources, scopes, items) in _SIGNALS.items():
        for request in _requests(directory / f"{signal}.jsonl"):
            for resource in request[resources]:
                told = [each for each in resource["resource"]["attributes"] if each["key"] not in given]
                found._note(On.RESOURCE, told)
                for item in (item for scope in resource[scopes] for item in scope[items]):
                    takes[signal](item)
    return found


def _requests(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open() as file:
        read = 0
        for line in file:
            if (read := read + len(line)) > ENOUGH_BYTES or not line.endswith("\n"):  # cut, as the agent was killed
                return
            yield json.loads(line)


_QUOTED = r"(?=(?:[^\"]|\"(?:\\\\.|[^\"\\\\])*\")*$)"
"""Not inside of a text."""
_FIELD_TYPES = {
    r"-?\d+i": names.INT, r"\".*\"": names.STRING, r"true|false": names.BOOLEAN, r"-?[\d.]+(?:e-?\d+)?": names.DOUBLE,
}  # fmt: skip


def in_lines(text: str) -> Emitted:
    """What is in lines of line protocol, by a reading of its own."""
    found = Emitted()
    for line in text.splitlines():
        head, fields, _ = re.split(rf"(?<!\\) {_QUOTED}", line)
        measurement, *tags = re.split(r"(?<!\\),", head)
        found.lines |= {(measurement, "tag", _plain(tag.partition("=")[0])) for tag in tags}
        for key, _, value in (each.partition("=") for each in re.split(rf"(?<!\\),{_QUOTED}", fields)):
            kind = next(kind for form, kind in _FIELD_TYPES.items() if re.fullmatch(form, value, re.S))
            found.lines.add((measurement, kind, _plain(key)))
    return found


def _plain(key: str) -> str:
    return re.sub(r"\\(.)", r"\1", key)


def _declared(name: str, wanted: Iterable[str]) -> str | None:
    """The declared name that a name stands for."""
    return next((each for each in wanted if name == each or ("*" in each and fnmatchcase(name, each))), None)


def _entry(place: On, name: str) -> tuple[On, str, str] | None:
    """The place, name and type under which an attribute is declared; of a peer, with the prefix."""
    if key := _declared(name, ATTRIBUTES):
        entry = ATTRIBUTES[key]
        return (place, key, entry.kind) if place in entry.on else None
    bare = _declared(name.removeprefix(PEER_PREFIX), ATTRIBUTES) if name.startswith(PEER_PREFIX) else None
    if bare and ATTRIBUTES[bare].of_peer and place in ATTRIBUTES[names.PEER_KIND].on:
        return place, PEER_PREFIX + bare, ATTRIBUTES[bare].kind
    return None


def undeclared(found: Emitted) -> list[str]:
    """What was emitted and is not in docs/attributes.md as it was: name, place, type, unit."""
    faults = [
        f"{kind} {name} on {place.name}" for place, name, kind in found.attributes
        if (entry := _entry(place, name)) is None or entry[2] != kind
    ]  # fmt: skip
    faults += [f"record {name}" for name in found.records - set(names.RECORDS)]
    faults += [f"span event {name}" for name in found.span_events - set(names.SPAN_EVENTS)]
    faults += [f"fault {name}" for name in found.faults if not _declared(name, names.FAULTS)]
    declared = {(each.name, each.unit, each.kind) for each in INSTRUMENTS.values()}
    faults += [f"{kind.value} {name} in {unit}" for name, unit, kind in found.instruments - declared]
    faults += [f"{name} by {by}" for name, by in found.by if name in INSTRUMENTS and not _tells(name, by)]
    wanted = _lines()
    faults += [
        f"{kind} {name} of {measurement}" for measurement, kind, name in found.lines
        if (told := _line_entry(wanted, measurement, kind, name)) is None or kind not in (told[0], "field")
    ]  # fmt: skip
    return sorted(faults)


_OF_SERIES = (names.ROLE, names.SERVER_PORT, names.SERVER_ADDRESS, names.OVERFLOW)


def _tells(metric: str, name: str) -> bool:
    """Whether docs/attributes.md says that points of a metric have an attribute."""
    of_series = metric.startswith("tcp.") and (name in _OF_SERIES or name.startswith(PEER_PREFIX))
    return name in INSTRUMENTS[metric].by or of_series


def _lines() -> dict[tuple[str, bool], dict[str, str]]:
    """What is declared: by measurement, and whether it is a tag, the names, each with `tag` or a field's type."""
    found = {}
    for measurement, (tags, fields) in generator("generate_attributes").measurements().items():
        found[measurement, True] = dict.fromkeys(tags, "tag")
        found[measurement, False] = {name: kind for name, (kind, _) in fields.items()}
    return found


def _line_entry(
    wanted: dict[tuple[str, bool], dict[str, str]], measurement: str, kind: str, name: str
) -> tuple[str, str] | None:
    """How a tag or field is declared: `tag` or its type, and its name as it stands there."""
    names_of = wanted.get((measurement, kind == "tag"), {})
    key = _declared(name, names_of)
    return (names_of[key], key) if key else None


def unseen(found: Emitted) -> list[str]:
    """What is declared and was not emitted, sorted."""
    seen = {entry[:2] for place, name, _ in found.attributes if (entry := _entry(place, name))}
    missing = [
        f"{name} on {place.name}" for name, each in ATTRIBUTES.items() for place in each.on if (place, name) not in seen
    ]
    prefixed = {name for _, name in seen}
    missing += [
        PEER_PREFIX + each.name for each in ATTRIBUTES.values()
        if each.of_peer and PEER_PREFIX + each.name not in prefixed
    ]  # fmt: skip
    missing += sorted(set(names.RECORDS) - found.records) + sorted(set(names.SPAN_EVENTS) - found.span_events)
    missing += sorted(set(INSTRUMENTS) - {name for name, _, _ in found.instruments})
    missing += [f"fault {each}" for each in names.FAULTS if not any(fnmatchcase(name, each) for name in found.faults)]
    wanted = _lines()
    told = {
        (measurement, kind == "tag", entry[1]) for measurement, kind, name in found.lines
        if (entry := _line_entry(wanted, measurement, kind, name))
    }  # fmt: skip
    missing += [
        f"{'tag' if is_tag else 'field'} {name} of {measurement}" for (measurement, is_tag), declared in wanted.items()
        for name in declared if (measurement, is_tag, name) not in told
    ]  # fmt: skip
    return sorted(missing)


EVERYTHING = Emitted()
"""What all agents of this test run emitted."""


def account(found: Emitted) -> None:
    """Fail for what is not declared; `pytest_terminal_summary` says what of the rest nobody has emitted."""
    EVERYTHING.add(found)
    assert not (faults := undeclared(found)), f"not in docs/attributes.md: {', '.join(faults)}"
