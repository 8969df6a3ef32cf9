"""What the records are about: the host, and the attributes that the user gives, as an OpenTelemetry Resource."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics
from opentelemetry.sdk.resources import Resource

from tcpio_otel import __version__, names
from tcpio_otel.attribution.naming import UNKNOWN, Workload
from tcpio_otel.encoding.proto_json import as_dict, compact

DEFAULT_SERVICE = "tcpio-otel"


def host_resource(
    service_name: str | None,
    attributes: Mapping[str, str],
    machine_id: Path = Path("/etc/machine-id"),
    host_name: str | None = None,
) -> Resource:
    """The Resource of this host.

    Args:
        service_name: `service.name`; None: what `attributes` say, else `tcpio-otel`.
        attributes: given by the user; they win over what is found here.
        machine_id: where `host.id` is read; without it there is none.
        host_name: `host.name`; None: this host's.
    """
    found = {
        names.SERVICE_NAME: DEFAULT_SERVICE,
        names.SERVICE_VERSION: __version__,
        names.HOST_NAME: host_name or socket.gethostname(),
        names.OS_TYPE: "linux",
    }
    if machine_id.is_file() and (identifier := machine_id.read_text().strip()):
        found[names.HOST_ID] = identifier
    found.update(attributes)
    if service_name:
        found[names.SERVICE_NAME] = service_name
    # Not Resource.create: that adds what describes an instrumented program, and a random instance id.
    return Resource(found, names.SCHEMA_URL)


Made = dict[int, tuple[Workload, bytes]]
"""Encoded Resources by number, and what each number stood for then."""


class Resources:
    """The Resource of each workload, by its number; 0 is the agent itself and whatever nobody can name.

    Args:
        own: the agent's; workloads have its attributes too, but for those that would say who they are.
        workload: what a number stands for.
    """

    def __init__(self, own: Resource, workload: Callable[[int], Workload]) -> None:
        self._own, self._workload = own, workload
        self._host = {key: value for key, value in own.attributes.items() if not key.startswith(_OF_A_WORKLOAD)}
        self._protobuf: Made = {}
        self._json: Made = {}

    def of(self, workload: Workload) -> Resource:
        """As the SDK has it."""
        if workload == UNKNOWN:
            return self._own
        return Resource({**self._host, **workload_attributes(workload)}, names.SCHEMA_URL)

    def resource(self, number: int) -> Resource:
        """Likewise, by the workload's number."""
        return self.of(self._workload(number)) if number else self._own

    def protobuf(self, number: int) -> bytes:
        """Serialised."""
        return self._encoded(number, self._protobuf, lambda found: found.SerializeToString(deterministic=True))

    def json(self, number: int) -> bytes:
        """As OTLP/JSON."""
        return self._encoded(number, self._json, lambda found: compact(as_dict(found)))

    def _encoded(self, number: int, made: Made, encode: Callable[[Any], bytes]) -> bytes:
        workload = self._workload(number) if number else UNKNOWN
        known = made.get(number)
        if known is None or known[0] is not workload:
            known = made[number] = workload, encode(message(self.resource(number)))
        return known[1]


_OF_A_WORKLOAD = ("service.", "process.", "container.", "k8s.pod.", "k8s.container.")


def workload_attributes(workload: Workload) -> dict[str, str]:
    """What says which workload it is (docs/attributes.md); what is not known is left out.

    `service.name` is the unit's or else the program's: nobody has configured a name here.
    """
    place = workload.place
    contained = place.container_id or place.pod_uid
    found = {
        names.SERVICE_NAME: place.unit or workload.program,
        names.CONTAINER_ID: place.container_id,
        names.CONTAINER_RUNTIME: place.runtime,
        names.POD_UID: place.pod_uid,
        names.POD_QOS: place.qos_class,
        names.EXECUTABLE_NAME: "" if contained else workload.program,
    }
    return {name: value for name, value in found.items() if value} | dict(workload.told)


def message(resource: Resource) -> Any:
    """A Resource as `opentelemetry.proto.resource.v1.Resource`."""
    return encode_metrics(MetricsData([ResourceMetrics(resource, [], names.SCHEMA_URL)])).resource_metrics[0].resource
