"""The probe at work, whoever loaded it: attached, with rings, counters and what the agent asks of it.

This is all that needs privileges. It runs before they are dropped, hence before NumPy is imported.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tcpio_otel.capture.control import ContextSources, Control, Counters, Filters, Tally, network_key, tally
from tcpio_otel.capture.libbpf import Library, recursion_misses
from tcpio_otel.capture.loaders import ByBcc, ByLibbpf, Loader, Loading, chosen
from tcpio_otel.errors import EnvironmentFault

SMALLEST_RING_BYTES = 1 << 16
RESERVED_SHARE = (
    8  # one in eight bytes of a ring is kept for what tells of sockets: totals must not be lost with packets
)
WAKEUP_SHARE = 4  # a ring filled to one in four wakes the reader; what comes until it runs finds room


MOUNTS = Path("/proc/self/mountinfo")


def cgroup_root(mounts: Path = MOUNTS) -> Path:
    """Where the root of the cgroup v2 tree is mounted.

    Raises:
        EnvironmentFault: it is mounted nowhere.
    """
    for point, kind, _ in _whole_mounts(mounts):
        if kind == "cgroup2":
            return point
    raise EnvironmentFault("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup, or boot with cgroup v2")


def memory_hierarchy(mounts: Path = MOUNTS) -> Path | None:
    """Where cgroup v1's memory controller has a tree of its own; None where it has none."""
    return next(
        (point for point, kind, options in _whole_mounts(mounts) if kind == "cgroup" and "memory" in options), None
    )


def _whole_mounts(mounts: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """What is mounted from its root on: where, of which type, with which options (proc_pid_mountinfo(5))."""
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, *rest = right.split()
        if root == "/":
            # mountinfo writes blanks as \040
            yield Path(point.encode().decode("unicode_escape")), kind, rest[-1].split(",")


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
        loader: what it was loaded by.
        loading: how; its `vocabulary` has names for the numbers in records, its `missing` what it cannot record here.
        rings: a file descriptor for each online CPU's ring buffer.
        ring_bytes: the size of each.
        older: the snapshot of sockets taken at the start, as bytes of `struct tcpio_record`.

    Raises:
        EnvironmentFault: on entry, in one line that says what this host lacks.
    """

    def __init__(
        self,
        *,
        filters: Filters,
        memory_bytes: int,
        cgroup: Path | None = None,
        loader: Loader = Loader.AUTO,
        contexts: ContextSources = ContextSources(),  # noqa: B008 - frozen
    ) -> None:
        self._filters, self._memory_bytes, self._cgroup = filters, memory_bytes, cgroup
        self._loader, self._contexts = loader, contexts
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._enter(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _enter(self, stack: ExitStack) -> None:
        library = Library()
        cgroup = self._cgroup or cgroup_root()
        self.loader = chosen(self._loader, library)
        if self._filters.netns and self.loader is Loader.BCC:
            raise EnvironmentFault("capture.network_namespace needs a kernel with BTF: by BCC namespaces have no inode")
        self.loading: Loading = ByBcc(library) if self.loader is Loader.BCC else ByLibbpf(library)
        try:
            self._object = self.loading.open(stack, self._contexts)
        except EnvironmentFault as fault:
            if self.loader is Loader.BCC and self._loader is Loader.AUTO:
                raise EnvironmentFault(f"this kernel has no BTF, and {fault}") from None
            raise
        self._object.load()
        self._map_counters(stack)
        self._create_rings(stack)
        control = self._set_control()
        self._attach(stack, cgroup)
        self.older = self.loading.first_look(stack, control)

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

    def _set_control(self) -> Control:
        control = Control(
            wakeup_bytes=self.ring_bytes // WAKEUP_SHARE,
            packet_bytes=self.ring_bytes - self.ring_bytes // RESERVED_SHARE,
        )
        self.loading.place(control)
        control.http_headers = self._contexts.http_headers
        control.filter_ports(self._filters.ports)
        control.network_filter = bool(self._filters.networks)
        control.netns = self._filters.netns
        networks = self._object.map_fd("networks")
        for network in self._filters.networks:
            self._object.update(networks, network_key(network), b"\1")
        self._object.update(self._object.map_fd("control"), bytes(4), bytes(control))
        return control

    def _attach(self, stack: ExitStack, cgroup: Path) -> None:
        try:
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise EnvironmentFault(f"cannot open the cgroup {cgroup}: {error.strerror}") from None
        stack.callback(os.close, directory)
        if not (cgroup / "cgroup.controllers").exists():
            raise EnvironmentFault(f"{cgroup} is no cgroup v2 tree; leave capture.cgroup unset to have it found")
        for program, section in self._object.sections():
            if program not in self.loading.missing:
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

    def program_fd(self, program: str) -> int:
        """The file descriptor of a loaded program; it stays the probe's."""
        return self._object.program_fd(program)

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map; it stays the probe's."""
        return self._object.map_fd(name)

    def detach(self) -> None:
        """Record nothing more; what is in the rings stays there to be drained."""
        self._object.detach()

    def look(self) -> bytes:
        """Every connected socket as of now, as bytes of `struct tcpio_record`; as often as is wanted.

        Raises:
            EnvironmentFault: it cannot be told without privileges.
        """
        return self.loading.look()

    def snapshot(self) -> bytes:
        """Every connected socket as of now, as bytes of `struct tcpio_record`; works once, and without privileges."""
        return self.loading.last_look()
