"""What a refresh of `tcpio-otel top` costs, by part: CPU time of the process, the median of a few.

python -m tests.bench.top                   50,000 connections that are made up
python -m tests.bench.top --sockets 4500    as root: a look at so many real ones, two sockets each, on loopback
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from tcpio_otel import listing
from tcpio_otel.batch import RECORD, Batch, Flag, Kind, State
from tcpio_otel.board import Board, Choice, Sort
from tcpio_otel.capture.control import Filters
from tcpio_otel.capture.probe import Probe
from tcpio_otel.connections.rates import Rates
from tcpio_otel.connections.table import ConnectionTable

CONNECTIONS, PROGRAMS, ROUNDS, ROWS, WIDTH = 50_000, 50, 7, 60, 200
SECOND = 1_000_000_000


def measure(name: str, work: Callable[[], object]) -> None:
    """Print the median of a few rounds, and the first."""
    taken: list[float] = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    print(f"{name:32} {statistics.median(taken) * 1e3:8.1f} ms, at first {taken[0] * 1e3:.1f} ms")


def records(kind: Kind, time_ns: int, count: int = CONNECTIONS) -> np.ndarray:
    """A record for each of so many clients of one server."""
    made, numbers = np.zeros(count, RECORD), np.arange(count)
    made["kind"], made["time_ns"], made["netns"] = kind, time_ns, 1
    made["pid"] = 1000 + numbers % PROGRAMS
    made["process_name"] = np.array([f"program{number}" for number in range(PROGRAMS)], "S16")[numbers % PROGRAMS]
    local, peer = np.zeros((2, count, 16), np.uint8)
    local[:, 10:12] = peer[:, 10:12] = 255
    local[:, 12:] = 10, 0, 0, 1
    peer[:, 12:] = np.stack([np.full(count, 10), 1 + (numbers >> 16), numbers >> 8 & 255, numbers & 255], axis=1)
    made["local_address"], made["peer_address"] = local.view("V16")[:, 0], peer.view("V16")[:, 0]
    made["local_port"], made["peer_port"] = 443, 50_000
    if kind is Kind.SOCKET:
        made["old_state"] = made["new_state"] = State.ESTABLISHED
        made["rtt_smoothed_us"] = 100 + numbers
    else:
        made["direction"], made["flags"], made["window"] = 1, Flag.ACK, 100
        made["seq"], made["payload_bytes"] = time_ns // SECOND * 2000, 1 + numbers % 1400
    return made


def refresh() -> None:
    """Every part of a refresh."""
    table = ConnectionTable(
        limit=131_072, linger_ns=2 * SECOND, handshake_timeout_ns=130 * SECOND, summary_interval_ns=0,
        kernel_totals=True, older_told=True, reset_reasons={},
    )  # fmt: skip
    rates = Rates(table)
    board = Board(table, rates, None, None)
    for second, kind in enumerate((Kind.SOCKET, Kind.PACKET, Kind.PACKET), 1):
        batch = Batch(records(kind, second * SECOND), 0, 0, second * SECOND)
        slots, ended = table.update(batch)
        board.take(batch, slots, ended)
    sockets = records(Kind.SOCKET, 4 * SECOND)
    print(f"{CONNECTIONS} connections")
    measure("a look, taken in", lambda: rates.look(sockets))
    measure("rates and totals", lambda: board.refresh(5 * SECOND))

    def rows(**choice: object) -> Callable[[], object]:
        chosen = Choice(**choice)  # type: ignore[arg-type]
        return lambda: listing.lines(listing.CONNECTIONS, board.connections(chosen, 0, ROWS), chosen, WIDTH)

    measure(f"{ROWS} rows", rows())
    measure(f"{ROWS} rows, by state", rows(sort=Sort.STATE))
    measure(f"{ROWS} rows, filtered", rows(text="10.1.7."))
    measure("workloads", lambda: listing.lines(listing.WORKLOADS, board.groups(Choice()), Choice(), WIDTH))


def look(connections: int) -> None:
    """What the kernel takes to tell of real sockets."""
    ours, theirs = socket.socketpair()
    if not os.fork():  # the agent's own sockets are not told of
        ours.close()
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            for _ in range(connections):
                stack.enter_context(socket.create_connection(server.getsockname()))
                stack.enter_context(server.accept()[0])
            theirs.sendall(b"1")
            theirs.recv(1)
        os._exit(0)
    theirs.close()
    ours.recv(1)
    with Probe(filters=Filters(), memory_bytes=1 << 22) as probe:
        print(f"{len(probe.look()) // RECORD.itemsize} sockets")
        measure("a look", probe.look)
    ours.close()
    os.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", type=int, metavar="CONNECTIONS", help="look at real sockets instead")
    given = parser.parse_args()
    look(given.sockets) if given.sockets else refresh()
