"""What encoders hand to exporters: encoded items that can be split and joined, and whole requests."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

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
    """

    buffer: memoryview
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)


Wrap = Callable[[list[memoryview], int], bytes]
"""Turns runs of items, and the sum of their bytes, into one export request: Resource and Scope around them."""


@dataclass(frozen=True)
class Request:
    """One export request, ready to send: `body` uncompressed, `items` log records, spans or data points in it.

    `packets` says how many packet records of the ledger are in it (zero for traces and metrics).
    """

    signal: Signal
    body: bytes
    items: int
    packets: int = 0
