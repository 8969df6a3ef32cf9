"""What the records are about: the host, and the attributes that the user gives, as an OpenTelemetry Resource."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics
from opentelemetry.sdk.resources import Resource

from tcpio_otel import __version__
from tcpio_otel.encoding import names

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
        "service.name": DEFAULT_SERVICE,
        "service.version": __version__,
        "host.name": host_name or socket.gethostname(),
        "os.type": "linux",
    }
    if machine_id.is_file() and (identifier := machine_id.read_text().strip()):
        found["host.id"] = identifier
    found.update(attributes)
    if service_name:
        found["service.name"] = service_name
    # Not Resource.create: that adds what describes an instrumented program, and a random instance id.
    return Resource(found, names.SCHEMA_URL)


def message(resource: Resource) -> Any:
    """A Resource as `opentelemetry.proto.resource.v1.Resource`."""
    return encode_metrics(MetricsData([ResourceMetrics(resource, [], names.SCHEMA_URL)])).resource_metrics[0].resource
