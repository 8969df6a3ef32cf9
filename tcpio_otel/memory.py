"""Memory of a burst, given back to the system once it is over: the allocator keeps it otherwise."""

import ctypes
from collections.abc import Callable

from tcpio_otel.clock import Nanoseconds, boot_ns

BURST_RECORDS = 8192
"""A batch of so many makes a burst, as much as one drain of a ring takes: smaller ones live on what is there."""

CALM_NS = 5_000_000_000
"""So long after a burst its connections have been let go too."""


_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Have all threads allocate from one heap; to be called before there are any.

    glibc gives a thread a heap of its own, and never gives back what is free at the end of such a one, not even when
    asked. Threads here take turns anyway.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, 1)


class GiveBack:
    """Makes the memory of a burst free, when that has been over for a while, and asks the C library to release it.

    glibc keeps freed memory for the next allocation, and an agent beside other workloads should not. Other C libraries
    do without `malloc_trim`; there that part is left to them.

    Args:
        forget: lets go of what can be made again.
        clock: monotonic.
    """

    def __init__(self, forget: Callable[[], None], clock: Nanoseconds = boot_ns) -> None:
        self._forget, self._clock = forget, clock
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._burst_ns: int | None = None

    def after(self, records: int) -> None:
        """Note the size of a batch."""
        if records >= BURST_RECORDS:
            self._burst_ns = self._clock()
        elif self._burst_ns is not None and self._clock() - self._burst_ns >= CALM_NS:
            self._burst_ns = None
            self._forget()
            if self._trim:
                self._trim(0)
