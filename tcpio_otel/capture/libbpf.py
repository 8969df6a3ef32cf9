"""libbpf, by ctypes: objects opened, loaded and attached, and the running kernel's types asked for.

Only what the probe needs of libbpf's public interface (libbpf.h, bpf.h, btf.h; version 1.0 and up). Nothing here
imports NumPy: the probe is loaded before privileges are dropped, and they are dropped before NumPy is imported.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from tcpio_otel.errors import EnvironmentFault

MAP_TYPE_RINGBUF = 27
CGROUP_SKB, GET_CURRENT_PID_TGID = 8, 14
INSTRUCTION = struct.Struct("<BBhi")
_BTF_KIND_STRUCT, _BTF_KIND_UNION, _BTF_KIND_ENUM, _BTF_KIND_TYPEDEF = 4, 5, 6, 8
_LIBBPF_WARN = 0
_LOG_LINES = 400

_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "libbpf_set_print": (c_void_p, [c_void_p]),
    "bpf_object__open_file": (c_void_p, [c_char_p, c_void_p]),
    "bpf_object__load": (c_int, [c_void_p]),
    "bpf_object__close": (None, [c_void_p]),
    "bpf_object__next_program": (c_void_p, [c_void_p, c_void_p]),
    "bpf_object__find_map_by_name": (c_void_p, [c_void_p, c_char_p]),
    "bpf_map__fd": (c_int, [c_void_p]),
    "bpf_map__reuse_fd": (c_int, [c_void_p, c_int]),
    "bpf_map__set_initial_value": (c_int, [c_void_p, c_char_p, c_size_t]),
    "bpf_obj_get": (c_int, [c_char_p]),
    "bpf_obj_get_info_by_fd": (c_int, [c_int, c_void_p, c_void_p]),
    "bpf_map__max_entries": (c_uint32, [c_void_p]),
    "bpf_program__name": (c_char_p, [c_void_p]),
    "bpf_program__section_name": (c_char_p, [c_void_p]),
    "bpf_program__set_autoload": (c_int, [c_void_p, c_bool]),
    "bpf_program__attach": (c_void_p, [c_void_p]),
    "bpf_program__attach_cgroup": (c_void_p, [c_void_p, c_int]),
    "bpf_program__fd": (c_int, [c_void_p]),
    "bpf_link__fd": (c_int, [c_void_p]),
    "bpf_link__destroy": (c_int, [c_void_p]),
    "bpf_iter_create": (c_int, [c_int]),
    "bpf_map_create": (c_int, [c_uint32, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p]),
    "bpf_map_update_elem": (c_int, [c_int, c_void_p, c_void_p, c_uint64]),
    "bpf_map_lookup_elem": (c_int, [c_int, c_void_p, c_void_p]),
    "bpf_btf_load": (c_int, [c_char_p, c_size_t, c_void_p]),
    "bpf_prog_load": (c_int, [c_uint32, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p]),
    "bpf_link_create": (c_int, [c_int, c_int, c_uint32, c_void_p]),
    "btf__load_vmlinux_btf": (c_void_p, []),
    "btf__parse_elf": (c_void_p, [c_char_p, c_void_p]),
    "btf__free": (None, [c_void_p]),
    "btf__find_by_name_kind": (c_int32, [c_void_p, c_char_p, c_uint32]),
    "btf__type_by_id": (c_void_p, [c_void_p, c_uint32]),
    "btf__resolve_type": (c_int32, [c_void_p, c_uint32]),
    "btf__resolve_size": (c_int64, [c_void_p, c_uint32]),
    "btf__name_by_offset": (c_char_p, [c_void_p, c_uint32]),
}


class _BtfType(ctypes.Structure):
    """`struct btf_type`: what follows it in memory depends on its kind."""

    _fields_ = (("name_offset", c_uint32), ("info", c_uint32), ("size_or_type", c_uint32))


class _BtfEnum(ctypes.Structure):
    _fields_ = (("name_offset", c_uint32), ("value", c_int32))


class _BtfMember(ctypes.Structure):
    _fields_ = (("name_offset", c_uint32), ("type", c_uint32), ("offset_bits", c_uint32))


class Library:
    """libbpf.so.1 with typed functions, and the last warnings that it printed.

    Raises:
        EnvironmentFault: the library is not installed, or too old to have a function that is needed.
    """

    def __init__(self, name: str = "libbpf.so.1") -> None:
        try:
            self._library = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            raise EnvironmentFault(f"cannot load {name}: {error}; install it (Debian, Ubuntu: libbpf1)") from None
        for function, (result, arguments) in _FUNCTIONS.items():
            try:
                entry = getattr(self._library, function)
            except AttributeError:
                raise EnvironmentFault(f"{name} lacks {function}; libbpf 1.0 or later is needed") from None
            entry.restype, entry.argtypes = result, arguments
        self._warnings: list[str] = []
        self._print = _PRINT(self._keep_warning)  # kept: libbpf holds a bare pointer to it
        self._library.libbpf_set_print(ctypes.cast(self._print, c_void_p))

    def _keep_warning(self, level: int, template: bytes, arguments: int) -> int:
        if level == _LIBBPF_WARN:
            text = ctypes.create_string_buffer(1 << 16)
            ctypes.CDLL(None).vsnprintf(text, c_size_t(len(text)), template, c_void_p(arguments))
            self._warnings = (self._warnings + text.value.decode(errors="replace").splitlines())[-_LOG_LINES:]
        return 0

    def warnings(self) -> list[str]:
        """The warnings since the last call, oldest first."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def __getattr__(self, function: str) -> Any:
        return getattr(self._library, function)

    def check(self, result: int, what: str) -> int:
        """`result`, unless it is negative.

        Raises:
            EnvironmentFault: what failed, with errno's text and libbpf's own words.
        """
        if result < 0:
            self.fail(what)
        return result

    def fail(self, what: str) -> NoReturn:
        """Raise the failure of `what`, with errno's text and libbpf's own words."""
        reason = os.strerror(ctypes.get_errno())
        said = next((line for line in self.warnings() if line.startswith("libbpf:") and "BEGIN" not in line), "")
        raise EnvironmentFault(f"cannot {what}: {reason}" + (f" ({said.removeprefix('libbpf: ')})" if said else ""))


class Types:
    """BTF: the kernel's own description of its types, or an object file's.

    Raises:
        EnvironmentFault: the running kernel has none.
    """

    def __init__(self, library: Library, object_file: Path | None = None) -> None:
        self._library = library
        if object_file is None:
            self._btf = library.btf__load_vmlinux_btf()
            if not self._btf:
                raise EnvironmentFault(
                    "this kernel has no BTF (/sys/kernel/btf/vmlinux): it needs CONFIG_DEBUG_INFO_BTF=y, "
                    "as Debian 11, Ubuntu 20.10, RHEL 8.2 and later have"
                )
        else:
            self._btf = library.btf__parse_elf(str(object_file).encode(), None)
            if not self._btf:
                library.fail(f"read the BTF of {object_file}")

    def close(self) -> None:
        """Free the types."""
        self._library.btf__free(self._btf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _type(self, identifier: int) -> tuple[_BtfType, int]:
        address = self._library.btf__type_by_id(self._btf, identifier)
        return _BtfType.from_address(address), address

    def enumerators(self, name: str) -> dict[str, int]:
        """The values of a kernel enum by name; empty when the kernel has no such enum."""
        identifier = self._library.btf__find_by_name_kind(self._btf, name.encode(), _BTF_KIND_ENUM)
        if identifier < 0:
            return {}
        kind, address = self._type(identifier)
        values = (_BtfEnum * (kind.info & 0xFFFF)).from_address(address + ctypes.sizeof(_BtfType))
        return {
            self._library.btf__name_by_offset(self._btf, value.name_offset).decode(): value.value for value in values
        }

    def layout(self, structure: str) -> dict[str, tuple[int, int]]:
        """Where each leaf member of a struct lies: dotted name to offset and size, in bytes.

        Anonymous and nested structs and unions are walked through; an array is one member.
        """
        identifier = self._library.btf__find_by_name_kind(self._btf, structure.encode(), _BTF_KIND_STRUCT)
        return dict(self._members(identifier, "", 0))

    def _members(self, identifier: int, prefix: str, base: int) -> Iterator[tuple[str, tuple[int, int]]]:
        kind, address = self._type(identifier)
        members = (_BtfMember * (kind.info & 0xFFFF)).from_address(address + ctypes.sizeof(_BtfType))
        for member in members:
            name = prefix + self._library.btf__name_by_offset(self._btf, member.name_offset).decode()
            resolved = self._library.btf__resolve_type(self._btf, member.type)
            offset = base + member.offset_bits // 8
            if self._type(resolved)[0].info >> 24 & 0x1F in (_BTF_KIND_STRUCT, _BTF_KIND_UNION):
                yield from self._members(resolved, f"{name}." if name else "", offset)
            else:
                yield name, (offset, self._library.btf__resolve_size(self._btf, member.type))

    def tracepoint_arguments(self, tracepoint: str) -> int | None:
        """How many arguments a BTF tracepoint hands to a program; None when the kernel does not have it."""
        identifier = self._library.btf__find_by_name_kind(
            self._btf, f"btf_trace_{tracepoint}".encode(), _BTF_KIND_TYPEDEF
        )
        if identifier < 0:
            return None
        pointer, _ = self._type(self._type(identifier)[0].size_or_type)
        prototype, _ = self._type(pointer.size_or_type)
        return int(prototype.info & 0xFFFF) - 1  # the first is the tracepoint's own context


def has_types(library: Library) -> bool:
    """Whether the running kernel describes its types."""
    try:
        Types(library).close()
    except EnvironmentFault:
        return False
    return True


class Maps:
    """What can be done to any map, whoever made it."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def update(self, map_fd: int, key: bytes, value: bytes) -> None:
        """Set one entry of a map."""
        self._library.check(self._library.bpf_map_update_elem(map_fd, key, value, 0), "write a map of the probe")

    def create_ring(self, size_bytes: int) -> int:
        """A ring buffer of its own; the caller closes the file descriptor."""
        return self._library.check(
            self._library.bpf_map_create(MAP_TYPE_RINGBUF, b"tcpio_ring", 0, 0, size_bytes, None),
            f"create a ring buffer of {size_bytes} bytes",
        )


class _MapInfo(ctypes.Structure):
    """The start of `struct bpf_map_info`."""

    _fields_ = tuple((name, c_uint32) for name in ("type", "id", "key_bytes", "value_bytes", "entries", "flags"))


class PinnedMap(NamedTuple):
    """A map that somebody pinned: a descriptor that the caller closes, and the sizes of a key and a value."""

    descriptor: int
    key_bytes: int
    value_bytes: int


class Object(Maps):
    """A BPF object file: opened on entry, unloaded and detached on exit whatever happens in between.

    Raises:
        EnvironmentFault: from every method, when libbpf or the kernel refuses.
    """

    def __init__(self, library: Library, path: Path) -> None:
        super().__init__(library)
        self._path = path
        self._object: int | None = None
        self._programs: dict[str, int] = {}
        self._left_out: set[str] = set()
        self._links: dict[str, int] = {}

    def __enter__(self) -> Self:
        if not self._path.exists():
            raise EnvironmentFault(f"the probe {self._path} is missing: this package was built without it")
        self._object = self._library.bpf_object__open_file(str(self._path).encode(), None)
        if not self._object:
            self._library.fail(f"open {self._path}")
        program = None
        while program := self._library.bpf_object__next_program(self._object, program):
            self._programs[self._library.bpf_program__name(program).decode()] = program
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if self._object:
            self._library.bpf_object__close(self._object)
            self._object = None

    def sections(self) -> Iterator[tuple[str, str]]:
        """Names of the programs and of their sections, which say what each attaches to; without those left out."""
        for name, program in self._programs.items():
            if name in self._left_out:
                continue
            yield name, self._library.bpf_program__section_name(program).decode()

    def handles(self) -> Iterator[tuple[str, int]]:
        """Names of the programs, and libbpf's own pointers to them."""
        yield from self._programs.items()

    def leave_out(self, program: str) -> None:
        """Do not load a program: one that the kernel does not take fails the whole object."""
        self._library.bpf_program__set_autoload(self._programs[program], False)
        self._left_out.add(program)

    def pinned(self, path: Path) -> PinnedMap | None:
        """The map that is pinned somewhere; None where there is none."""
        descriptor = self._library.bpf_obj_get(str(path).encode())
        if descriptor < 0:
            return None
        info, size = _MapInfo(), c_uint32(ctypes.sizeof(_MapInfo))
        self._library.check(
            self._library.bpf_obj_get_info_by_fd(descriptor, ctypes.byref(info), ctypes.byref(size)),
            f"ask what {path} is",
        )
        return PinnedMap(descriptor, info.key_bytes, info.value_bytes)

    def share(self, name: str, descriptor: int) -> None:
        """Put another map in the place of one that would be made."""
        self._library.check(self._library.bpf_map__reuse_fd(self._map(name), descriptor), f"share {name}")

    def set_constant(self, section: str, value: bytes) -> None:
        """What a section of constants holds, all of it."""
        self._library.check(
            self._library.bpf_map__set_initial_value(self._map(section), value, len(value)), f"set {section}"
        )

    def _map(self, name: str) -> int:
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            self._library.fail(f"find map {name}")
        return int(found)

    def load(self) -> None:
        """Create the maps, verify and load the programs."""
        if self._library.bpf_object__load(self._object):
            self._library.fail("load the probe into the kernel")

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map; it stays the object's."""
        return self._library.check(self._library.bpf_map__fd(self._map(name)), f"find map {name}")

    def map_entries(self, name: str) -> int:
        """How many entries a map was made for."""
        return int(self._library.bpf_map__max_entries(self._map(name)))

    def attach(self, program: str, cgroup_fd: int | None = None) -> None:
        """Attach a program by link, so that it goes when this process goes."""
        handle = self._programs[program]
        link = (
            self._library.bpf_program__attach(handle)
            if cgroup_fd is None
            else self._library.bpf_program__attach_cgroup(handle, cgroup_fd)
        )
        if not link:
            self._library.fail(f"attach {program}")
        self._links[program] = link

    def iterator(self, program: str) -> int:
        """A file descriptor whose reading runs an attached iterator once; the caller closes it."""
        return self._library.check(
            self._library.bpf_iter_create(self._library.bpf_link__fd(self._links[program])), f"iterate by {program}"
        )

    def program_fd(self, program: str) -> int:
        """The file descriptor of a loaded program; it stays the object's."""
        return int(self._library.bpf_program__fd(self._programs[program]))

    def attached(self) -> list[str]:
        """The programs that are attached now."""
        return list(self._links)

    def detach(self) -> None:
        """Detach every program; records that are in the rings stay readable."""
        while self._links:
            _, link = self._links.popitem()
            self._library.bpf_link__destroy(link)


def helper_allowed(library: Library, program_type: int, helper: int) -> bool:
    """Whether the kernel lets programs of a type (enum bpf_prog_type) call a helper (enum bpf_func_id)."""
    call, move, leave = (0x85, 0, 0, helper), (0xB7, 0, 0, 1), (0x95, 0, 0, 0)
    code = b"".join(INSTRUCTION.pack(*instruction) for instruction in (call, move, leave))
    tried = library.bpf_prog_load(program_type, b"tcpio_try", b"GPL", code, 3, None)
    if tried >= 0:
        os.close(tried)
    return bool(tried >= 0)


def recursion_misses(program_fd: int) -> int:
    """How often a tracing program was skipped because it was running already, from /proc (5.12 and later)."""
    with suppress(FileNotFoundError):
        for line in Path(f"/proc/self/fdinfo/{program_fd}").read_text().splitlines():
            if line.startswith("recursion_misses:"):
                return int(line.split()[1])
    return 0
