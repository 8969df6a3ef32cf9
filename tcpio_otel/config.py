"""YAML, environment and flags to one frozen, typed configuration.

What wins, from first to last: flags, `TCPIO_*` variables, the file, `OTEL_*` variables, defaults. Whatever is wrong is
one line that says where (file, line and column; variable; or flag), what, and what would be right. No NumPy and no
gRPC here: this is read before privileges are dropped.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tcpio_otel.capture.loaders import Loader
from tcpio_otel.config_values import Bytes, Network, PortRange, Seconds, Source, Url, parse, parse_pairs, show
from tcpio_otel.errors import UsageError
from tcpio_otel.export.settings import Compression, Listen, OtlpSettings, Protocol
from tcpio_otel.otel_environment import SIGNALS, read_otel

DEFAULT_DIRECTORY = Path("tcpio-data")


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


def key(help_text: str, default: Any, **limits: Any) -> Any:
    """A configuration key: what it does, its default (or the class that makes it), `least` and `most` for numbers."""
    metadata = {"help": help_text, **limits}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Capture:
    """What is recorded, and how."""

    ports: tuple[PortRange, ...] = key("record connections with one of these ports at either end; empty: all", ())
    cidrs: tuple[Network, ...] = key("record connections with an address in one of these at either end; empty: all", ())
    local: tuple[Network, ...] = key(
        "for capture files: networks that are this host's; empty: told by direction or by who sent the SYN", ()
    )
    loader: Loader = key(
        "what loads the probe: libbpf (needs a kernel with BTF), bcc (compiles it here), or auto: the first that can",
        Loader.AUTO,
    )
    cgroup: Path | None = key("root of the cgroup v2 tree; unset: found by itself", None)
    network_namespace: Path | None = key(
        "record one network namespace only: a file such as /run/netns/NAME or /proc/PID/ns/net; unset: all", None
    )
    ring_memory: Bytes = key("memory of all ring buffers together", Bytes(16 << 20), least=1 << 16, most=1 << 34)
    queue_memory: Bytes = key(
        "memory for records that came in a burst and wait to be processed",
        Bytes(256 << 20),
        least=1 << 20,
        most=1 << 36,
    )
    latency: Seconds = key("longest time a record waits in a ring", Seconds(0.1), least=0.001, most=10)


@dataclass(frozen=True)
class Connections:
    """How connections are followed."""

    limit: int = key(
        "connections followed at once; beyond it the longest silent are evicted", 131_072, least=16, most=1 << 24
    )
    linger: Seconds = key(
        "how long the last segments of an ended connection may take", Seconds(2), least=0.01, most=600
    )
    handshake_timeout: Seconds = key("after this a handshake has failed", Seconds(130), least=1, most=3600)
    summary_interval: Seconds = key(
        "how often an open connection that is not silent sends a summary; 0: never", Seconds(300), least=0, most=86_400
    )
    handshake_wait: Seconds = key("how long packet logs wait for trace ids", Seconds(3), least=0, most=60)


@dataclass(frozen=True)
class Correlation:
    """How packets find the traces of applications."""

    socket_tags: bool = key("take the contexts that applications set on their sockets", True)
    http_headers: bool = key("look for traceparent and b3 in the heads of HTTP/1 requests in clear text", True)
    published_contexts: bool = key(
        "read the contexts that OpenTelemetry eBPF Instrumentation publishes, where its map exists", True
    )
    published_map: Path = key("where it pins that map", Path("/sys/fs/bpf/otel/traces_ctx_v1"))
    wait: Seconds = key(
        "how long what a server received waits for the context that its application will set; 0: it goes without",
        Seconds(0.5),
        least=0,
        most=10,
    )
    quiet: Seconds = key(
        "a request that was answered, and of which nothing was heard for so long, is summed up",
        Seconds(5),
        least=0.01,
        most=3600,
    )


@dataclass(frozen=True)
class Attribution:
    """Whose the connections are said to be."""

    workloads: bool = key(
        "a Resource for each container, systemd unit and program; off: all is the agent's own Resource's", True
    )


class ClusterObjects(StrEnum):
    """Objects of a Kubernetes cluster that tell what addresses mean, by the API's names."""

    SERVICES = "services"
    ENDPOINT_SLICES = "endpointslices"
    NODES = "nodes"
    PODS = "pods"


@dataclass(frozen=True)
class Kubernetes:
    """What the API server knows of this node's pods."""

    enabled: bool = key(
        "watch the pods of this node at the API server, and say of each workload which pod it is", False
    )
    node_name: str | None = key("this node's name, as the API server has it; needed", None)
    kubeconfig: Path | None = key("how to reach the API server; unset: as a pod does, by its service account", None)
    kubelet: Url | None = key(
        "URL of this node's kubelet, asked for its pods while the API server does not answer; unset: nobody is", None
    )
    kubelet_certificate: Path | None = key("CA certificate of the kubelet, PEM; unset: the cluster's", None)
    wait: Seconds = key(
        "how long what a new pod sends and receives waits until the API server has told of it",
        Seconds(5),
        least=0,
        most=60,
    )
    cache: Path | None = key("a file that keeps what is known of pods across restarts; unset: none does", None)
    labels: tuple[str, ...] = key("labels of pods that become attributes k8s.pod.label.*", ())
    annotations: tuple[str, ...] = key("annotations of pods that become attributes k8s.pod.annotation.*", ())
    service_labels: bool = key("take service.name and service.version from app.kubernetes.io/* labels", False)
    peers: tuple[ClusterObjects, ...] = key(
        "objects of the whole cluster to watch, to say of each peer what it is: services, endpointslices, nodes, pods",
        (),
    )
    backends: bool = key(
        "say which pod is behind a Service's address, by connections that this network namespace translates (NAT)",
        False,
    )


@dataclass(frozen=True)
class Receiver:
    """An OTLP receiver; of a signal, what is unset is taken from `export`."""

    endpoint: Url | None = key("URL of an OTLP receiver; to one for all signals HTTP adds the signal's path", None)
    protocol: Protocol | None = key("grpc, http/protobuf or http/json; unset: http/protobuf", None)
    headers: Mapping[str, str] | None = key("headers of every request, such as authorization", None)
    timeout: Seconds | None = key("time for one attempt; unset: 10s", None, least=0.01, most=600)
    compression: Compression | None = key("gzip or none; unset: gzip for HTTP, none for gRPC", None)
    certificate: Path | None = key("CA certificate, PEM; unset: the system's", None)
    client_certificate: Path | None = key("our certificate for mTLS, PEM", None)
    client_key: Path | None = key("our key for mTLS, PEM", None)


@dataclass(frozen=True)
class ExportSettings(Receiver):
    """Where everything is sent, and what happens when that fails."""

    logs: Receiver = key("for packet logs", Receiver)
    traces: Receiver = key("for connection spans", Receiver)
    metrics: Receiver = key("for the agent's own metrics", Receiver)
    queue_memory: Bytes = key(
        "memory for requests that wait, for each signal", Bytes(64 << 20), least=1 << 20, most=1 << 36
    )
    retry_for: Seconds = key("how long a request is tried again", Seconds(300), least=0, most=86_400)
    flush_timeout: Seconds = key(
        "how long the queues may take to empty when the agent stops", Seconds(5), least=0, most=3600
    )


@dataclass(frozen=True)
class Batch:
    """How many records make a request."""

    max_bytes: Bytes = key(
        "size of a request, uncompressed; gRPC servers refuse more than 4MiB", Bytes(3 << 20), least=8192, most=1 << 30
    )
    max_records: int = key("log records or spans in a request", 4096, least=1, most=1 << 20)
    max_age: Seconds = key("longest time a record waits for others", Seconds(1), least=0.01, most=60)


@dataclass(frozen=True)
class File:
    """OTLP/JSON files, instead of a receiver."""

    directory: Path | None = key("where the files go; unset, and no endpoint either: ./tcpio-data", None)
    rotate: Bytes = key("a file that reaches this is put aside", Bytes(64 << 20), least=1 << 20, most=1 << 40)
    keep: int = key("how many files put aside are kept, for each signal", 10, least=0, most=100_000)


@dataclass(frozen=True)
class ResourceSettings:
    """What the agent's Resource says: that of its metrics, and of connections of which nobody knows whose they are."""

    service_name: str | None = key("service.name of the agent; unset: tcpio-otel", None)
    attributes: Mapping[str, str] = key(
        "more attributes, such as deployment.environment.name; workloads have them too, but for service.* and the like",
        dict,
    )


@dataclass(frozen=True)
class Signals:
    """Which signals are sent."""

    logs: Export = key("packet logs: otlp or none", Export.OTLP)
    traces: Export = key("connection spans: otlp or none", Export.OTLP)
    metrics: Export = key("the agent's own metrics: otlp or none", Export.OTLP)


@dataclass(frozen=True)
class Metrics:
    """Metrics: the agent's own, and those of traffic."""

    interval: Seconds = key("time between two exports", Seconds(60), least=0.1, most=86_400)
    listen: Listen | None = key(
        "address and port where Prometheus may scrape the same metrics, at /metrics; port 0: any; unset: nowhere",
        None,
    )
    traffic: bool = key("metrics of what goes between workloads and their peers, beside the agent's own", True)
    series_limit: int = key(
        "series of workload, peer, role and server port that are told apart; what comes beyond them is told as one",
        2000,
        least=1,
        most=1 << 20,
    )


class LineTag(StrEnum):
    """Addresses and ports of lines for Telegraf, by what they are called there."""

    LOCAL_ADDRESS = "local_address"
    LOCAL_PORT = "local_port"
    PEER_ADDRESS = "peer_address"
    PEER_PORT = "peer_port"
    CLIENT_ADDRESS = "client_address"
    CLIENT_PORT = "client_port"
    SERVER_ADDRESS = "server_address"
    SERVER_PORT = "server_port"


@dataclass(frozen=True)
class Telegraf:
    """What `tcpio-otel telegraf` tells."""

    packets: bool = key("a line for each packet; Telegraf drops what its own buffer cannot hold", False)
    connections: bool = key("a line for each connection that has ended", True)
    peers: bool = key("totals by workload and peer; metrics.series_limit bounds them", True)
    tags: tuple[LineTag, ...] = key(
        "addresses and ports that are tags, and so make series, where they are told as fields otherwise", ()
    )
    interval: Seconds = key(
        "time between two flushes, until Telegraf asks for one by itself; 0: only then",
        Seconds(10),
        least=0,
        most=86_400,
    )


@dataclass(frozen=True)
class Log:
    """What the agent says of itself, on standard error."""

    level: LogLevel = key("the least that is said: debug, info, warning or error", LogLevel.INFO)


@dataclass(frozen=True)
class Config:
    """Everything that can be set."""

    source: Source = key("live, or pcap:FILE", Source("live"))
    duration: Seconds | None = key(
        "stop by itself after this; unset: run until stopped", None, least=0, most=366 * 86_400
    )
    capture: Capture = key("what is recorded", Capture)
    connections: Connections = key("how connections are followed", Connections)
    correlation: Correlation = key("how packets find traces", Correlation)
    attribution: Attribution = key("whose connections are", Attribution)
    kubernetes: Kubernetes = key("what pods are called", Kubernetes)
    export: ExportSettings = key("where it is sent", ExportSettings)
    batch: Batch = key("how many records make a request", Batch)
    file: File = key("OTLP/JSON files", File)
    resource: ResourceSettings = key("what the records are about", ResourceSettings)
    signals: Signals = key("which signals are sent", Signals)
    metrics: Metrics = key("metrics of the agent and of traffic", Metrics)
    telegraf: Telegraf = key("what Telegraf is told", Telegraf)
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
        return None if any(self.otlp(signal) for signal in SIGNALS) else DEFAULT_DIRECTORY

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
        if http:
            # https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
            url = urlsplit(endpoint)
            path = (url.path or "/") if own.endpoint else f"{url.path.rstrip('/')}/v1/{signal}"
            endpoint = url._replace(path=path).geturl()
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
    """A key at the end of its path.

    Attributes:
        path: dotted.
        type: of the value; of one element for a list, None for a mapping from text to text.
        many: whether it is a list.
        optional: whether it may be unset.
        field: of the dataclass.
    """

    path: str
    type: Any
    many: bool
    optional: bool
    field: dataclasses.Field[Any]


def _leaves(section: type, prefix: str = "") -> Iterator[Leaf]:
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        path, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, path + ".")  # type: ignore[arg-type] # a hint is no instance
            continue
        optional = types.NoneType in typing.get_args(hint)
        if optional:
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        many = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if many else None if typing.get_origin(hint) is Mapping else hint
        yield Leaf(path, kind, many, optional, entry)


LEAVES = {leaf.path: leaf for leaf in _leaves(Config)}
"""All keys by their dotted paths, in their order."""

VARIABLES = {"TCPIO_" + path.replace(".", "_").upper(): path for path in LEAVES}
"""The variables of all keys."""


def _value(leaf: Leaf, given: Any, where: str) -> Any:
    """The value of a key from text, or from a list or mapping of texts.

    Raises:
        UsageError: naming `where`, the key, and what would be right.
    """
    # What a header holds may be a secret: it must not end in a log.
    shown = "its value" if leaf.path.endswith("headers") else repr(given)
    try:
        if leaf.type is None:
            return types.MappingProxyType(given if isinstance(given, dict) else parse_pairs(_one(given)))
        if leaf.many:
            texts = given if isinstance(given, list) else filter(str.strip, _one(given).split(","))
            return tuple(parse(leaf.type, text) for text in texts)
        value = parse(leaf.type, _one(given))
    except ValueError as error:
        raise UsageError(f"{where}: {leaf.path}: {shown} is not {error}") from None
    least, most = (leaf.field.metadata.get(limit) for limit in ("least", "most"))
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = " and ".join(
            f"at {word} {show(type(value)(limit))}"
            for word, limit in (("least", least), ("most", most))
            if limit is not None
        )
        raise UsageError(f"{where}: {leaf.path}: {shown} is out of range: give {bounds}")
    return value


def _one(given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError("a single value")  # noqa: TRY004 - reported like every other wrong value
    return given


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _from_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    """The keys of a YAML file: dotted path, texts, and where they stand."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError:  # UnicodeDecodeError, or a NUL in the path
        raise UsageError(f"the configuration {path} is not UTF-8 text") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UsageError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply to be a configuration") from None
    if root is not None:
        yield from _from_node(root, "", path)


def _where(node: yaml.Node, path: Path) -> str:
    return f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _unset(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _entries(node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """The entries of a mapping: name, node of the name, node of the value; each name once."""
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{_where(node, path)}: {prefix.rstrip('.') or 'the file'} must hold keys and values")
    seen: set[str] = set()
    for name_node, value in node.value:
        name = _text(name_node, "a key", path)
        if not name.isprintable():
            raise UsageError(f"{_where(name_node, path)}: the key {name!r} holds control characters")
        if name in seen:
            raise UsageError(f"{_where(name_node, path)}: {prefix}{name} stands here a second time")
        seen.add(name)
        yield name, name_node, value


def _from_node(node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, Any, str]]:
    known = {leaf.removeprefix(prefix).partition(".")[0]: None for leaf in LEAVES if leaf.startswith(prefix)}
    for name, name_node, value in _entries(node, prefix, path):
        if name not in known:
            hint = _nearest(name, known) or f"; known here: {', '.join(known)}"
            raise UsageError(f"{_where(name_node, path)}: unknown key {prefix}{name}{hint}")
        if _unset(value):
            continue
        if prefix + name in LEAVES:
            yield prefix + name, _texts(value, prefix + name, path), _where(value, path)
        else:
            yield from _from_node(value, f"{prefix}{name}.", path)


def _texts(node: yaml.Node, name: str, path: Path) -> Any:
    """A node as text, list of texts, or mapping of texts: types are ours to decide, not YAML's."""
    if isinstance(node, yaml.SequenceNode):
        return [_text(part, name, path) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        return {entry: _text(value, name, path) for entry, _, value in _entries(node, f"{name}.", path)}
    return _text(node, name, path)


def _text(node: yaml.Node, name: str, path: Path) -> str:
    if not isinstance(node, yaml.ScalarNode) or _unset(node):
        raise UsageError(f"{_where(node, path)}: {name} holds something that is neither text nor a number")
    return str(node.value)


def load(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration, and warnings about `OTEL_*` variables that were ignored.

    Args:
        file: a YAML file, if there is one.
        environment: of the process. An empty variable is an unset one.
        flags: dotted paths, with texts or lists of texts from the command line; None: not given.

    Raises:
        UsageError: with where, what, and what would be right.
    """
    given: dict[str, tuple[Any, str]] = {}
    if file:
        given.update({path: (texts, where) for path, texts, where in _from_file(file)})
    for variable, text in environment.items():
        if variable.startswith("TCPIO_") and text:
            if variable not in VARIABLES:
                raise UsageError(f"unknown variable {variable}{_nearest(variable, VARIABLES)}")
            given[VARIABLES[variable]] = (text, variable)
    given.update({path: (texts, "command line") for path, texts in flags.items() if texts is not None})
    values = {path: _value(LEAVES[path], texts, where) for path, (texts, where) in given.items()}
    otel = read_otel(environment)
    for path, (text, variable) in otel.values.items():
        if path in values:
            continue
        try:
            values[path] = _value(LEAVES[path], text, variable)
        except UsageError as error:
            # The specification has wrong numbers and names ignored; to send data elsewhere than asked is another thing.
            if path.endswith("endpoint"):
                raise
            otel.warnings.append(f"{error}; ignored")
    config = _build(Config, "", values)
    _check(config)
    return config, otel.warnings


def _build(section: type[Any], prefix: str, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(section)
    found = {}
    for entry in dataclasses.fields(section):
        path, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            found[entry.name] = _build(hint, path + ".", values)  # type: ignore[arg-type] # a hint is no instance
        elif path in values:
            found[entry.name] = values[path]
    return section(**found)


def _check(config: Config) -> None:
    """What no single key can tell.

    Raises:
        UsageError: two keys contradict each other.
    """
    receivers = [settings for signal in SIGNALS if (settings := config.otlp(signal))]
    if config.kubernetes.enabled and not config.kubernetes.node_name:
        raise UsageError("kubernetes.enabled needs kubernetes.node_name (in a pod: spec.nodeName, by the downward API)")
    if config.kubernetes.enabled and not config.attribution.workloads:
        raise UsageError("kubernetes.enabled says of workloads which pods they are: it needs attribution.workloads")
    if config.kubernetes.kubelet_certificate and not config.kubernetes.kubelet:
        raise UsageError("kubernetes.kubelet_certificate is for kubernetes.kubelet, which is not set")
    if config.kubernetes.enabled and config.kubernetes.backends and not config.kubernetes.peers:
        raise UsageError("kubernetes.backends says who is behind addresses: it needs kubernetes.peers (services, say)")
    if config.file.directory and receivers:
        raise UsageError("file.directory and export.endpoint are both set: the ledger counts a packet once; choose one")
    for settings in receivers:
        if bool(settings.client_certificate) != bool(settings.client_key):
            raise UsageError(
                f"for {settings.endpoint} one of client_certificate and client_key is missing: mTLS needs both"
            )


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
                shown[entry.name] = show(value)
        return shown

    return yaml.safe_dump(section(config), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML file; what it cannot say (CIDR blocks, durations in range) `load` says."""
    scalar = {"type": ["string", "number", "boolean"]}  # `load` reads all of them as the text that they are
    root: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "tcpio-otel"}
    root |= {"type": "object", "additionalProperties": False, "properties": {}}
    for leaf in LEAVES.values():
        properties = root["properties"]
        *sections, name = leaf.path.split(".")
        for section in sections:
            empty = {"type": ["object", "null"], "additionalProperties": False, "properties": {}}
            properties = properties.setdefault(section, empty)["properties"]
        if leaf.type is None:
            shape: dict[str, Any] = {"type": ["object", "null"], "additionalProperties": scalar}
        elif leaf.many:
            enum = isinstance(leaf.type, type) and issubclass(leaf.type, StrEnum)
            one = {"enum": [*leaf.type]} if enum else scalar
            shape = {"type": ["array", "null"], "items": one}
        elif issubclass(leaf.type, StrEnum):
            shape = {"enum": [*leaf.type, None]}
        elif leaf.type is int:
            shape = {"type": ["integer", "null"]}
            shape |= {"minimum": leaf.field.metadata["least"], "maximum": leaf.field.metadata["most"]}
        else:
            shape = {**scalar, "type": [*scalar["type"], "null"]}
        properties[name] = {**shape, "description": leaf.field.metadata["help"], "default": show(default(leaf))}
    return root


def default(leaf: Leaf) -> Any:
    """The default of a key."""
    factory = leaf.field.default_factory
    return leaf.field.default if factory is dataclasses.MISSING else factory()
