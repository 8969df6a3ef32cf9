"""Protobuf messages of OTLP to OTLP/JSON, for what is rare enough to go the slow way.

OTLP/JSON is protobuf's JSON mapping with two changes: ids are hex instead of base64, enums are integers
(https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding).
"""

import base64
import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

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
        resource, scope: as objects of OTLP/JSON.
        schema_url: of both.
        keys: of the three nested lists: resources, scopes, items.
    """

    def __init__(self, resource: Any, scope: Any, schema_url: str, keys: tuple[str, str, str]) -> None:
        resources, scopes, items = keys
        tail = {"schemaUrl": schema_url}
        self._head = compact({resources: [{"resource": resource, scopes: [{"scope": scope, items: []}]}]})[
            : -len("]}]}]}")
        ]
        self._tail = b"]," + compact(tail)[1:-1] + b"}]," + compact(tail)[1:-1] + b"}]}\n"

    def wrap(self, runs: list[memoryview], length: int) -> bytes:
        """One line around runs of items that are `length` bytes together (payload.Wrap)."""
        del length  # protobuf needs it
        last = runs[-1][:-1] if runs else memoryview(b"")
        return b"".join([self._head, *runs[:-1], last, self._tail])
