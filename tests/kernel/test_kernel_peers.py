"""Who the other end is: pods, Services and who is behind them, nodes, and whoever is outside.

Hosts are network namespaces, translation is netfilter's, and so is the API server real; what controllers and kubelets
would write there, the test does.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import AF_INET, SHUT_RDWR, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any, NamedTuple

import pytest

from tests.kernel.harness import Agent, agent, logs, spans, wait_for
from tests.kernel.hosts import Host, add_address, host, veth
from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane, build, control_plane

NODE = "10.0.7.1"
CLIENT, SERVER, LATE = "10.244.0.2", "10.244.0.3", "10.244.0.4"
WORLD, ELSEWHERE = "9.9.9.9", "192.168.77.1"
OURS = (NODE, CLIENT, SERVER, LATE, WORLD, ELSEWHERE)
SERVICE, HTTP, NODE_PORT, OWN_PORT = "10.96.0.10", 8080, 30080, 9100
CORE = "/api/v1/namespaces/default"
WAIT_S = 4

RULES = f"""
table ip nat {{
    chain translate {{ ip daddr {SERVICE} tcp dport 80 dnat to {SERVER}:{HTTP};
                       ip daddr {NODE} tcp dport {NODE_PORT} dnat to {SERVER}:{HTTP}; }}
    chain prerouting {{ type nat hook prerouting priority -100; jump translate; }}
    chain output {{ type nat hook output priority -100; jump translate; }}
    chain postrouting {{ type nat hook postrouting priority 100; ip saddr {WORLD} ip daddr {SERVER} masquerade; }}
}}
"""


class Hosts(NamedTuple):
    """A node, its pods, and the rest of the world behind it."""

    node: Host
    client: Host
    server: Host
    late: Host
    world: Host


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """The node forwards between the others, and translates a Service's address as kube-proxy has it do."""
    with ExitStack() as stack:
        made = Hosts(*(stack.enter_context(host(f"tcpio-peers-{name}")) for name in Hosts._fields))
        addresses = ([CLIENT], [SERVER], [LATE], [WORLD, ELSEWHERE])
        for number, (other, own) in enumerate(zip(made[1:], addresses, strict=True)):
            device = f"pod{number}"
            veth(made.node, other, device, "eth0")
            add_address(made.node, device, f"{NODE}/32")
            add_address(other, "eth0", *(f"{address}/32" for address in own))
            other.run("ip", "route", "add", NODE, "dev", "eth0")
            other.run("ip", "route", "add", "default", "via", NODE)
            for address in own:
                made.node.run("ip", "route", "add", address, "dev", device)
        made.node.run("ip", "route", "add", "10.96.0.0/16", "dev", "pod0")  # any: it is translated on its way there
        made.node.sysctl("ipv4/ip_forward", 1)
        made.node.run("nft", "-f", "-", input=RULES)
        yield made


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server on the node, which knows what a test cluster would have told it."""
    or_skip(build)
    flags = ["--service-cluster-ip-range=10.96.0.0/16"]
    with hosts.node.inside(), control_plane(tmp_path_factory.mktemp("cluster"), *flags) as made:
        made.create("/api/v1/nodes", {"metadata": {"name": "node-1"}})
        addresses = {"status": {"addresses": [{"type": "InternalIP", "address": NODE}]}}
        assert made.call("PATCH", "/api/v1/nodes/node-1/status", addresses).status == 200
        pod(made, "client", CLIENT, node="node-2")
        server = pod(made, "server", SERVER)
        pod(made, "own-network", NODE, hostNetwork=True)
        pod(made, "over", CLIENT, phase="Succeeded")  # whose address another has by now
        ports = [{"port": 80, "targetPort": HTTP, "nodePort": NODE_PORT, "protocol": "TCP"}]
        spec = {"type": "NodePort", "clusterIP": SERVICE, "ports": ports, "selector": {"app": "server"}}
        made.create(f"{CORE}/services", {"metadata": {"name": "shop"}, "spec": spec})
        target = {"kind": "Pod", "name": "server", "namespace": "default", "uid": server}
        slice_ = {
            "metadata": {"name": "shop-1", "labels": {"kubernetes.io/service-name": "shop"}},
            "addressType": "IPv4", "ports": [{"port": HTTP, "protocol": "TCP"}],
            "endpoints": [{"addresses": [SERVER], "targetRef": target, "nodeName": "node-1"}],
        }  # fmt: skip
        made.create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", slice_)
        yield made


def pod(
    cluster: ControlPlane, name: str, address: str, node: str = "node-1", phase: str = "Running", **spec: Any
) -> str:
    """A pod, as the kubelet tells of it; its uid."""
    full = {"nodeName": node, "containers": [{"name": "main", "image": "main:1"}], **spec}
    labels = {"app": name, "pod-template-hash": "5d4c"}
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{name}-5d4c", "uid": "x", "controller": True}
    metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
    made = cluster.create(f"{CORE}/pods", {"metadata": metadata, "spec": full})
    has_address(cluster, name, address, phase)
    return str(made["metadata"]["uid"])


def has_address(cluster: ControlPlane, name: str, address: str, phase: str = "Running") -> None:
    """What the kubelet says once a pod has its address."""
    host_ips = {"hostIP": NODE, "hostIPs": [{"ip": NODE}]} if address else {}
    status = {"phase": phase, **host_ips, "podIP": address, "podIPs": [{"ip": address}]}
    answer = cluster.call("PATCH", f"{CORE}/pods/{name}/status", {"status": status})
    assert answer.status == 200, answer.data


@contextmanager
def listening(where: Host, address: str, port: int) -> Iterator[None]:
    """A server that answers each connection with what it said."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # it was closed
            with connection:
                while data := connection.recv(1000):
                    connection.sendall(data)

    listener = where.socket(AF_INET)
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listener.settimeout(None)
    listener.bind((address, port))
    listener.listen()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(SHUT_RDWR)
        thread.join()
        listener.close()


def say(client: socket, times: int = 1) -> None:
    """Say something, and hear it back."""
    for _ in range(times):
        client.sendall(b"x" * 100)
        assert client.recv(1000)


def talk(where: Host, source: str, address: str, port: int) -> int:
    """One connection from a host, from one of its addresses; its port."""
    with where.socket(AF_INET) as client:
        client.bind((source, 0))
        client.connect((address, port))
        say(client)
        return int(client.getsockname()[1])


PREFIX = "tcp.peer."
BEHIND = {"address": SERVER, "port": HTTP}
End = tuple[str, int, str, int]
"""A socket's tuple: its address and port, and its peer's."""


def ends(directory: Path) -> dict[End, dict[str, Any]]:
    """What packets and spans alike say of the peer of each socket; asserts that all of them say the same."""
    found: dict[End, dict[str, Any]] = {}
    for record in (*logs(directory), *(span["attributes"] for span in spans(directory))):
        own = "tcp.socket" if "tcp.socket.local.address" in record else "network"
        address, port, peer, peer_port = (
            record[f"{own}.{end}.{part}"] for end in ("local", "peer") for part in ("address", "port")
        )
        said = {name.removeprefix(PREFIX): value for name, value in record.items() if name.startswith(PREFIX)}
        said.pop("k8s.pod.uid", None)
        if address not in OURS:
            continue  # of somebody else on this machine
        end = address, port, peer, peer_port
        assert found.setdefault(end, said) == said, end
    return found


MODES = {
    "services": ("services,endpointslices", True),
    "nodes": ("services,endpointslices,nodes", True),
    "pods": ("services,nodes,pods", True),
    "headers": ("services,nodes,pods", False),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_end_says_who_the_other_is(hosts: Hosts, cluster: ControlPlane, tmp_path: Path, mode: str) -> None:
    """Through a Service from a pod and from the node, from outside through the node's port, directly, and outwards."""
    watched, backends = MODES[mode]
    node, client, server, _, world = hosts
    with ExitStack() as stack:
        stack.enter_context(node.inside())
        watcher = stack.enter_context(watching(cluster, tmp_path, watched, backends=backends))
        for where, address, port in ((server, SERVER, HTTP), (node, NODE, OWN_PORT), (world, "0.0.0.0", HTTP)):
            stack.enter_context(listening(where, address, port))
        by_service = talk(client, CLIENT, SERVICE, 80)
        from_node = talk(node, NODE, SERVICE, 80)
        directly = talk(client, CLIENT, SERVER, HTTP)
        to_node = talk(client, CLIENT, NODE, OWN_PORT)
        outwards = talk(client, CLIENT, WORLD, HTTP)
        private = talk(client, CLIENT, ELSEWHERE, HTTP)
        inwards = talk(world, WORLD, NODE, NODE_PORT)
        time.sleep(0.5)
        assert watcher.stop() == 0
    ledger = watcher.ledger()
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]
    found = ends(tmp_path / "out")
    by_pods, nodes_known = "pods" in watched, "nodes" in watched
    of_pods = {"k8s.namespace.name": "default", "kind": "pod"}
    of_server = {**of_pods, "k8s.pod.name": "server", "k8s.node.name": "node-1", **owned_by("server")}
    of_client = (
        {**of_pods, "k8s.pod.name": "client", "k8s.node.name": "node-2", **owned_by("client")} if by_pods else {}
    )
    of_node = {"kind": "node", "k8s.node.name": "node-1"} if nodes_known else {}
    of_shop = {"kind": "service", "k8s.service.name": "shop", "k8s.namespace.name": "default"}
    behind_shop = {**of_server, **of_shop, "address": SERVER, "port": HTTP}
    outside, of_private = {"kind": "external"}, {"kind": "external"} if by_pods else {}
    expected = {
        (CLIENT, by_service, SERVICE, 80): behind_shop if backends else of_shop,
        (SERVER, HTTP, CLIENT, by_service): of_client,
        (NODE, from_node, SERVICE, 80): behind_shop,  # headers tell, where the socket's own network translates
        (SERVER, HTTP, NODE, from_node): of_node,
        (CLIENT, directly, SERVER, HTTP): of_server,
        (SERVER, HTTP, CLIENT, directly): of_client,
        (CLIENT, to_node, NODE, OWN_PORT): of_node,
        (NODE, OWN_PORT, CLIENT, to_node): of_client,
        (CLIENT, outwards, WORLD, HTTP): outside,
        (WORLD, HTTP, CLIENT, outwards): of_client,
        (CLIENT, private, ELSEWHERE, HTTP): of_private,
        (ELSEWHERE, HTTP, CLIENT, private): of_client,
    }
    for end, said in expected.items():
        assert found.pop(end) == said, end
    at_world = found.pop((WORLD, inwards, NODE, NODE_PORT))
    ((end, at_server),) = found.items()  # the node may have changed the port
    assert end[:3] == (SERVER, HTTP, NODE)
    if backends:
        assert at_world == (behind_shop if nodes_known else {**of_server, "address": SERVER, "port": HTTP})
        assert at_server == {**outside, "address": WORLD, "port": inwards}
    else:
        assert (at_world, at_server) == (of_shop, of_node)


def test_a_burst_through_a_service_is_named_to_the_last(hosts: Hosts, cluster: ControlPlane, tmp_path: Path) -> None:
    """A thousand connections as fast as they go: the pod behind each is known in all its records."""
    node, client, server, _, _ = hosts
    with ExitStack() as stack:
        stack.enter_context(node.inside())
        watcher = stack.enter_context(watching(cluster, tmp_path, "services,endpointslices", backends=True))
        stack.enter_context(listening(server, SERVER, HTTP))
        local = [talk(client, CLIENT, SERVICE, 80) for _ in range(1000)]
        assert watcher.stop() == 0
    found = ends(tmp_path / "out")
    told = {(said["kind"], said.get("k8s.pod.name")) for said in (found[CLIENT, port, SERVICE, 80] for port in local)}
    assert told == {("service", "server")}
    assert "translations lost" not in watcher.stderr()
    ledger = watcher.ledger()
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]


def owned_by(name: str) -> dict[str, str]:
    """What a pod itself tells, beyond what EndpointSlices say of it."""
    return {
        "k8s.replicaset.name": f"{name}-5d4c", "k8s.deployment.name": name, "service.name": name,
        "service.namespace": "default",
    }  # fmt: skip


@pytest.mark.parametrize("tells_s", [1, None], ids=["soon", "never"])
def test_a_new_pod_is_waited_for(hosts: Hosts, cluster: ControlPlane, tmp_path: Path, tells_s: float | None) -> None:
    """It talks before the API server has its address: records and span wait, bounded, and nobody else's do."""
    node, client, server, late, _ = hosts
    name = f"late-{tells_s}"
    with ExitStack() as stack:
        stack.enter_context(node.inside())
        watcher = stack.enter_context(watching(cluster, tmp_path, "services,nodes,pods", backends=True))
        stack.enter_context(listening(server, SERVER, HTTP))
        with late.socket(AF_INET) as young:
            young.bind((LATE, 0))
            young.connect((SERVER, HTTP))
            say(young)
            port = young.getsockname()[1]
        other = talk(client, CLIENT, SERVER, HTTP)
        wait_for(lambda: (SERVER, HTTP, CLIENT, other) in ends(tmp_path / "out"), "the others", WAIT_S - 1)
        assert (SERVER, HTTP, LATE, port) not in ends(tmp_path / "out")
        if tells_s:
            time.sleep(tells_s)
            pod(cluster, name, LATE)
        wait_for(lambda: (SERVER, HTTP, LATE, port) in ends(tmp_path / "out"), "the new pod", WAIT_S + 5)
        assert watcher.stop() == 0
    found = ends(tmp_path / "out")[SERVER, HTTP, LATE, port]
    assert (found["kind"], found.get("k8s.pod.name")) == (("pod", name) if tells_s else ("external", None))
    ledger = watcher.ledger()
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]
    if tells_s:
        assert cluster.call("DELETE", f"{CORE}/pods/{name}?gracePeriodSeconds=0").status == 200


@contextmanager
def watching(cluster: ControlPlane, directory: Path, watched: str, *, backends: bool) -> Iterator[Agent]:
    """An agent in the network of the calling thread, once it knows the cluster."""
    settings = {
        "TCPIO_KUBERNETES_ENABLED": "true",
        "TCPIO_KUBERNETES_NODE_NAME": "node-1",
        "TCPIO_KUBERNETES_KUBECONFIG": str(cluster.kubeconfig(directory / "kubeconfig")),
        "TCPIO_KUBERNETES_WAIT": f"{WAIT_S}s",
        "TCPIO_KUBERNETES_PEERS": watched,
        "TCPIO_KUBERNETES_BACKENDS": "true" if backends else "false",
    }
    ports = [argument for port in (HTTP, 80, NODE_PORT, OWN_PORT) for argument in ("--port", str(port))]
    with agent(directory, "run", "--otlp-file", "out", *ports, **settings) as watcher:
        said = [f"the {name} of the cluster" for name in watched.split(",")]
        for what in (*said, "the pods of node"):
            wait_for(lambda what=what: f"watching {what}" in watcher.stderr(), what)
        yield watcher
