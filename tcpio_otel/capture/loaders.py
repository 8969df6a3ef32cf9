"""Two ways to bring the probe into a kernel: by libbpf where it describes its types (BTF), else by BCC.

Each says what the kernel lets it do: the names that it knows, and what goes unrecorded.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tcpio_otel import privileges
from tcpio_otel.capture import bcc, libbpf
from tcpio_otel.capture.control import ContextSources, Control
from tcpio_otel.capture.inventory import held_sockets
from tcpio_otel.capture.libbpf import Library, Types
from tcpio_otel.errors import EnvironmentFault

OBJECT = Path(__file__).with_name("tcpio.bpf.o")

# Programs on tracepoints, and the arguments they need: without the tracepoint, or with fewer arguments, the kernel
# would refuse the whole object.
TRACEPOINTS = {
    "tcpio_drop": ("kfree_skb", 2),
    "tcpio_queue": ("net_dev_queue", 1),
    "tcpio_state": ("inet_sock_set_state", 3),
    "tcpio_reset": ("tcp_send_reset", 3),
    "tcpio_read": ("tcp_rcv_space_adjust", 1),
    "tcpio_cgroup": ("cgroup_mkdir", 2),
}
WITHOUT = {
    "tcpio_drop": "segments received by TIME_WAIT or no socket are not recorded",
    "tcpio_queue": "some segments sent by TIME_WAIT or no socket are not recorded",
    "tcpio_state": "totals are added up from records",
    "tcpio_reset": "the kernel's reason for a RST is not known",
    "tcpio_read": "a connection keeps the process that made its socket",
    "tcpio_cgroup": "containers that live for less than a second may go unnamed",
}
WITHOUT_TYPES = {
    **{
        program: WITHOUT[program]
        for program in ("tcpio_drop", "tcpio_queue", "tcpio_reset", "tcpio_read", "tcpio_cgroup")
    },
    "tcpio_error": "the error that a socket failed with is not known: one that timed out shows as aborted",
    "tcpio_snapshot": "connections older than the agent are known once they send, and their ends by both FINs",
    "tcpio_option": "packets are not joined to the traces of applications",
    "tcpio_totals": "totals of connections older than the agent, or open when it stops, are added up from records",
}
"""What BCC's probe does without: each needs the kernel's types."""

UNKNOWN_HOLDERS = "the processes of connections and listeners older than the agent are not known"
NEED_STORAGE = {"tcpio_read"}
SOCKET_STORAGE = "BPF_FUNC_sock_from_file"  # the helper that came with socket storage in tracing programs, in 5.11
SNAPSHOT, OPTION = "tcpio_snapshot", "tcpio_option"
PUBLISHED, PUBLISHED_BYTES = "published_contexts", (8, 24)


class Loader(StrEnum):
    """By what the probe is loaded: libbpf, BCC, or the first of them that this kernel serves."""

    AUTO = "auto"
    LIBBPF = "libbpf"
    BCC = "bcc"


@dataclass(frozen=True)
class Vocabulary:
    """The running kernel's own names for the numbers in records."""

    drop_reasons: Mapping[int, str] = field(default_factory=dict)
    reset_reasons: Mapping[int, str] = field(default_factory=dict)


class Loaded(Protocol):
    """What the probe is made of, whoever loaded it: `libbpf.Object` or `bcc.Object`."""

    def load(self) -> None:
        """Create the maps, verify and load the programs."""

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map."""

    def update(self, map_fd: int, key: bytes, value: bytes) -> None:
        """Set one entry of a map."""

    def create_ring(self, size_bytes: int) -> int:
        """A ring buffer of its own; the caller closes the file descriptor."""

    def sections(self) -> Iterator[tuple[str, str]]:
        """Names of the programs and of their sections, in the order in which to attach them."""

    def attach(self, program: str, cgroup_fd: int | None = None) -> None:
        """Attach a program by link."""

    def attached(self) -> list[str]:
        """The programs that are attached now."""

    def program_fd(self, program: str) -> int:
        """The file descriptor of a loaded program."""

    def detach(self) -> None:
        """Detach every program."""


class Loading(Protocol):
    """One way to load the probe. `missing` says what goes unrecorded, by the program that would have recorded it."""

    vocabulary: Vocabulary
    missing: dict[str, str]

    def open(self, stack: ExitStack, contexts: ContextSources) -> Loaded:
        """The probe, ready to load; `stack` lets go of it."""

    def place(self, control: Control) -> None:
        """Note in `control` what the programs must know of this kernel."""

    def first_look(self, stack: ExitStack, control: Control) -> bytes:
        """Once everything is attached: the sockets that are older, as bytes of `struct tcpio_record`."""

    def look(self) -> bytes:
        """Every connected socket as of now, likewise, as often as is wanted.

        Raises:
            EnvironmentFault: this kernel does not let whoever has dropped its privileges look.
        """

    def last_look(self) -> bytes:
        """The same; works once, and without privileges everywhere."""


def chosen(loader: Loader, library: Library) -> Loader:
    """The loader to use: `auto` is libbpf where the kernel has BTF, else BCC."""
    if loader is not Loader.AUTO:
        return loader
    return Loader.LIBBPF if libbpf.has_types(library) else Loader.BCC


class ByLibbpf:
    """The object file, relocated to the running kernel by libbpf."""

    def __init__(self, library: Library, object_file: Path = OBJECT) -> None:
        self._library, self._object_file = library, object_file
        self.missing: dict[str, str] = {}

    def open(self, stack: ExitStack, contexts: ContextSources) -> Loaded:
        """The probe, without the programs that this kernel does not take, or that nobody asks for."""
        with Types(self._library) as kernel:
            drops, resets = kernel.enumerators("skb_drop_reason"), kernel.enumerators("sk_rst_reason")
            self._object = stack.enter_context(libbpf.Object(self._library, self._object_file))
            for program in left_out(kernel):
                self._object.leave_out(program)
                self.missing[program] = WITHOUT[program]
            if not contexts.socket_tags:
                self._object.leave_out(OPTION)
            if contexts.published_map:
                self._share(stack, contexts.published_map)
        self.vocabulary = Vocabulary(_stripped(drops, "SKB_DROP_REASON_"), _stripped(resets, "SK_RST_REASON_"))
        return self._object

    def _share(self, stack: ExitStack, pinned: Path) -> None:
        """Read the map in which other people's programs publish threads' contexts, if it is there."""
        published = self._object.pinned(pinned)
        if published is None:
            return
        stack.callback(os.close, published.descriptor)
        if (published.key_bytes, published.value_bytes) != PUBLISHED_BYTES:
            self.missing[PUBLISHED] = f"{pinned} has another layout than this agent knows, and is not read"
        elif not libbpf.helper_allowed(self._library, libbpf.CGROUP_SKB, libbpf.GET_CURRENT_PID_TGID):
            self.missing[PUBLISHED] = f"{pinned} is not read: a packet's thread is not known before 6.10"
        else:
            self._object.share(PUBLISHED, published.descriptor)
            self._object.set_constant(".rodata.published", b"\1")

    def place(self, control: Control) -> None:
        """Where in the kernel's code segments are dropped."""
        symbols = Path("/proc/kallsyms").read_bytes()
        control.tcp_v4_rcv[:] = code_range("tcp_v4_rcv", symbols)
        control.tcp_v6_rcv[:] = code_range("tcp_v6_rcv", symbols)
        control.sock_edemux, _ = code_range("sock_edemux", symbols)
        if not control.tcp_v4_rcv[0]:
            self.missing.setdefault("tcpio_drop", f"{WITHOUT['tcpio_drop']} (addresses in /proc/kallsyms are hidden)")

    def first_look(self, stack: ExitStack, control: Control) -> bytes:
        """By the iterator over all files; it also tells the probe who the agent is."""
        del control
        self._last = self._object.iterator(SNAPSHOT)
        stack.callback(os.close, self._last)
        return self.look()

    def look(self) -> bytes:
        """By a new iterator, which takes no privilege since 5.19: the programs and links are this process's own."""
        iterator = self._object.iterator(SNAPSHOT)
        try:
            return _read_all(iterator)
        finally:
            os.close(iterator)

    def last_look(self) -> bytes:
        """By the same iterator, opened while that was allowed."""
        return _read_all(self._last)


class ByBcc:
    """The source without kernel types, compiled here by BCC.

    Attributes:
        compiled: what BCC made of it; compile_s: how long that took, in seconds.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self.vocabulary = Vocabulary()
        self.missing = dict(WITHOUT_TYPES)

    def open(self, stack: ExitStack, contexts: ContextSources) -> Loaded:
        """The probe, compiled."""
        del contexts
        started = time.perf_counter()
        self._object = stack.enter_context(bcc.Object(self._library))
        self.compiled, self.compile_s = self._object.compiled, time.perf_counter() - started
        return self._object

    def place(self, control: Control) -> None:
        """Nothing: its programs know no kernel function."""

    def first_look(self, stack: ExitStack, control: Control) -> bytes:
        """Nothing yet: a socket that is older is reported with the first segment that it sends.

        Whose such sockets are the probe is told here, and who the agent is.
        """
        del stack
        control.agent_tgid = self._object.own_pid()
        self._object.update(self._object.map_fd("control"), bytes(4), bytes(control))
        if control.agent_tgid != os.getpid() or not privileges.has(privileges.Capability.SYS_PTRACE):
            self.missing["tcpio_holders"] = UNKNOWN_HOLDERS  # ids here are not the host's, or nobody may be asked
            return b""
        for held in held_sockets():
            self._object.adopt(held)
        return b""

    def look(self) -> bytes:
        """Nothing to look by: without types there is no iterator."""
        raise EnvironmentFault("a probe by BCC has no iterator over sockets: that needs a kernel with BTF")

    def last_look(self) -> bytes:
        """Nothing, likewise."""
        return b""


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
    at = max(symbols.find(f" {kind} {function}\n".encode()) for kind in "Tt")
    if at < 0 or not (start := int(symbols[symbols.rfind(b"\n", 0, at) + 1 : at], 16)):
        return 0, 0
    while (at := symbols.find(b"\n", at) + 1) and (blank := symbols.find(b" ", at)) > 0:
        if (end := int(symbols[at:blank], 16)) != start:
            return (start, end) if end > start else (0, 0)
    return 0, 0


def _stripped(enumerators: Mapping[str, int], prefix: str) -> dict[int, str]:
    return {value: name.removeprefix(prefix) for name, value in enumerators.items() if name.startswith(prefix)}


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
