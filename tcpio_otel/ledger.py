"""Where every packet record went: one set of counters that always adds up.

`seen = exported + filtered + sampled + dropped + in_flight`, where `in_flight` is what the stages between the
probe and the receiver still hold. A stage only ever *moves* a count; nothing is created after `seen`.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Balance:
    """A snapshot of the ledger, in packet records.

    `filtered` and `dropped` map a reason to a count.
    """

    seen: int = 0
    exported: int = 0
    sampled: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0

    @property
    def difference(self) -> int:
        """Zero when nothing was lost silently or counted twice."""
        return self.seen - (
            self.exported + self.sampled + sum(self.filtered.values()) + sum(self.dropped.values()) + self.in_flight
        )


class Ledger:
    """Counters of packet records, safe to use from several threads.

    `in_flight` is held, not derived: stages add to it when they take records in and subtract when they let go, so
    that `Balance.difference` can really be wrong, and tests can assert that it is not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exported = self._sampled = self._held = 0
        self._dropped: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        self._source_seen = self._source_pending = 0
        self._source_filtered: dict[str, int] = {}
        self._source_dropped: dict[str, int] = {}

    def source(self, *, seen: int, filtered: dict[str, int], dropped: dict[str, int], pending: int) -> None:
        """Replace what the source counted so far, in records since its start.

        `pending` are records that the source has accepted and not yet handed over (in the ring buffers).
        """
        with self._lock:
            self._source_seen, self._source_pending = seen, pending
            self._source_filtered, self._source_dropped = filtered, dropped

    def taken(self, records: int) -> None:
        """Records left the source and are now held by the agent."""
        with self._lock:
            self._held += records

    def exported(self, records: int) -> None:
        """Held records were accepted by a receiver, written to a file, or printed."""
        with self._lock:
            self._held -= records
            self._exported += records

    def filtered(self, records: int, reason: str) -> None:
        """Held records are not asked for, for `reason`."""
        if records:
            with self._lock:
                self._held -= records
                self._filtered[reason] += records

    def dropped(self, records: int, reason: str) -> None:
        """Held records were given up, for `reason`."""
        if records:
            with self._lock:
                self._held -= records
                self._dropped[reason] += records

    def balance(self) -> Balance:
        """The counts at this moment; exact when the source's counts were refreshed after its last drain."""
        with self._lock:
            filtered, dropped = Counter(self._source_filtered), Counter(self._source_dropped)
            filtered.update(self._filtered)
            dropped.update(self._dropped)
            return Balance(
                seen=self._source_seen,
                exported=self._exported,
                sampled=self._sampled,
                filtered=dict(+filtered),
                dropped=dict(+dropped),
                in_flight=self._held + self._source_pending,
            )
