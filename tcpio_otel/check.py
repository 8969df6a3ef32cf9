"""What this host, this kernel and the collector allow, in plain words, before anything is started."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tcpio_otel import privileges
from tcpio_otel.capture.control import ContextSources, Filters
from tcpio_otel.capture.libbpf import Library, Types
from tcpio_otel.capture.loaders import TRACEPOINTS, ByBcc, Loader, chosen, code_range, left_out
from tcpio_otel.capture.probe import Probe, cgroup_root
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


def _cgroup(configured: Path | None) -> str:
    root = configured or cgroup_root()
    try:
        inode = root.stat().st_ino
    except OSError as error:
        raise EnvironmentFault(f"cannot read capture.cgroup {root}: {error.strerror}") from None
    if inode != HOST_CGROUP_INODE:
        raise EnvironmentFault(
            f"{root} (inode {inode}) is a subtree of the host's: mount the host's /sys/fs/cgroup into this container, "
            "and say where by capture.cgroup"
        )
    return str(root)


def _symbols() -> str:
    if code_range("tcp_v4_rcv", Path("/proc/kallsyms").read_bytes()) == (0, 0):
        raise EnvironmentFault(
            "/proc/kallsyms hides addresses (CAP_SYSLOG): segments received by TIME_WAIT or no socket go unrecorded"
        )
    return "readable: by libbpf, segments received by TIME_WAIT or no socket are recorded too"


def _loads(loader: Loader, cgroup: Path | None) -> str:
    before, started = _resident_bytes("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    contexts = ContextSources(socket_tags=True, http_headers=True)
    with Probe(filters=Filters(), memory_bytes=1 << 20, cgroup=cgroup, loader=loader, contexts=contexts) as probe:
        took_ms = (time.perf_counter() - started) * 1e3
        peak = _resident_bytes("VmHWM") - before
        hooks, without, by = ", ".join(probe.hooks()), "; ".join(probe.loading.missing.values()), "loads"
        if isinstance(probe.loading, ByBcc):
            compiled = probe.loading.compiled
            peak = max(peak, compiled.peak_bytes)
            by = f"BCC {compiled.version} compiles the probe and loads it"
    return f"{by} in {took_ms:.0f} ms with {peak / 1e6:.0f} MB, and attaches it at {hooks}" + (
        f"; here, {without}" if without else ""
    )


def _loaders(wanted: Loader, cgroup: Path | None) -> Iterator[Finding]:
    """What each loader offers here; needed is the one that `run` would take."""
    try:
        taken = chosen(wanted, Library())
    except EnvironmentFault:
        return  # said above: both need the library
    for loader in (Loader.LIBBPF, Loader.BCC):
        yield _tried(f"by {loader}", partial(_loads, loader, cgroup), needed=loader is taken)
    yield Finding("loader", True, f"{wanted}: {taken}" if wanted is not taken else str(taken))


def _resident_bytes(field: str) -> int:
    """Resident memory of this process: now (VmRSS), or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _receiver(endpoint: str, reach: Callable[[], str]) -> Finding:
    return _tried("receiver", lambda: f"{endpoint}: {reach()}")


def findings(receivers: dict[str, Callable[[], str]], loader: Loader, cgroup: Path | None = None) -> Iterator[Finding]:
    """Every finding, in the order in which one would look for a cause.

    `loader` and `cgroup` are those that are configured. `receivers` maps an endpoint to a call that reaches it, and
    returns what it answered or raises EnvironmentFault.
    """
    yield Finding("kernel", sys.platform == "linux", f"{platform.release()} {platform.machine()}")
    yield Finding("python", True, f"{platform.python_version()}, uid {os.getuid()}")
    for name, attempt in (
        ("capabilities", _capabilities),
        ("libbpf.so", _libbpf),
        ("cgroup v2", partial(_cgroup, cgroup)),
    ):
        yield _tried(name, attempt)
    yield _tried("kernel BTF", _kernel_types, needed=loader is Loader.LIBBPF)
    yield _tried("kallsyms", _symbols, needed=False)
    if not privileges.missing_to_load():
        yield from _loaders(loader, cgroup)
    for endpoint, reach in receivers.items():
        yield _receiver(endpoint, reach)
