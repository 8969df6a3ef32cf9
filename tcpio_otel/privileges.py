"""Linux capabilities: which are missing to load the probe, and how to give all of them up.

Capabilities belong to threads, not to processes: `drop_all` must run before anything starts a thread, and that
includes importing NumPy and gRPC. So this module imports neither.
"""

import ctypes
import os
from enum import IntEnum
from pathlib import Path

from tcpio_otel.errors import EnvironmentFault


class Capability(IntEnum):
    """The capabilities that matter here (include/uapi/linux/capability.h)."""

    NET_ADMIN = 12
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYSLOG = 34
    PERFMON = 38
    BPF = 39


TO_LOAD = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN)
"""What loading and attaching the probe needs; SYS_ADMIN stands in for the first two."""

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def effective(status: Path = Path("/proc/thread-self/status")) -> int:
    """The effective capabilities of a thread, as a bit mask, from its status file."""
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    raise EnvironmentFault(f"{status} has no CapEff line: is /proc mounted?")


def missing_to_load() -> list[Capability]:
    """Those of `TO_LOAD` that this thread lacks, SYS_ADMIN taken into account."""
    held = effective()
    if held >> Capability.SYS_ADMIN & 1:
        held |= 1 << Capability.BPF | 1 << Capability.PERFMON
    return [capability for capability in TO_LOAD if not held >> capability & 1]


def has(capability: Capability) -> bool:
    """Whether this thread holds a capability effectively."""
    return bool(effective() >> capability & 1)


def drop_all() -> None:
    """Give up every capability, for good, in the calling thread and all it starts from now on.

    Raises:
        EnvironmentFault: more than one thread is running (the others would keep theirs), or the kernel refuses.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise EnvironmentFault(f"cannot drop capabilities: {threads} threads are running, and each holds its own")
    libc = ctypes.CDLL(None, use_errno=True)
    # Bounding and ambient sets first: the former needs a capability that goes with the rest. Where it is not held,
    # there is nothing that execve could bring back under no_new_privs.
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = _Header(_CAPABILITY_VERSION_3, 0)
    if libc.capset(ctypes.byref(header), ctypes.byref((_Sets * 2)())):
        error = ctypes.get_errno()
        raise EnvironmentFault(f"cannot drop capabilities: capset: {os.strerror(error)}")
