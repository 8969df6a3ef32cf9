"""The Helm chart: rendered by Helm, taken by an API server and by the agent, and refused where it must be."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.peers import helm as peer
from tests.peers import prometheus_operator
from tests.peers.go import or_skip
from tests.peers.kubernetes import ControlPlane, build, control_plane

CHART = Path(__file__).parents[2] / "helm" / "tcpio-otel"
SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "observability"

Objects = dict[str, dict[str, Any]]


class Helm:
    """Helm, with an environment of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["helm", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def output(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert not result.returncode, result.stdout + result.stderr
        return result.stdout

    def template(self, *arguments: str) -> str:
        return self.output("template", "agent", str(CHART), "--namespace", NAMESPACE, *arguments)


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return or_skip(lambda: Helm(peer.environment(tmp_path_factory.mktemp("helm"))))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    or_skip(build)
    with control_plane(tmp_path_factory.mktemp("cluster")) as running:
        privileged = {"pod-security.kubernetes.io/enforce": "privileged"}
        running.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": privileged}})
        for name in ("baseline", "restricted"):
            labels = {"pod-security.kubernetes.io/enforce": name}
            running.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        kubeconfig = running.kubeconfig(running.directory / "kubeconfig")
        kubectl(running, kubeconfig, "apply", "-f", str(or_skip(prometheus_operator.pod_monitors)))
        kubectl(running, kubeconfig, "wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        yield running


@pytest.fixture(scope="module")
def kubeconfig(cluster: ControlPlane) -> Path:
    return cluster.kubeconfig(cluster.directory / "kubeconfig")


def values_of(scenario: str) -> str:
    return f"--values={CHART / 'ci' / f'{scenario}-values.yaml'}"


def objects(text: str) -> Objects:
    """Manifests by their kinds, of which the chart has one each."""
    return {found["kind"]: found for found in yaml.safe_load_all(text) if found}


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def variables(workload: dict[str, Any]) -> dict[str, str]:
    """The container's variables as the kubelet would give them on node-a; those from Secrets have a value made up."""
    given: dict[str, str] = {}
    fields = {"spec.nodeName": "node-a", "status.hostIP": "192.0.2.1"}
    for entry in container(workload)["env"]:
        source = entry.get("valueFrom", {})
        text = entry.get("value") or fields.get(source.get("fieldRef", {}).get("fieldPath"), "authorization=Bearer%20x")
        given[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], text)
    return given


def agent(configuration: str, environment: Mapping[str, str], directory: Path) -> dict[str, Any]:
    """What the agent says is in effect with a file and variables."""
    file = directory / "tcpio-otel.yaml"
    file.write_text(configuration)
    command = [sys.executable, "-m", "tcpio_otel.cli", "config", "-c", str(file), "--secrets"]
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    assert not result.stderr
    found: dict[str, Any] = yaml.safe_load(result.stdout)
    return found


def kubectl(cluster: ControlPlane, kubeconfig: Path, *arguments: str, given: str | None = None) -> str:
    command = [str(cluster.kubectl), f"--kubeconfig={kubeconfig}", *arguments]
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    return result.stdout


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lint(helm: Helm, scenario: str) -> None:
    """Helm finds nothing to complain of, warnings included."""
    helm.output("lint", "--strict", str(CHART), values_of(scenario))


def test_unit_tests_of_the_chart(helm: Helm) -> None:
    """Those under helm/tcpio-otel/tests pass."""
    said = helm.output("unittest", str(CHART))
    assert re.search(r"Tests: +[0-9]+ passed", said), said


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_api_server_takes_it(helm: Helm, cluster: ControlPlane, kubeconfig: Path, scenario: str) -> None:
    """It takes every object, with no field unknown to it and no warning; the pod of `helm test` is one of them."""
    text = helm.template(values_of(scenario))
    assert "Pod" in objects(text)
    arguments = ("apply", "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-n", NAMESPACE, "-f", "-")
    said = kubectl(cluster, kubeconfig, *arguments, given=text)
    assert len(said.splitlines()) == len([found for found in yaml.safe_load_all(text) if found])


@pytest.mark.parametrize("version", ["1.25.0", "1.31.0", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_schemas_of_other_versions_know_it(helm: Helm, scenario: str, version: str) -> None:
    """Every field of every object, from the oldest Kubernetes of which schemas are had to the newest."""
    for found in yaml.safe_load_all(helm.template(values_of(scenario))):
        if found and not found["apiVersion"].startswith(prometheus_operator.GROUP):
            kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_agent_takes_its_file(helm: Helm, tmp_path: Path, scenario: str) -> None:
    """The agent takes the rendered file and variables without a warning, and knows its node and the host's cgroups."""
    rendered = objects(helm.template(values_of(scenario)))
    configuration = rendered["ConfigMap"]["data"]["tcpio-otel.yaml"]
    taken = agent(configuration, variables(rendered["DaemonSet"]), tmp_path)
    assert taken["kubernetes"]["node_name"] == "node-a"
    assert taken["capture"]["cgroup"].startswith("/host/sys/fs/cgroup")
    assert taken["resource"]["attributes"].items() >= {"host.name": "node-a", "k8s.node.name": "node-a"}.items()
    receivers = [taken["export"][name]["endpoint"] for name in ("logs", "traces", "metrics")]
    assert bool(taken["file"]["directory"]) != any([taken["export"]["endpoint"], *receivers])


def test_everything_reaches_the_agent(helm: Helm, tmp_path: Path) -> None:
    """Endpoint, headers, certificates and attributes are what the values say; a comma in a value stays in it."""
    rendered = objects(helm.template(values_of("everything")))
    configuration = rendered["ConfigMap"]["data"]["tcpio-otel.yaml"]
    taken = agent(configuration, variables(rendered["DaemonSet"]), tmp_path)
    assert taken["export"]["endpoint"] == "https://otlp.example.com:4317"
    assert taken["export"]["headers"] == {"authorization": "Bearer x"}
    assert taken["export"]["certificate"] == "/etc/tcpio-otel-tls/ca.crt"
    assert taken["export"]["client_key"] == "/etc/tcpio-otel-tls/tls.key"
    assert taken["resource"]["attributes"]["deployment.environment.name"] == "staging, eu"
    assert list(map(str, taken["capture"]["ports"])) == ["443", "8000-8999"]
    assert taken["metrics"]["listen"] == "0.0.0.0:9464"


def test_node_local_receiver(helm: Helm, tmp_path: Path) -> None:
    """`$(HOST_IP)` in the endpoint is the node's address."""
    rendered = objects(helm.template(values_of("no-kubernetes-api")))
    configuration = rendered["ConfigMap"]["data"]["tcpio-otel.yaml"]
    taken = agent(configuration, variables(rendered["DaemonSet"]), tmp_path)
    assert taken["export"]["endpoint"] == "http://192.0.2.1:4318"


def test_where_the_agent_writes(helm: Helm) -> None:
    """With a root that is read-only, its file of pods and its OTLP/JSON files are in volumes that are not."""
    rendered = objects(helm.template())
    configuration = yaml.safe_load(rendered["ConfigMap"]["data"]["tcpio-otel.yaml"])
    mounts = container(rendered["DaemonSet"])["volumeMounts"]
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    cache, files = configuration["kubernetes"]["cache"], configuration["file"]["directory"]
    assert writable == {str(Path(cache).parent), files}


def test_restart_on_change(helm: Helm) -> None:
    """The pods' template changes with the configuration, and not from one rendering to the next."""

    def template(*arguments: str) -> Any:
        return objects(helm.template(*arguments))["DaemonSet"]["spec"]["template"]

    assert template() == template()
    assert template() != template("--set=config.log.level=debug")


def test_install(helm: Helm, cluster: ControlPlane, kubeconfig: Path) -> None:
    """It installs by its defaults, says how to see the first packet, changes by an upgrade, and leaves nothing."""
    where = ("--namespace", NAMESPACE, f"--kubeconfig={kubeconfig}")
    said = helm.output("install", "agent", str(CHART), values_of("default"), *where)
    command = f"kubectl -n {NAMESPACE} exec daemonset/agent-tcpio-otel -- tcpio-otel watch"
    assert command in said
    path = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/agent-tcpio-otel"
    before = cluster.call("GET", path).json()["metadata"]["generation"]
    helm.output("upgrade", "agent", str(CHART), values_of("default"), "--set=config.log.level=debug", *where)
    assert cluster.call("GET", path).json()["metadata"]["generation"] == before + 1
    helm.output("uninstall", "agent", *where)
    assert cluster.call("GET", path).status == 404


def test_rights(helm: Helm, cluster: ControlPlane, kubeconfig: Path, tmp_path: Path) -> None:
    """The service account may list and watch pods and what names peers; all else it may, every account may."""
    where = ("--namespace", NAMESPACE, f"--kubeconfig={kubeconfig}")
    helm.output("install", "rights", str(CHART), *where)
    cluster.create(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", {"metadata": {"name": "anybody"}})

    def rights(account: str) -> set[str]:
        own = cluster.kubeconfig(tmp_path / account, cluster.token(NAMESPACE, account))
        said = kubectl(cluster, own, "auth", "can-i", "--list", "--no-headers", "-n", NAMESPACE)
        return {" ".join(line.split()) for line in said.splitlines()}

    named = {f"{objects} [] [] [list watch]" for objects in ("pods", "services", "endpointslices.discovery.k8s.io")}
    assert rights("rights-tcpio-otel") - rights("anybody") == named
    token = cluster.token(NAMESPACE, "rights-tcpio-otel")
    for path in ("/api/v1/pods", "/api/v1/pods?watch=1&timeoutSeconds=1", "/api/v1/pods?fieldSelector=spec.nodeName=a"):
        assert cluster.call("GET", path, token=token).status == 200
    for path in (f"/api/v1/namespaces/{NAMESPACE}/pods/any", "/api/v1/nodes", "/api/v1/secrets"):
        assert cluster.call("GET", path, token=token).status == 403
    helm.output("uninstall", "rights", *where)


@pytest.mark.parametrize("level", ["baseline", "restricted"])
def test_pod_security(helm: Helm, cluster: ControlPlane, level: str) -> None:
    """A namespace of another level than `privileged` refuses the pods, as README and notes say."""
    pod = objects(helm.template())["Pod"]
    refused = cluster.call("POST", f"/api/v1/namespaces/{level}/pods", {**pod, "metadata": {"name": "agent"}})
    assert refused.status == 403
    assert "hostPID=true" in refused.json()["message"]


def test_takes_effect_in_a_privileged_namespace(helm: Helm, cluster: ControlPlane) -> None:
    """A namespace of level `privileged` takes the pod, with what it asks for."""
    pod = objects(helm.template())["Pod"]
    asked = {**pod, "metadata": {"name": "agent"}}
    made = cluster.create(f"/api/v1/namespaces/{NAMESPACE}/pods", asked)
    assert made["spec"]["containers"][0]["securityContext"] == pod["spec"]["containers"][0]["securityContext"]
    cluster.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/agent")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("otpl.endpoint=http://c:4318", "additional properties 'otpl' not allowed"),
        ("otlp.endpont=http://c:4318", "additional properties 'endpont' not allowed"),
        ("otlp.endpoint=c:4318", "at '/otlp/endpoint': 'c:4318' does not match pattern"),
        ("otlp.protocol=http", "at '/otlp/protocol': value must be one of"),
        ("config.capture.prots=443", "at '/config/capture': additional properties 'prots' not allowed"),
        ("config.kubernetes.peers={pods,secrets}", "at '/config/kubernetes/peers/1': value must be one of"),
        ("config.capture.loader=ebpf", "at '/config/capture/loader': value must be one of"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy': value must be one of"),
        ("capabilities={BPF,PERFMON,NET_ADMIN,ALL}", "at '/capabilities/3': value must be one of"),
        ("seccompProfile.type=None", "at '/seccompProfile/type': value must be one of"),
        ("podMonitor.interval=often", "at '/podMonitor/interval': 'often' does not match pattern"),
        ("networkPolicy.apiServerPorts={70000}", "maximum: got 70,000, want 65,535"),
        ("terminationGracePeriodSeconds=soon", "at '/terminationGracePeriodSeconds': got string, want integer"),
        (r"podLabels.app\.kubernetes\.io/name=other", "podLabels: app.kubernetes.io/name is set by the chart"),
        ("config.attribution.workloads=false", "config.kubernetes.enabled says of workloads which pods they are"),
        ("config.export.flush_timeout=30s", "must be longer than config.export.flush_timeout"),
    ],
)
def test_wrong_values(helm: Helm, setting: str, message: str) -> None:
    """Helm refuses them, and says where and why."""
    refused = helm.run("template", "agent", str(CHART), f"--set={setting}")
    assert refused.returncode
    assert message in refused.stderr, refused.stderr


def test_package(helm: Helm, tmp_path: Path) -> None:
    """What is shipped has the check that `helm test` runs, and neither scenarios nor unit tests."""
    helm.output("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    shown = helm.output("template", "agent", str(package))
    assert objects(shown) == json.loads(json.dumps(objects(helm.output("template", "agent", str(CHART)))))
    names = subprocess.run(["tar", "tzf", str(package)], capture_output=True, text=True, check=True).stdout
    assert "tcpio-otel/templates/tests/check.yaml" in names
    assert "tcpio-otel/tests/" not in names
    assert "tcpio-otel/ci/" not in names
