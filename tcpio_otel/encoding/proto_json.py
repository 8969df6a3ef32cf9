"""Protobuf messages of OTLP to OTLP/JSON, for what is rare enough to go the slow way.

OTLP/JSON is protobuf's JSON mapping with two changes: ids are hex instead of base64, enums are integers
(https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding).
"""

import base64
import json
from collections.abc import Callable
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from tcpio_otel.payload import Part

_IDS = ("traceId", "spanId", "parentSpanId")


def as_dict(message: Message) -> Any:
    """A message as the objects of OTLP/JSON."""
    return _with_hex_ids(MessageToDict(message, use_integers_for_enums=True))


def as_line(message: Message) -> bytes:
    """A message on one line, newline included."""
    return compact(as_dict(message)) + b"\n"


def compact(value: Any) -> bytes:
    """JSON without blanks, as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _with_hex_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_hex_ids(element) for element in value]
    if isinstance(value, dict):
        return {
            key: base64.b64decode(element).hex() if key in _IDS else _with_hex_ids(element)
            for key, element in value.items()
        }
    return value


class JsonEnvelope:
    """Puts Resource and Scope around items of a signal, each a JSON object and a comma; gives one line.

    Args:
        resource: of each number, as OTLP/JSON.
        scope: as an object of it.
        schema_url: of both.
        keys: of the three nested lists: resources, scopes, items.
    """

    def __init__(
        self, resource: Callable[[int], bytes], scope: Any, schema_url: str, keys: tuple[str, str, str]
    ) -> None:
        self._resource = resource
        self._resources, self._scopes, items = keys
        self._scope = b'{"scope":' + compact(scope) + b"," + compact(items) + b":["
        schema = compact({"schemaUrl": schema_url})[1:]  # closes what it stands in
        self._tail = b"]," + schema + b"]," + schema

    def _head(self, resource: int) -> bytes:
        return b'{"resource":' + self._resource(resource) + b"," + compact(self._scopes) + b":[" + self._scope

    def wrap(self, parts: list[Part]) -> bytes:
        """One line (payload.Envelope)."""
        pieces: list[bytes | memoryview] = [b"{" + compact(self._resources) + b":["]
        for number, part in enumerate(parts):
            pieces += [b"," * bool(number) + self._head(part.resource), *part.runs[:-1], part.runs[-1][:-1], self._tail]
        return b"".join([*pieces, b"]}\n"])

    def overhead_bytes(self, resource: int) -> int:
        """The comma before it counts; what stands around all of them counts with each."""
        return len(self._head(resource)) + len(self._tail) + len(self.wrap([])) + 1
