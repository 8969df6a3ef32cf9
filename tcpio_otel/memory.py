"""Memory of a burst, given back to the system once it is over: the allocator keeps it otherwise."""

import ctypes

from tcpio_otel.clock import Nanoseconds, boot_ns

BURST_RECORDS = 1000
"""A batch of so many makes a burst: smaller ones live on what is there."""

CALM_NS = 5_000_000_000
"""So long after a burst its connections have been let go too."""


class GiveBack:
    """Asks the C library to release free memory, when a burst has been over for a while.

    glibc keeps freed memory for the next allocation, and an agent beside other workloads should not. Other C libraries
    do without `malloc_trim`; there this does nothing.
    """

    def __init__(self, clock: Nanoseconds = boot_ns) -> None:
        self._clock = clock
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._burst_ns: int | None = None

    def after(self, records: int) -> None:
        """Note the size of a batch."""
        if records >= BURST_RECORDS:
            self._burst_ns = self._clock()
        elif self._burst_ns is not None and self._clock() - self._burst_ns >= CALM_NS:
            self._burst_ns = None
            if self._trim:
                self._trim(0)
