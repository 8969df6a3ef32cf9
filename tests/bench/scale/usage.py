"""What processes take, as the kernel counts it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
QUIET_CORES, WINDOW_S = 0.05, 0.5
patience_s = 15.0
"""How long at most; less where figures do not matter."""


def cpu_s(*pids: int) -> float:
    """CPU time of processes so far, in user space and in the kernel."""
    ticks = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return ticks / TICKS_PER_S


def settle(*pids: int) -> None:
    """Wait until processes do next to nothing any more; on some machines they always do something."""
    deadline = time.monotonic() + patience_s
    before, since = cpu_s(*pids), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(WINDOW_S)
        now, at = cpu_s(*pids), time.monotonic()
        if now - before < QUIET_CORES * (at - since):
            return
        before, since = now, at


def spent_s(work: Callable[[], object], *pids: int) -> float:
    """CPU time that processes take for some work, and for what comes of it afterwards."""
    before = cpu_s(*pids)
    work()
    settle(*pids)
    return cpu_s(*pids) - before
