"""The few pieces of protobuf that are written by hand, and the envelope that all OTLP requests share.

Field numbers are those of opentelemetry-proto 1.x. Logs, traces and metrics nest alike: request (1) resource_x (1)
resource, (2) scope_x, (3) schema_url; scope_x (1) scope, (2) items, (3) schema_url.
"""

import struct
from collections.abc import Iterable
from functools import lru_cache

from tcpio_otel.encoding import names


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
    """Puts Resource and Scope around items of any signal, each encoded as field 2 of its scope.

    Args:
        resource: a serialised `opentelemetry.proto.resource.v1.Resource`.
    """

    def __init__(self, resource: bytes) -> None:
        self._schema = field(3, names.SCHEMA_URL.encode())
        self._scope = field(1, field(1, names.SCOPE.encode()) + field(2, names.SCOPE_VERSION.encode()))
        self._resource = field(1, resource)

    def wrap(self, runs: list[memoryview], length: int) -> bytes:
        """An export request around runs of items that are `length` bytes together (payload.Wrap)."""
        scope_head = b"\x12" + varint(len(self._scope) + length + len(self._schema)) + self._scope
        content = len(self._resource) + len(scope_head) + length + 2 * len(self._schema)
        head = b"\x0a" + varint(content) + self._resource + scope_head
        return b"".join([head, *runs, self._schema, self._schema])
