"""Pods as the API server has them to attributes: names, owners, labels, and what they say of themselves.

Pure. The names and rules are OpenTelemetry's: semantic conventions for Kubernetes, and
https://opentelemetry.io/docs/specs/semconv/non-normative/k8s-attributes/.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tcpio_otel import names

OWN_ATTRIBUTES = "resource.opentelemetry.io/"
"""Annotations that begin so are attributes."""

_MIRRORED = "kubernetes.io/config.hash"  # of a static pod: the uid that the kubelet gave it
_TEMPLATE = "pod-template-hash"
_PART = "app.kubernetes.io/"
_OF_A_CRON_JOB = re.compile(r"(?P<name>.+)-\d{8,}")  # minutes since 1970 (pkg/controller/cronjob/utils.go)
_OWNERS = {
    "ReplicaSet": names.REPLICA_SET,
    "StatefulSet": names.STATEFUL_SET,
    "DaemonSet": names.DAEMON_SET,
    "Job": names.JOB,
    "ReplicationController": names.REPLICATION_CONTROLLER,
}
_NAMED_AFTER = (
    names.DEPLOYMENT, names.REPLICA_SET, names.STATEFUL_SET, names.DAEMON_SET, names.CRON_JOB, names.JOB,
    names.POD_NAME, names.CONTAINER_NAME,
)  # fmt: skip
"""Of these the first that is known is a workload's `service.name`, when nobody gave it one."""


Item = Mapping[str, Any]
"""An object of the API, as JSON has it."""


class Container(NamedTuple):
    """A container of a pod: its name in the pod's specification, how often it was started again, its image."""

    name: str
    restarts: int
    image: str


@dataclass(frozen=True)
class Pod:
    """What is kept of a pod. `uids` are those that its cgroups may have; `containers` are by id, 64 hex digits."""

    uids: tuple[str, ...]
    attributes: Mapping[str, str]
    said: Mapping[str, str]
    containers: Mapping[str, Container]


@dataclass(frozen=True)
class Wanted:
    """What of a pod becomes attributes, beyond its names and owners.

    Attributes:
        labels, annotations: keys of those that become `k8s.pod.label.*` and `k8s.pod.annotation.*`.
        service_labels: whether `app.kubernetes.io/*` labels name the service.
    """

    labels: Sequence[str] = ()
    annotations: Sequence[str] = ()
    service_labels: bool = False


def pod_of(item: Item, wanted: Wanted) -> Pod:
    """A pod of the API (core/v1 Pod, as JSON)."""
    metadata, status = item["metadata"], item.get("status", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    found = {
        names.POD_UID: metadata["uid"],
        names.POD_NAME: metadata["name"],
        names.NAMESPACE: metadata["namespace"],
        names.NODE: item.get("spec", {}).get("nodeName", ""),
        names.POD_START: status.get("startTime", ""),
        **_owner(metadata, labels),
    }
    for key in wanted.labels:
        found[names.POD_LABEL.replace("*", key)] = labels.get(key, "")
    for key in wanted.annotations:
        found[names.POD_ANNOTATION.replace("*", key)] = annotations.get(key, "")
    said = {
        names.SERVICE_NAMESPACE: metadata["namespace"],
        **(_by_labels(labels) if wanted.service_labels else {}),
        **{key.removeprefix(OWN_ATTRIBUTES): value
           for key, value in annotations.items() if key.startswith(OWN_ATTRIBUTES)},
    }  # fmt: skip
    uids = tuple(uid for uid in (metadata["uid"], annotations.get(_MIRRORED)) if uid)
    return Pod(uids, _known(found), _known(said), _containers(status))


def attributes_of(pod: Pod, container_id: str) -> dict[str, str]:
    """The attributes of one container of a pod; of the pod alone, where the container is not in its status (yet)."""
    found = dict(pod.attributes)
    image = ""
    if container := pod.containers.get(container_id):
        image = container.image
        found[names.CONTAINER_NAME] = container.name
        found[names.CONTAINER_RESTARTS] = str(container.restarts)
        found[names.CONTAINER_IMAGE] = image.partition("@")[0].rpartition(":")[0] or image
    named = (found.get(key) for key in (names.NAMESPACE, names.POD_NAME, names.CONTAINER_NAME))
    said = {
        names.SERVICE_NAME: next(found[key] for key in _NAMED_AFTER if key in found),
        names.SERVICE_VERSION: _version(image),
        names.SERVICE_INSTANCE: ".".join(name for name in named if name),
        **pod.said,
    }
    return _known({**found, **said})


def _owner(metadata: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, str]:
    """Who made the pod, and who made that: by name, so that it takes no right to read others' objects."""
    owners = metadata.get("ownerReferences") or ()
    owner = next((one for one in owners if one.get("controller")), None)
    if owner is None or owner["kind"] not in _OWNERS:
        return {}
    kind, name = owner["kind"], owner["name"]
    found = {_OWNERS[kind]: name}
    template = labels.get(_TEMPLATE)
    if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
        found[names.DEPLOYMENT] = name.removesuffix(f"-{template}")
    if kind == "Job" and (cron := _OF_A_CRON_JOB.fullmatch(name)):
        found[names.CRON_JOB] = cron["name"]
    return found


def _by_labels(labels: Mapping[str, str]) -> dict[str, str]:
    name = labels.get(f"{_PART}instance") or labels.get(f"{_PART}name", "")
    return {
        names.SERVICE_NAME: name,
        names.SERVICE_VERSION: labels.get(f"{_PART}version", ""),
    }


def _version(image: str) -> str:
    """What of an image's name tells its version: tag, digest, or both."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return "@".join(part for part in (tag, digest) if part)


def _containers(status: Mapping[str, Any]) -> dict[str, Container]:
    kinds = ("initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")
    return {
        identifier.rpartition("://")[2]: Container(one["name"], one.get("restartCount", 0), one.get("image", ""))
        for kind in kinds
        for one in status.get(kind) or ()
        for identifier in _identifiers(one)
    }


def _identifiers(status: Mapping[str, Any]) -> list[str]:
    """Of a container, and of what it was before it was started again: its last records may still come."""
    before = (status.get("lastState") or {}).get("terminated") or {}
    return [found for found in (before.get("containerID"), status.get("containerID")) if found]


def _known(found: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if value}
