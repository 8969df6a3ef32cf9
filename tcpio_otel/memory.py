"""Memory of a burst, given back to the system once it is over: the allocator keeps it otherwise."""

import ctypes

WORTH_RECORDS = 10_000
"""After so many records there may be something to give back."""


class GiveBack:
    """Asks the C library to release free memory, when the agent is idle after work.

    glibc keeps freed memory for the next allocation, and an agent beside other workloads should not. Other C libraries
    do without `malloc_trim`; there this does nothing.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._records = 0

    def after(self, records: int) -> None:
        """Note the size of a batch; an empty one after enough of them is the moment."""
        self._records += records
        if not records and self._records >= WORTH_RECORDS:
            self._records = 0
            if self._trim:
                self._trim(0)
