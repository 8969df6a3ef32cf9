"""What correlation costs the probe, for packets that open no request: the kernel's own count of its programs' time.

One probe and one conversation; the switch is turned on and off while they run, so that nothing else differs between a
round with it and one without. Packets are small, both ways in turn, and each carries data: a protocol that the probe
does not know, and HTTP, within a request's long body. In a network namespace of its own. Needs root.
"""

import ctypes
import mmap
import re
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcpio_otel.capture.control import ContextSources, Control, Filters
from tcpio_otel.capture.probe import Probe
from tcpio_otel.capture.ring import Ring

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
PROGRAMS = ("tcpio_ingress", "tcpio_egress")
ROUND_TRIPS = 2000
SWITCH = Control.http_headers.offset
BEGINNINGS = {
    "of an unknown protocol": "hello",
    "of HTTP": "POST / HTTP/1.1\\r\\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\\r\\n"
    "Content-Length: 500000000\\r\\n\\r\\n",
}
TALK = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(listener.getsockname())
far, _ = listener.accept()
near.sendall(b"BEGINNING")
far.recv(4096)
for line in sys.stdin:
    for _ in range(int(line)):
        near.sendall(b"p" * 64)
        far.recv(64)
        far.sendall(b"q" * 64)
        near.recv(64)
    print(flush=True)
"""


def _time(probe: Probe) -> tuple[int, int]:
    """Nanoseconds and runs of the packet programs so far."""
    total, runs = 0, 0
    for program in PROGRAMS:
        text = Path(f"/proc/self/fdinfo/{probe.program_fd(program)}").read_text()
        total += int(re.findall(r"run_time_ns:\s*(\d+)", text)[0])
        runs += int(re.findall(r"run_cnt:\s*(\d+)", text)[0])
    return total, runs


@contextmanager
def _namespace() -> Iterator[str]:
    """A network namespace, in which the kernel counts the time of programs."""
    name = f"tcpio-bench-{uuid.uuid4().hex[:8]}"
    enabled = STATISTICS.read_text()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        STATISTICS.write_text("1")
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        STATISTICS.write_text(enabled)
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _conversation(namespace: str, beginning: str, rounds: int) -> list[tuple[float, float]]:
    """Nanoseconds a packet without correlation and with it, for each round."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", TALK.replace("BEGINNING", beginning)]
    sources = ContextSources(socket_tags=True, http_headers=True)
    figures = []
    with (
        Probe(filters=Filters(), memory_bytes=64 << 20, contexts=sources) as probe,
        mmap.mmap(probe.map_fd("control"), ctypes.sizeof(Control)) as control,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as talk,
    ):
        assert talk.stdin is not None
        assert talk.stdout is not None
        rings = [Ring(fd, probe.ring_bytes) for fd in probe.rings]
        for turn in range(rounds + 1):
            measured = {}
            for on in (0, 1) if turn % 2 else (1, 0):
                control[SWITCH : SWITCH + 4] = on.to_bytes(4, "little")
                before = _time(probe)
                talk.stdin.write(f"{ROUND_TRIPS}\n")
                talk.stdin.flush()
                assert talk.stdout.readline()
                after = _time(probe)
                measured[on] = (after[0] - before[0]) / (after[1] - before[1])
                for ring in rings:
                    while len(ring.take()[0]):
                        pass
            if turn:  # the first warms up
                figures.append((measured[0], measured[1]))
        assert not probe.tally().lost
        talk.stdin.close()
    return figures


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Nanoseconds a packet without correlation and with it, for each round, by what the conversation is."""
    with _namespace() as namespace:
        return {name: _conversation(namespace, beginning, rounds) for name, beginning in BEGINNINGS.items()}


def middle(figures: list[float]) -> str:
    """The median, and between what the middle half of the figures lies."""
    low, median, high = statistics.quantiles(figures, n=4)
    return f"{median:+.0f} (middle half {low:+.0f} to {high:+.0f})"


def report(figures: dict[str, list[tuple[float, float]]]) -> str:
    """The figures in words."""
    lines = []
    for name, pairs in figures.items():
        more = [on - off for off, on in pairs]
        off, on = (statistics.median(times) for times in zip(*pairs, strict=True))
        lines.append(
            f"probe, ns a packet {name} that opens no request: {off:.0f} without correlation, {on:.0f} with; round by "
            f"round {middle(more)}"
        )
    return "\n".join(lines)
