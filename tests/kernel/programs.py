"""Small programs that make TCP traffic and print, as JSON, what they themselves counted."""

import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

TCPI_RTT = 68  # where it is in struct tcp_info (include/uapi/linux/tcp.h)


def exchange(family: str, count: str, request: str, response: str) -> dict[str, int]:
    """So many connections, one after the other: a request, a response, closed by the server."""
    address = "127.0.0.1" if family == "4" else "::1"
    kind = socket.AF_INET if family == "4" else socket.AF_INET6
    server = socket.create_server((address, 0), family=kind, backlog=64)
    asked, answered = b"q" * int(request), b"r" * int(response)
    totals = {"connections": int(count), "server_received": 0, "client_received": 0, "port": server.getsockname()[1]}

    def serve() -> None:
        for _ in range(int(count)):
            connection, _ = server.accept()
            left = len(asked)
            while left:
                left -= len(connection.recv(left))
            totals["server_received"] += len(asked)
            connection.sendall(answered)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(int(count)):
        client = socket.socket(kind)
        client.connect(server.getsockname()[:2])
        client.sendall(asked)
        while part := client.recv(1 << 16):
            totals["client_received"] += len(part)
        client.close()
    thread.join()
    return totals


def refused(family: str) -> dict[str, int]:
    """A connection to a port where nobody listens."""
    address, kind = ("127.0.0.1", socket.AF_INET) if family == "4" else ("::1", socket.AF_INET6)
    with socket.socket(kind) as client:
        return {"errno": client.connect_ex((address, 9))}


def reset() -> dict[str, int]:
    """A connection that its client aborts (SO_LINGER 0)."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    client.sendall(b"abc")
    accepted.recv(3)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    try:
        accepted.recv(1)
    except ConnectionResetError:
        return {"reset": 1, "port": server.getsockname()[1]}
    return {"reset": 0}


def half_close() -> dict[str, int]:
    """The client closes its side first and goes on receiving."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    client.sendall(b"x" * 1000)
    client.shutdown(socket.SHUT_WR)
    while accepted.recv(4096):
        pass
    accepted.sendall(b"y" * 3000)
    accepted.close()
    received = 0
    while part := client.recv(4096):
        received += len(part)
    client.close()
    return {"client_received": received}


def mapped() -> dict[str, int]:
    """An IPv6 socket that is reached over IPv4."""
    server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    client = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
    accepted, _ = server.accept()
    client.sendall(b"hello")
    accepted.recv(5)
    client.close()
    accepted.close()
    return {"port": server.getsockname()[1]}


def hold() -> dict[str, int]:
    """Keep a connection open until standard input ends; says when it is open."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    client.sendall(b"x" * 1234)
    received = 0
    while received < 1234:
        received += len(accepted.recv(4096))
    print("open", flush=True)
    sys.stdin.read()
    return {"received": received}


def draw(count: str, size: str) -> dict[str, int]:
    """So many connections stay open; for each line of input each carries `size` bytes to its client, in small segments.

    Prints the server's port, then, after each line, how much all have carried by then, and the sum of the round-trip
    times of the servers' sockets, in microseconds.
    """
    server = socket.create_server(("127.0.0.1", 0))
    pairs = [(socket.create_connection(server.getsockname()), server.accept()[0]) for _ in range(int(count))]
    print(server.getsockname()[1], flush=True)
    moved = 0

    def send(end: socket.socket) -> None:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, int(size), 1000):
            end.sendall(bytes(min(1000, int(size) - start)))

    for _ in sys.stdin:
        for client, accepted in pairs:
            sender = threading.Thread(target=send, args=(accepted,))
            sender.start()
            _read(client, int(size))
            sender.join()
            moved += int(size)
        time.sleep(0.2)  # until the last acknowledgement has come
        round_trips = sum(
            struct.unpack_from("=I", accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), TCPI_RTT)[0]
            for _, accepted in pairs
        )
        print(json.dumps([moved, round_trips]), flush=True)
    return {"moved": moved}


def dial(address: str, port: str) -> dict[str, int]:
    """Connect to an address, say hello, and wait to be killed."""
    with socket.create_connection((address, int(port))) as client:
        client.sendall(b"hello")
        sys.stdin.read()
    return {}


def hold_many(count: str) -> dict[str, int]:
    """So many connections between two processes, each with other amounts; half are closed on a line of input.

    The connection with number n carries 100 + n bytes up and 5000 + n down. Prints a line when all have.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 14, 1 << 14))
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    parent, child = socket.socketpair()
    if not (server_pid := os.fork()):
        parent.close()
        accepted = []
        for number in range(int(count)):
            end, _ = server.accept()
            _read(end, 100 + number)
            end.sendall(b"d" * (5000 + number))
            accepted.append(end)
        child.sendall(b"1")
        child.recv(1)
        for end in accepted[::2]:
            _read(end, 1)
            end.close()
        child.sendall(b"2")
        child.recv(1)
        os._exit(0)
    child.close()
    ends = []
    for number in range(int(count)):
        end = socket.create_connection(server.getsockname())
        end.sendall(b"u" * (100 + number))
        _read(end, 5000 + number)
        ends.append(end)
    parent.recv(1)
    ports = {end.getsockname()[1]: number for number, end in enumerate(ends)}
    print(json.dumps({"server": server_pid, "port": server.getsockname()[1], "ports": ports}), flush=True)
    sys.stdin.readline()
    for end in ends[::2]:
        end.close()
    parent.sendall(b"1")
    parent.recv(1)
    print("closed", flush=True)
    sys.stdin.read()
    return {}


def _read(end: socket.socket, count: int) -> None:
    """Read so many bytes, or to the end."""
    while count and (part := end.recv(count)):
        count -= len(part)


def chat(seconds: str) -> dict[str, int]:
    """One connection over which a hundred bytes go back and forth, ten times a second."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    rounds = int(10 * float(seconds))
    for _ in range(rounds):
        for one, other in ((client, accepted), (accepted, client)):
            one.sendall(b"x" * 100)
            left = 100
            while left:
                left -= len(other.recv(left))
        time.sleep(0.1)
    client.close()
    accepted.close()
    return {"port": server.getsockname()[1], "sent": 100 * rounds}


def sink(address: str, port: str) -> dict[str, int]:
    """Take whatever comes over any number of connections, until standard input ends; says when it listens."""
    server, received = socket.create_server((address, int(port))), [0]

    def take(connection: socket.socket) -> None:
        while part := connection.recv(1 << 16):
            received[0] += len(part)

    def serve() -> None:
        while True:
            threading.Thread(target=take, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    print("open", flush=True)
    sys.stdin.read()
    return {"received": received[0]}


def pour(address: str, port: str, bytes_s: str) -> dict[str, float]:
    """Send so many bytes a second over one connection, until standard input ends."""
    portion, started = int(bytes_s) // 50, time.monotonic()
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    sent = 0
    with socket.create_connection((address, int(port))) as client:
        while not over.is_set():
            client.sendall(b"x" * portion)
            sent += portion
            time.sleep(max(0.0, started + sent / int(bytes_s) - time.monotonic()))
    return {"sent": sent, "seconds": time.monotonic() - started}


def resetter(address: str, port: str) -> dict[str, int]:
    """Read a little from each connection, then abort it, until standard input ends; says when it listens."""
    server, resets = socket.create_server((address, int(port))), [0]

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            resets[0] += 1

    threading.Thread(target=serve, daemon=True).start()
    print("open", flush=True)
    sys.stdin.read()
    return {"resets": resets[0]}


def ask(address: str, port: str, bytes_sent: str = "100") -> dict[str, int]:
    """Connect, send a little, read to the end; tells the errno that ended it, 0 for none."""
    with socket.socket() as client:
        try:
            client.connect((address, int(port)))
            client.sendall(b"q" * int(bytes_sent))
            while client.recv(1 << 16):
                pass
        except OSError as error:
            return {"errno": error.errno or 0}
    return {"errno": 0}


PROGRAMS: dict[str, Callable[..., dict[str, int]]] = {
    program.__name__: program
    for program in (
        exchange,
        refused,
        reset,
        half_close,
        mapped,
        hold,
        draw,
        dial,
        hold_many,
        chat,
        sink,
        pour,
        resetter,
        ask,
    )
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
