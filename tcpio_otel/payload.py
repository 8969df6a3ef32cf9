"""What encoders hand to exporters: encoded items that can be split and joined, and whole requests."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Signal(StrEnum):
    """An OpenTelemetry signal, as it stands in paths and file names."""

    LOGS = "logs"
    TRACES = "traces"
    METRICS = "metrics"


@dataclass(frozen=True)
class Items:
    """Encoded log records, spans or data points, one after the other, each cut so that any run of them is valid.

    `buffer` holds the bytes; item i ends before `ends[i]` (int64, shape (n,)) and starts where its predecessor ends.
    `groups` says what they are about, in their order: the number of a resource, and one past the last item of it.
    """

    buffer: memoryview
    ends: NDArray[np.int64]
    groups: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def grouped(self) -> tuple[tuple[int, int], ...]:
        """The groups; without any, all is about resource 0."""
        return ((0, len(self)),) if self.groups is None else self.groups


class Part(NamedTuple):
    """What of a request is about one resource: runs of items, `length` bytes together."""

    resource: int
    runs: list[memoryview]
    length: int


class Envelope(Protocol):
    """Makes export requests: Resource and Scope around items."""

    def wrap(self, parts: list[Part]) -> bytes:
        """One request."""

    def overhead_bytes(self, resource: int) -> int:
        """By how much a part about that resource can be longer than its items, at most."""


def always(resource: int) -> bool:
    """A resource of which there is nothing more to be known."""
    del resource
    return True


@dataclass(frozen=True)
class Request:
    """One export request, ready to send: `body` uncompressed, `items` log records, spans or data points in it.

    `packets` says how many packet records of the ledger are in it (zero for traces and metrics).
    """

    signal: Signal
    body: bytes
    items: int
    packets: int = 0
