"""What watches cost a real API server and its etcd: lists, changes told to many, and what stays open."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.scale import objects
from tests.bench.scale.usage import cpu_s, settle, spent_s
from tests.kernel.harness import resident_bytes
from tests.peers.kubernetes import ControlPlane

PAGE = 500
FLAGS = ("--service-cluster-ip-range=10.96.0.0/16",)
"""Room for many Services."""

WRITERS = 4
OWN, OWN_CHANGES = "pods of one node", 5
"""Each is told to one watch only, so there must be more of them."""

PATHS = {
    "pods": "/api/v1/pods", "nodes": "/api/v1/nodes", "endpointslices": "/apis/discovery.k8s.io/v1/endpointslices",
    "services": "/api/v1/services",
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """How much of everything."""

    pods: int
    nodes: int
    slices: int
    services: int
    watches: int
    changes: int
    rounds: int


def processes(cluster: ControlPlane) -> tuple[int, int]:
    """The API server and its etcd."""
    return cluster.pid("kube-apiserver"), cluster.pid("etcd")


def _ask(cluster: ControlPlane, method: str, path: str, body: Any) -> None:
    answer = cluster.call(method, path, body)
    assert answer.status < 300, answer.data.decode()


def _at_once(work: Callable[[int], object], numbers: range) -> None:
    with ThreadPoolExecutor(WRITERS) as executor:
        for _ in executor.map(work, numbers):
            pass


def fill(cluster: ControlPlane, counts: Counts) -> None:
    """Make nodes, EndpointSlices and Services; pods come by themselves."""

    def node(number: int) -> None:
        _ask(cluster, "POST", PATHS["nodes"], objects.node(number))
        _ask(cluster, "PATCH", f"{PATHS['nodes']}/node-{number}/status", {"status": objects.node_status(number)})

    _at_once(node, range(counts.nodes))
    _at_once(lambda at: _ask(cluster, "POST", objects.SLICES, objects.endpoint_slice(at)), range(counts.slices))
    _at_once(lambda at: _ask(cluster, "POST", f"{objects.CORE}/services", objects.service(at)), range(counts.services))


def add_pods(cluster: ControlPlane, numbers: range) -> None:
    """Make pods that run."""

    def pod(number: int) -> None:
        _ask(cluster, "POST", f"{objects.CORE}/pods", objects.pod(number))
        _ask(cluster, "PATCH", *_change("pods", number, 0))

    _at_once(pod, numbers)


def _change(kind: str, number: int, second: int) -> tuple[str, Any]:
    """Where and how an object changes, as what controls it would change it."""
    if kind == "pods":
        path = f"{objects.CORE}/pods/{objects.name_of(number)}/status"
        return path, {"status": objects.pod_status(number, second)}
    if kind == "nodes":
        return f"{PATHS['nodes']}/node-{number}/status", {"status": objects.node_status(number, second)}
    if kind == "endpointslices":
        first = number * objects.ENDPOINTS_IN_SLICE
        changed = objects.endpoint_slice(number, first + second % objects.ENDPOINTS_IN_SLICE)
        return f"{objects.SLICES}/{changed['metadata']['name']}", {"endpoints": changed["endpoints"]}
    return f"{objects.CORE}/services/shop-{number}", {"metadata": {"labels": {"changed": str(second)}}}


def listed(cluster: ControlPlane, path: str) -> tuple[int, int]:
    """List objects as the agent does, page by page: how many, and the bytes that came."""
    count = received = 0
    token = ""
    while True:
        separator = "&" if "?" in path else "?"
        answer = cluster.call("GET", f"{path}{separator}limit={PAGE}" + (f"&continue={token}" if token else ""))
        assert answer.status == 200, answer.data.decode()
        received += len(answer.data)
        page = answer.json()
        count += len(page["items"])
        token = page["metadata"].get("continue", "")
        if not token:
            return count, received


def lists(cluster: ControlPlane, rounds: int) -> Iterator[str]:
    """A line for each kind: what one list costs."""
    for name, path, times in [
        (OWN, f"{PATHS['pods']}?fieldSelector=spec.nodeName=node-0", 20),
        *((kind, path, 3) for kind, path in PATHS.items()),
    ]:
        count, received = listed(cluster, path)

        def work(path: str = path, times: int = times) -> None:
            for _ in range(times):
                listed(cluster, path)

        figures = [spent_s(work, *processes(cluster)) for _ in range(rounds)]
        milliseconds = 1000 * statistics.median(figures) / times
        yield f"{name:18}{count:9,}{received:14,}{received / count:12,.0f}{milliseconds:14.1f}"


@contextmanager
def streams(cluster: ControlPlane, paths: list[str]) -> Iterator[Callable[[], dict[str, int]]]:
    """So many open watches; says what they were told so far."""
    command = [sys.executable, "-m", "tests.bench.scale.streams", str(cluster.port), str(cluster.ca_file)]
    with subprocess.Popen(
        [*command, cluster.admin_token], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def say(line: str) -> str:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline()

        assert say(json.dumps(paths)) == "open\n"
        yield lambda: json.loads(say("counts"))
        process.stdin.close()


@dataclass
class Follower:
    """The agent's own client, for one kind of object of the whole cluster."""

    pid: int
    before_bytes: int
    knows_bytes: int
    list_s: float


@contextmanager
def follower(kubeconfig: Path, kind: str) -> Iterator[Follower]:
    """Start it, and wait until it knows all objects."""
    command = [sys.executable, "-m", "tests.bench.scale.follower", str(kubeconfig), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        before, started = int(process.stdout.readline()), cpu_s(process.pid)
        said = process.stdout.readline()
        assert said.startswith("watching"), said
        yield Follower(process.pid, before, resident_bytes(process.pid), cpu_s(process.pid) - started)
        process.stdin.close()


def _paths(kind: str, watches: int, version: str) -> list[str]:
    """Of so many watches from now on."""
    options = f"watch=1&allowWatchBookmarks=true&resourceVersion={version}"
    if kind == OWN:
        return [f"{PATHS['pods']}?fieldSelector=spec.nodeName=node-{at}&{options}" for at in range(watches)]
    return [f"{PATHS[kind]}?{options}"] * watches


def _told(cluster: ControlPlane, kind: str, counts: Counts, watches: int, turn: int) -> dict[str, float]:
    """What one change costs that is told to so many watches."""
    changed = "pods" if kind == OWN else kind
    total = {
        "pods": counts.pods, "nodes": counts.nodes, "endpointslices": counts.slices, "services": counts.services
    }[changed]  # fmt: skip
    changes = counts.changes * (OWN_CHANGES if kind == OWN else 1)
    base = processes(cluster)
    settle(*base)
    version = cluster.call("GET", f"{PATHS[changed]}?limit=1").json()["metadata"]["resourceVersion"]
    before_bytes = resident_bytes(base[0])
    begun = cpu_s(*base)
    with ExitStack() as stack:
        ask = stack.enter_context(streams(cluster, _paths(kind, watches, version))) if watches else None
        opened = cpu_s(*base) - begun
        open_bytes = resident_bytes(base[0]) - before_bytes
        settle(*base)
        began = ask() if ask else {"events": 0, "bytes": 0}
        expected = changes * (1 if kind == OWN else watches)
        step = objects.PODS_ON_NODE if kind == OWN else 1
        spread = min(watches, total // step) if kind == OWN and watches else total // step

        def change(at: int) -> None:
            _ask(cluster, "PATCH", *_change(changed, at % max(spread, 1) * step, 1 + turn * changes + at))

        def work() -> None:
            _at_once(change, range(changes))
            deadline = time.monotonic() + 120
            while ask and ask()["events"] - began["events"] < expected:
                assert time.monotonic() < deadline, f"{ask()} of {expected} events came"
                time.sleep(0.2)

        spent = spent_s(work, *base)
        ended = ask() if ask else began
    return {
        "spent_s": spent / changes, "open_s": opened, "open_bytes": open_bytes,
        "bytes": (ended["bytes"] - began["bytes"]) / max(ended["events"] - began["events"], 1),
    }  # fmt: skip


def watches(cluster: ControlPlane, counts: Counts) -> Iterator[str]:
    """A line for each kind: what changes cost that are told to many, beyond what they cost anyway."""
    for kind in (OWN, *PATHS):
        number = min(counts.watches, counts.nodes if kind != OWN else counts.pods // objects.PODS_ON_NODE)
        _told(cluster, kind, counts, 0, 0)  # warms up
        without: list[dict[str, float]] = []
        with_them: list[dict[str, float]] = []
        for turn in range(counts.rounds):
            for several in (False, True) if turn % 2 else (True, False):
                figures = _told(cluster, kind, counts, number if several else 0, 2 * turn + several + 1)
                (with_them if several else without).append(figures)
        middle = {key: statistics.median(each[key] for each in with_them) for key in with_them[0]}
        write_s = statistics.median(each["spent_s"] for each in without)
        more_s = statistics.median(
            one["spent_s"] - other["spent_s"] for one, other in zip(with_them, without, strict=True)
        )
        told = 1 if kind == OWN else number
        yield (
            f"{kind:18}{number:8}{middle['bytes']:12,.0f}{1000 * write_s:12.2f}{1e6 * more_s / told:12.1f}"
            f"{1000 * middle['open_s'] / number:12.2f}{middle['open_bytes'] / 1024 / number:12.0f}"
        )


def followers(cluster: ControlPlane, counts: Counts, kubeconfig: Path) -> Iterator[str]:
    """A line for each kind: what it costs the agent to know all objects, and to hear of a change."""
    totals = {"pods": counts.pods, "nodes": counts.nodes, "endpointslices": counts.slices, "services": counts.services}
    for kind, total in totals.items():
        memory, listing, hearing = [], [], []
        for turn in range(counts.rounds):
            with follower(kubeconfig, kind) as one:
                memory.append(one.knows_bytes - one.before_bytes)
                listing.append(one.list_s)

                def change(at: int, kind: str = kind, total: int = total, turn: int = turn) -> None:
                    _ask(cluster, "PATCH", *_change(kind, at % total, 100 + turn * counts.changes + at))

                hearing.append(spent_s(partial(_at_once, change, range(counts.changes)), one.pid))
                whole = resident_bytes(one.pid)
        yield (
            f"{kind:18}{total:9,}{statistics.median(memory) / 1e6:14.1f}{whole / 1e6:14.1f}"
            f"{1000 * statistics.median(listing):14.0f}{1e6 * statistics.median(hearing) / counts.changes:14.0f}"
        )


def report(cluster: ControlPlane, counts: Counts, directory: Path) -> Iterator[str]:
    """All of it, line by line."""
    head = f"{'lists':18}{'objects':>9}{'bytes':>14}{'an object':>12}{'CPU ms':>14}"
    fill(cluster, counts)
    first = counts.pods // 5
    for numbers in (range(first), range(first, counts.pods)):
        add_pods(cluster, numbers)
        yield f"with {numbers.stop:,} pods"
        yield head
        yield from lists(cluster, counts.rounds)
    yield (
        f"{'watches':18}{'open':>8}{'bytes':>12}{'write ms':>12}{'told µs':>12}{'begin ms':>12}{'KiB open':>12}"
        f"   CPU of the API server and etcd; {counts.changes} changes, {counts.rounds} rounds"
    )
    yield from watches(cluster, counts)
    yield f"{'agent':18}{'objects':>9}{'MB more':>14}{'MB whole':>14}{'list CPU ms':>14}{'event CPU µs':>14}"
    yield from followers(cluster, counts, cluster.kubeconfig(directory / "kubeconfig"))
