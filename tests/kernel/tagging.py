"""Programs without privileges that tag sockets, or try to, and print, as JSON, what the kernel answered.

    tagging.py PROGRAM [ARGUMENT ...]

Each gives up what root may do first, unless it is started as `root PROGRAM`.
"""

import ctypes
import json
import mmap
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

LEVEL = 0x6F74656C
NOBODY = 65534
IDLE_TAGS = 8
"""The probe's own limit: tags in a row that are taken while nothing is sent."""

TAKEN, OTHER = bytes.fromhex("aa" * 24), bytes.fromhex("ac" * 24)
"""Ids that are given where they will be taken."""

REFUSED = bytes.fromhex("bb" * 24)
"""Ids that are given where they will not."""

CLEAR = bytes(24)
BLANKS = {
    "no trace id": bytes(16) + REFUSED[16:],
    "no span id": REFUSED[:16] + bytes(8),
    "half a trace id": bytes(8) + REFUSED[8:16] + bytes(8),
}
PIDFD_OPEN, PIDFD_GETFD = 434, 438
PAGE = mmap.PAGESIZE
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.setsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]


def give(descriptor: int, value: Any, size: int = 24, name: int = 1, level: int = LEVEL) -> int:
    """Call setsockopt(2) with what no wrapper would let through; the errno."""
    return ctypes.get_errno() if LIBC.setsockopt(descriptor, level, name, value, size & 0xFFFFFFFF) else 0


def connection(family: int = socket.AF_INET, protocol: int = 0) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection over loopback: the client's, the server's."""
    with socket.socket(family, socket.SOCK_STREAM, protocol) as listener:
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        client = socket.socket(family, socket.SOCK_STREAM, protocol)
        client.connect(listener.getsockname())
        return client, listener.accept()[0]


def own() -> dict[str, int]:
    """A process's own connections, in every state in which one can send or receive."""
    answers = {}
    for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
        client, server = connection(family)
        with client, server, os.fdopen(os.dup(client.fileno()), "rb", 0) as copy:
            for what, end in (("client", client), ("server", server), ("copy", copy)):
                answers[f"{what}, IPv{version}"] = give(end.fileno(), TAKEN)
                client.sendall(b"x")
                answers[f"{what}, IPv{version}, shared"] = give(end.fileno(), OTHER, name=2)
                client.sendall(b"x")
                answers[f"{what}, IPv{version}, clear"] = give(end.fileno(), CLEAR)
                client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            answers[f"half closed, IPv{version}"] = give(client.fileno(), TAKEN)
            answers[f"half closed by its peer, IPv{version}"] = give(server.fileno(), TAKEN)
    return answers


def _sockets(stack: ExitStack) -> Iterator[tuple[str, int]]:
    """Everything that is no connection, as far as this kernel has it and lets us."""

    def made(*arguments: int) -> socket.socket:
        return stack.enter_context(socket.socket(*arguments))

    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        listener = made(family, socket.SOCK_STREAM)
        yield f"new {family.name}", listener.fileno()
        listener.bind((address, 0))
        yield f"bound {family.name}", listener.fileno()
        listener.listen()
        yield f"listening {family.name}", listener.fileno()
        udp = made(family, socket.SOCK_DGRAM)
        yield f"UDP {family.name}", udp.fileno()
        udp.connect(listener.getsockname())
        yield f"connected UDP {family.name}", udp.fileno()
        reset, server = connection(family)
        stack.enter_context(reset)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.close()
        with suppress(ConnectionResetError):
            reset.recv(1)
        yield f"reset {family.name}", reset.fileno()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        yield f"Unix {kind.name}", stack.enter_context(socket.socketpair(socket.AF_UNIX, kind)[0]).fileno()
    for what, arguments in {
        "raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
        "raw IPv6": (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0),
        "netlink": (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM, 0),
    }.items():
        with suppress(OSError):
            yield what, made(*arguments).fileno()
    with suppress(OSError):
        client, server = connection(protocol=socket.IPPROTO_MPTCP)
        stack.enter_context(server)
        yield "MPTCP", stack.enter_context(client).fileno()
        yield "MPTCP, accepted", server.fileno()
    pipe = os.pipe()
    for end in pipe:
        stack.callback(os.close, end)
    yield "no socket", pipe[0]
    yield "nothing", -1
    closed = os.dup(0)
    os.close(closed)
    yield "closed", closed


def refused() -> dict[str, int]:
    """What is no tag, or has no connection to tag."""
    buffer = ctypes.create_string_buffer(REFUSED * (1 << 16))
    with ExitStack() as stack:
        answers = {what: give(descriptor, REFUSED) for what, descriptor in _sockets(stack)}
        for end in connection():
            number = stack.enter_context(end).fileno()
            sizes = [*(size for size in range(65) if size != 24), 72, PAGE - 1, PAGE, PAGE + 1, 1 << 16, 1 << 20]
            for size in [*sizes, (1 << 31) - 1, -1, -24, -(1 << 31)]:
                answers[f"{size} bytes"] = give(number, buffer, size)
            for what, value in BLANKS.items():
                answers[what] = give(number, value)
            for name in (0, 3, 24, -1, (1 << 31) - 1, -(1 << 31)):
                answers[f"name {name}"] = give(number, REFUSED, name=name)
            for level in (LEVEL - 1, LEVEL + 1, 0x6C65746F, 0x6F74656D):
                answers[f"level {level:#x}"] = give(number, REFUSED, level=level)
    return answers


def misplaced() -> dict[str, int]:
    """Values that lie where the process has no memory, all or in part."""
    memory = mmap.mmap(-1, 2 * PAGE)
    memory[PAGE - 23 : PAGE] = REFUSED[:23]
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    LIBC.mprotect(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(PAGE), PROT_NONE)
    client, server = connection()
    with client, server:
        return {
            what: give(client.fileno(), address)
            for what, address in {
                "null": None,
                "first page": 1,
                "hidden": start + PAGE,
                "one byte hidden": start + PAGE - 23,
                "kernel": 0xFFFF888000000000,
                "not canonical": 1 << 63,
                "last byte": (1 << 64) - 1,
            }.items()
        }


def take(process: str, descriptor: str) -> dict[str, int]:
    """Ask for another process's socket."""
    pidfd = LIBC.syscall(PIDFD_OPEN, int(process), 0)
    taken = LIBC.syscall(PIDFD_GETFD, pidfd, int(descriptor), 0)
    answers = {"pidfd_getfd": ctypes.get_errno() if taken < 0 else 0}
    try:
        os.close(os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR))
        answers["open"] = 0
    except OSError as error:
        answers["open"] = error.errno or 0
    return answers


def flood(count: str) -> dict[str, Any]:
    """So many tags in turn on a connection where nothing else happens; then a byte, and one tag more."""
    client, server = connection()
    with client, server:
        number, values = client.fileno(), (TAKEN, OTHER, CLEAR)
        answers = [give(number, values[i % 3], name=1 + i % 2) for i in range(int(count))]
        client.sendall(b"x")
        server.recv(1)
        return {"taken": answers.count(0), "answers": sorted(set(answers)), "after": give(number, TAKEN),
                "port": client.getsockname()[1]}  # fmt: skip


def flood_many(port: str, count: str) -> dict[str, int]:
    """So many connections, all tagged in turn as often as will be taken, until standard input ends."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", int(port)), backlog=128))
        pairs = []
        for _ in range(int(count)):
            client = stack.enter_context(socket.socket())
            client.connect(listener.getsockname())
            pairs.append((client, stack.enter_context(listener.accept()[0])))
        sys.stdout.write("flooding\n")
        sys.stdout.flush()
        taken = calls = sent = 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            for client, server in pairs:
                for turn in range(2 * IDLE_TAGS):
                    taken += not give(client.fileno(), (TAKEN, OTHER)[turn % 2], name=1 + turn % 2)
                    calls += 1
                client.sendall(b"x")
                sent += len(server.recv(1))
        return {"taken": taken, "calls": calls, "sent": sent}


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program for program in (own, refused, misplaced, take, flood, flood_many)
}

if __name__ == "__main__":
    _, name, *arguments = sys.argv
    if name == "root":
        name, *arguments = arguments
    else:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.stdout.write(json.dumps(PROGRAMS[name](*arguments)))
