"""Objects of a cluster to what its addresses mean."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.attribution.addresses import (
    REMEMBERED_S,
    Addresses,
    Directory,
    Key,
    by_endpoint_slice,
    by_node,
    by_pod,
    by_service,
    packed,
)
from tcpio_otel.attribution.naming import Kind, Meaning
from tcpio_otel.attribution.pods import Wanted
from tcpio_otel.batch import Endpoint

EXTERNAL = Meaning(Kind.EXTERNAL)


def address(text: str) -> bytes:
    """As records have it."""
    found = packed(text)
    assert found
    return found


def pod(name: str, *ips: str, phase: str = "Running", **spec: Any) -> dict[str, Any]:
    """As the API server has it."""
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}", "labels": {"tier": "front"}},
        "spec": {"nodeName": "node-1", **spec},
        "status": {"phase": phase, "podIPs": [{"ip": ip} for ip in ips], "startTime": "2026-11-26T01:02:03Z"},
    }


def service(name: str, spec: dict[str, Any], *ingress: str) -> dict[str, Any]:
    """As the API server has it."""
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [{"ip": ip} for ip in ingress]} if ingress else {}},
    }


def slice_of(*endpoints: tuple[str, str], ports: tuple[int, ...] = (8080,)) -> dict[str, Any]:
    """An EndpointSlice: addresses, and the pods that have them."""
    return {
        "metadata": {"name": "shop-1", "namespace": "shop", "uid": "uid-slice"},
        "ports": [{"port": port} for port in ports],
        "endpoints": [
            {"addresses": [ip], "nodeName": "node-2", "targetRef": {"kind": "Pod", "name": name, "namespace": "shop"}}
            for ip, name in endpoints
        ],
    }


def node(name: str, *ips: str) -> dict[str, Any]:
    """As the API server has it; a host name is no address."""
    addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
    return {"metadata": {"name": name}, "status": {"addresses": [*addresses, {"type": "Hostname", "address": name}]}}


def test_a_pod_has_its_addresses_while_it_runs() -> None:
    """Of both families; none of its own on its node's network, and none that another may have by now."""
    found = by_pod(pod("web", "10.1.2.3", "fd00::3"), Wanted(labels=["tier"]))
    assert set(found) == {address("10.1.2.3"), address("fd00::3")}
    (meaning,) = set(found.values())
    assert meaning.kind is Kind.POD
    assert dict(meaning.attributes) == {
        "k8s.pod.name": "web", "k8s.pod.uid": "uid-web", "k8s.namespace.name": "shop", "k8s.node.name": "node-1",
        "k8s.pod.label.tier": "front", "service.name": "web", "service.namespace": "shop",
    }  # fmt: skip
    assert by_pod(pod("web", "10.1.2.3", phase="Succeeded"), Wanted()) == {}
    assert by_pod(pod("web", "10.1.2.3", phase="Failed"), Wanted()) == {}
    assert by_pod(pod("web", "10.1.2.3", hostNetwork=True), Wanted()) == {}
    assert by_pod({"metadata": pod("new")["metadata"]}, Wanted()) == {}


def test_a_service_is_reached_at_many_addresses() -> None:
    """Its own, those of balancers and of others; by its ports on every node; a headless one at none."""
    ports = [{"port": 80, "nodePort": 30080}, {"port": 53, "nodePort": 30053, "protocol": "UDP"}, {"port": 81}]
    spec = {"clusterIPs": ["10.96.0.10", "fd96::10"], "externalIPs": ["192.0.2.7"], "ports": ports}
    found = by_service(service("web", spec, "198.51.100.4"))
    texts = ("10.96.0.10", "fd96::10", "192.0.2.7", "198.51.100.4")
    assert set(found) == {*map(address, texts), 30080}
    assert by_service(service("headless", {"clusterIP": "None", "clusterIPs": ["None"]})) == {}
    assert by_service(service("elsewhere", {"type": "ExternalName", "externalName": "example.com"})) == {}


@pytest.mark.parametrize("item", [{"endpoints": None}, {"endpoints": [{"addresses": ["web.example.com"]}]}, {}])
def test_a_slice_without_pods_says_nothing(item: dict[str, Any]) -> None:
    """None yet, names instead of addresses, or others than pods."""
    assert by_endpoint_slice({"metadata": slice_of()["metadata"], **item}) == {}


def known(watched: tuple[str, ...], *, complete: bool = False) -> Addresses:
    """A cluster of which such objects are known."""
    told: dict[str, Any] = {
        "pods": (lambda item: by_pod(item, Wanted()), [pod("front", "10.1.0.1"), pod("back", "10.1.0.2")]),
        "endpointslices": (by_endpoint_slice, [slice_of(("10.1.0.2", "back"), ("10.0.0.9", "on-its-node"))]),
        "services": (by_service, [service("web", {"clusterIPs": ["10.96.0.1"], "ports": [{"nodePort": 30080}]})]),
        "nodes": (by_node, [node("node-1", "10.0.0.9", "fd00::9")]),
    }
    directories = {}
    for name in watched:
        read, items = told[name]
        directories[name] = Directory(read)
        for number, item in enumerate(items):
            directories[name].take(f"{name}-{number}", item)
    return Addresses(Directory(lambda item: by_pod(item, Wanted())), directories, lambda: complete)


def named(meaning: Meaning | None) -> tuple[str, str] | None:
    """Kind and name."""
    if meaning is None:
        return None
    return meaning.kind, next((value for name, value in meaning.attributes if name == f"k8s.{meaning.kind}.name"), "")


@pytest.mark.parametrize(
    ("watched", "expected"),
    [
        ((), [None] * 6),
        (("services",), [None, None, ("service", "web"), None, None, None]),
        # A pod that listens there is certain; who has an address that may be a node's is not.
        (("services", "endpointslices"), [
            None, ("pod", "back"), ("service", "web"), ("pod", "on-its-node"), None, None,
        ]),
        (("services", "endpointslices", "nodes"), [
            None, ("pod", "back"), ("service", "web"), ("pod", "on-its-node"), ("service", "web"), ("node", "node-1"),
        ]),
        (("services", "nodes", "pods"), [
            ("pod", "front"), ("pod", "back"), ("service", "web"), ("node", "node-1"), ("service", "web"),
            ("node", "node-1"),
        ]),
    ],
)  # fmt: skip
def test_what_is_watched_decides_what_is_known(
    watched: tuple[str, ...], expected: list[tuple[str, str] | None]
) -> None:
    """Never more than is certain."""
    addresses = known(watched)
    asked = [
        ("10.1.0.1", 55000), ("10.1.0.2", 8080), ("10.96.0.1", 80), ("10.0.0.9", 8080), ("10.0.0.9", 30080),
        ("10.0.0.9", 55000),
    ]  # fmt: skip
    assert [named(addresses.meaning(address(text), port)) for text, port in asked] == expected


def test_a_client_behind_a_service_is_known_where_it_cannot_be_a_node() -> None:
    """By its address alone: its port is any."""
    at = address("10.1.0.2"), 55000
    assert known(("endpointslices",)).meaning(*at) is None
    assert named(known(("endpointslices", "nodes")).meaning(*at)) == ("pod", "back")


def test_outside_is_what_is_certainly_no_part_of_the_cluster() -> None:
    """The public IPv4 Internet, or, once everything of the cluster is known, whatever is left."""
    texts = ("9.9.9.9", "192.168.1.1", "2600::1", "127.0.0.1", "::1", "169.254.169.254", "fe80::1")
    partly, wholly = known(("services",)), known(("services", "nodes", "pods"), complete=True)
    assert [partly.outside(address(text)) for text in texts] == [EXTERNAL, *[None] * 6]
    assert [wholly.outside(address(text)) for text in texts] == [EXTERNAL, EXTERNAL, EXTERNAL, *[None] * 4]
    assert [partly.may_appear(address(text)) for text in texts] == [False, True, True, False, False, False, False]


def test_an_address_outlives_its_pod_by_a_little() -> None:
    """Its last records may still come; who has it next is told at once."""
    clock = [0.0]
    directory = Directory(lambda item: by_pod(item, Wanted()), lambda: clock[0])
    key = address("10.1.2.3")
    directory.take("a", pod("old", "10.1.2.3"))
    directory.gone("a")
    assert named(directory.get(key)) == ("pod", "old")
    directory.take("b", pod("new", "10.1.2.3"))
    assert named(directory.get(key)) == ("pod", "new")
    directory.gone("b")
    clock[0] += REMEMBERED_S - 1
    assert named(directory.get(key)) == ("pod", "new")
    clock[0] += 1
    assert directory.get(key) is None
    directory.pause()
    assert not directory._gone
    assert not directory._meanings


class _Slow:
    """The obvious way: every object, in the order in which they last claimed an address."""

    def __init__(self) -> None:
        self.claims: list[tuple[str, Key, Meaning]] = []
        self.left: dict[Key, tuple[Meaning, float]] = {}

    def set(self, uid: str, keys: dict[Key, Meaning], now_s: float) -> None:
        for claim in [claim for claim in self.claims if claim[0] == uid and keys.get(claim[1]) != claim[2]]:
            self.claims.remove(claim)
            if all(other[1] != claim[1] for other in self.claims):
                self.left[claim[1]] = claim[2], now_s
        held = {claim[1] for claim in self.claims if claim[0] == uid}
        self.claims += [(uid, key, meaning) for key, meaning in keys.items() if key not in held]

    def get(self, key: Key, now_s: float) -> Meaning | None:
        live = [claim[2] for claim in self.claims if claim[1] == key]
        if live:
            return live[-1]
        meaning, since_s = self.left.get(key, (None, 0))
        return meaning if meaning and now_s - since_s < REMEMBERED_S else None


_KEYS: list[Key] = [address("10.0.0.1"), 30080, Endpoint(address("10.0.0.1"), 80)]
_STEPS = st.one_of(
    st.tuples(
        st.just("take"), st.sampled_from("abc"),
        st.dictionaries(st.sampled_from(_KEYS), st.sampled_from("xyz"), max_size=3),
    ),
    st.tuples(st.just("gone"), st.sampled_from("abc")),
    st.tuples(st.just("listed"), st.sets(st.sampled_from("abc"))),
    st.tuples(st.just("later"), st.floats(0, 12)),
    st.tuples(st.just("pause")),
)  # fmt: skip


@given(st.lists(_STEPS, max_size=40))
def test_a_directory_is_as_the_obvious_one(steps: list[Any]) -> None:
    """Whatever comes, changes and goes, and in whatever order."""
    clock = [0.0]
    slow, held = _Slow(), set()
    directory = Directory(lambda item: dict(item["keys"]), lambda: clock[0])
    for step, *given_ in steps:
        if step == "take":
            uid, names = given_
            keys = {key: Meaning(Kind.POD, (("name", name),)) for key, name in names.items()}
            directory.take(uid, {"keys": keys})
            slow.set(uid, keys, clock[0])
            held.add(uid)
        elif step == "gone":
            directory.gone(given_[0])
            slow.set(given_[0], {}, clock[0])
            held.discard(given_[0])
        elif step == "listed":
            directory.listed(given_[0])
            for uid in list(directory._items.keys() | held):
                if uid not in given_[0]:
                    slow.set(uid, {}, clock[0])
            held &= given_[0]
        elif step == "later":
            clock[0] += given_[0]
        else:
            directory.pause()
        assert [directory.get(key) for key in _KEYS] == [slow.get(key, clock[0]) for key in _KEYS]
