"""The probe's rings as a source: batches from the running kernel, each at most one latency after its packets."""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tcpio_otel import names
from tcpio_otel.batch import RECORD, Batch, Kind
from tcpio_otel.capture.loaders import Loader
from tcpio_otel.capture.probe import Probe
from tcpio_otel.capture.ring import Rings
from tcpio_otel.clock import Nanoseconds, UnixOffset, boot_ns
from tcpio_otel.errors import EnvironmentFault
from tcpio_otel.ledger import Ledger

logger = logging.getLogger(__name__)


class LiveSource:
    """Batches of a probe that is attached already.

    A thread of its own empties the rings, so that they need hold no more than one latency's worth: what comes in a
    burst waits here, as records in memory, while the stages behind take their time. Beyond `queue_bytes` it waits in
    the rings, and when they are full the probe counts what it could not put there.

    Iterating never ends by itself; when nothing comes for `idle_s`, it yields an empty batch. `finish` yields the rest.
    """

    paced = False

    def __init__(
        self,
        probe: Probe,
        ledger: Ledger,
        *,
        latency_s: float,
        queue_bytes: int,
        idle_s: float,
        clock: Nanoseconds = boot_ns,
    ) -> None:
        self._probe, self._ledger, self._latency_s, self._queue_bytes = probe, ledger, latency_s, queue_bytes
        self._idle_s, self._clock = idle_s, clock
        self.older_told = self._can_look = probe.loader is Loader.LIBBPF
        self._unix_offset = UnixOffset(boot=clock)
        self._queue: deque[Batch] = deque()
        self._queued_bytes = self._released = self._misses = 0
        self._changed, self._attached = threading.Condition(), threading.Lock()
        self._finishing = self._finished = self._to_look = False
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        older = np.frombuffer(self._probe.older, RECORD)
        self._rings = Rings(self._probe.rings, self._probe.ring_bytes, older, self._clock)
        self._reader = threading.Thread(target=self._read, name="ring reader", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._finishing = True
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
        self._reader.join()
        self._rings.close()

    def now_ns(self) -> int:
        """The time on the records' clock."""
        return self._clock()

    # The reader's thread.

    def _read(self) -> None:
        try:
            more = False
            while not self._finishing or more:
                if self._to_look:
                    self._look_again()
                if not more:
                    self._rings.wait(self._latency_s)
                more = self._drain(everything=False)
            while self._drain(everything=True):
                pass
        except BaseException as fault:
            # Raised where the batches are read: a thread's own traceback would reach nobody.
            self._fault = fault
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _look_again(self) -> None:
        try:
            with self._attached:
                found = self.look() if self._to_look else np.empty(0, RECORD)
        except EnvironmentFault as fault:
            logger.warning("of connections, round-trip times and totals are known at their end alone: %s", fault)
            self._can_look = self._to_look = False
            return
        self._to_look = False
        found["kind"] = Kind.LOOK
        self._rings.hold(found)

    def _drain(self, *, everything: bool) -> bool:
        """Move what is in the rings to the queue; true when more is waiting."""
        now_ns = self._clock()
        records, more = self._rings.drain(everything=everything)
        if len(records):
            batch = self._batch(records, now_ns)
            with self._changed:
                while self._queued_bytes > self._queue_bytes and not self._finishing:
                    self._changed.wait()
                self._queue.append(batch)
                self._queued_bytes += records.nbytes
                self._changed.notify_all()
        return more

    def _batch(self, records: NDArray[np.void], now_ns: int) -> Batch:
        offset_ns = self._unix_offset()
        return Batch(records, offset_ns, now_ns + offset_ns, now_ns)

    # The thread of the stages.

    def _next(self, timeout_s: float | None) -> Batch | None:
        """The next batch; an empty one after the timeout; None when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._finished, timeout_s)
            if self._queue:
                batch = self._queue.popleft()
                self._queued_bytes -= batch.records.nbytes
                self._changed.notify_all()
            elif self._fault:
                raise self._fault
            elif self._finished:
                return None
            else:
                batch = self._batch(np.empty(0, RECORD), self._clock())
        self._released += len(batch.packets)
        self._ledger.taken(len(batch.packets))
        self._account()
        return batch

    def _account(self) -> None:
        tally = self._probe.tally()
        self._ledger.source(
            seen=tally.seen,
            filtered=tally.filtered,
            dropped={"ring_full": tally.lost},
            pending=tally.submitted - self._released + tally.in_progress,
        )

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next(self._idle_s)) is not None:
            yield batch

    def finish(self) -> Iterator[Batch]:
        """Detach the probe, then yield what it had recorded until then."""
        self._misses = self._probe.recursion_misses()
        with self._attached:
            self._can_look = self._to_look = False
            self._probe.detach()
        with self._changed:
            self._finishing = True
            self._changed.notify_all()
        while (batch := self._next(None)) is not None:
            yield batch
        self._account()

    def look(self) -> NDArray[np.void]:
        """Every connected socket as of now (dtype RECORD), as often as is wanted.

        Raises:
            EnvironmentFault: it cannot be told without privileges.
        """
        return np.frombuffer(self._probe.look(), RECORD).copy()

    def look_again(self) -> None:
        """Have records of all connected sockets come soon, as of then, of kind LOOK; where that can be told."""
        self._to_look = self._can_look

    def snapshot(self) -> NDArray[np.void]:
        """Every connected socket as of now (dtype RECORD); to be called once, before `finish`."""
        return np.frombuffer(self._probe.snapshot(), RECORD)

    def faults(self) -> dict[str, int]:
        """Counts of what went wrong without costing a packet its place in the ledger."""
        return {
            names.LATE: self._rings.late,
            names.FACTS_LOST: self._probe.tally().lost_facts,
            names.RECURSION_MISSES: self._misses or self._probe.recursion_misses(),
        }
