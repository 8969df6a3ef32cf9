"""A whole node: the chart in a real cluster, with the image as it is built, a runtime, a kubelet and kube-proxy."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tcpio_otel import privileges
from tcpio_otel.attribution.kubelet import Kubelet
from tcpio_otel.attribution.kubernetes import NodePods, connected
from tcpio_otel.attribution.pods import Wanted
from tcpio_otel.capture.probe import cgroup_root
from tests.integration.collector import Collector, collector, free_port
from tests.kernel.harness import attached, plain, scrape, wait_for
from tests.peers import helm as helm_peer
from tests.peers import image as images
from tests.peers import node as nodes
from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane
from tests.peers.server import REPOSITORY
from tests.quick_start import commands, typed

CHART = REPOSITORY / "helm" / "tcpio-otel"
NAMESPACE = "observability"
IMAGE = "localhost/tcpio-otel-test/agent"
ACCOUNT = "agent-tcpio-otel"
KUBELET = f"https://{nodes.ADDRESS}:10250"
KUBELET_OFFERS = {
    "/pods": 200, "/runningpods/": 200, "/stats/summary": 403, "/logs/": 403, "/configz": 403,
    "/exec/default/pod/container": 403,
}  # fmt: skip
"""To whoever may get nodes/pods."""

PATIENCE_S = 120

pytestmark = pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")

SHOP = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: httpd
          image: TOOLS
          imagePullPolicy: Never
          command: [/bin/sh, -c, "echo hello > /www/index.html && exec /bin/busybox httpd -f -p 8080 -h /www"]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: ADDRESS
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shopper}
spec:
  selector: {matchLabels: {app: shopper}}
  template:
    metadata: {labels: {app: shopper}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: wget
          image: TOOLS
          imagePullPolicy: Never
          command: [/bin/sh, -c, "while /bin/sleep 0.2; do /bin/busybox wget -qO /dev/null http://ADDRESS/; done"]
"""
ADDRESS = "10.213.128.80"


@dataclass
class Cluster:
    """A cluster of one node, and the ways to ask it."""

    node: nodes.Node
    plane: ControlPlane
    helm_environment: dict[str, str]
    kubeconfig: Path

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints."""
        return _printed([str(self.plane.kubectl), f"--kubeconfig={self.kubeconfig}", *arguments], given)

    def helm(self, *arguments: str, namespace: str = NAMESPACE) -> str:
        """What Helm prints."""
        where = [f"--kubeconfig={self.kubeconfig}", f"--namespace={namespace}"]
        return _printed(["helm", *arguments, *where], environment=self.helm_environment)

    def roll_out(self, namespace: str, what: str) -> None:
        """Wait until all pods of a workload are ready; where they do not come to be, what the cluster says of them."""
        here = ("-n", namespace)
        try:
            self.kubectl(*here, "rollout", "status", what, f"--timeout={PATIENCE_S}s")
        except AssertionError as failure:
            labels = "-lapp.kubernetes.io/name=tcpio-otel" if "tcpio" in what else f"-lapp={what.partition('/')[2]}"
            told = self.kubectl(*here, "describe", "pods", labels)
            raise AssertionError(f"{failure}\n{told}") from None

    def agent(self) -> str:
        """The name of the agent's pod that is running."""
        selector = "-lapp.kubernetes.io/name=tcpio-otel,app.kubernetes.io/component=agent"
        found = self.kubectl(
            "-n", NAMESPACE, "get", "pods", selector, "-o", "name", "--field-selector=status.phase=Running"
        )
        (name,) = found.split()
        return name


def _printed(command: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, as an archive that a runtime takes."""
    name = or_skip(lambda: images.build("libbpf"))
    path = tmp_path_factory.mktemp("image") / "agent.tar"
    images.buildah("push", "--quiet", name, f"docker-archive:{path}:{IMAGE}:built")
    return path


@pytest.fixture(scope="module")
def cluster(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose node has the image, and two workloads that talk through a Service."""
    or_skip(nodes.build)
    environment = or_skip(lambda: helm_peer.environment(tmp_path_factory.mktemp("helm")))
    directory = tmp_path_factory.mktemp("node")
    with nodes.node(directory) as (node, plane):
        node.load(archive)
        made = Cluster(node, plane, environment, plane.kubeconfig(directory / "admin"))
        labels = {"pod-security.kubernetes.io/enforce": "privileged"}
        plane.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
        manifest = SHOP.replace("TOOLS", nodes.TOOLS).replace("ADDRESS", ADDRESS)
        made.kubectl("apply", "-f", "-", given=manifest)
        yield made


def received(receiver: Collector) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Packets that the Collector has been given: the attributes of each, and those of its Resource."""
    found = []
    path = receiver.directory / "received.json"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            resources = json.loads(line).get("resourceLogs", [])
        except ValueError:
            continue  # it is being written
        for resource in resources:
            whose = plain(resource["resource"]["attributes"])
            found += [
                (plain(record["attributes"]), whose)
                for scope in resource["scopeLogs"]
                for record in scope["logRecords"]
                if record.get("eventName") == "tcp.packet"
            ]
    return found


def test_the_chart_on_a_node(cluster: Cluster, tmp_path: Path) -> None:
    """Installed, ready, tested by itself; packets come named at both ends; nothing is left when it has gone."""
    programs = attached()
    with ExitStack() as stack:
        receiver = stack.enter_context(collector(tmp_path))
        settings = {
            "kubelet.url": KUBELET, "kubelet.certificateHostPath": str(cluster.node.directory / "kubelet-ca.pem"),
            "image.repository": IMAGE, "image.tag": "built", "image.pullPolicy": "Never",
            "config.capture.cgroup": f"/host{cgroup_root()}",
            "config.kubernetes.peers": "{services,nodes,pods}", "config.kubernetes.backends": "true",
            "otlp.endpoint": f"http://127.0.0.1:{receiver.http_port}",
            "config.metrics.listen": f"0.0.0.0:{(scraped := free_port())}",
        }  # fmt: skip
        cluster.helm("install", "agent", str(CHART), *(f"--set={key}={value}" for key, value in settings.items()))
        cluster.roll_out(NAMESPACE, "daemonset/agent-tcpio-otel")
        said = cluster.helm("test", "agent", "--logs")
        assert "ok  by libbpf" in said
        cluster.roll_out("default", "deployment/web")
        cluster.roll_out("default", "deployment/shopper")

        def from_shopper() -> list[tuple[dict[str, Any], dict[str, Any]]]:
            return [
                (record, whose) for record, whose in received(receiver)
                if whose.get("k8s.deployment.name") == "shopper" and record["network.peer.port"] == 80
            ]  # fmt: skip

        wait_for(from_shopper, "packets of the shopper", PATIENCE_S)
        first = cluster.agent()
        restarts = cluster.kubectl(
            "-n", NAMESPACE, "get", first, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"
        )
        assert restarts == "0"
        check_rights_at_kubelet(cluster)
        check_scrape(f"http://{nodes.ADDRESS}:{scraped}/metrics")
        log = tmp_path / "log"
        with log.open("w") as file:
            ask = [str(cluster.plane.kubectl), f"--kubeconfig={cluster.kubeconfig}", "-n", NAMESPACE]
            following = subprocess.Popen([*ask, "logs", "-f", first], stdout=file, stderr=subprocess.STDOUT)
        stack.callback(following.wait)
        stack.callback(following.kill)
        cluster.kubectl("-n", NAMESPACE, "delete", first)
        wait_for(lambda: "seen " in log.read_text(), "the ledger of the agent that was stopped", PATIENCE_S)
        cluster.roll_out(NAMESPACE, "daemonset/agent-tcpio-otel")
        before = len(from_shopper())
        wait_for(lambda: len(from_shopper()) > before, "packets by the agent that followed", PATIENCE_S)
        assert cluster.agent() != first
        cluster.helm("uninstall", "agent", "--wait")
        wait_for(lambda: attached() == programs, "the probe to be gone", PATIENCE_S)
    ledger = next(line for line in log.read_text().splitlines() if "seen " in line and " = exported " in line)
    assert re.search(r"dropped 0 \+ in flight 0", ledger), ledger
    check(received(receiver))


def test_the_quick_start(cluster: Cluster, tmp_path: Path) -> None:
    """The README's, with the image that is on the node already, a Collector's address, and this host's cgroup tree."""
    image, *steps = commands("On Kubernetes")
    name = image.partition("IMAGE=")[2]
    cluster.node.run("ctr", "--namespace=k8s.io", "images", "tag", f"{IMAGE}:built", name)
    (programs := tmp_path / "bin").mkdir()
    (programs / "kubectl").symlink_to(cluster.plane.kubectl)
    environment, log = {**cluster.helm_environment, "KUBECONFIG": str(cluster.kubeconfig)}, tmp_path / "log"
    with collector(tmp_path, address="0.0.0.0") as receiver:
        *steps, watch = (
            step.replace("collector.example:4318", f"{nodes.ADDRESS}:{receiver.http_port}") for step in steps
        )
        for step in steps:
            command = f"{step} --set config.capture.cgroup=/host{cgroup_root()}" if " install " in step else step
            with typed(command, programs, log, environment) as process:
                assert process.wait(PATIENCE_S) == 0, f"{command}: {log.read_text()}"
        with typed(watch, programs, log, environment):
            wait_for(lambda: log.read_text().count("(PUSH|ACK)") > 3, "packets of the node", PATIENCE_S)
        wait_for(lambda: received(receiver), "packets", PATIENCE_S)
        cluster.helm("uninstall", "tcpio-otel", "--wait", namespace="tcpio-otel")


def check_rights_at_kubelet(cluster: Cluster) -> None:
    """The agent's account may read the node's pods, in the two ways that its right is for, and nothing else."""
    ask = urllib3.PoolManager(ca_certs=str(cluster.node.directory / "kubelet-ca.pem"))
    headers = {"authorization": f"Bearer {cluster.plane.token(NAMESPACE, ACCOUNT)}"}
    answers = {path: ask.request("GET", f"{KUBELET}{path}", headers=headers).status for path in KUBELET_OFFERS}
    assert answers == KUBELET_OFFERS


def check_scrape(url: str) -> None:
    """Metrics of the shopper, by its own name and that of the Service that it asks."""
    moved = {
        (labels["job"], labels["tcp_peer_k8s_service_name"]): value
        for labels, value in scrape(url)["tcp_io_bytes_total"]
        if labels.get("tcp_peer_k8s_service_name")
    }
    assert moved["default/shopper", "web"] > 0


def test_the_kubelet_tells_of_pods_while_the_agent_is_cut_off(cluster: Cluster, tmp_path: Path) -> None:
    """With the right that the chart gives, and a certificate of the kubelet's own; until the API server is back."""
    cluster.roll_out("default", "deployment/web")
    plane, kubeconfig = cluster.plane, tmp_path / "kubeconfig"
    plane.account("reader")
    plane.allow("reader", {"resources": ["nodes/pods"], "verbs": ["get"]})
    client = connected(plane.kubeconfig(kubeconfig, plane.token("default", "reader")))
    reachable, client.configuration.host = client.configuration.host, "https://127.0.0.1:1"
    kubelet = Kubelet(KUBELET, nodes.NAME, client.configuration, cluster.node.directory / "kubelet-ca.pem")
    (uid,) = cluster.kubectl("get", "pods", "-lapp=web", "-o", "jsonpath={.items[*].metadata.uid}").split()
    with NodePods(client, nodes.NAME, Wanted(), kubelet=kubelet) as pods:
        wait_for(lambda: pods.fault.endswith("the kubelet tells of them instead"), "the kubelet's answer", PATIENCE_S)
        assert pods[uid]
        told = pods[uid].attributes
        assert (told["k8s.pod.uid"], told["k8s.deployment.name"], told["k8s.node.name"]) == (uid, "web", nodes.NAME)
        assert [each.name for each in pods[uid].containers.values()] == ["httpd"]
        plane.allow("reader")
        wait_for(lambda: "the kubelet: 403 Forbidden" in pods.fault, "its refusal", PATIENCE_S)
        plane.allow("reader", {"resources": ["pods"], "verbs": ["list", "watch"]})
        client.configuration.host = reachable
        wait_for(lambda: not pods.fault, "the API server's answer", PATIENCE_S)
        assert pods[uid].attributes == told


def end(record: dict[str, Any]) -> tuple[str, int]:
    """The end of a connection that a packet is of."""
    return record["network.local.address"], record["network.local.port"]


def check(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Every packet between the two says whose it is and who the other end is."""
    web_port, service_port = 8080, 80
    to_service = [(record, whose) for record, whose in found if record["network.peer.address"] == ADDRESS]
    # Before the first pod of the Service is ready nobody answers, and nobody is behind it.
    answered = {end(record) for record, _ in to_service if record["network.io.direction"] == "receive"}
    by_shopper = [(record, whose) for record, whose in to_service if end(record) in answered]
    # What comes to a TIME_WAIT socket that is older than the agent belongs to nobody.
    by_web = [
        (record, whose)
        for record, whose in found
        if record["network.local.port"] == web_port and "process.pid" in record
    ]
    assert by_shopper
    assert by_web
    for record, whose in by_shopper:
        assert record["network.peer.port"] == service_port
        assert whose["k8s.deployment.name"] == whose["service.name"] == "shopper"
        assert whose["k8s.container.name"] == "wget"
        assert record["tcp.peer.kind"] == "service"
        assert record["tcp.peer.k8s.service.name"] == "web"
        assert record["tcp.peer.k8s.deployment.name"] == "web"
        assert record["tcp.peer.port"] == web_port
    for record, whose in by_web:
        assert whose["k8s.deployment.name"] == "web"
        assert record["tcp.peer.kind"] == "pod"
        assert record["tcp.peer.k8s.deployment.name"] == "shopper"
    assert {whose["k8s.node.name"] for _, whose in (*by_shopper, *by_web)} == {nodes.NAME}
