"""Text to the values that a configuration holds, and back.

`parse` and `show` are inverse: what `show` gives parses to an equal value. Durations go through decimal arithmetic,
so that `1.1ms` is the float next to 0.0011 and comes back as `1.1ms`.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tcpio_otel.export.settings import Listen

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Seconds(float):
    """A duration; in text with a unit: `250ms`, `5s`, `2m`, `1h`."""


class Bytes(int):
    """A size; in text with a unit: `64MiB`, `1MB`."""


class PortRange(tuple[int, int]):
    """Ports from the first to the last, both included; in text `443` or `8000-8999`."""

    __slots__ = ()


class Url(str):
    """An http or https URL: scheme, host, perhaps port and path."""

    __slots__ = ()


class Source(str):
    """Where packets come from: `live`, or `pcap:FILE`."""

    __slots__ = ()


# Counts of digits are bounded: no value needs more, and beyond 4,300 Python refuses to convert them.
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,24})?)\s*(ms|s|m|h)?")
_SIZE = re.compile(r"([0-9]{1,15})\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)?")
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_LISTEN = re.compile(r"(?:\[([^]]+)\]|([^][:]*)):([0-9]{1,5})")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")

_UNITS_S = {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_UNITS_BYTES = {
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "KB": 10**3,
    "B": 1,
}


def _seconds(text: str) -> Seconds:
    found = _DURATION.fullmatch(text)
    if not found:
        raise ValueError("a duration such as 250ms, 5s or 2m")
    return Seconds(Decimal(found[1]) * _UNITS_S[found[2] or "s"])


def _bytes(text: str) -> Bytes:
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError("a size such as 64MiB or 1MB")
    return Bytes(int(found[1]) * _UNITS_BYTES[found[2] or "B"])


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError("a whole number")
    return int(text)


def _ports(text: str) -> PortRange:
    if found := _PORTS.fullmatch(text):
        first, last = int(found[1]), int(found[2] or found[1])
        if first <= last <= 65535:
            return PortRange((first, last))
    raise ValueError("a port such as 443, or a range such as 8000-8999")


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("a network such as 192.0.2.0/24 or 2001:db8::/32") from None


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("a path")
    return Path(text)


def _url(text: str) -> Url:
    wanted = "a URL such as http://localhost:4318, or https:// for TLS"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        raise ValueError(wanted) from None
    if not usable or not text.isprintable() or " " in text:
        raise ValueError(wanted)
    return Url(text)


def _listen(text: str) -> Listen:
    wanted = "an address and a port such as 127.0.0.1:9464 or [::1]:9464"
    found = _LISTEN.fullmatch(text)
    if not found or int(found[3]) > 65535:
        raise ValueError(wanted)
    try:
        address = ipaddress.IPv6Address(found[1]) if found[1] else ipaddress.IPv4Address(found[2] or 0)
    except ValueError:
        raise ValueError(wanted) from None
    return Listen(str(address), int(found[3]))


def _source(text: str) -> Source:
    if text != "live" and (not text.startswith("pcap:") or text == "pcap:" or "\0" in text):
        raise ValueError("live, or pcap:FILE")
    return Source(text)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    Seconds: _seconds,
    Bytes: _bytes,
    bool: _boolean,
    int: _integer,
    str: str,
    Path: _path,
    PortRange: _ports,
    Network: _network,
    Url: _url,
    Source: _source,
    Listen: _listen,
}


def parse(kind: Any, text: str) -> Any:
    """A value of a kind from text.

    Args:
        kind: one of the types of this module, `bool`, `int`, `str`, `Path`, or a `StrEnum`.
        text: as it stands in a file, a variable or a flag.

    Raises:
        ValueError: its message says what would be right, to stand behind "is not".
    """
    text = text.strip()
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"one of {', '.join(kind)}") from None
    return _PARSERS[kind](text)


def parse_pairs(text: str) -> dict[str, str]:
    """`name=value,other=value`, percent-decoded.

    It is the form of `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS`: the W3C Baggage header's, without
    properties.

    Raises:
        ValueError: as for `parse`.
    """
    wanted = "a list such as name=value,other=value, with commas and percent signs in values percent-encoded"
    pairs = {}
    for part in filter(str.strip, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or _STRAY_PERCENT.search(part):
            raise ValueError(wanted)
        try:
            pairs[unquote(name.strip(), errors="strict")] = unquote(value.strip(), errors="strict")
        except UnicodeDecodeError:
            raise ValueError(wanted) from None
    return pairs


def show(value: Any) -> Any:
    """A value as YAML writes it: text, a whole number, true or false, None, or lists and mappings of those."""
    if isinstance(value, Seconds):
        exact = Decimal(repr(float(value)))
        units = ("h", "m", "s") if exact % 1 == 0 else ("ms",) if exact < 1 else ("s",)
        unit = next(unit for unit in units if unit == units[-1] or (exact and exact % _UNITS_S[unit] == 0))
        return f"{(exact / _UNITS_S[unit]).normalize():f}{unit}"
    if isinstance(value, Bytes):
        for unit in ("GiB", "MiB", "KiB"):
            if value and value % _UNITS_BYTES[unit] == 0:
                return f"{value // _UNITS_BYTES[unit]}{unit}"
        return int(value)
    if isinstance(value, PortRange):
        return str(value[0]) if value[0] == value[1] else f"{value[0]}-{value[1]}"
    if isinstance(value, Listen):
        return str(value)
    if isinstance(value, tuple):
        return [show(part) for part in value]
    if isinstance(value, Mapping):
        return dict(value)
    if value is None or type(value) in (bool, int, str):
        return value
    return str(value)
