"""Names of cgroups to what they stand for: the container, the pod, the systemd unit.

How the directories are named is no standard but a habit of each: the kubelet (cgroupfs and systemd drivers,
pkg/kubelet/cm/{cgroup_manager_linux,pod_container_manager_linux}.go), containerd's CRI plugin, CRI-O, Docker and
cri-dockerd, Podman, systemd (systemd.unit(5)). Pure: names in, a place out.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from tcpio_otel.batch import Endpoint

_CONTAINER = re.compile(r"(?:(?P<prefix>[a-z][a-z_-]*?)-)?(?P<id>[0-9a-f]{64})(?:\.scope)?")
_POD = re.compile(
    r"(?:[a-z0-9]+-)*?(?:(?P<qos>burstable|besteffort)-)?"
    r"pod(?P<uid>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?"
)
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_HELPERS = ("conmon", "crio-conmon", "libpod-conmon")
"""Who looks after a container from a cgroup of its own, named after it."""

_RUNTIMES = {
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "docker": "docker",
    "libpod": "podman",
}
_CLASSES = {"burstable": "Burstable", "besteffort": "BestEffort"}


class Place(NamedTuple):
    """Where a process is at home; what is not known is empty.

    Attributes:
        container_id: 64 hex digits.
        runtime: of the container, where its name tells.
        pod_uid: as the API server has it; a static pod's is that of its file, 32 hex digits.
        qos_class: of the pod: Guaranteed, Burstable or BestEffort.
        unit: the systemd service or scope, without its ending; empty inside a container or pod.
    """

    container_id: str = ""
    runtime: str = ""
    pod_uid: str = ""
    qos_class: str = ""
    unit: str = ""


class Workload(NamedTuple):
    """What a connection belongs to on this host. `program` is the executable's name; of a container, the first seen.

    `told` are attributes that somebody else knows it by: the API server, of a pod.
    """

    place: Place
    program: str
    told: tuple[tuple[str, str], ...] = ()


UNKNOWN = Workload(Place(), "")


class Kind(StrEnum):
    """What an address is: `tcp.peer.kind`."""

    POD = "pod"
    SERVICE = "service"
    NODE = "node"
    EXTERNAL = "external"


class Meaning(NamedTuple):
    """What an address stands for: attributes as the thing's own Resource would have them."""

    kind: Kind
    attributes: tuple[tuple[str, str], ...] = ()


class Known(NamedTuple):
    """What is known of a peer: what its address means; who really answers, if another; and what that means."""

    meaning: Meaning | None = None
    real: Endpoint | None = None
    behind: Meaning | None = None


NOTHING = Known()


def place_of(names: Sequence[str]) -> Place:
    """What the directories from the root of a hierarchy down to a cgroup stand for.

    The first pod counts, and the first container in it: what runs further down (Docker in a pod, systemd in a
    container) belongs to that. Without a pod it is the first container.
    """
    found, above = Place(), ""
    # With systemd as init but not as driver, runc's own notation stands in one name: slice, prefix, id.
    for part in (part for name in names for part in name.split(":")):
        container = _CONTAINER.fullmatch(part)
        if not found.pod_uid and (pod := _POD.fullmatch(part)):
            qos_class = _CLASSES.get(pod["qos"] or above, "Guaranteed")
            found = Place(pod_uid=_dashed(pod["uid"]), qos_class=qos_class)
        elif container and container["prefix"] not in _HELPERS:
            if not found.container_id:
                runtime = _RUNTIMES.get(container["prefix"] or above, "")
                found = found._replace(container_id=container["id"], runtime=runtime, unit="")
        elif part.endswith((".service", ".scope")) and not found.pod_uid and not found.container_id:
            found = found._replace(unit=_unescaped(part.rpartition(".")[0]))
        above = part
    return found


def _dashed(uid: str) -> str:
    """A pod's uid as the API server writes it: systemd's driver turns dashes, which mean depth to it, around."""
    return uid.replace("_", "-")


def _unescaped(unit: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), unit)
