"""The few pieces of protobuf that are written by hand, and the envelope that all OTLP requests share.

Field numbers are those of opentelemetry-proto 1.x. Logs, traces and metrics nest alike: request (1) resource_x (1)
resource, (2) scope_x, (3) schema_url; scope_x (1) scope, (2) items, (3) schema_url.
"""

import struct
from collections.abc import Callable, Iterable
from functools import lru_cache

from tcpio_otel import names
from tcpio_otel.payload import Part


def varint(number: int) -> bytes:
    """A protobuf base-128 varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


@lru_cache(maxsize=1 << 16)
def string_attribute(key: str, value: str) -> bytes:
    """`LogRecord.attributes` with a string value."""
    return field(6, field(1, key.encode()) + field(2, field(1, value.encode())))


@lru_cache(maxsize=1 << 16)
def int_attribute(key: str, value: int) -> bytes:
    """`LogRecord.attributes` with an integer value."""
    return field(6, field(1, key.encode()) + field(2, b"\x18" + varint(value)))


def bool_attribute(key: str) -> bytes:
    """`LogRecord.attributes` with the value true."""
    return field(6, field(1, key.encode()) + field(2, b"\x10\x01"))


def fixed64(number: int) -> bytes:
    """Eight bytes, the lowest first: fixed64 and, for what is not negative, sfixed64."""
    return number.to_bytes(8, "little")


def double_attribute(key: str, value: float) -> bytes:
    """`LogRecord.attributes` with a floating-point value."""
    return field(6, field(1, key.encode()) + field(2, b"\x21" + struct.pack("<d", value)))


def strings_attribute(key: str, values: Iterable[str]) -> bytes:
    """`LogRecord.attributes` with an array of strings as value."""
    array = b"".join(field(1, field(1, value.encode())) for value in values)
    return field(6, field(1, key.encode()) + field(2, field(5, array)))


class ProtobufEnvelope:
    """Puts Resource and Scope around items of any signal, each encoded as field 2 of its scope (payload.Envelope).

    Args:
        resource: the serialised `opentelemetry.proto.resource.v1.Resource` of each number.
    """

    def __init__(self, resource: Callable[[int], bytes]) -> None:
        self._schema = field(3, names.SCHEMA_URL.encode())
        self._scope = field(1, field(1, names.SCOPE.encode()) + field(2, names.SCOPE_VERSION.encode()))
        self._resource = resource

    def wrap(self, parts: list[Part]) -> bytes:
        """An export request."""
        pieces: list[bytes | memoryview] = []
        for part in parts:
            resource = field(1, self._resource(part.resource))
            scope_head = b"\x12" + varint(len(self._scope) + part.length + len(self._schema)) + self._scope
            content = len(resource) + len(scope_head) + part.length + 2 * len(self._schema)
            pieces += [b"\x0a" + varint(content) + resource + scope_head, *part.runs, self._schema, self._schema]
        return b"".join(pieces)

    def overhead_bytes(self, resource: int) -> int:
        """Lengths take five bytes at most, and their tags one."""
        return len(field(1, self._resource(resource))) + len(self._scope) + 2 * len(self._schema) + 2 * 6
