"""Clocks as parameters: kernel (boot) time, Unix time, and the offset between them."""

import time
from collections.abc import Callable

Nanoseconds = Callable[[], int]
"""A clock: called without arguments, returns integer nanoseconds."""


def boot_ns() -> int:
    """Time since boot, suspend included: the clock of the probe's records."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class UnixOffset:
    """The distance from the boot clock to Unix time, sampled and refreshed.

    A sample reads boot, Unix and boot time in a row and keeps the tightest of a few tries, so that a preemption
    between the reads cannot skew it. It is taken again every `refresh_ns`, because NTP steers Unix time only.
    """

    def __init__(
        self,
        boot: Nanoseconds = boot_ns,
        unix: Nanoseconds = time.time_ns,
        refresh_ns: int = 10_000_000_000,
    ) -> None:
        self._boot, self._unix, self._refresh_ns = boot, unix, refresh_ns
        self._sampled_at = boot()
        self._offset = self._sample()

    def _sample(self) -> int:
        samples = []
        for _ in range(5):
            before = self._boot()
            unix = self._unix()
            after = self._boot()
            samples.append((after - before, unix - (before + after) // 2))
        return min(samples)[1]

    def __call__(self) -> int:
        """Nanoseconds to add to a boot time to get Unix time."""
        now = self._boot()
        if now - self._sampled_at >= self._refresh_ns:
            self._sampled_at, self._offset = now, self._sample()
        return self._offset
