"""What this host, this kernel and the collector allow, in plain words, before anything is started."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tcpio_otel import privileges
from tcpio_otel.capture.control import Filters
from tcpio_otel.capture.libbpf import Library, Types
from tcpio_otel.capture.probe import OBJECT, TRACEPOINTS, Probe, cgroup_root, code_range, left_out
from tcpio_otel.errors import EnvironmentFault

HOST_CGROUP_INODE = 1
"""The inode of the cgroup tree's true root; another number means that this process sees a subtree only."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `needed`: without it the live source does not run."""

    name: str
    good: bool
    detail: str
    needed: bool = True

    def __str__(self) -> str:
        verdict = "ok" if self.good else "NO" if self.needed else "--"
        return f"{verdict:4}{self.name:14}{self.detail}"


def _tried(name: str, attempt: Callable[[], str], *, needed: bool = True) -> Finding:
    try:
        return Finding(name, True, attempt(), needed)
    except EnvironmentFault as fault:
        return Finding(name, False, str(fault), needed)


def _capabilities() -> str:
    if missing := privileges.missing_to_load():
        names = ", ".join(f"CAP_{capability.name}" for capability in missing)
        raise EnvironmentFault(f"lacks {names}: run as root, or grant them; a pcap file needs none")
    return "enough to load the probe; all are dropped once it is attached"


def _libbpf() -> str:
    Library()
    return "libbpf.so.1 is installed"


def _kernel_types() -> str:
    with Types(Library()) as kernel:
        missing = [TRACEPOINTS[program][0] for program in left_out(kernel)]
    return f"present; tracepoints it lacks, or shows too little of: {', '.join(missing) or 'none'}"


def _cgroup() -> str:
    root = cgroup_root()
    if (inode := root.stat().st_ino) != HOST_CGROUP_INODE:
        raise EnvironmentFault(
            f"{root} (inode {inode}) is a subtree of the host's: mount the host's /sys/fs/cgroup into this container"
        )
    return str(root)


def _symbols() -> str:
    if code_range("tcp_v4_rcv", Path("/proc/kallsyms").read_bytes()) == (0, 0):
        raise EnvironmentFault(
            "/proc/kallsyms hides addresses (CAP_SYSLOG): segments received by TIME_WAIT or no socket go unrecorded"
        )
    return "readable: segments received by TIME_WAIT or no socket are recorded too"


def _probe() -> str:
    started = time.perf_counter()
    with Probe(filters=Filters(), memory_bytes=1 << 20) as probe:
        took_ms = (time.perf_counter() - started) * 1e3
        without = "; ".join(probe.missing.values())
        older = len(probe.older) // 160
    return f"{OBJECT.name} loads, attaches and detaches ({took_ms:.0f} ms, {older} sockets older than it)" + (
        f"; here, {without}" if without else ""
    )


def _receiver(endpoint: str, reach: Callable[[], str]) -> Finding:
    return _tried("receiver", lambda: f"{endpoint}: {reach()}")


def findings(receivers: dict[str, Callable[[], str]]) -> Iterator[Finding]:
    """Every finding, in the order in which one would look for a cause.

    `receivers` maps an endpoint to a call that reaches it, and returns what it answered or raises EnvironmentFault.
    """
    yield Finding("kernel", sys.platform == "linux", f"{platform.release()} {platform.machine()}")
    yield Finding("python", True, f"{platform.python_version()}, uid {os.getuid()}")
    for name, attempt in (
        ("capabilities", _capabilities),
        ("libbpf", _libbpf),
        ("kernel BTF", _kernel_types),
        ("cgroup v2", _cgroup),
    ):
        yield _tried(name, attempt)
    yield _tried("kallsyms", _symbols, needed=False)
    if not privileges.missing_to_load():
        yield _tried("probe", _probe)
    for endpoint, reach in receivers.items():
        yield _receiver(endpoint, reach)
