"""YAML, environment and flags to one frozen, typed configuration.

What wins, from first to last: flags, `TCPIO_*` variables, the file, `OTEL_*` variables, defaults. Whatever is wrong is
one line that says where (file and line, variable, or flag), what, and what would be right. No NumPy and no gRPC
here: this is read before privileges are dropped.
"""

import dataclasses
import difflib
import ipaddress
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from tcpio_otel.errors import UsageError
from tcpio_otel.export.settings import Compression, OtlpSettings, Protocol
from tcpio_otel.otel_environment import OtelValues, read_otel

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_DIRECTORY = Path("tcpio-data")


class Seconds(float):
    """A duration; in text with a unit: `250ms`, `5s`, `2m`, `1h`."""


class Bytes(int):
    """A size; in text with a unit: `64MiB`, `1MB`."""


class PortRange(tuple[int, int]):
    """Ports from the first to the last, both included; in text `443` or `8000-8999`."""

    __slots__ = ()


class Export(StrEnum):
    """What happens to a signal."""

    OTLP = "otlp"
    NONE = "none"


class LogLevel(StrEnum):
    """How much the agent says of itself."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def key(help_text: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A configuration key: what it does, its default, and `least`/`most` for numbers."""
    metadata = {"help": help_text, **limits}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Capture:
    """What is recorded, and how."""

    ports: tuple[PortRange, ...] = key("record connections with one of these ports at either end; empty: all", ())
    cidrs: tuple[Network, ...] = key("record connections with an address in one of these at either end; empty: all", ())
    local: tuple[Network, ...] = key("for captures: addresses that are this host's", ())
    cgroup: Path | None = key("root of the cgroup v2 tree; unset: found by itself", None)
    ring_memory: Bytes = key("memory of all ring buffers together", Bytes(32 << 20), least=1 << 16, most=1 << 34)
    latency: Seconds = key("longest time a record waits in a ring", Seconds(0.1), least=0.001, most=10)


@dataclass(frozen=True)
class Connections:
    """How connections are followed."""

    limit: int = key("connections followed at once; beyond it the longest silent are evicted", 131_072, least=16)
    linger: Seconds = key(
        "how long the last segments of an ended connection may take", Seconds(2), least=0.01, most=600
    )
    handshake_timeout: Seconds = key("after this a handshake has failed", Seconds(130), least=1, most=3600)
    handshake_wait: Seconds = key("how long packet logs wait for trace ids", Seconds(3), least=0, most=60)


@dataclass(frozen=True)
class Receiver:
    """An OTLP receiver; of a signal, what is unset is taken from `export`."""

    endpoint: str | None = key("URL; for HTTP, the signal's path is added to a general one", None)
    protocol: Protocol | None = key("grpc, http/protobuf or http/json; unset: http/protobuf", None)
    headers: Mapping[str, str] | None = key("sent with every request", None)
    timeout: Seconds | None = key("for one attempt; unset: 10s", None, least=0.01, most=600)
    compression: Compression | None = key("gzip or none; unset: gzip for HTTP, none for gRPC", None)
    certificate: Path | None = key("CA certificate, PEM; unset: the system's", None)
    client_certificate: Path | None = key("for mTLS, PEM", None)
    client_key: Path | None = key("for mTLS, PEM", None)


@dataclass(frozen=True)
class ExportSettings(Receiver):
    """Where everything is sent, and what happens when that fails."""

    logs: Receiver = key("for packet logs", Receiver)
    traces: Receiver = key("for connection spans", Receiver)
    metrics: Receiver = key("for the agent's own metrics", Receiver)
    queue_memory: Bytes = key("requests that may wait, for each signal", Bytes(64 << 20), least=1 << 20)
    retry_for: Seconds = key("how long a request is tried again", Seconds(300), least=0)
    flush_timeout: Seconds = key("how long the queues may take to empty when the agent stops", Seconds(5), least=0)


@dataclass(frozen=True)
class Batch:
    """How many records make a request."""

    max_bytes: Bytes = key("of a request, uncompressed; gRPC servers refuse more than 4MiB", Bytes(3 << 20), least=8192)
    max_records: int = key("of a request", 4096, least=1)
    max_age: Seconds = key("longest time a record waits for others", Seconds(1), least=0.01, most=60)


@dataclass(frozen=True)
class File:
    """OTLP/JSON files, instead of a receiver."""

    directory: Path | None = key("where; unset, and no endpoint either: ./tcpio-data", None)
    rotate: Bytes = key("a file that reaches this is put aside", Bytes(64 << 20), least=1 << 20)
    keep: int = key("files put aside that are kept, for each signal", 10, least=0)


@dataclass(frozen=True)
class ResourceSettings:
    """What the records are said to be about."""

    service_name: str | None = key("service.name; unset: tcpio-otel", None)
    attributes: Mapping[str, str] = key("more attributes, such as deployment.environment.name", dict)


@dataclass(frozen=True)
class Signals:
    """Which signals are sent."""

    logs: Export = key("packet logs", Export.OTLP)
    traces: Export = key("connection spans", Export.OTLP)
    metrics: Export = key("the agent's own metrics", Export.OTLP)


@dataclass(frozen=True)
class Metrics:
    """The agent's own metrics."""

    interval: Seconds = key("between two exports", Seconds(60), least=0.1)


@dataclass(frozen=True)
class Log:
    """What the agent says of itself, on standard error."""

    level: LogLevel = key("debug, info, warning or error", LogLevel.INFO)


@dataclass(frozen=True)
class Config:
    """Everything that can be set."""

    source: str = key("live, or pcap:FILE", "live")
    duration: Seconds | None = key("stop by itself after this; unset: run until stopped", None, least=0)
    capture: Capture = key("what is recorded", Capture)
    connections: Connections = key("how connections are followed", Connections)
    export: ExportSettings = key("where it is sent", ExportSettings)
    batch: Batch = key("how many records make a request", Batch)
    file: File = key("OTLP/JSON files", File)
    resource: ResourceSettings = key("what the records are about", ResourceSettings)
    signals: Signals = key("which signals are sent", Signals)
    metrics: Metrics = key("the agent's own metrics", Metrics)
    log: Log = key("what the agent says", Log)

    @property
    def capture_file(self) -> Path | None:
        """The file to replay; None for the live source."""
        return Path(self.source.removeprefix("pcap:")) if self.source.startswith("pcap:") else None

    @property
    def file_directory(self) -> Path | None:
        """Where OTLP/JSON files go: where `file.directory` says, or `./tcpio-data` when no receiver is named either."""
        if self.file.directory:
            return self.file.directory
        return None if any(self.otlp(signal) for signal in ("logs", "traces", "metrics")) else DEFAULT_DIRECTORY

    def otlp(self, signal: str) -> OtlpSettings | None:
        """Where a signal ("logs", "traces", "metrics") goes; None when no endpoint is set for it."""
        general: Receiver = self.export
        own: Receiver = getattr(self.export, signal)

        def chosen(name: str) -> Any:
            value = getattr(own, name)
            return getattr(general, name) if value is None else value

        endpoint = chosen("endpoint")
        if endpoint is None:
            return None
        protocol = chosen("protocol") or Protocol.HTTP_PROTOBUF
        http = protocol is not Protocol.GRPC
        if http and own.endpoint is None:
            endpoint = f"{endpoint.rstrip('/')}/v1/{signal}"
        return OtlpSettings(
            endpoint=endpoint,
            protocol=protocol,
            headers=tuple((chosen("headers") or {}).items()),
            timeout_s=float(chosen("timeout") or 10),
            compression=chosen("compression") or (Compression.GZIP if http else Compression.NONE),
            certificate=chosen("certificate"),
            client_certificate=chosen("client_certificate"),
            client_key=chosen("client_key"),
        )


class Leaf(typing.NamedTuple):
    """A key at the end of its path: dotted path, type, whether it may be unset, the dataclass field."""

    path: str
    type: Any
    optional: bool
    field: dataclasses.Field[Any]


def leaves(section: type = Config, prefix: str = "") -> Iterator[Leaf]:
    """All keys, in their order."""
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        path, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, path + ".")
            continue
        optional = types.NoneType in typing.get_args(hint)
        plain = [part for part in typing.get_args(hint) if part is not types.NoneType]
        yield Leaf(path, plain[0] if optional and len(plain) == 1 else hint, optional, entry)


LEAVES = {leaf.path: leaf for leaf in leaves()}
VARIABLES = {"TCPIO_" + path.replace(".", "_").upper(): path for path in LEAVES}

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_SIZE = re.compile(r"(\d+)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)?")
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNITS_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}


def _seconds(text: str) -> Seconds:
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError("a duration such as 250ms, 5s or 2m")
    return Seconds(float(found[1]) * _UNITS_S[found[2] or "s"])


def _size(text: str) -> Bytes:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError("a size such as 64MiB or 1MB")
    return Bytes(int(found[1]) * _UNITS_BYTES[found[2] or "B"])


def _integer(text: str) -> int:
    if not re.fullmatch(r"-?\d+", text.strip().replace("_", "")):
        raise ValueError("a whole number")
    return int(text.replace("_", ""))


def _ports(text: str) -> PortRange:
    first, _, last = text.partition("-")
    try:
        ports = (int(first), int(last or first))
    except ValueError:
        ports = (-1, -1)
    if not 0 <= ports[0] <= ports[1] <= 65535:
        raise ValueError("a port such as 443, or a range such as 8000-8999")
    return PortRange(ports)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError("a network such as 192.0.2.0/24 or 2001:db8::/32") from None


def _enum(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    def parse(text: str) -> StrEnum:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"one of {', '.join(kind)}") from None

    return parse


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path")
    return Path(text)


def _source(text: str) -> str:
    if text != "live" and not (text.startswith("pcap:") and len(text) > len("pcap:")):
        raise ValueError("live, or pcap:FILE")
    return text


_PARSERS: dict[Any, Callable[[str], Any]] = {
    Seconds: _seconds, Bytes: _size, int: _integer, str: str, Path: _path, PortRange: _ports, Network: _network,
}  # fmt: skip


def _parser(leaf: Leaf) -> Callable[[str], Any]:
    if leaf.path == "source":
        return _source
    if isinstance(leaf.type, type) and issubclass(leaf.type, StrEnum):
        return _enum(leaf.type)
    return _PARSERS[leaf.type]


def _is_list(leaf: Leaf) -> bool:
    return typing.get_origin(leaf.type) is tuple


def _is_mapping(leaf: Leaf) -> bool:
    return typing.get_origin(leaf.type) is Mapping or leaf.type is Mapping


def parse(leaf: Leaf, value: Any, where: str) -> Any:
    """A value of a key from text (or from lists and mappings of text).

    Raises:
        UsageError: naming `where`, the key, and what would be right.
    """
    try:
        if _is_mapping(leaf):
            pairs = value if isinstance(value, Mapping) else _pairs(value)
            return types.MappingProxyType({str(name): str(entry) for name, entry in pairs.items()})
        if _is_list(leaf):
            parts = value if isinstance(value, list) else [part for part in str(value).split(",") if part.strip()]
            element = leaf._replace(type=typing.get_args(leaf.type)[0])
            return tuple(_parser(element)(str(part).strip()) for part in parts)
        parsed = _single(leaf, value)
    except ValueError as error:
        raise UsageError(f"{where}: {leaf.path}: {value!r} is not {error}") from None
    least, most = (leaf.field.metadata.get(limit) for limit in ("least", "most"))
    if (least is not None and parsed < least) or (most is not None and parsed > most):
        wanted = " and ".join(
            f"{word} {limit:g}" for word, limit in (("at least", least), ("at most", most)) if limit is not None
        )
        raise UsageError(f"{where}: {leaf.path}: {value!r} is out of range: give {wanted}")
    return parsed


def _single(leaf: Leaf, value: Any) -> Any:
    if isinstance(value, list | Mapping):
        raise ValueError("a single value")  # noqa: TRY004 - like every other wrong value
    return _parser(leaf)(str(value))


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if part.strip() and not (separator and name.strip()):
            raise ValueError("a list such as name=value,other=value")
        if part.strip():
            pairs[name.strip()] = value.strip()
    return pairs


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _from_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    """The keys of a YAML file: dotted path, value, and where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the configuration {path} is not UTF-8 text") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is not None:
        yield from _from_node(root, "", path)


def _where(node: yaml.Node, path: Path) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _from_node(node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{_where(node, path)}: {prefix.rstrip('.') or 'the file'} must hold keys and values")
    siblings = {known.removeprefix(prefix).partition(".")[0] for known in LEAVES if known.startswith(prefix)}
    seen: set[str] = set()
    for name_node, value in node.value:
        name, where = str(name_node.value), _where(name_node, path)
        if name not in siblings:
            hint = _nearest(name, siblings) or f"; known here: {', '.join(sorted(siblings))}"
            raise UsageError(f"{where}: unknown key {prefix}{name}{hint}")
        if name in seen:
            raise UsageError(f"{where}: {prefix}{name} stands here a second time")
        seen.add(name)
        if isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null":
            continue  # an empty key is an unset one
        if prefix + name in LEAVES:
            yield prefix + name, _plain(value, prefix + name, path), _where(value, path)
        else:
            yield from _from_node(value, f"{prefix}{name}.", path)


def _plain(node: yaml.Node, name: str, path: Path) -> Any:
    """A node as text, list of texts, or mapping of texts: types are ours to decide, not YAML's."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value):
        return [part.value for part in node.value]
    if isinstance(node, yaml.MappingNode) and all(isinstance(part, yaml.ScalarNode) for _, part in node.value):
        return {name_node.value: part.value for name_node, part in node.value}
    raise UsageError(f"{_where(node, path)}: {name} must be a value, a list of values, or pairs of them")


def load(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration, and warnings about variables that were ignored.

    Args:
        file: a YAML file, if there is one.
        environment: of the process.
        flags: dotted paths and texts from the command line.

    Raises:
        UsageError: with where, what, and what would be right.
    """
    otel: OtelValues = read_otel(environment)
    given: dict[str, tuple[Any, str]] = {path: (value, variable) for path, (value, variable) in otel.values.items()}
    if file:
        given.update({path: (value, where) for path, value, where in _from_file(file)})
    for variable, text in environment.items():
        if variable.startswith("TCPIO_") and text:
            if variable not in VARIABLES:
                raise UsageError(f"unknown variable {variable}{_nearest(variable, VARIABLES)}")
            given[VARIABLES[variable]] = (text, variable)
    given.update({path: (value, "command line") for path, value in flags.items() if value is not None})
    parsed = {path: parse(LEAVES[path], value, where) for path, (value, where) in given.items()}
    config = _build(Config, "", parsed)
    _check(config)
    return config, otel.warnings


def _build(section: type[Any], prefix: str, parsed: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(section)
    values = {}
    for entry in dataclasses.fields(section):
        path, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[entry.name] = _build(hint, path + ".", parsed)
        elif path in parsed:
            values[entry.name] = parsed[path]
    return section(**values)


def _check(config: Config) -> None:
    """What no single key can tell.

    Raises:
        UsageError: two keys contradict each other.
    """
    receivers = (config.export, config.export.logs, config.export.traces, config.export.metrics)
    if config.file.directory and any(receiver.endpoint for receiver in receivers):
        raise UsageError("file.directory and export.endpoint are both set: the ledger counts a packet once; choose one")
    for receiver in receivers:
        if bool(receiver.client_certificate) != bool(receiver.client_key):
            raise UsageError("client_certificate and client_key go together: mTLS needs both")


def _shown(value: Any) -> Any:
    """A value as it is written in YAML."""
    if isinstance(value, Seconds):
        return f"{value * 1000:g}ms" if value < 1 else f"{value:g}s"
    if isinstance(value, Bytes):
        for unit in ("GiB", "MiB", "KiB"):
            if value and value % _UNITS_BYTES[unit] == 0:
                return f"{value // _UNITS_BYTES[unit]}{unit}"
        return int(value)
    if isinstance(value, PortRange):
        return str(value[0]) if value[0] == value[1] else f"{value[0]}-{value[1]}"
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_shown(part) for part in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value if value is None or isinstance(value, int | str) else str(value)


def effective(config: Config, *, secrets: bool = False) -> str:
    """The configuration as YAML that loads back to the same; headers may hold tokens: masked unless asked for."""

    def section(part: Any) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            if dataclasses.is_dataclass(value):
                shown[entry.name] = section(value)
            elif entry.name == "headers" and value and not secrets:
                shown[entry.name] = dict.fromkeys(value, "***")
            else:
                shown[entry.name] = _shown(value)
        return shown

    return yaml.safe_dump(section(config), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML file."""

    def of(leaf: Leaf) -> dict[str, Any]:
        if _is_list(leaf):
            return {"type": "array", "items": {"type": ["string", "integer"]}}
        if _is_mapping(leaf):
            return {"type": "object", "additionalProperties": {"type": "string"}}
        if leaf.type is int:
            return {"type": "integer"}
        if isinstance(leaf.type, type) and issubclass(leaf.type, StrEnum):
            return {"enum": list(leaf.type)}
        return {"type": ["string", "number"] if leaf.type in (Seconds, Bytes) else "string"}

    root: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "tcpio-otel"}
    for path, leaf in LEAVES.items():
        node = root
        *sections, name = path.split(".")
        for part in sections:
            node = node.setdefault("properties", {}).setdefault(part, {"type": "object", "additionalProperties": False})
        entry = {**of(leaf), "description": leaf.field.metadata["help"]}
        default = leaf.field.default
        if default is not dataclasses.MISSING and default is not None:
            entry["default"] = _shown(default)
        node.setdefault("properties", {})[name] = entry
    return {**root, "type": "object", "additionalProperties": False}
