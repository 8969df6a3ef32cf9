"""What the agent takes on a node: real traffic between pods that a real API server knows, sent to a real Collector."""

import gzip
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from isal import igzip
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tcpio_otel.capture.probe import cgroup_root
from tcpio_otel.export.http import GZIP_LEVEL
from tests.bench.scale import objects, server
from tests.bench.scale.usage import cpu_s, settle
from tests.integration.collector import Collector, free_port
from tests.kernel.cgroups import NAMES, Tree
from tests.kernel.harness import Agent, Namespace, agent, new_namespace, resident_bytes, wait_for
from tests.peers.kubernetes import ControlPlane, control_plane

SIGNALS = ("logs", "traces", "metrics")
COUNTS = server.Counts(pods=300, nodes=10, slices=3, services=3, watches=0, changes=0, rounds=0)
ROUND_TRIPS = 500
"""On one connection, where many packets go over one; where few do it is SHORT."""
SHORT = 2

DEFAULT, SPANS, BARE = "all, peers by services and endpointslices", "spans and metrics", "all, peers not named"
BY_PODS, METRICS, FILTERED, UNTOLD = "all, peers by pods", "metrics alone", "all filtered", "spans alone"
MODES: dict[str, dict[str, str]] = {
    DEFAULT: {},
    BARE: {"TCPIO_KUBERNETES_PEERS": ""},
    BY_PODS: {"TCPIO_KUBERNETES_PEERS": "pods"},
    SPANS: {"TCPIO_SIGNALS_LOGS": "none"},
    UNTOLD: {"TCPIO_SIGNALS_LOGS": "none", "TCPIO_METRICS_TRAFFIC": "false"},
    METRICS: {"TCPIO_SIGNALS_LOGS": "none", "TCPIO_SIGNALS_TRACES": "none"},
    FILTERED: {"TCPIO_CAPTURE_PORTS": "9"},
}
"""By what is turned down, and how; the first is the chart's default."""


@dataclass
class Requests:
    """What the agent sent of a signal, request by request, as protobuf."""

    bodies: list[bytes]
    items: int

    def sizes(self) -> dict[str, float]:
        """Bytes an item: as they are, as the agent compresses them, and as a Collector may."""
        packers = {
            "protobuf": lambda body: body,
            "gzip by the agent": lambda body: igzip.compress(body, GZIP_LEVEL),
            "gzip": lambda body: gzip.compress(body, 6),
            "zstd": zstandard.ZstdCompressor(3).compress,
        }
        return {
            name: sum(len(pack(body)) for body in self.bodies) / max(self.items, 1) for name, pack in packers.items()
        }


def _log_records(body: bytes) -> int:
    found = ExportLogsServiceRequest.FromString(body)
    return sum(len(scope.log_records) for each in found.resource_logs for scope in each.scope_logs)


def _spans(body: bytes) -> int:
    found = ExportTraceServiceRequest.FromString(body)
    return sum(len(scope.spans) for each in found.resource_spans for scope in each.scope_spans)


def _metrics(body: bytes) -> int:
    found = ExportMetricsServiceRequest.FromString(body)
    return sum(len(scope.metrics) for each in found.resource_metrics for scope in each.scope_metrics)


_COUNT = {"logs": _log_records, "traces": _spans, "metrics": _metrics}


def _requests(file: Path, signal: str) -> Requests:
    """What the Collector's file exporter wrote: each request behind its length, in four bytes."""
    data, bodies, at = file.read_bytes() if file.exists() else b"", [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        bodies.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return Requests(bodies, sum(map(_COUNT[signal], bodies)))


@contextmanager
def keeping(directory: Path) -> Iterator[Collector]:
    """A Collector that keeps each request as it came."""
    made = Collector(free_port(), free_port(), directory, None)
    protocols = {
        "http": {"endpoint": f"127.0.0.1:{made.http_port}"},
        "grpc": {"endpoint": f"127.0.0.1:{made.grpc_port}"},
    }
    made.configuration = {
        "receivers": {"otlp": {"protocols": protocols}},
        "exporters": {f"file/{each}": {"path": str(directory / each), "format": "proto"} for each in SIGNALS},
        "service": {
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
            "pipelines": {each: {"receivers": ["otlp"], "exporters": [f"file/{each}"]} for each in SIGNALS},
        },
    }
    made.start()
    try:
        yield made
    finally:
        made.stop()


@dataclass
class Run:
    """What came of one run of the agent."""

    recorded: int
    """Packets whose log records were to be exported; each end of a connection has its own."""
    took_s: float
    idle_cores: float
    spent_s: float
    """CPU time beyond what it takes idle."""
    resident_bytes: int
    requests: dict[str, Requests] = field(default_factory=dict)


class Node:
    """Pods in a network namespace and a cgroup of their own, and the API server that knows them."""

    def __init__(self, cluster: ControlPlane, namespace: Namespace, cgroup: Path, directory: Path) -> None:
        self._namespace, self._cgroup, self._directory = namespace, cgroup, directory
        self._kubeconfig = cluster.kubeconfig(directory / "kubeconfig")
        self._runs = 0

    def run(self, mode: Mapping[str, str], rate: int, seconds: float, of_connection: int = ROUND_TRIPS) -> Run:
        """Have the agent record traffic of so many round trips a second."""
        self._runs += 1
        directory = self._directory / f"run-{self._runs}"
        directory.mkdir()
        with keeping(directory) as receiver:
            settings = {
                "TCPIO_EXPORT_ENDPOINT": f"http://127.0.0.1:{receiver.http_port}",
                "TCPIO_CAPTURE_NETWORK_NAMESPACE": f"/run/netns/{self._namespace.name}",
                "TCPIO_CORRELATION_PUBLISHED_CONTEXTS": "false",  # as in the chart
                "TCPIO_KUBERNETES_ENABLED": "true",
                "TCPIO_KUBERNETES_NODE_NAME": "node-0",
                "TCPIO_KUBERNETES_KUBECONFIG": str(self._kubeconfig),
                "TCPIO_KUBERNETES_PEERS": "services,endpointslices",  # as in the chart
                **mode,
            }
            with agent(directory / "agent", "run", **settings) as running:
                told = len([each for each in settings["TCPIO_KUBERNETES_PEERS"].split(",") if each])
                wait_for(lambda: running.stderr().count("watching the ") > told, "the watches")
                found = self._record(running, rate, seconds, of_connection)
                assert running.stop() == 0
            ledger = running.ledger()
            found.recorded = ledger["seen"] - ledger["filtered"]  # packets of other namespaces are filtered
        found.requests = {signal: _requests(directory / signal, signal) for signal in SIGNALS}
        for signal in SIGNALS:
            (directory / signal).unlink(missing_ok=True)
        return found

    def _record(self, running: Agent, rate: int, seconds: float, of_connection: int) -> Run:
        settle(running.pid)
        before, at = cpu_s(running.pid), time.monotonic()
        time.sleep(seconds / 2)
        idle_cores = (cpu_s(running.pid) - before) / (time.monotonic() - at)
        before, at = cpu_s(running.pid), time.monotonic()
        round_trips = round(rate * seconds)
        command = [
            sys.executable,
            "-m",
            "tests.bench.scale.conversation",
            self._cgroup,
            rate,
            round_trips,
            of_connection,
        ]
        talk = subprocess.run(
            # Not by `ip netns exec`, which mounts another /sys, and with it hides the cgroups.
            ["nsenter", f"--net=/run/netns/{self._namespace.name}", *map(str, command), str(COUNTS.pods)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        time.sleep(3)  # the last segments of connections, and the last batch
        settle(running.pid)
        idle_s = (time.monotonic() - at) * idle_cores
        spent = cpu_s(running.pid) - before - idle_s
        return Run(0, float(json.loads(talk.stdout)), idle_cores, spent, resident_bytes(running.pid))


@contextmanager
def node(directory: Path) -> Iterator[Node]:
    """Set it up. Needs root.

    Raises:
        LookupError: no API server can be built here.
    """
    with ExitStack() as stack:
        (directory / "cluster").mkdir()
        cluster = stack.enter_context(control_plane(directory / "cluster"))
        server.fill(cluster, COUNTS)
        server.add_pods(cluster, range(COUNTS.pods))
        namespace = stack.enter_context(new_namespace())
        for command in ("link set lo mtu 1500", "route add local 10.0.0.0/8 dev lo"):
            subprocess.run(["ip", "-n", namespace.name, *command.split()], check=True)
        tree = Tree(cgroup_root())
        stack.callback(tree.close)
        path = f"{objects.CORE}/pods/{objects.name_of(0)}"
        uid = cluster.call("GET", path).json()["metadata"]["uid"]
        cgroup = tree.make(NAMES["containerd"](uid, objects.container_id(0)))
        yield Node(cluster, namespace, cgroup, directory)


def _line(name: str, runs: list[Run]) -> str:
    def middle(value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, runs))

    columns = [
        (middle(lambda run: run.recorded / run.took_s), "10,.0f"),
        (middle(lambda run: run.requests["traces"].items / run.took_s), "9,.1f"),
        (100 * middle(lambda run: run.spent_s / run.took_s), "8.2f"),
        (1e6 * middle(lambda run: run.spent_s / run.recorded if run.recorded else math.nan), "12.2f"),
        (100 * middle(lambda run: run.idle_cores), "8.2f"),
        (middle(lambda run: run.resident_bytes) / 1e6, "8.0f"),
        (middle(lambda run: sum(map(len, run.requests["metrics"].bodies))) / 1e3, "10.1f"),
    ]
    return f"{name:66}" + "".join(format(value, form) for value, form in columns)


def report(here: Node, rates: list[int], seconds: float, rounds: int, modes: Collection[str]) -> Iterator[str]:
    """All of it, line by line."""
    middle_rate = rates[len(rates) // 2]
    cases = {
        **{f"{DEFAULT}, {rate} round trips/s": (MODES[DEFAULT], rate, ROUND_TRIPS) for rate in rates},
        **{name: (mode, middle_rate, ROUND_TRIPS) for name, mode in MODES.items() if name in modes},
        f"{DEFAULT}, short": (MODES[DEFAULT], middle_rate // 4, SHORT),
        f"{SPANS}, short": (MODES[SPANS], middle_rate // 4, SHORT),
    }  # fmt: skip
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (mode, rate, of_connection) in cases.items():
            runs[name].append(here.run(mode, rate, seconds, of_connection))
    heads = {"records/s": 10, "spans/s": 9, "CPU %": 8, "µs a record": 12, "idle %": 8, "MB": 8, "metric kB": 10}
    yield f"{'agent':66}" + "".join(f"{head:>{width}}" for head, width in heads.items())
    for name, found in runs.items():
        yield _line(name, found)
    yield f"{'size of an item, bytes':74}{'items':>9}" + "".join(f"{each:>20}" for each in Requests([], 0).sizes())
    for name, found in runs.items():
        for signal in ("logs", "traces"):
            sent = found[-1].requests[signal]
            if sent.items:
                sizes = "".join(f"{size:20.1f}" for size in sent.sizes().values())
                yield f"{name + ', ' + signal:74}{sent.items:9,}{sizes}"
