"""What runs in a pod: a server and a client of a simple HTTP, told what to do by lines of JSON.

talker.py CGROUP. A line is the name of a function and its arguments; the answer is what it returns.
"""

import json
import os
import socket
import struct
import sys
import threading

held: list[socket.socket] = []
kept: list[socket.socket] = []
"""Open, and silent."""


def serve(address: str, port: int) -> None:
    """Answer /N with N bytes, and close; abort what asks for /abort; keep open what asks for /hold."""
    listener = socket.create_server((address, port))

    def accept() -> None:
        while True:
            threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def answer(connection: socket.socket) -> None:
    """One request."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(4096)
    path = request.split()[1][1:].decode()
    if path == "hold":
        held.append(connection)
        return
    if path == "abort":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(int(path)))
    connection.close()


def ask(source: str, address: str, port: int, path: str, traceparent: str = "") -> dict[str, int]:
    """One request on a connection of its own; the port it came from, and the bytes each way."""
    client = socket.socket()
    client.bind((source, 0))
    client.connect((address, port))
    header = f"traceparent: {traceparent}\r\n" if traceparent else ""
    request = f"GET /{path} HTTP/1.1\r\nHost: {address}\r\n{header}\r\n".encode()
    client.sendall(request)
    told = {"port": client.getsockname()[1], "sent": len(request), "received": 0}
    if path == "hold":
        held.append(client)
        return told
    try:
        while part := client.recv(1 << 16):
            told["received"] += len(part)
    except ConnectionResetError:
        pass  # which is what /abort is for
    client.close()
    return told


def say() -> int:
    """A byte on what is held."""
    return sum(client.send(b"x") for client in held)


def ignore(address: str, port: int) -> None:
    """Listen, with room for one connection, and never accept it."""
    kept.append(socket.create_server((address, port), backlog=0))


def queue(source: str, address: str, port: int) -> bool:
    """Connect, for as long as a SYN and the one after it take; whether that came to anything."""
    client = socket.socket()
    client.bind((source, 0))
    client.settimeout(1.5)
    try:
        client.connect((address, port))
    except TimeoutError:
        client.close()
        return False
    kept.append(client)
    return True


def refused(source: str, address: str, port: int) -> int:
    """Connect where nobody listens; the error."""
    with socket.socket() as client:
        client.bind((source, 0))
        return client.connect_ex((address, port))


def tell(answer: object) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with open(f"{sys.argv[1]}/cgroup.procs", "w") as processes:
        processes.write(str(os.getpid()))
    tell("ready")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        tell(globals()[name](*arguments))
