"""The probe by BCC: compiled on this host, for kernels whose types are not to be had.

BCC turns C into instructions (bcc_compile.py, in a process of its own); maps, loading and attaching go by libbpf, so
that what holds of the one loader holds of the other: links that go with the agent, maps that it shares with the probe.
"""

import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from tcpio_otel.capture.control import Control, Counters, Owner
from tcpio_otel.capture.inventory import HeldSocket
from tcpio_otel.capture.libbpf import CGROUP_SKB, INSTRUCTION, Library, Maps, helper_allowed
from tcpio_otel.errors import EnvironmentFault

SOURCE = Path(__file__).with_name("tcpio.bcc")
COMPILER = Path(__file__).with_name("bcc_compile.py")
PYTHONS = ("/usr/bin/python3", sys.executable)
"""Where BCC is looked for: it comes with the distribution, for the distribution's Python."""

COMPILE_S = 300
MAX_CPUS = 1024
_LOAD_64, _PSEUDO_MAP_FD, _CALL, _MOVE_64 = 0x18, 1, 0x85, 0xB7
_GET_NETNS_COOKIE = 122
_NO_EXIST = 1
_CGROUP_SOCK, _SOCK_OPS = 9, 13


class _Program(NamedTuple):
    """What a program is to the kernel: enum bpf_prog_type, enum bpf_attach_type."""

    type: int
    attach: int


PROGRAMS = {
    "tcpio_create": _Program(_CGROUP_SOCK, 2),
    "tcpio_ops": _Program(_SOCK_OPS, 3),
    "tcpio_ingress": _Program(CGROUP_SKB, 0),
    "tcpio_egress": _Program(CGROUP_SKB, 1),
}


class _Map(NamedTuple):
    """What bpf_map_create is told: enum bpf_map_type, sizes in bytes, entries, flags."""

    type: int
    key: int
    value: int
    entries: int
    flags: int = 0


_NO_PREALLOC, _CLONE, _MMAPABLE = 1, 1 << 9, 1 << 10
_ARRAY, _LRU_HASH, _LPM_TRIE, _ARRAY_OF_MAPS, _SK_STORAGE = 2, 9, 11, 12, 24
MAPS = {
    "rings": _Map(_ARRAY_OF_MAPS, 4, 4, MAX_CPUS),
    "counters": _Map(_ARRAY, 4, ctypes.sizeof(Counters), MAX_CPUS, _MMAPABLE),
    "control": _Map(_ARRAY, 4, ctypes.sizeof(Control), 1, _MMAPABLE),
    "owners": _Map(_SK_STORAGE, 4, ctypes.sizeof(Owner), 0, _NO_PREALLOC | _CLONE),
    "networks": _Map(_LPM_TRIE, 20, 1, 1024, _NO_PREALLOC),
    "own_connections": _Map(_LRU_HASH, 36, 1, 1024),
}
"""In the order of `enum map` in bpf/tcpio.bcc.c."""


class _MapOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("btf_fd", c_uint32), ("btf_key", c_uint32), ("btf_value", c_uint32),
        ("btf_vmlinux_value", c_uint32), ("inner_map", c_uint32), ("flags", c_uint32), ("extra", c_uint64),
        ("numa_node", c_uint32), ("interface", c_uint32),
    )  # fmt: skip


class _LoadOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("attempts", c_int), ("attach_type", c_uint32), ("btf_fd", c_uint32), ("flags", c_uint32),
        ("interface", c_uint32), ("kernel_version", c_uint32), ("attach_btf", c_uint32), ("attach_program", c_uint32),
        ("attach_btf_object", c_uint32), ("descriptors", c_void_p), ("functions", c_void_p),
        ("function_count", c_uint32), ("function_size", c_uint32), ("lines", c_void_p), ("line_count", c_uint32),
        ("line_size", c_uint32), ("log_level", c_uint32), ("log_size", c_uint32), ("log", c_char_p),
    )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What BCC made of the source: instructions by function, BCC's version, and the memory that it took."""

    programs: dict[str, bytes]
    version: str
    peak_bytes: int


def compile_probe(pythons: Sequence[str] = PYTHONS, source: Path = SOURCE) -> Compiled:
    """Have BCC compile the probe.

    Raises:
        EnvironmentFault: no Python here has BCC, headers are missing, or it does not compile; in one line.
    """
    faults: list[str] = []
    for python in dict.fromkeys(pythons):
        try:
            done = subprocess.run(  # noqa: S603 - a Python by its full path, and our own file
                [python, "-I", str(COMPILER), *PROGRAMS],
                input=source.read_text(), capture_output=True, text=True, timeout=COMPILE_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            faults.append(f"{python}: {error}")
            continue
        if done.returncode == 0:
            made = json.loads(done.stdout)
            programs = {name: bytes.fromhex(text) for name, text in made["programs"].items()}
            return Compiled(programs, made["version"], made["peak_bytes"])
        faults.append(" ".join(done.stderr.split()) or f"{python} ended with {done.returncode}")
    raise EnvironmentFault(f"BCC cannot compile the probe: {faults[0]}")


def filled_in(code: bytes, maps: Sequence[int], *, netns_cookie: bool) -> bytes:
    """Instructions with descriptors where they name maps by number.

    `netns_cookie` says whether the kernel lets them ask for their network namespace: without, the answer is 0.
    """
    done = bytearray()
    for operation, registers, offset, immediate in INSTRUCTION.iter_unpack(code):
        if operation == _LOAD_64 and registers >> 4 == _PSEUDO_MAP_FD:
            done += INSTRUCTION.pack(operation, registers, offset, maps[immediate])
        elif operation == _CALL and not registers and immediate == _GET_NETNS_COOKIE and not netns_cookie:
            done += INSTRUCTION.pack(_MOVE_64, 0, 0, 0)
        else:
            done += INSTRUCTION.pack(operation, registers, offset, immediate)
    return bytes(done)


def _btf_of_owners() -> bytes:
    """Types for the socket storage, which the kernel asks for: a signed int as key, as value an array of words."""
    header, kind = struct.Struct("<HBBIIIII"), struct.Struct("<III")
    strings, integer, array = b"\0int\0word\0", 1 << 24, 3 << 24
    types = (
        kind.pack(1, integer, 4) + struct.pack("<I", 1 << 24 | 32)  # 1: int, signed, 32 bits
        + kind.pack(5, integer, 4) + struct.pack("<I", 32)  # 2: word, 32 bits
        + kind.pack(0, array, 0) + kind.pack(2, 2, ctypes.sizeof(Owner) // 4)  # 3: words
    )  # fmt: skip
    return header.pack(0xEB9F, 1, 0, header.size, 0, len(types), len(types), len(strings)) + types + strings


class Object(Maps):
    """The probe by BCC: compiled on entry, unloaded and detached on exit whatever happens in between.

    Raises:
        EnvironmentFault: from every method, when BCC, libbpf or the kernel refuses.
    """

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._stack = ExitStack()
        self._maps: dict[str, int] = {}
        self._programs: dict[str, int] = {}
        self._links: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.compiled = compile_probe()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
        self._stack.close()

    def _kept(self, descriptor: int, what: str) -> int:
        self._library.check(descriptor, what)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def load(self) -> None:
        """Create the maps, verify and load the programs."""
        for name in MAPS:
            self._maps[name] = self._kept(self._create(name), f"create the map {name}")
        for name in PROGRAMS:
            self._programs[name] = self._kept(self.load_program(name), f"load {name} into the kernel")

    def _create(self, name: str) -> int:
        kind = MAPS[name]
        options = _MapOptions(size=ctypes.sizeof(_MapOptions), flags=kind.flags)
        with ExitStack() as meanwhile:
            if kind.type == _ARRAY_OF_MAPS:
                options.inner_map = self.create_ring(1 << 16)
                meanwhile.callback(os.close, options.inner_map)
            if kind.type == _SK_STORAGE:
                types = _btf_of_owners()
                options.btf_fd = self._library.check(
                    self._library.bpf_btf_load(types, len(types), None), "load the types of socket storage"
                )
                options.btf_key, options.btf_value = 1, 3
                meanwhile.callback(os.close, options.btf_fd)
            return int(
                self._library.bpf_map_create(
                    kind.type, f"tcpio_{name}"[:15].encode(), kind.key, kind.value, kind.entries, ctypes.byref(options)
                )
            )

    def load_program(self, name: str, log: ctypes.Array[ctypes.c_char] | None = None) -> int:
        """Load one program; returns its descriptor, or a negative number. The verifier's statistics go to `log`."""
        kind = PROGRAMS[name]
        # cgroup_skb: from 6.15 on
        cookie = kind.type == _CGROUP_SOCK or helper_allowed(self._library, kind.type, _GET_NETNS_COOKIE)
        code = filled_in(self.compiled.programs[name], list(self._maps.values()), netns_cookie=cookie)
        options = _LoadOptions(size=ctypes.sizeof(_LoadOptions), attach_type=kind.attach)
        if log is not None:
            options.log_level, options.log_size = 4, len(log)
            options.log = ctypes.cast(log, c_char_p)
        count = len(code) // INSTRUCTION.size
        return int(self._library.bpf_prog_load(kind.type, name.encode(), b"GPL", code, count, ctypes.byref(options)))

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map; it stays the object's."""
        return self._maps[name]

    def sections(self) -> Iterator[tuple[str, str]]:
        """Names of the programs, in the order in which to attach them; all go to the cgroup."""
        for name in PROGRAMS:
            yield name, "cgroup"

    def attach(self, program: str, cgroup_fd: int | None = None) -> None:
        """Attach a program by link, so that it goes when this process goes."""
        link = self._library.bpf_link_create(self._programs[program], cgroup_fd, PROGRAMS[program].attach, None)
        self._links[program] = self._library.check(link, f"attach {program}")

    def program_fd(self, program: str) -> int:
        """The file descriptor of a loaded program; it stays the object's."""
        return self._programs[program]

    def attached(self) -> list[str]:
        """The programs that are attached now."""
        return list(self._links)

    def detach(self) -> None:
        """Detach every program; records that are in the rings stay readable."""
        while self._links:
            _, link = self._links.popitem()
            os.close(link)

    def adopt(self, held: HeldSocket) -> None:
        """Tell the probe whose a socket is that is older than it."""
        owner = Owner(
            pid=held.pid, observed=held.listening, netns=held.netns_cookie & 0xFFFFFFFF, role=held.role,
            name=(ctypes.c_uint8 * 16)(*held.name),
        )  # fmt: skip
        done = self._library.bpf_map_update_elem(
            self._maps["owners"], held.descriptor.to_bytes(4, "little"), bytes(owner), _NO_EXIST
        )
        if done != -errno.EEXIST:  # another holder came first, or the probe saw it being made
            self._library.check(done, "write a socket's owner")

    def own_pid(self) -> int:
        """This process's id in the initial namespace, as the probe saw it make a socket."""
        owner = Owner()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as made:
            self._library.check(
                self._library.bpf_map_lookup_elem(
                    self._maps["owners"], made.fileno().to_bytes(4, "little"), ctypes.byref(owner)
                ),
                "find the agent's own process id",
            )
        return int(owner.pid)
