"""`python -m tests.kernel.marked FILE`: records of segments that no full socket sent or received, until SIGINT.

A process of its own: a probe takes the connections of its own process for the agent's.
"""

import signal
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import RECORD, Direction, Mark
from tcpio_otel.capture.control import IPV4_MAPPED, Filters
from tcpio_otel.capture.live import LiveSource
from tcpio_otel.capture.loaders import Loader
from tcpio_otel.capture.probe import Probe
from tcpio_otel.ledger import Ledger
from tests.kernel import hosts

_MAPPED = np.frombuffer(IPV4_MAPPED, np.uint8)
_SYN_ACK = 18


def read(path: Path) -> NDArray[np.void]:
    """What was written (dtype RECORD)."""
    return np.frombuffer(path.read_bytes(), RECORD)


def _without_socket(packets: NDArray[np.void]) -> NDArray[np.bool_]:
    without: NDArray[np.bool_] = (packets["marks"] & Mark.NO_SOCKET) > 0
    if hosts.KERNEL < (6, 11):  # cgroup_skb does not show IPv6 SYN-ACKs of request sockets
        syn_ack = ((packets["flags"] & _SYN_ACK) == _SYN_ACK) & (packets["direction"] == Direction.TRANSMIT)
        addresses = np.ascontiguousarray(packets["header_local_address"]).view(np.uint8).reshape(-1, 16)
        without |= syn_ack & (addresses[:, :12] != _MAPPED).any(axis=1)
    return without


def main() -> None:
    """Record until told to stop."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    with (
        open(sys.argv[1], "wb") as file,
        Probe(filters=Filters(), memory_bytes=16 << 20, loader=Loader.LIBBPF) as probe,
        LiveSource(probe, Ledger(), latency_s=0.1, queue_bytes=64 << 20, idle_s=0.25) as source,
    ):
        sys.stdout.write("capturing\n")
        sys.stdout.flush()
        for part in (iter(source), source.finish()):
            for batch in part:
                packets = batch.records[batch.is_packet]
                file.write(packets[_without_socket(packets)].tobytes())
                if stop.is_set():
                    break


if __name__ == "__main__":
    main()
