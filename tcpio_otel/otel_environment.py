"""The standard `OTEL_*` variables to configuration keys, as the OpenTelemetry specification reads them.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and
https://opentelemetry.io/docs/specs/otel/protocol/exporter/. An empty variable is an unset one. A value that cannot be
used is ignored with a warning, as the specification wants it; what would silently change where data goes is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tcpio_otel.errors import UsageError

SIGNALS = ("logs", "traces", "metrics")

_GENERAL = "OTEL_EXPORTER_OTLP_"
_PREFIXES = {"export.": _GENERAL, **{f"export.{signal}.": f"{_GENERAL}{signal.upper()}_" for signal in SIGNALS}}

TEXTS = {
    **{
        prefix + name.upper(): section + name
        for section, prefix in _PREFIXES.items()
        for name in ("protocol", "headers", "compression", "certificate", "client_certificate", "client_key")
    },
    # One batch section serves logs and spans; the later entry wins, and packet logs are what there is most of.
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "batch.max_records",
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": "batch.max_records",
    "OTEL_RESOURCE_ATTRIBUTES": "resource.attributes",
    "OTEL_SERVICE_NAME": "resource.service_name",
}
"""Variables that hold what a key of the configuration holds, written alike."""

MILLISECONDS = {
    **{f"{prefix}TIMEOUT": f"{section}timeout" for section, prefix in _PREFIXES.items()},
    "OTEL_BSP_SCHEDULE_DELAY": "batch.max_age",
    "OTEL_BLRP_SCHEDULE_DELAY": "batch.max_age",
    "OTEL_METRIC_EXPORT_INTERVAL": "metrics.interval",
}
"""Variables that hold a number of milliseconds."""

ENDPOINTS = {f"{prefix}ENDPOINT": f"{section}endpoint" for section, prefix in _PREFIXES.items()}
"""Variables that hold a URL, or for gRPC a host and port, for which `..._INSECURE` then chooses plain text."""

EXPORTERS = {f"OTEL_{signal.upper()}_EXPORTER": f"signals.{signal}" for signal in SIGNALS}
"""Variables that turn a signal off, or leave it on; `OTEL_SDK_DISABLED` turns all off."""


@dataclass
class OtelValues:
    """Keys of the configuration, each with a text and the variable that it comes from; and what was ignored."""

    values: dict[str, tuple[str, str]] = field(default_factory=dict)
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
    for name, key in TEXTS.items():
        if name in present:
            found.values[key] = (present[name], name)
    for name, key in MILLISECONDS.items():
        if name in present:
            _milliseconds(name, key, present[name], found)
    _endpoints(present, found)
    for name, key in EXPORTERS.items():
        if name in present:
            found.values[key] = (_exporter(name, present[name]), name)
    if _true("OTEL_SDK_DISABLED", present, found):
        found.values |= dict.fromkeys(EXPORTERS.values(), ("none", "OTEL_SDK_DISABLED"))
    return found


def _milliseconds(name: str, key: str, text: str, found: OtelValues) -> None:
    if text.isascii() and text.isdigit():
        found.values[key] = (f"{text}ms", name)
    else:
        found.warnings.append(f"{name}: {text!r} is not a whole number of milliseconds; ignored")


def _endpoints(present: Mapping[str, str], found: OtelValues) -> None:
    """A gRPC endpoint may come without a scheme: INSECURE decides then, and only then."""
    for section, prefix in _PREFIXES.items():
        # A signal's own INSECURE or PROTOCOL may give a general endpoint another meaning than it has for the others.
        own = {f"{prefix}{name}" for name in ("ENDPOINT", "INSECURE", "PROTOCOL")} & present.keys()
        if not own:
            continue
        name = f"{prefix}ENDPOINT" if f"{prefix}ENDPOINT" in present else f"{_GENERAL}ENDPOINT"
        endpoint = present.get(name, "")
        grpc = present.get(f"{prefix}PROTOCOL", present.get(f"{_GENERAL}PROTOCOL")) == "grpc"
        if grpc and endpoint and "://" not in endpoint:
            insecure = f"{prefix}INSECURE" if f"{prefix}INSECURE" in present else f"{_GENERAL}INSECURE"
            scheme = "http" if _true(insecure, present, found) else "https"
            found.values[f"{section}endpoint"] = (f"{scheme}://{endpoint}", name)
        elif f"{prefix}ENDPOINT" in present:
            found.values[f"{section}endpoint"] = (endpoint, name)


def _exporter(name: str, text: str) -> str:
    if text not in ("otlp", "none"):
        raise UsageError(f"{name}: {text!r} is not otlp or none; for a terminal, use tcpio-otel watch")
    return text


def _true(name: str, present: Mapping[str, str], found: OtelValues) -> bool:
    text = present.get(name, "false")
    if text.lower() not in ("true", "false"):
        found.warnings.append(f"{name}: {text!r} is not true or false; taken as false")
    return text.lower() == "true"
