"""The standard `OTEL_*` variables to configuration keys, as the OpenTelemetry specification reads them.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and
https://opentelemetry.io/docs/specs/otel/protocol/exporter/. An empty variable is an unset one. A value that cannot be
read is ignored with a warning, as the specification wants it; what would silently change where data goes is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tcpio_otel.errors import UsageError

SIGNALS = ("logs", "traces", "metrics")


@dataclass
class OtelValues:
    """Keys of the configuration, each with its value and the variable that it comes from; and what was ignored."""

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_otel(environment: Mapping[str, str]) -> OtelValues:
    """Read the variables.

    Raises:
        UsageError: a variable asks for what this agent does not do.
    """
    found = OtelValues()
    present = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_") and value.strip()}
    if "OTEL_CONFIG_FILE" in present:
        raise UsageError("OTEL_CONFIG_FILE is not supported: use tcpio-otel's own file, with --config")
    _exporter(present, found)
    _batches(present, found)
    _signals(present, found)
    if name := present.get("OTEL_SERVICE_NAME"):
        found.values["resource.service_name"] = (name, "OTEL_SERVICE_NAME")
    if text := present.get("OTEL_RESOURCE_ATTRIBUTES"):
        attributes = _pairs(text)
        if attributes is None:
            found.warnings.append("OTEL_RESOURCE_ATTRIBUTES is malformed and was ignored as a whole")
        else:
            found.values["resource.attributes"] = (attributes, "OTEL_RESOURCE_ATTRIBUTES")
    return found


def _pairs(text: str) -> dict[str, str] | None:
    """`key=value,key=value`, percent-decoded (W3C Baggage without properties); None when malformed."""
    pairs = {}
    for part in text.split(","):
        if not part.strip():
            continue
        name, separator, value = part.partition("=")
        if not separator or not name.strip():
            return None
        pairs[unquote(name.strip())] = unquote(value.strip())
    return pairs


def _exporter(present: Mapping[str, str], found: OtelValues) -> None:
    for signal in ("", *SIGNALS):
        section = f"export.{signal}." if signal else "export."
        prefix = f"OTEL_EXPORTER_OTLP_{signal.upper()}_" if signal else "OTEL_EXPORTER_OTLP_"
        for name, key in (
            ("PROTOCOL", "protocol"),
            ("COMPRESSION", "compression"),
            ("CERTIFICATE", "certificate"),
            ("CLIENT_CERTIFICATE", "client_certificate"),
            ("CLIENT_KEY", "client_key"),
        ):
            if value := present.get(prefix + name):
                found.values[section + key] = (value, prefix + name)
        if (text := present.get(prefix + "HEADERS")) is not None:
            headers = _pairs(text)
            if headers is None:
                found.warnings.append(f"{prefix}HEADERS is malformed and was ignored")
            else:
                found.values[section + "headers"] = (headers, prefix + "HEADERS")
        if (milliseconds := _milliseconds(present, prefix + "TIMEOUT", found)) is not None:
            found.values[section + "timeout"] = (f"{milliseconds}ms", prefix + "TIMEOUT")
        if endpoint := present.get(prefix + "ENDPOINT"):
            found.values[section + "endpoint"] = (_with_scheme(endpoint, prefix, present), prefix + "ENDPOINT")


def _with_scheme(endpoint: str, prefix: str, present: Mapping[str, str]) -> str:
    """For gRPC an endpoint may come without a scheme; INSECURE decides then, and only then."""
    if urlsplit(endpoint).scheme in ("http", "https") or "://" in endpoint:
        return endpoint
    insecure = present.get(prefix + "INSECURE", present.get("OTEL_EXPORTER_OTLP_INSECURE", "false"))
    return f"{'http' if insecure.lower() == 'true' else 'https'}://{endpoint}"


def _milliseconds(present: Mapping[str, str], name: str, found: OtelValues) -> int | None:
    text = present.get(name)
    if text is None:
        return None
    if not text.isdigit() or not int(text):
        found.warnings.append(f"{name}={text!r} is no number of milliseconds above 0 and was ignored")
        return None
    return int(text)


def _batches(present: Mapping[str, str], found: OtelValues) -> None:
    for name, key in (
        ("OTEL_BLRP_SCHEDULE_DELAY", "batch.max_age"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "metrics.interval"),
    ):
        if (milliseconds := _milliseconds(present, name, found)) is not None:
            found.values[key] = (f"{milliseconds}ms", name)
    name = "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE"
    if text := present.get(name):
        if text.isdigit() and int(text):
            found.values["batch.max_records"] = (text, name)
        else:
            found.warnings.append(f"{name}={text!r} is no number above 0 and was ignored")


def _signals(present: Mapping[str, str], found: OtelValues) -> None:
    for signal in SIGNALS:
        name = f"OTEL_{signal.upper()}_EXPORTER"
        choice = present.get(name)
        if choice is None:
            continue
        if choice not in ("otlp", "none"):
            raise UsageError(
                f"{name}={choice!r}: this agent exports by otlp, or none; for a terminal use tcpio-otel watch"
            )
        found.values[f"signals.{signal}"] = (choice, name)
    if present.get("OTEL_SDK_DISABLED", "false").lower() == "true":
        for signal in SIGNALS:
            found.values[f"signals.{signal}"] = ("none", "OTEL_SDK_DISABLED")
