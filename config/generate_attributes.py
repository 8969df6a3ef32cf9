"""The names that leave the agent to what people read: the tables of docs/attributes.md.

Run it after a change of tcpio_otel/names.py or of the tables in tcpio_otel/encoding/line_protocol.py; a test compares
its output with the file, and another what the agent emits with these tables.
"""

import importlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import opentelemetry.semconv

from tcpio_otel import names
from tcpio_otel.encoding import line_protocol as lines
from tcpio_otel.names import ATTRIBUTES, Attribute, Kind, On

PAGE = Path(__file__).resolve().parent.parent / "docs" / "attributes.md"
PACKAGE = "opentelemetry-semantic-conventions"
STABLE, DEVELOPMENT, OURS = "stable", "development", "ours"


def conventions() -> dict[str, str]:
    """Every name that the installed semantic conventions have, and whether it is stable there."""
    found: dict[str, str] = {}
    (root,) = opentelemetry.semconv.__path__
    for status, folders in ((DEVELOPMENT, ("_incubating/attributes", "_incubating/metrics")),
                            (STABLE, ("attributes", "metrics"))):  # fmt: skip
        for path in sorted(path for folder in folders for path in (Path(root) / folder).glob("*.py")):
            module = ".".join((opentelemetry.semconv.__name__, *path.relative_to(root).with_suffix("").parts))
            values = vars(importlib.import_module(module))
            found |= {value: status for name, value in values.items() if name.isupper() and isinstance(value, str)}
    return found


def origin(name: str, known: dict[str, str]) -> str:
    """Where a name is from. A template's name stands there without what varies."""
    return known.get(name.removesuffix(".*"), OURS)


def attribute_rows(which: list[Attribute]) -> Iterator[str]:
    """A table of attributes."""
    known = conventions()
    yield "| attribute | type | on | from | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for each in which:
        kind = f"{each.kind}, {each.unit}" if each.unit else each.kind
        letters = "".join(on.value for on in each.on)
        yield f"| `{each.name}` | {kind} | {letters} | {origin(each.name, known)} | {each.meaning} |"


def records() -> Iterator[str]:
    """The table of log records, spans and their events."""
    yield "| name | what it is |"
    yield "| --- | --- |"
    for name, meaning in names.RECORDS.items():
        yield f"| `{name}` | {meaning} |"
    for name, meaning in names.SPAN_EVENTS.items():
        yield f"| `{name}` | event of a span: {meaning} |"


def attributes() -> Iterator[str]:
    """Those of records, spans, and points."""
    return attribute_rows([each for each in ATTRIBUTES.values() if set(each.on) - {On.RESOURCE}])


def resource() -> Iterator[str]:
    """Those of a Resource; and of a peer, which has them behind a prefix."""
    known = conventions()
    yield f"| attribute | from | behind `{names.PEER_PREFIX}` | meaning |"
    yield "| --- | --- | --- | --- |"
    for each in ATTRIBUTES.values():
        if On.RESOURCE in each.on or each.of_peer:
            peer = ("too" if each.on else "only there") if each.of_peer else ""
            yield f"| `{each.name}` | {origin(each.name, known)} | {peer} | {each.meaning} |"


def metrics() -> Iterator[str]:
    """The table of metrics."""
    known = conventions()
    yield "| metric | unit | instrument | from | meaning | by |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for each in names.INSTRUMENTS.values():
        by = ", ".join(f"`{name}`" for name in each.by)
        temporality = "" if each.kind is Kind.GAUGE else ", cumulative"
        yield (
            f"| `{each.name}` | {each.unit} | {each.kind.value}{temporality} | {origin(each.name, known)} "
            f"| {each.meaning} | {by} |"
        )


def faults() -> Iterator[str]:
    """The table of what can go wrong without costing a packet."""
    yield "| fault | meaning |"
    yield "| --- | --- |"
    for name, meaning in names.FAULTS.items():
        yield f"| `{name}` | {meaning} |"


Told = dict[str, tuple[str, str]]
"""Of tags or fields by name: the type, and what they mean or are copies of."""


def measurements() -> dict[str, tuple[Told, Told]]:
    """By measurement, its tags and its fields, as they stand in a line."""

    def copies(found: list[str], kind: str = names.STRING) -> Told:
        return {lines.key(name): (kind, f"`{name}`") for name in found}

    def own(found: lines.Fields) -> Told:
        return {name: (each.kind, each.meaning) for name, each in found.items()}

    def on(place: On) -> list[str]:
        peers = [names.PEER_PREFIX + each.name for each in ATTRIBUTES.values() if each.of_peer]
        found = [each.name for each in ATTRIBUTES.values() if place in each.on]
        return [name for name in found if name not in unsaid] + peers

    def split(place: On, tags: frozenset[str]) -> tuple[Told, Told]:
        wanted = tags | lines.PEER_TAGS
        found = on(place)
        fields: Told = {}
        for name in (name for name in found if name not in wanted):
            known = ATTRIBUTES.get(name)
            fields |= copies([name], known.kind if known else names.STRING)
        return copies([name for name in found if name in wanted]), fields

    unsaid = (names.NETWORK_TRANSPORT, names.CONTEXTS, names.INTERLEAVED)
    whose = copies([name for name in lines.WORKLOAD_TAGS if name != names.EXECUTABLE_NAME])
    program = copies([names.EXECUTABLE_NAME])
    peers = copies([name for name in on(On.PACKET) if name in lines.PEER_TAGS])
    packet_tags, packet_fields = split(On.PACKET, lines.PACKET_TAGS)
    connection_tags, connection_fields = split(On.SPAN, lines.CONNECTION_TAGS)
    one_of_a_kind = copies(
        [names.ROLE, names.SERVER_PORT, names.SERVER_ADDRESS, names.CLIENT_ADDRESS, names.OVERFLOW,
         names.PEER_PREFIX + names.POD_NAME, names.PEER_PREFIX + names.NODE]
    )  # fmt: skip
    exported = {
        name.replace("*", kind): (names.INT, f"lines of {kind}")
        for kind in lines.KINDS.values()
        for name in lines.EXPORT_FIELDS
    }
    wrong = {lines.key(name): (names.INT, meaning) for name, meaning in names.FAULTS.items()}
    packets = {"packets": (names.INT, "received and dropped")}
    kinds = "`rst`, `syn_ack`, `syn`, `fin`, `payload`, `ack`, `other`: the first that fits"
    outcome = {"outcome": (names.STRING, "`filtered`, `dropped`"), "reason": (names.STRING, "why")}
    return {
        lines.PACKET: (
            {**whose, **packet_tags, "segment": (names.STRING, kinds)},
            packet_fields,
        ),
        lines.CONNECTION: ({**whose, **connection_tags, **copies([names.ROLE])},
                           {**connection_fields, **own(lines.CONNECTION_FIELDS)}),
        lines.PEER: ({**whose, **program, **peers, **one_of_a_kind}, own(lines.PEER_FIELDS)),
        lines.DROP: ({**whose, **program, **copies([names.DROP_REASON])}, packets),
        lines.AGENT: ({}, {**own(lines.AGENT_FIELDS), **exported, **wrong}),
        lines.AGENT_PACKETS: (outcome, {"packets": (names.INT, "not exported")}),
    }  # fmt: skip


def line_protocol() -> Iterator[str]:
    """The table of tags and fields: those with the same meaning in several measurements share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for measurement, (tags, fields) in measurements().items():
        for name, (_, meaning) in tags.items():
            rows.setdefault((name, "tag", meaning), []).append(f"`{measurement}`")
        for name, (kind, meaning) in fields.items():
            rows.setdefault((name, f"field, {kind}", meaning), []).append(f"`{measurement}`")
    yield "| name | | of | meaning |"
    yield "| --- | --- | --- | --- |"
    for (name, kind, meaning), of in rows.items():
        yield f"| `{name}` | {kind} | {', '.join(of)} | {meaning} |"


def package() -> Iterator[str]:
    """Which semantic conventions the tables were compared with."""
    yield f"{PACKAGE} {version(PACKAGE)}; records name {names.SCHEMA_URL} as their schema."


TABLES = {
    "package": package,
    "records": records,
    "attributes": attributes,
    "resource": resource,
    "metrics": metrics,
    "faults": faults,
    "lines": line_protocol,
}


def page() -> str:
    """docs/attributes.md: its tables made anew between their marks, the rest as it stands."""
    text = PAGE.read_text()
    for name, table in TABLES.items():
        before, mark, rest = text.partition(f"<!-- {name}: generated by config/generate_attributes.py -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        text = before + mark + "".join(f"{row}\n" for row in table()) + end + after
    return text


FILES = {PAGE: page}

if __name__ == "__main__":
    for path, content in FILES.items():
        path.write_text(content())
