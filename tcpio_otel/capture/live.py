"""The probe's rings as a source: batches from the running kernel, each at most one latency after its packets."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import RECORD, Batch
from tcpio_otel.capture.probe import Probe
from tcpio_otel.capture.ring import Rings
from tcpio_otel.clock import Nanoseconds, UnixOffset, boot_ns
from tcpio_otel.ledger import Ledger


class LiveSource:
    """Batches of a probe that is attached already.

    Iterating never ends by itself: it yields what came, or an empty batch when nothing did for `latency_s`, so that
    the reader can look after its timers. `finish` yields the rest after detaching the probe.
    """

    paced = False

    def __init__(self, probe: Probe, ledger: Ledger, *, latency_s: float, clock: Nanoseconds = boot_ns) -> None:
        self._probe, self._ledger, self._latency_s, self._clock = probe, ledger, latency_s, clock
        self._unix_offset = UnixOffset(boot=clock)
        self._released = 0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        older = np.frombuffer(self._probe.older, RECORD)
        self._rings = Rings(self._probe.rings, self._probe.ring_bytes, older, self._clock)
        self._exit.callback(self._rings.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def now_ns(self) -> int:
        """The time on the records' clock."""
        return self._clock()

    def _batch(self, *, everything: bool = False) -> tuple[Batch, bool]:
        records, more = self._rings.drain(everything=everything)
        offset_ns = self._unix_offset()
        batch = Batch(records, offset_ns, self._clock() + offset_ns)
        self._released += len(batch.packets)
        self._ledger.taken(len(batch.packets))
        self._account()
        return batch, more

    def _account(self) -> None:
        tally = self._probe.tally()
        self._ledger.source(
            seen=tally.seen,
            filtered=tally.filtered,
            dropped={"ring_full": tally.lost},
            pending=tally.submitted - self._released + tally.in_progress,
        )

    def __iter__(self) -> Iterator[Batch]:
        more = False
        while True:
            if not more:
                self._rings.wait(self._latency_s)
            batch, more = self._batch()
            yield batch

    def finish(self) -> Iterator[Batch]:
        """Detach the probe, then yield what it had recorded until then."""
        self._misses = self._probe.recursion_misses()
        self._probe.detach()
        more = True
        while more:
            batch, more = self._batch(everything=True)
            yield batch

    def snapshot(self) -> NDArray[np.void] | None:
        """Every connected socket as of now (dtype RECORD); to be called once, before `finish`."""
        return np.frombuffer(self._probe.snapshot(), RECORD)

    def faults(self) -> dict[str, int]:
        """Counts of what went wrong without costing a packet its place in the ledger."""
        return {
            "late": self._rings.late,
            "facts_lost": self._probe.tally().lost_facts,
            "recursion_misses": self._misses if hasattr(self, "_misses") else self._probe.recursion_misses(),
        }
