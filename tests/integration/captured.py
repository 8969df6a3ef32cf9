"""A short story on a wire that loses packets, between pods that a real API server knows, as our agent recorded it.

The queries and dashboards that we show are asked about it, so what happened is written down beside it.
"""

import json
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcpio_otel.capture.probe import cgroup_root
from tests.kernel import hosts
from tests.kernel.cgroups import LOGS, NAMES, SPANS, Tree, identifier
from tests.kernel.harness import agent, plain, wait_for
from tests.kernel.hosts import Direction, Host, Packet, Relay
from tests.kernel.scenarios import SYN, flags_of, payload_of, tcp_offset
from tests.peers.kubernetes import ControlPlane, control_plane

PODS = "/api/v1/namespaces/shop/pods"
ADDRESSES = {"checkout": "10.214.0.1", "reports": "10.214.0.2", "payments": "10.214.0.9"}
BULK, SLOW, SMALL, FULL, CLOSED = 8081, 8082, 8083, 8084, 8089
"""Ports of payments: where answers are lost, where the first SYN is, where nothing is, where nobody accepts what comes,
and where nobody listens."""

LARGE_BYTES, SMALL_BYTES = 200_000, 500
LOST_ANSWERS, LOST_REQUESTS = 5, 1
TURNED_AWAY = 2
"""Connections for which FULL has no room, after the first."""

SUMMARY_S = 1
TALK_S = 4
"""How long one goes on to talk after all others: until ends are told, and in more than one export of metrics."""


@dataclass
class Story:
    """What happened."""

    directory: Path
    """Where the agent's files are: logs.jsonl, traces.jsonl and metrics.jsonl."""
    trace_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    span_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    """Of the request to SMALL that had a traceparent."""
    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    """By what was done: the client's port, and what it sent and received, in bytes."""
    lost: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Packets that the wire lost, by their way (`to_server`, `to_client`) and the server's port."""

    def requests(self, signal: str) -> list[bytes]:
        """The OTLP/JSON requests of a signal, in the order in which the agent wrote them."""
        return (self.directory / f"{signal}.jsonl").read_bytes().splitlines()

    def own_metrics(self) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
        """What the agent last said of itself: the request, its Resource's attributes, and its metrics by name."""
        for request in reversed(self.requests("metrics")):
            for resource in json.loads(request)["resourceMetrics"]:
                metrics = {metric["name"]: metric for scope in resource["scopeMetrics"] for metric in scope["metrics"]}
                if "tcpio.packets.seen" in metrics:
                    return request, plain(resource["resource"]["attributes"]), metrics
        raise AssertionError("the agent has no metrics of its own")

    def written(self, signal: str) -> list[dict[str, Any]]:
        """Log records or spans as the agent wrote them, with all attributes, its Resource's among them, as one."""
        resources, scopes, items = {"logs": LOGS, "traces": SPANS}[signal]
        return [
            item | {"attributes": plain(resource["resource"]["attributes"]) | plain(item["attributes"])}
            for request in self.requests(signal)
            for resource in json.loads(request)[resources]
            for scope in resource[scopes]
            for item in scope[items]
        ]


class Losses:
    """Loses the first SYN to SLOW, and of what BULK is asked and answers every fourth packet, up to what is wanted."""

    def __init__(self, story: Story) -> None:
        self._lost = story.lost
        self._passed: Counter[str] = Counter()

    def __call__(self, packet: Packet, way: Direction) -> list[Packet]:
        """The policy of a relay."""
        if not (flags := flags_of(packet)):
            return [packet]
        at = tcp_offset(packet)
        ports = [int.from_bytes(packet[at + place : at + place + 2], "big") for place in (0, 2)]
        port = ports[way.name == "to_server"]
        if self._loses(way.name, port, flags, payload_of(packet)):
            self._lost[way.name, port] += 1
            return []
        return [packet]

    def _loses(self, way: str, port: int, flags: int, payload_bytes: int) -> bool:
        if port == SLOW:
            return bool(flags & SYN) and not self._lost["to_server", SLOW] and way == "to_server"
        if port != BULK or not payload_bytes:
            return False
        self._passed[way] += 1
        if way == "to_server":
            return self._lost[way, BULK] < LOST_REQUESTS
        return self._lost[way, BULK] < LOST_ANSWERS and self._passed[way] % 4 == 0


class Pod:
    """A process that the agent takes for a pod's."""

    def __init__(self, where: Host, cgroup: Path) -> None:
        program = [sys.executable, str(Path(__file__).with_name("talker.py")), str(cgroup)]
        self._process = subprocess.Popen(
            # Not by `ip netns exec`, which mounts another /sys, and with it hides the cgroups.
            ["nsenter", f"--net=/run/netns/{where.name}", *program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def do(self, what: str, *arguments: str | int) -> Any:
        """Have it call a function of talker.py."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "a pod has ended"
        return line

    def close(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def _known(cluster: ControlPlane, name: str) -> tuple[str, str]:
    """Have the API server know a running pod of a Deployment; its uid and its container's id."""
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{name}-5d4c", "uid": "x", "controller": True}
    metadata = {"name": f"{name}-0", "labels": {"pod-template-hash": "5d4c"}, "ownerReferences": [owner]}
    spec = {"nodeName": "node-1", "containers": [{"name": "main", "image": "main:1"}]}
    uid, container = cluster.create(PODS, {"metadata": metadata, "spec": spec})["metadata"]["uid"], identifier()
    status = {"name": "main", "containerID": f"containerd://{container}", "image": "main:1", "imageID": "x"}
    address = ADDRESSES[name]
    body = {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "containerStatuses": [{**status, "ready": True, "restartCount": 0}],
    }  # fmt: skip
    assert cluster.call("PATCH", f"{PODS}/{name}-0/status", {"status": body}).status == 200
    return uid, container


@contextmanager
def _pods(cluster: ControlPlane, losses: Losses) -> Iterator[dict[str, Pod]]:
    """The pods: two on one side of the wire, and the one that they talk to on the other."""
    name = f"tcpio-story-{uuid.uuid4().hex[:6]}"
    with ExitStack() as stack:
        client, server = (stack.enter_context(hosts.host(f"{name}-{role}")) for role in ("client", "server"))
        relay = stack.enter_context(Relay(client, server))
        stack.enter_context(relay.policy(losses))
        tree = Tree(cgroup_root())
        stack.callback(tree.close)
        made = {}
        for pod, where in {"checkout": client, "reports": client, "payments": server}.items():
            hosts.add_address(where, "tun0", f"{ADDRESSES[pod]}/24")
            made[pod] = Pod(where, tree.make(NAMES["containerd"](*_known(cluster, pod))))
            stack.callback(made[pod].close)
        yield made


def record(directory: Path) -> Story:
    """Have it happen, under an agent that watches the API server; what it wrote lasts as long as the directory.

    Raises:
        LookupError: no API server can be built here.
    """
    story = Story(directory / "out")
    (directory / "cluster").mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(control_plane(directory / "cluster"))
        cluster.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        pods = stack.enter_context(_pods(cluster, Losses(story)))
        settings = {
            "TCPIO_KUBERNETES_ENABLED": "true",
            "TCPIO_KUBERNETES_NODE_NAME": "node-1",
            "TCPIO_KUBERNETES_KUBECONFIG": str(cluster.kubeconfig(directory / "kubeconfig")),
            "TCPIO_KUBERNETES_PEERS": "pods",
            "TCPIO_CONNECTIONS_SUMMARY_INTERVAL": f"{SUMMARY_S}s",
            "TCPIO_METRICS_INTERVAL": "1s",
        }
        flags = ["--otlp-file", "out", "--cidr", "10.214.0.0/24"]
        with agent(directory, "run", *flags, **settings) as recording:
            for what in ("the pods of the cluster", "the pods of node"):
                wait_for(lambda what=what: f"watching {what}" in recording.stderr(), what)
            _happen(story, pods)
            assert recording.stop() == 0
        ledger = recording.ledger()
        assert ledger["seen"] == ledger["exported"] + ledger["filtered"], ledger
    return story


def _happen(story: Story, pods: dict[str, Pod]) -> None:
    """Losses, a slow handshake, a full backlog, a request in a trace, a reset, a refusal, what nobody closes."""
    pods["payments"].do("ignore", ADDRESSES["payments"], FULL)
    for number in range(1 + TURNED_AWAY):
        assert pods["checkout"].do("queue", ADDRESSES["checkout"], ADDRESSES["payments"], FULL) == (number == 0)
    for port in (BULK, SLOW, SMALL):
        pods["payments"].do("serve", ADDRESSES["payments"], port)

    def ask(pod: str, port: int, path: str | int, traceparent: str = "") -> dict[str, int]:
        told: dict[str, int] = pods[pod].do("ask", ADDRESSES[pod], ADDRESSES["payments"], port, str(path), traceparent)
        return told

    story.asked["hold"] = ask("reports", SMALL, "hold")
    story.asked["bulk"] = ask("checkout", BULK, LARGE_BYTES)
    story.asked["slow"] = ask("checkout", SLOW, SMALL_BYTES)
    story.asked["traced"] = ask("checkout", SMALL, SMALL_BYTES, f"00-{story.trace_id}-{story.span_id}-01")
    story.asked["abort"] = ask("checkout", SMALL, "abort")
    assert pods["reports"].do("refused", ADDRESSES["reports"], ADDRESSES["payments"], CLOSED)
    for _ in range(2 * TALK_S):
        story.asked["hold"]["sent"] += pods["reports"].do("say")
        time.sleep(0.5)
    assert story.lost == {("to_client", BULK): LOST_ANSWERS, ("to_server", BULK): LOST_REQUESTS, ("to_server", SLOW): 1}
