"""The standard variables: what each of them does, as the OpenTelemetry specification has it."""

from pathlib import Path
from typing import Any

import pytest

from tcpio_otel.config import Config, Export, load
from tcpio_otel.errors import UsageError
from tcpio_otel.export.settings import Compression, OtlpSettings, Protocol
from tcpio_otel.otel_environment import ENDPOINTS, EXPORTERS, MILLISECONDS, SIGNALS, TEXTS

GENERAL = "OTEL_EXPORTER_OTLP_"
PREFIXES = {None: GENERAL} | {signal: f"{GENERAL}{signal.upper()}_" for signal in SIGNALS}

RECEIVER = {
    "PROTOCOL": ("http/json", "protocol", Protocol.HTTP_JSON),
    "HEADERS": ("a=b%20c,d=e", "headers", (("a", "b c"), ("d", "e"))),
    "COMPRESSION": ("none", "compression", Compression.NONE),
    "CERTIFICATE": ("/ca.pem", "certificate", Path("/ca.pem")),
    "TIMEOUT": ("2500", "timeout_s", 2.5),
}
"""For every variable of a receiver that stands alone: its text, and what becomes of it in OtlpSettings."""

OTHERS: dict[str, tuple[str, str, Any]] = {
    "OTEL_BLRP_SCHEDULE_DELAY": ("200", "batch.max_age", 0.2),
    "OTEL_BSP_SCHEDULE_DELAY": ("300", "batch.max_age", 0.3),
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": ("512", "batch.max_records", 512),
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": ("256", "batch.max_records", 256),
    "OTEL_METRIC_EXPORT_INTERVAL": ("5000", "metrics.interval", 5.0),
    "OTEL_SERVICE_NAME": ("edge", "resource.service_name", "edge"),
    "OTEL_RESOURCE_ATTRIBUTES": ("a=b%2Cc,d=e", "resource.attributes", {"a": "b,c", "d": "e"}),
    "OTEL_LOGS_EXPORTER": ("none", "signals.logs", Export.NONE),
    "OTEL_TRACES_EXPORTER": ("none", "signals.traces", Export.NONE),
    "OTEL_METRICS_EXPORTER": ("none", "signals.metrics", Export.NONE),
}


def configured(**environment: str) -> Config:
    """The configuration that variables make; nothing in them may be ignored."""
    config, warnings = load(None, environment, {})
    assert warnings == []
    return config


def receivers(**environment: str) -> dict[str, OtlpSettings | None]:
    """The receivers of all signals that variables make."""
    config = configured(**environment)
    return {signal: config.otlp(signal) for signal in SIGNALS}


def of(found: dict[str, OtlpSettings | None], signal: str) -> OtlpSettings:
    """A receiver that must be there."""
    settings = found[signal]
    assert settings is not None
    return settings


@pytest.mark.parametrize("name", OTHERS)
def test_a_variable_does_what_it_says(name: str) -> None:
    """Each by itself, in the specification's own units."""
    text, path, value = OTHERS[name]
    found: Any = configured(**{name: text})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("name", RECEIVER)
@pytest.mark.parametrize("signal", PREFIXES)
def test_a_variable_of_the_exporter_is_for_all_signals_or_for_its_own(signal: str | None, name: str) -> None:
    """The general one reaches all three; a signal's own leaves the others alone."""
    text, field, value = RECEIVER[name]
    bare = receivers(**{f"{GENERAL}ENDPOINT": "http://h"})
    found = receivers(**{f"{GENERAL}ENDPOINT": "http://h", f"{PREFIXES[signal]}{name}": text})
    for each in SIGNALS:
        expected = value if signal in (None, each) else getattr(of(bare, each), field)
        assert getattr(of(found, each), field) == expected


@pytest.mark.parametrize("signal", PREFIXES)
def test_client_certificate_and_key_come_in_pairs(signal: str | None) -> None:
    """MTLS for all signals, or for one."""
    pair = {f"{PREFIXES[signal]}CLIENT_CERTIFICATE": "/c.pem", f"{PREFIXES[signal]}CLIENT_KEY": "/k.pem"}
    found = receivers(**{f"{GENERAL}ENDPOINT": "https://h", **pair})
    for each in SIGNALS:
        expected = (Path("/c.pem"), Path("/k.pem")) if signal in (None, each) else (None, None)
        assert (of(found, each).client_certificate, of(found, each).client_key) == expected


def test_every_variable_that_is_read_is_tested_here() -> None:
    """No variable is added without a test of what it does."""
    tested = set(OTHERS) | {
        f"{prefix}{name}"
        for prefix in PREFIXES.values()
        for name in (*RECEIVER, "CLIENT_CERTIFICATE", "CLIENT_KEY", "ENDPOINT")
    }
    assert {*TEXTS, *MILLISECONDS, *ENDPOINTS, *EXPORTERS} == tested


def test_the_general_endpoint_is_a_base_for_http_and_a_signals_own_is_taken_as_it_is() -> None:
    """`v1/{signal}` is added to the general one only."""
    found = receivers(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://h:4318/base/",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://t:1/x",
        OTEL_EXPORTER_OTLP_METRICS_ENDPOINT="http://m:2",
    )
    assert {signal: of(found, signal).endpoint for signal in SIGNALS} == {
        "logs": "http://h:4318/base/v1/logs",
        "traces": "http://t:1/x",
        "metrics": "http://m:2/",
    }


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4317"}, "https://h:4317"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4317", "OTEL_EXPORTER_OTLP_INSECURE": "TRUE"}, "http://h:4317"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4317", "OTEL_EXPORTER_OTLP_LOGS_INSECURE": "true"}, "http://h:4317"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4317", "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}, "https://h:4317"),
        ({"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "l:1", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, "http://l:1"),
        (
            {
                "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "l:1",
                "OTEL_EXPORTER_OTLP_LOGS_INSECURE": "false",
                "OTEL_EXPORTER_OTLP_INSECURE": "true",
            },
            "https://l:1",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://h:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, "https://h:4317"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317", "OTEL_EXPORTER_OTLP_INSECURE": "false"}, "http://h:4317"),
    ],
)
def test_insecure_counts_for_grpc_without_a_scheme_only(environment: dict[str, str], endpoint: str) -> None:
    """A scheme in the endpoint decides; without one TLS is the default."""
    assert of(receivers(OTEL_EXPORTER_OTLP_PROTOCOL="grpc", **environment), "logs").endpoint == endpoint


def test_http_needs_a_scheme() -> None:
    """Where data goes is not guessed: the variable is named, and the agent does not start."""
    with pytest.raises(
        UsageError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: export\.endpoint: 'h:4318' is not a URL such as"
    ):
        load(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "h:4318", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, {})


def test_without_an_endpoint_there_is_no_receiver() -> None:
    """The specification's localhost is no default here: `run` writes files instead."""
    assert receivers(OTEL_EXPORTER_OTLP_PROTOCOL="grpc") == dict.fromkeys(SIGNALS)


def test_log_batches_win_over_span_batches() -> None:
    """There is one batch section, and packet logs are what there is most of."""
    config = configured(
        OTEL_BSP_SCHEDULE_DELAY="5000",
        OTEL_BLRP_SCHEDULE_DELAY="1500",
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE="7",
        OTEL_BLRP_MAX_EXPORT_BATCH_SIZE="8",
    )
    assert (config.batch.max_age, config.batch.max_records) == (1.5, 8)


def test_sdk_disabled_turns_every_signal_off() -> None:
    """Whatever the exporters say; only `true`, in any case, means true."""
    config = configured(OTEL_SDK_DISABLED="True", OTEL_LOGS_EXPORTER="otlp")
    assert {getattr(config.signals, signal) for signal in SIGNALS} == {Export.NONE}
    assert configured(OTEL_SDK_DISABLED="false") == Config()
    config, warnings = load(None, {"OTEL_SDK_DISABLED": "1"}, {})
    assert config == Config()
    assert warnings == ["OTEL_SDK_DISABLED: '1' is not true or false; taken as false"]


def test_an_empty_variable_is_an_unset_one() -> None:
    """And blanks around a value do not count."""
    assert configured(OTEL_EXPORTER_OTLP_ENDPOINT="", OTEL_SDK_DISABLED=" ", OTEL_CONFIG_FILE="") == Config()
    assert configured(OTEL_SERVICE_NAME=" edge ").resource.service_name == "edge"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "9" * 30),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-1"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "²"),
        ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "many"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization: Bearer abc"),
        ("OTEL_RESOURCE_ATTRIBUTES", "good=1,malformed"),
        ("OTEL_RESOURCE_ATTRIBUTES", "good=1,bad=%zz"),
    ],
)
def test_what_cannot_be_used_is_warned_about_and_ignored(name: str, text: str) -> None:
    """As the specification wants it: the value as a whole, with a warning that names the variable and no secret."""
    config, warnings = load(None, {name: text}, {})
    assert config == Config()
    (warning,) = warnings
    assert warning.startswith(f"{name}: ")
    assert warning.endswith("; ignored")
    assert "Bearer" not in warning


def test_what_is_overridden_is_not_warned_about() -> None:
    """A variable meant for other programs does not disturb where the file or a flag decides."""
    environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": "x", "OTEL_EXPORTER_OTLP_ENDPOINT": "x"}
    config, warnings = load(None, environment, {"export.protocol": "grpc", "export.endpoint": "http://h:4317"})
    assert warnings == []
    assert of({"logs": config.otlp("logs")}, "logs").endpoint == "http://h:4317"


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("text", ["console", "otlp,console", "zipkin"])
def test_other_exporters_are_refused(name: str, text: str) -> None:
    """Data that would silently go nowhere is worse than an agent that does not start."""
    with pytest.raises(UsageError, match=f"^{name}: '{text}' is not otlp or none"):
        load(None, {name: text}, {})


def test_a_configuration_file_of_the_sdk_is_refused() -> None:
    """It would win over everything else, and nothing here can read it."""
    with pytest.raises(UsageError, match="OTEL_CONFIG_FILE is not supported"):
        load(None, {"OTEL_CONFIG_FILE": "sdk.yaml"}, {})
