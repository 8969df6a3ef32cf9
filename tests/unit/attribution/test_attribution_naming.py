"""Which container, pod or unit the names of cgroups stand for, by driver and runtime."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.attribution.naming import Place, place_of

ID = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
UID = "6d3b2f1e-0a5c-4c1e-9d7f-1234567890ab"
LOW = UID.replace("-", "_")
STATIC = "b5d9a6b2f2d1f6a0a4c3f1f2e3d4c5b6"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        # The kubelet with systemd's driver
        (
            f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{LOW}.slice/cri-containerd-{ID}.scope",
            Place(ID, "containerd", UID, "Burstable"),
        ),
        (
            f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{LOW}.slice/crio-{ID}.scope",
            Place(ID, "cri-o", UID, "BestEffort"),
        ),
        (
            f"kubepods.slice/kubepods-pod{LOW}.slice/docker-{ID}.scope",
            Place(ID, "docker", UID, "Guaranteed"),
        ),
        (
            f"kubepods.slice/kubepods-pod{STATIC}.slice/cri-containerd-{ID}.scope",
            Place(ID, "containerd", STATIC, "Guaranteed"),
        ),
        # with a cgroup root of its own, as kind and some distributions have it
        (
            f"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
            f"kubelet-kubepods-burstable-pod{LOW}.slice/cri-containerd-{ID}.scope",
            Place(ID, "containerd", UID, "Burstable"),
        ),
        # with the cgroupfs driver
        (f"kubepods/burstable/pod{UID}/{ID}", Place(ID, "", UID, "Burstable")),
        (f"kubepods/besteffort/pod{UID}/crio-{ID}", Place(ID, "cri-o", UID, "BestEffort")),
        (f"kubepods/pod{UID}/{ID}", Place(ID, "", UID, "Guaranteed")),
        # a node that is a container itself
        (f"docker/{OTHER}/kubelet/kubepods/besteffort/pod{UID}/{ID}", Place(ID, "", UID, "BestEffort")),
        # containerd as a unit, its containers in runc's notation
        (
            f"system.slice/containerd.service/kubepods-burstable-pod{LOW}.slice:cri-containerd:{ID}",
            Place(ID, "containerd", UID, "Burstable"),
        ),
        # what looks after a container, and what runs within one
        (f"kubepods.slice/kubepods-pod{LOW}.slice/crio-conmon-{ID}.scope", Place("", "", UID, "Guaranteed")),
        (
            f"kubepods.slice/kubepods-pod{LOW}.slice/crio-{ID}.scope/container/init.scope",
            Place(ID, "cri-o", UID, "Guaranteed"),
        ),
        (
            f"kubepods.slice/kubepods-pod{LOW}.slice/cri-containerd-{ID}.scope/docker/{OTHER}",
            Place(ID, "containerd", UID, "Guaranteed"),
        ),
        (f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{LOW}.slice", Place("", "", UID, "Burstable")),
        # without Kubernetes
        (f"system.slice/docker-{ID}.scope", Place(ID, "docker")),
        (f"docker/{ID}", Place(ID, "docker")),
        (f"machine.slice/libpod-{ID}.scope/container", Place(ID, "podman")),
        (f"machine.slice/libpod-conmon-{ID}.scope", Place(unit=f"libpod-conmon-{ID}")),
        (f"user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope", Place(ID, "podman")),
        # units
        ("system.slice/nginx.service", Place(unit="nginx")),
        ("system.slice/system-postgresql.slice/postgresql@15-main.service", Place(unit="postgresql@15-main")),
        (r"system.slice/my\x2dapp.service/worker", Place(unit="my-app")),
        ("init.scope", Place(unit="init")),
        ("user.slice/user-0.slice/session-3.scope", Place(unit="session-3")),
        ("", Place()),
        ("kubepods", Place()),
        ("system.slice", Place()),
        # near misses
        (f"system.slice/{ID[:63]}", Place()),
        (f"kubepods/podx{UID}", Place()),
        (f"system.slice/{ID.upper()}.scope", Place(unit=ID.upper())),
    ],
)
def test_a_path_names_its_container_pod_and_unit(path: str, place: Place) -> None:
    """Each driver's and runtime's own way to write it."""
    assert place_of(path.split("/") if path else []) == place


@given(st.lists(st.text(max_size=90), max_size=6))
def test_no_name_is_too_odd(names: list[str]) -> None:
    """Whatever directories are called, there is an answer."""
    assert isinstance(place_of(names), Place)
