"""What the records are said to be about."""

import json
from pathlib import Path

from tcpio_otel import __version__, names
from tcpio_otel.attribution.naming import UNKNOWN, Place, Workload
from tcpio_otel.encoding import proto_json
from tcpio_otel.encoding.resource import Resources, host_resource, message


def attributes(machine_id: Path = Path("/nonexistent"), service: str | None = None, **more: str) -> dict[str, str]:
    """The attributes of a resource."""
    return dict(host_resource(service, more, machine_id, host_name="node-1").attributes)  # type: ignore[arg-type] # text


def test_the_host_and_the_service_are_named(tmp_path: Path) -> None:
    """host.id is the machine-id, without the newline of its file."""
    machine_id = tmp_path / "machine-id"
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    assert attributes(machine_id) == {
        "service.name": "tcpio-otel",
        "service.version": __version__,
        "host.name": "node-1",
        "host.id": "0123456789abcdef0123456789abcdef",
        "os.type": "linux",
    }


def test_a_host_without_machine_id_has_no_host_id(tmp_path: Path) -> None:
    """Containers often have none, or an empty one."""
    (tmp_path / "machine-id").touch()
    assert "host.id" not in attributes(tmp_path / "machine-id")
    assert "host.id" not in attributes(tmp_path / "missing")


def test_what_the_user_says_wins_and_the_service_name_most() -> None:
    """OTEL_SERVICE_NAME beats service.name in OTEL_RESOURCE_ATTRIBUTES, which beats what is found."""
    more = {"host.name": "given", "service.name": "from-attributes", "team": "net"}
    found = attributes(**more)
    assert {name: found[name] for name in more} == more
    assert attributes(service="edge", **more)["service.name"] == "edge"


def test_it_describes_the_host_and_not_an_instrumented_program() -> None:
    """No telemetry.sdk.*, no random service.instance.id: two runs of the agent are the same resource."""
    resource = host_resource(None, {})
    assert resource == host_resource(None, {})
    assert not [name for name in resource.attributes if name.startswith(("telemetry.", "service.instance"))]
    assert resource.schema_url == names.SCHEMA_URL


def test_its_message_holds_the_same() -> None:
    """As protobuf, for the envelopes of all signals."""
    resource = host_resource("edge", {"team": "net"})
    pairs = message(resource).attributes
    assert {pair.key: pair.value.string_value for pair in pairs} == dict(resource.attributes)


def test_each_workload_is_a_resource_of_its_own() -> None:
    """With what says where it is, and with what the user gives, but for what would say who it is."""
    given = {"deployment.environment.name": "test", "service.version": "9", "k8s.pod.name": "x", "k8s.node.name": "n"}
    place = Place("c" * 64, "containerd", "some-uid", "Burstable")
    known = [UNKNOWN, Workload(place, "nginx"), Workload(Place(unit="cron"), "bash"), Workload(Place(), "curl")]
    resources = Resources(host_resource("watcher", given, host_name="edge"), known.__getitem__)
    own, container, unit, program = (dict(resources.resource(number).attributes) for number in range(4))
    assert (own["service.name"], own["service.version"], own["k8s.pod.name"]) == ("watcher", "9", "x")
    assert container | {"host.id": ""} == {
        "service.name": "nginx",
        "container.id": "c" * 64,
        "container.runtime.name": "containerd",
        "k8s.pod.uid": "some-uid",
        "k8s.pod.qos_class": "Burstable",
        "host.name": "edge",
        "host.id": "",
        "os.type": "linux",
        "deployment.environment.name": "test",
        "k8s.node.name": "n",
    }
    assert (unit["service.name"], unit["process.executable.name"]) == ("cron", "bash")
    assert (program["service.name"], program["process.executable.name"]) == ("curl", "curl")
    assert message(resources.resource(1)).SerializeToString(deterministic=True) == resources.protobuf(1)
    assert json.loads(resources.json(1)) == proto_json.as_dict(message(resources.resource(1)))


def test_a_number_that_means_another_workload_is_made_anew() -> None:
    """Numbers are used again."""
    known = [UNKNOWN, Workload(Place(), "one")]
    resources = Resources(host_resource("watcher", {}), known.__getitem__)
    before = resources.protobuf(1)
    known[1] = Workload(Place(), "other")
    assert b"one" in before
    assert b"other" in resources.protobuf(1)
