"""Round trips at a steady rate between pods' addresses, both ends in one process, which enters a pod's cgroup.

    python -m tests.bench.scale.conversation CGROUP RATE ROUND_TRIPS ROUND_TRIPS_A_CONNECTION PODS

Any connection may be the next to ask; the sizes of requests and answers are a service's: most small, a few large.
Seeded, so that runs repeat. Prints as JSON how long it took.
"""

import json
import os
import random
import socket
import sys
import time
from pathlib import Path

from tests.bench.scale.objects import PORT, address

OPEN = 50
"""Connections at once."""
TICK_S = 0.02
LARGEST = 60_000


def _read(end: socket.socket, count: int) -> None:
    while count:
        count -= len(end.recv(count))


class Connection:
    """Between two pods, both ends of it."""

    def __init__(self, listener: socket.socket, number: int, pods: int) -> None:
        self._client = socket.socket()
        self._client.bind((address(number * 7 % pods), 0))
        self._client.connect((address((number * 13 + 5) % pods), PORT))
        self._server, _ = listener.accept()
        self.asked = 0

    def ask(self, request: int, answer: int) -> None:
        """One round trip of so many bytes."""
        for sender, receiver, count in ((self._client, self._server, request), (self._server, self._client, answer)):
            sender.sendall(bytes(count))
            _read(receiver, count)
        self.asked += 1

    def close(self) -> None:
        """The client closes first."""
        self._client.close()
        self._server.close()


def main(cgroup: str, rate: int, round_trips: int, of_connection: int, pods: int) -> float:
    """Do so many round trips; how long that took, in seconds."""
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    listener = socket.create_server(("0.0.0.0", PORT), backlog=OPEN)
    chance, made = random.Random(1), OPEN
    connections = [Connection(listener, number, pods) for number in range(OPEN)]
    started = time.monotonic()
    for done in range(round_trips):
        at = chance.randrange(OPEN)
        if connections[at].asked == of_connection:
            connections[at].close()
            connections[at] = Connection(listener, made, pods)
            made += 1
        request, answer = (min(int(chance.lognormvariate(mean, 1)), LARGEST) for mean in (6, 7.5))
        connections[at].ask(1 + request, 1 + answer)
        ahead_s = started + done / rate - time.monotonic()
        if ahead_s > TICK_S:
            time.sleep(ahead_s)
    took_s = time.monotonic() - started
    for connection in connections:
        connection.close()
    return took_s


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
