"""What correlation costs the probe, for packets that open no request: the kernel's own count of its programs' time.

Rounds with and without it alternate, over the same ping-pong in a network namespace of its own. Needs root.
"""

import re
import statistics
import subprocess
import sys
import uuid
from pathlib import Path

from tcpio_otel.capture.control import ContextSources, Filters
from tcpio_otel.capture.probe import Probe

STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
PROGRAMS = ("tcpio_ingress", "tcpio_egress")
ROUND_TRIPS = 20_000
MODES = {
    "off": ContextSources(),
    "on": ContextSources(socket_tags=True, http_headers=True),
}
TALK = f"""
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
def echo():
    end, _ = listener.accept()
    with end:
        while data := end.recv(64):
            end.sendall(data)
threading.Thread(target=echo).start()
with socket.create_connection(listener.getsockname()) as end:
    for _ in range({ROUND_TRIPS}):
        end.sendall(b"p" * 64)
        end.recv(64)
"""


def _time(probe: Probe) -> tuple[int, int]:
    """Nanoseconds and runs of the packet programs so far."""
    total, runs = 0, 0
    for program in PROGRAMS:
        text = Path(f"/proc/self/fdinfo/{probe.program_fd(program)}").read_text()
        total += int(re.findall(r"run_time_ns:\s*(\d+)", text)[0])
        runs += int(re.findall(r"run_cnt:\s*(\d+)", text)[0])
    return total, runs


def _round(namespace: str, sources: ContextSources) -> float:
    """Nanoseconds a packet, over one ping-pong whose every packet carries data, but for the handshake."""
    with Probe(filters=Filters(), memory_bytes=64 << 20, contexts=sources) as probe:
        before = _time(probe)
        subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", TALK], check=True)
        after = _time(probe)
    return (after[0] - before[0]) / (after[1] - before[1])


def measure(rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a packet by mode, one figure a round."""
    name = f"tcpio-bench-{uuid.uuid4().hex[:8]}"
    figures: dict[str, list[float]] = {mode: [] for mode in MODES}
    enabled = STATISTICS.read_text()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        STATISTICS.write_text("1")
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        for turn in range(rounds + 1):
            for mode, sources in MODES.items():
                figure = _round(name, sources)
                if turn:  # the first warms up
                    figures[mode].append(figure)
    finally:
        STATISTICS.write_text(enabled)
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return figures


def report(figures: dict[str, list[float]]) -> str:
    """The figures in words."""
    differences = [on - off for on, off in zip(figures["on"], figures["off"], strict=True)]
    medians = {mode: statistics.median(times) for mode, times in figures.items()}
    return (
        f"probe, ns a packet that opens no request: {medians['off']:.0f} without correlation, {medians['on']:.0f} "
        "with; "
        f"pair by pair {statistics.median(differences):+.0f} ({min(differences):+.0f} to {max(differences):+.0f})"
    )
