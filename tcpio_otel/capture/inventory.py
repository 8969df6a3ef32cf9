"""The TCP sockets that processes hold already: whose they are, and who opened them.

Each is borrowed from its process by pidfd_getfd(2) for a moment (Linux 5.6; CAP_SYS_PTRACE), asked, and let go.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tcpio_otel.capture.control import Role

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_SO_NETNS_COOKIE = 71
_SIOCOUTQ = 0x5411
_TCP_INFO_BYTES = 224
_ESTABLISHED, _FIN_WAIT2, _CLOSE_WAIT, _LISTEN = 1, 5, 8, 10
_LOOKS = 5


@dataclass(frozen=True)
class HeldSocket:
    """A TCP socket and its holder. `descriptor` is ours while the next one is not asked for."""

    descriptor: int
    pid: int
    name: bytes
    listening: bool
    netns_cookie: int
    role: Role


@dataclass(frozen=True)
class _Info:
    """Of `struct tcp_info`, what tells who opened a connection."""

    state: int
    bytes_acked: int
    unsent: int
    bytes_sent: int
    bytes_retransmitted: int


def held_sockets(processes: Path = Path("/proc")) -> Iterator[HeldSocket]:
    """Every TCP socket of every process that may be looked into; each once for every process that holds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for directory in processes.iterdir():
        if not directory.name.isdigit():
            continue
        pid = int(directory.name)
        try:
            numbers = [int(link.name) for link in os.scandir(directory / "fd") if _is_socket(link)]
            name, process = _name(directory), os.pidfd_open(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or may not be looked into
        try:
            yield from _sockets_of(libc, process, numbers, (pid, name))
        finally:
            os.close(process)


def _is_socket(link: os.DirEntry[str]) -> bool:
    try:
        return os.readlink(link.path).startswith("socket:")
    except OSError:
        return False  # closed meanwhile


def _name(directory: Path) -> bytes:
    """The executable's basename; the command name where there is none to read. 15 bytes, as the probe has it."""
    try:
        name = os.path.basename(os.readlink(directory / "exe").removesuffix(" (deleted)"))
    except OSError:
        name = (directory / "comm").read_text().rstrip("\n")
    return os.fsencode(name)[:15]


def _sockets_of(libc: ctypes.CDLL, process: int, numbers: list[int], holder: tuple[int, bytes]) -> Iterator[HeldSocket]:
    for number in numbers:
        borrowed = libc.syscall(_SYS_PIDFD_GETFD, process, number, 0)
        if borrowed < 0:
            continue  # closed meanwhile
        with socket.socket(fileno=borrowed) as held:
            if held.type != socket.SOCK_STREAM or held.proto != socket.IPPROTO_TCP:
                continue
            listening = _info(held).state == _LISTEN
            yield HeldSocket(borrowed, *holder, listening, _netns_cookie(held), _role(held))


def _netns_cookie(held: socket.socket) -> int:
    with suppress(OSError):  # before 5.14
        return int.from_bytes(held.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
    return 0


def _info(held: socket.socket) -> _Info:
    raw = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES).ljust(_TCP_INFO_BYTES, b"\0")
    acked, unsent, sent, retransmitted = (
        struct.unpack_from(form, raw, offset)[0] for form, offset in (("Q", 120), ("I", 144), ("Q", 200), ("Q", 208))
    )
    return _Info(raw[0], acked, unsent, sent, retransmitted)


def _role(held: socket.socket) -> Role:
    """Who opened a connection: a client's SYN counts among the acknowledged bytes, a server's does not.

    Its numbers come by several calls, so they are taken until two looks agree.
    """
    before = _info(held)
    for _ in range(_LOOKS if before.state in (_ESTABLISHED, _CLOSE_WAIT, _FIN_WAIT2) else 0):
        queued = int.from_bytes(fcntl.ioctl(held, _SIOCOUTQ, bytes(4)), "little")
        now = _info(held)
        if now == before:
            syn = now.bytes_acked + queued - now.unsent - (now.bytes_sent - now.bytes_retransmitted)
            return {0: Role.SERVER, 1: Role.CLIENT}.get(syn - (now.state == _FIN_WAIT2), Role.UNKNOWN)
        before = now
    return Role.UNKNOWN
