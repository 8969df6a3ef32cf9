"""File, variables and flags to a configuration."""

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.config import LEAVES, VARIABLES, Config, default, effective, load, schema
from tcpio_otel.config_values import show
from tcpio_otel.errors import UsageError
from tcpio_otel.export.settings import Compression, OtlpSettings, Protocol

Write = Callable[[str], Path]

OTHERS = {
    "source": "pcap:a.pcap",
    "duration": "90s",
    "metrics.listen": "[::1]:9464",
    "capture.ports": ["443", "8000-8999"],
    "capture.cidrs": ["192.0.2.0/24", "2001:db8::/32"],
    "capture.local": ["198.51.100.7/32"],
    "capture.loader": "bcc",
    "capture.cgroup": "/sys/fs/cgroup/unified",
    "capture.network_namespace": "/run/netns/blue",
    "capture.ring_memory": "8MiB",
    "capture.queue_memory": "64MiB",
    "capture.latency": "20ms",
    "connections.limit": 1000,
    "connections.linger": "500ms",
    "connections.handshake_timeout": "1m",
    "connections.summary_interval": "1m",
    "connections.handshake_wait": "0s",
    "correlation.socket_tags": False,
    "correlation.http_headers": False,
    "correlation.published_contexts": False,
    "correlation.published_map": "/sys/fs/bpf/other",
    "attribution.workloads": False,
    "kubernetes.enabled": True,
    "kubernetes.node_name": "node-7",
    "kubernetes.kubeconfig": "/etc/kubeconfig",
    "kubernetes.kubelet": "https://192.0.2.7:10250",
    "kubernetes.kubelet_certificate": "/etc/kubelet.pem",
    "kubernetes.wait": "7s",
    "kubernetes.cache": "/var/cache/pods.json",
    "kubernetes.labels": ["app", "team"],
    "kubernetes.annotations": ["owner"],
    "kubernetes.service_labels": True,
    "kubernetes.peers": ["services", "nodes"],
    "kubernetes.backends": True,
    "correlation.wait": "0s",
    "correlation.quiet": "1s",
    "export.queue_memory": "128MiB",
    "export.retry_for": "0s",
    "export.flush_timeout": "10s",
    "batch.max_bytes": "1MiB",
    "batch.max_records": 100,
    "batch.max_age": "200ms",
    "file.directory": "/var/lib/tcpio",
    "file.rotate": "5000000",
    "file.keep": 0,
    "resource.service_name": "edge",
    "resource.attributes": {"deployment.environment.name": "staging", "team": "net"},
    "signals.logs": "none",
    "signals.traces": "none",
    "signals.metrics": "none",
    "metrics.interval": "10s",
    "metrics.traffic": False,
    "metrics.series_limit": 77,
    "telegraf.packets": True,
    "telegraf.connections": False,
    "telegraf.peers": False,
    "telegraf.tags": ["server_port", "peer_address"],
    "telegraf.interval": "30s",
    "log.level": "debug",
} | {
    f"export.{section}{name}": value
    for section in ("", "logs.", "traces.", "metrics.")
    for name, value in {
        "endpoint": "https://collector.example:4317",
        "protocol": "grpc",
        "headers": {"authorization": "Bearer abc", "x": "1"},
        "timeout": "3s",
        "compression": "gzip",
        "certificate": "/etc/ca.pem",
        "client_certificate": "/etc/client.pem",
        "client_key": "/etc/client.key",
    }.items()
}
"""For every key a value that is not the default, as the file writes it."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "tcpio-otel.yaml"
        path.write_text(text)
        return path

    return write


def nested(path: str, value: Any) -> str:
    """A file that sets one key."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


def at(config: Config, path: str) -> Any:
    """The value of a key."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def partners(path: str) -> dict[str, Any]:
    """Flags without which a key cannot be set: mTLS needs both halves, and a watch the node's name."""
    if path.endswith("client_key"):
        return {path.replace("client_key", "client_certificate"): "/etc/client.pem"}
    if path.endswith("client_certificate"):
        return {path.replace("client_certificate", "client_key"): "/etc/client.key"}
    if path == "kubernetes.enabled":
        return {"kubernetes.node_name": "node-7"}
    if path == "kubernetes.kubelet_certificate":
        return {"kubernetes.kubelet": "https://192.0.2.7:10250"}
    return {}


def as_text(value: Any) -> str:
    """A value as a variable holds it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ",".join(f"{name}={entry}" for name, entry in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def test_nothing_given_is_the_default() -> None:
    """Without file, variables and flags the agent captures live and has no receiver."""
    config, warnings = load(None, {}, {})
    assert config == Config()
    assert warnings == []
    assert config.capture_file is None
    assert all(config.otlp(signal) is None for signal in ("logs", "traces", "metrics"))
    assert config.file_directory == Path("tcpio-data")


@pytest.mark.parametrize("path", LEAVES)
def test_every_key_is_set_by_file_variable_and_flag_alike(path: str, write: Write) -> None:
    """The three ways lead to the same value, and it is not the default."""
    value = OTHERS[path]
    variable = next(name for name, key in VARIABLES.items() if key == path)
    found = [
        load(write(nested(path, value)), {}, partners(path))[0],
        load(None, {variable: as_text(value)}, partners(path))[0],
        load(None, {}, {path: as_text(value), **partners(path)})[0],
    ]
    assert at(found[0], path) != default(LEAVES[path])
    assert at(found[0], path) == at(found[1], path) == at(found[2], path)
    assert show(at(found[0], path)) == (int(value) if value == "5000000" else value)


def test_flags_beat_variables_beat_the_file_beats_otel_beats_defaults(write: Write) -> None:
    """The documented order, taken away from the top."""
    file = write("batch: {max_records: 2}")
    environment = {"TCPIO_BATCH_MAX_RECORDS": "3", "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": "1"}
    otel = {"OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": "1"}
    assert load(file, environment, {"batch.max_records": "4"})[0].batch.max_records == 4
    assert load(file, environment, {"batch.max_records": None})[0].batch.max_records == 3
    assert load(file, otel, {})[0].batch.max_records == 2
    assert load(None, otel, {})[0].batch.max_records == 1
    assert load(None, {}, {})[0].batch.max_records == 4096


def test_an_empty_value_is_an_unset_one(write: Write) -> None:
    """A key with nothing behind it, a section that is all comments, and an empty variable change nothing."""
    file = write("capture:\n  # ports: [443]\nduration:\nexport: {endpoint: ~}\n")
    assert load(file, {"TCPIO_EXPORT_ENDPOINT": "", "TCPIO_NO_SUCH": ""}, {})[0] == Config()
    assert load(write("# nothing\n"), {}, {})[0] == Config()


def test_a_list_comes_from_repeated_flags() -> None:
    """`--port 22 --port 8000-8999` gives both."""
    config, _ = load(None, {}, {"capture.ports": ["22", "8000-8999"], "capture.cidrs": ["192.0.2.1"]})
    assert config.capture.ports == ((22, 22), (8000, 8999))
    assert config.capture.cidrs == (ip_network("192.0.2.1/32"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("captur:\n  ports: [1]", "{}:1:1: unknown key captur; did you mean capture?"),
        ("capture:\n  port: [1]", "{}:2:3: unknown key capture.port; did you mean ports?"),
        ("log:\n  zzz: 1", "{}:2:3: unknown key log.zzz; known here: level"),
        ("batch:\n  max_age: 1s\n  max_age: 2s", "{}:3:3: batch.max_age stands here a second time"),
        ("log: {level: info}\nlog: {level: info}", "{}:2:1: log stands here a second time"),
        ("resource:\n  attributes: {a: 1, a: 2}", "{}:2:22: resource.attributes.a stands here a second time"),
        ("capture:\n  ports: [443, 70000]", "{}:2:10: capture.ports: ['443', '70000'] is not a port such as 443,"),
        ("capture:\n  cidrs: [192.0.2.0/40]", "{}:2:10: capture.cidrs: ['192.0.2.0/40'] is not a network such as"),
        ("capture: [1]", "{}:1:10: capture must hold keys and values"),
        ("- capture", "{}:1:1: the file must hold keys and values"),
        ("batch:\n  max_age: [1s]", "{}:2:12: batch.max_age: ['1s'] is not a single value"),
        ("batch:\n  max_age: 1 fortnight", "{}:2:12: batch.max_age: '1 fortnight' is not a duration such as"),
        ("batch:\n  max_age: 2h", "{}:2:12: batch.max_age: '2h' is out of range: give at least 10ms and at most 1m"),
        ("batch: {max_records: 0}", "{}:1:22: batch.max_records: '0' is out of range: give at least 1 and at"),
        ("batch: {max_bytes: 1}", "{}:1:20: batch.max_bytes: '1' is out of range: give at least 8KiB and at most 1GiB"),
        ("log: {level: loud}", "{}:1:14: log.level: 'loud' is not one of debug, info, warning, error"),
        ("export: {endpoint: localhost}", "{}:1:20: export.endpoint: 'localhost' is not a URL such as"),
        ("capture: {ports: [[1]]}", "{}:1:19: capture.ports holds something that is neither text nor a number"),
        ("capture: {ports: [~]}", "{}:1:19: capture.ports holds something that is neither text nor a number"),
        ("export: {headers: {a: }}", "{}:1:22: export.headers holds something that is neither text nor a number"),
        ('"a\\nb": 1', "{}:1:1: the key 'a\\nb' holds control characters"),
        ("? [a]\n: 1", "{}:1:3: a key holds something that is neither text nor a number"),
        ("capture: {", "{}:1:11: not YAML: "),
        ("a: *b", "{}:1:4: not YAML: found undefined alias"),
        ("--- 1\n--- 2", "{}:2:1: not YAML: but found another document"),
        ("a: \x01", "{}: not YAML: "),
        ("[" * 3000, "{}: nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "{}:1:1: unknown key a"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_one_line_with_its_place(text: str, message: str, write: Write) -> None:
    """File, line and column, then what, then what would be right."""
    path = write(text)
    with pytest.raises(UsageError) as caught:
        load(path, {}, {})
    assert str(caught.value).startswith(message.format(path))
    assert "\n" not in str(caught.value)


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*LEAVES, "export", *"{}[],~-", ": ", "\n", "  ", "5s", '"\\n"', "&a ", "*a "])).map(
        "".join
    )
)
def test_any_file_is_read_or_refused_in_one_line(text: str) -> None:
    """Garbage raises nothing but the documented error."""
    with tempfile.NamedTemporaryFile("wb", suffix=".yaml") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        with contextlib.suppress(UsageError), one_line():
            load(Path(file.name), {}, {})


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Whatever is refused is refused in one line."""
    try:
        yield
    except UsageError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        raise


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Missing, a directory, or not text."""
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, cause in (
        (tmp_path / "missing.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "is not UTF-8 text"),
    ):
        with pytest.raises(UsageError, match=f"{path}.*{cause}"):
            load(path, {}, {})


def test_a_mistyped_variable_is_refused_with_the_nearest() -> None:
    """TCPIO_CAPTURE_PORT must not be ignored: packets would be recorded that nobody asked for."""
    with pytest.raises(UsageError, match=r"unknown variable TCPIO_CAPTURE_PORT; did you mean TCPIO_CAPTURE_PORTS\?"):
        load(None, {"TCPIO_CAPTURE_PORT": "443"}, {})


def test_wrong_variables_and_flags_are_named() -> None:
    """The line says which variable, or that it was the command line."""
    with pytest.raises(UsageError, match=r"^TCPIO_LOG_LEVEL: log\.level: 'x' is not one of debug"):
        load(None, {"TCPIO_LOG_LEVEL": "x"}, {})
    with pytest.raises(UsageError, match=r"^command line: capture\.latency: 'x' is not a duration"):
        load(None, {}, {"capture.latency": "x"})


def test_secrets_stay_out_of_messages() -> None:
    """A malformed list of headers is refused without being repeated."""
    with pytest.raises(UsageError) as caught:
        load(None, {"TCPIO_EXPORT_HEADERS": "authorization: Bearer abc"}, {})
    assert "Bearer" not in str(caught.value)


def test_files_and_a_receiver_exclude_each_other() -> None:
    """The ledger counts a packet once, so it goes to one place."""
    with pytest.raises(UsageError, match="choose one"):
        load(None, {}, {"file.directory": "d", "export.traces.endpoint": "http://h"})


def test_a_watch_of_pods_needs_a_node_and_workloads() -> None:
    """Otherwise there is nothing to ask for, or nobody to tell it of."""
    with pytest.raises(UsageError, match=r"kubernetes\.enabled needs kubernetes\.node_name"):
        load(None, {}, {"kubernetes.enabled": "true"})
    flags = {"kubernetes.enabled": "true", "kubernetes.node_name": "n", "attribution.workloads": "false"}
    with pytest.raises(UsageError, match=r"it needs attribution\.workloads"):
        load(None, {}, flags)
    flags = {"kubernetes.enabled": "true", "kubernetes.node_name": "n", "kubernetes.backends": "true"}
    with pytest.raises(UsageError, match=r"it needs kubernetes\.peers"):
        load(None, {}, flags)


def test_half_of_mtls_is_refused_and_halves_may_meet_from_two_sections() -> None:
    """The key may stand in `export` and the certificate with a signal."""
    flags = {"export.endpoint": "https://h", "export.logs.client_certificate": "c"}
    with pytest.raises(UsageError, match="for https://h/v1/logs one of client_certificate and client_key is missing"):
        load(None, {}, flags)
    general = {"export.client_certificate": "general", "export.client_key": "k"}
    settings = load(None, {}, flags | general)[0].otlp("logs")
    assert settings is not None
    assert (settings.client_certificate, settings.client_key) == (Path("c"), Path("k"))


def test_the_configuration_cannot_be_changed() -> None:
    """Frozen to the last mapping."""
    config, _ = load(None, {}, {"export.headers": "a=b"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch.max_records = 1  # type: ignore[misc] # that is the point
    with pytest.raises(TypeError):
        config.export.headers["a"] = "c"  # type: ignore[index] # that is the point


def test_replay_names_its_file() -> None:
    """`pcap:` and a path, blanks and colons included."""
    config, _ = load(None, {}, {"source": "pcap:/tmp/a b:c.pcap"})
    assert config.capture_file == Path("/tmp/a b:c.pcap")


def receiver(signal: str, **flags: str) -> OtlpSettings:
    """What flags under `export` make of a signal; `__` stands for a dot."""
    config, _ = load(None, {}, {f"export.{name.replace('__', '.')}": value for name, value in flags.items()})
    settings = config.otlp(signal)
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("flags", "endpoint"),
    [
        ({"endpoint": "http://h:4318"}, "http://h:4318/v1/logs"),
        ({"endpoint": "http://h:4318/"}, "http://h:4318/v1/logs"),
        ({"endpoint": "http://h/otlp/?tenant=1"}, "http://h/otlp/v1/logs?tenant=1"),
        ({"logs__endpoint": "http://h:4318"}, "http://h:4318/"),
        ({"logs__endpoint": "http://h/custom"}, "http://h/custom"),
        ({"endpoint": "http://general", "logs__endpoint": "http://own/x"}, "http://own/x"),
        ({"endpoint": "http://h:4317", "protocol": "grpc"}, "http://h:4317"),
        ({"endpoint": "http://h", "protocol": "grpc", "logs__protocol": "http/json"}, "http://h/v1/logs"),
    ],
)
def test_endpoints_become_urls_as_the_specification_says(flags: dict[str, str], endpoint: str) -> None:
    """A general HTTP endpoint is a base; a signal's own is taken as it is, with the root for an empty path."""
    assert receiver("logs", **flags).endpoint == endpoint


def test_a_signal_overrides_and_inherits() -> None:
    """Each key on its own; headers as a whole."""
    settings = receiver(
        "traces",
        endpoint="https://h",
        headers="a=1,b=2",
        timeout="3s",
        certificate="/ca.pem",
        traces__headers="c=3",
        traces__compression="none",
    )
    assert settings == OtlpSettings(
        "https://h/v1/traces",
        Protocol.HTTP_PROTOBUF,
        headers=(("c", "3"),),
        timeout_s=3.0,
        compression=Compression.NONE,
        certificate=Path("/ca.pem"),
    )


def test_compression_is_gzip_over_http_and_none_over_grpc() -> None:
    """The gzip of gRPC costs more than everything else together; whoever wants it can ask for it."""
    assert receiver("logs", endpoint="http://h").compression is Compression.GZIP
    assert receiver("logs", endpoint="http://h", protocol="grpc").compression is Compression.NONE
    assert receiver("logs", endpoint="http://h", protocol="grpc", compression="gzip").compression is Compression.GZIP


def test_only_a_signal_with_an_endpoint_has_a_receiver() -> None:
    """An endpoint for traces says nothing of logs, and no files are written then."""
    config, _ = load(None, {}, {"export.traces.endpoint": "http://h"})
    assert config.otlp("logs") is None
    assert config.otlp("traces") is not None
    assert config.file_directory is None


@pytest.mark.parametrize("path", LEAVES)
def test_the_effective_configuration_loads_back_to_the_same(path: str, write: Write) -> None:
    """What `config` prints is a configuration file."""
    config, _ = load(write(nested(path, OTHERS[path])), {}, partners(path))
    assert load(write(effective(config, secrets=True)), {}, {})[0] == config


def test_headers_are_masked_unless_asked_for() -> None:
    """A printed configuration can be pasted into a ticket."""
    config, _ = load(None, {}, {"export.logs.headers": "authorization=Bearer abc"})
    assert "abc" not in effective(config)
    assert "authorization: '***'" in effective(config)
    assert "authorization: Bearer abc" in effective(config, secrets=True)


def fits(value: Any, node: dict[str, Any]) -> bool:
    """Whether a value satisfies the few words of JSON Schema that ours is made of."""
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "boolean": bool, "integer": int}
    kinds["null"] = type(None)
    if "enum" in node:
        return value in node["enum"]
    allowed = [node["type"]] if isinstance(node["type"], str) else node["type"]
    if not any(isinstance(value, kinds[kind]) for kind in allowed):
        return False
    if isinstance(value, dict):
        known, rest = node.get("properties", {}), node["additionalProperties"]
        return all(
            fits(part, known[name]) if name in known else rest and fits(part, rest) for name, part in value.items()
        )
    if isinstance(value, list):
        return all(fits(part, node["items"]) for part in value)
    return not isinstance(value, int) or node.get("minimum", value) <= value <= node.get("maximum", value)


def test_the_schema_takes_what_loads() -> None:
    """The effective configuration, defaults and all keys set, satisfies the schema; unknown keys and ranges do not."""
    assert fits(yaml.safe_load(effective(Config())), schema())
    for path, value in OTHERS.items():
        assert fits(yaml.safe_load(nested(path, value)), schema()), path
    for text in ("captur: {}", "batch: {max_records: 0}", "log: {level: loud}", "capture: {ports: 443}", "export: 1"):
        assert not fits(yaml.safe_load(text), schema()), text


def test_the_schema_describes_every_key() -> None:
    """With help and default, so that an editor can show them."""
    for path, leaf in LEAVES.items():
        node = schema()
        for name in path.split("."):
            node = node["properties"][name]
        assert node["description"] == leaf.field.metadata["help"]
        assert node["default"] == show(default(leaf))


def test_it_is_read_before_numpy_and_grpc() -> None:
    """Privileges are dropped before what starts threads is imported."""
    program = (
        "import sys, tcpio_otel.config as config; config.load(None, {}, {});"
        "print(sorted({'numpy', 'grpc', 'opentelemetry', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
