"""The probe, loaded and attached: from an object file to rings, counters and a snapshot of sockets.

This is all that needs privileges. It runs before they are dropped, hence before NumPy is imported.
"""

import ctypes
import mmap
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tcpio_otel.capture.control import Control, Counters, Filters, Tally, network_key, tally
from tcpio_otel.capture.libbpf import Library, Object, Types, recursion_misses
from tcpio_otel.errors import EnvironmentFault

OBJECT = Path(__file__).with_name("tcpio.bpf.o")
SMALLEST_RING_BYTES = 1 << 16
WAKEUP_SHARE = 4  # a ring filled to one in four wakes the reader; what comes until it runs finds room

# Programs on tracepoints, and the arguments they need: without the tracepoint, or with fewer arguments, the kernel
# would refuse the whole object.
TRACEPOINTS = {
    "tcpio_drop": ("kfree_skb", 2),
    "tcpio_queue": ("net_dev_queue", 1),
    "tcpio_state": ("inet_sock_set_state", 3),
    "tcpio_reset": ("tcp_send_reset", 3),
    "tcpio_read": ("tcp_rcv_space_adjust", 1),
}
WITHOUT = {
    "tcpio_drop": "segments received by TIME_WAIT or no socket are not recorded",
    "tcpio_queue": "some segments sent by TIME_WAIT or no socket are not recorded",
    "tcpio_state": "totals are added up from records",
    "tcpio_reset": "the kernel's reason for a RST is not known",
    "tcpio_read": "a connection keeps the process that made its socket",
}
NEED_STORAGE = {"tcpio_read"}
SOCKET_STORAGE = "BPF_FUNC_sock_from_file"  # the helper that came with socket storage in tracing programs, in 5.11
SNAPSHOT = "tcpio_snapshot"


@dataclass(frozen=True)
class Vocabulary:
    """The running kernel's own names for the numbers in records."""

    drop_reasons: Mapping[int, str]
    reset_reasons: Mapping[int, str]


def cgroup_root(mounts: Path = Path("/proc/self/mountinfo")) -> Path:
    """Where the root of the cgroup v2 tree is mounted.

    Raises:
        EnvironmentFault: it is mounted nowhere.
    """
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        if right.split()[0] == "cgroup2" and root == "/":
            return Path(point.encode().decode("unicode_escape"))  # mountinfo writes blanks as \040
    raise EnvironmentFault("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup, or boot with cgroup v2")


def left_out(kernel: Types) -> list[str]:
    """The programs that a kernel does not take, by its types."""
    helpers = kernel.enumerators("bpf_func_id")
    return [
        program
        for program, (tracepoint, arguments) in TRACEPOINTS.items()
        if (kernel.tracepoint_arguments(tracepoint) or 0) < arguments
        or (program in NEED_STORAGE and SOCKET_STORAGE not in helpers)
    ]


def code_range(function: str, symbols: bytes) -> tuple[int, int]:
    """Where a kernel function lies, from /proc/kallsyms: first address, one past the last; (0, 0) when hidden."""
    found = re.search(rb"^([0-9a-f]+) [tT] " + function.encode() + rb"$", symbols, re.MULTILINE)
    if not found or not (start := int(found[1], 16)):
        return 0, 0
    for line in re.finditer(rb"^([0-9a-f]+) ", symbols[found.end() + 1 :], re.MULTILINE):
        if (end := int(line[1], 16)) != start:
            return (start, end) if end > start else (0, 0)
    return 0, 0


def _stripped(enumerators: Mapping[str, int], prefix: str) -> dict[int, str]:
    return {value: name.removeprefix(prefix) for name, value in enumerators.items() if name.startswith(prefix)}


def ring_bytes(memory_bytes: int, cpus: int) -> int:
    """The size of one CPU's ring: a power of two, so that all of them fit in `memory_bytes`."""
    return max(SMALLEST_RING_BYTES, mmap.PAGESIZE, 1 << (memory_bytes // cpus).bit_length() - 1)


def online_cpus(text: str) -> list[int]:
    """The CPUs of a kernel list such as `0-3,8`."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


class Probe:
    """The probe at work, as a context manager that detaches it whatever happens.

    Attributes:
        vocabulary: names for the numbers in records.
        rings: a file descriptor for each online CPU's ring buffer.
        ring_bytes: the size of each.
        older: the snapshot of sockets taken at the start, as bytes of `struct tcpio_record`.
        missing: programs that this kernel does not take, and what goes unrecorded without each.

    Raises:
        EnvironmentFault: on entry, in one line that says what this host lacks.
    """

    def __init__(
        self,
        *,
        filters: Filters,
        memory_bytes: int,
        cgroup: Path | None = None,
        object_file: Path = OBJECT,
        library: Library | None = None,
    ) -> None:
        self._filters, self._memory_bytes, self._cgroup = filters, memory_bytes, cgroup
        self._object_file, self._given_library = object_file, library
        self._exit = ExitStack()
        self.missing: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._enter(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _enter(self, stack: ExitStack) -> None:
        library = self._given_library or Library()
        cgroup = self._cgroup or cgroup_root()
        with Types(library) as kernel:
            drops, resets = kernel.enumerators("skb_drop_reason"), kernel.enumerators("sk_rst_reason")
            self._object = stack.enter_context(Object(library, self._object_file))
            for program in left_out(kernel):
                self._object.leave_out(program)
                self.missing[program] = WITHOUT[program]
        self.vocabulary = Vocabulary(_stripped(drops, "SKB_DROP_REASON_"), _stripped(resets, "SK_RST_REASON_"))
        self._object.load()
        self._map_counters(stack)
        self._create_rings(stack)
        self._set_control()
        self._attach(stack, cgroup)
        self._later = self._object.iterator(SNAPSHOT)
        stack.callback(os.close, self._later)
        first = self._object.iterator(SNAPSHOT)
        try:
            self.older = _read_all(first)
        finally:
            os.close(first)

    def _map_counters(self, stack: ExitStack) -> None:
        self._cpus = online_cpus(Path("/sys/devices/system/cpu/online").read_text())
        self._counters = Counters * (self._cpus[-1] + 1)
        self._counter_memory = stack.enter_context(
            mmap.mmap(self._object.map_fd("counters"), ctypes.sizeof(self._counters), prot=mmap.PROT_READ)
        )

    def _create_rings(self, stack: ExitStack) -> None:
        self.ring_bytes = ring_bytes(self._memory_bytes, len(self._cpus))
        self.rings: list[int] = []
        rings_fd = self._object.map_fd("rings")
        for cpu in self._cpus:
            ring = self._object.create_ring(self.ring_bytes)
            stack.callback(os.close, ring)
            self.rings.append(ring)
            self._object.update(rings_fd, cpu.to_bytes(4, "little"), ring.to_bytes(4, "little"))

    def _set_control(self) -> None:
        control = Control(wakeup_bytes=self.ring_bytes // WAKEUP_SHARE)
        symbols = Path("/proc/kallsyms").read_bytes()
        control.tcp_v4_rcv[:] = code_range("tcp_v4_rcv", symbols)
        control.tcp_v6_rcv[:] = code_range("tcp_v6_rcv", symbols)
        control.sock_edemux, _ = code_range("sock_edemux", symbols)
        if not control.tcp_v4_rcv[0]:
            self.missing.setdefault("tcpio_drop", f"{WITHOUT['tcpio_drop']} (addresses in /proc/kallsyms are hidden)")
        control.filter_ports(self._filters.ports)
        control.network_filter = bool(self._filters.networks)
        networks = self._object.map_fd("networks")
        for network in self._filters.networks:
            self._object.update(networks, network_key(network), b"\1")
        self._object.update(self._object.map_fd("control"), bytes(4), bytes(control))

    def _attach(self, stack: ExitStack, cgroup: Path) -> None:
        try:
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise EnvironmentFault(f"cannot open the cgroup {cgroup}: {error.strerror}") from None
        stack.callback(os.close, directory)
        if not (cgroup / "cgroup.controllers").exists():
            raise EnvironmentFault(f"{cgroup} is no cgroup v2 tree; leave capture.cgroup unset to have it found")
        for program, section in self._object.sections():
            if program not in self.missing:
                self._object.attach(program, directory if section.startswith("cgroup") else None)

    def hooks(self) -> list[str]:
        """What the probe is attached to, by the names of its programs."""
        return [program.removeprefix("tcpio_") for program in self._object.attached()]

    def tally(self) -> Tally:
        """What the probe counted until now."""
        return tally(*(self._counters.from_buffer_copy(self._counter_memory) for _ in range(2)))

    def recursion_misses(self) -> int:
        """How often a tracing program was skipped because it was running already on its CPU."""
        return sum(recursion_misses(self._object.program_fd(program)) for program in self._object.attached())

    def detach(self) -> None:
        """Record nothing more; what is in the rings stays there to be drained."""
        self._object.detach()

    def snapshot(self) -> bytes:
        """Every connected socket as of now, as bytes of `struct tcpio_record`; works once, and without privileges."""
        return _read_all(self._later)


def _read_all(iterator: int) -> bytes:
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(iterator, 1 << 20)
        except BlockingIOError:  # EAGAIN: the kernel pauses a long iteration to let others run
            continue
        if not part:
            return b"".join(parts)
        parts.append(part)
