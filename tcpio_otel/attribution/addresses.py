"""Addresses to what stands behind them in a cluster: pods, Services, nodes, and what is outside.

Objects of the API server (core/v1 Pod, Service and Node, discovery.k8s.io/v1 EndpointSlice, as JSON) say which
addresses are theirs. Pure, but for the clock that it is given.
"""

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tcpio_otel import names
from tcpio_otel.attribution.naming import Kind, Meaning
from tcpio_otel.attribution.pods import Item, Wanted, attributes_of, pod_of
from tcpio_otel.batch import IPV4_PREFIX, Endpoint

REMEMBERED_S = 10.0
"""For how long an address still means what is gone: its last records may still come, and soon it is another's."""

Key = bytes | int | Endpoint
"""An address (16 bytes, IPv4 as ::ffff:a.b.c.d), a Service's port on every node, or an address with a port."""

Reader = Callable[[Item], dict[Key, Meaning]]


def packed(text: str) -> bytes | None:
    """An address as records have it; None for what is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return IPV4_PREFIX + address.packed if address.version == 4 else address.packed


_OF_ONE_START = (names.POD_START, names.SERVICE_INSTANCE, names.SERVICE_VERSION)
"""What a pod's own records say of it, and nobody needs to know of a peer."""


def by_pod(item: Item, wanted: Wanted) -> dict[Key, Meaning]:
    """Of a pod: nothing once it has ended, as its address may be another's; nor on its node's own network."""
    status = item.get("status", {})
    if item.get("spec", {}).get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return {}
    told = attributes_of(pod_of(item, wanted), "")
    found = {name: value for name, value in told.items() if name not in _OF_ONE_START}
    return _all(_addresses(each.get("ip") for each in status.get("podIPs") or ()), Kind.POD, found)


def by_endpoint_slice(item: Item) -> dict[Key, Meaning]:
    """Of the pods behind a Service: where they listen, and their addresses, which may be their nodes' own."""
    found: dict[Key, Meaning] = {}
    ports = [port["port"] for port in item.get("ports") or () if port.get("port")]
    for endpoint in item.get("endpoints") or ():
        target = endpoint.get("targetRef") or {}
        if target.get("kind") == "Pod":
            attributes = {
                names.POD_NAME: target.get("name", ""),
                names.POD_UID: target.get("uid", ""),
                names.NAMESPACE: target.get("namespace") or item["metadata"]["namespace"],
                names.NODE: endpoint.get("nodeName") or "",
            }
            addresses = _addresses(endpoint.get("addresses") or ())
            listening = [Endpoint(address, port) for address in addresses for port in ports]
            found |= _all([*addresses, *listening], Kind.POD, attributes)
    return found


def by_service(item: Item) -> dict[Key, Meaning]:
    """Of a Service: the addresses that it is reached at, and its ports on every node."""
    spec, balancer = item.get("spec", {}), item.get("status", {}).get("loadBalancer") or {}
    metadata = item["metadata"]
    attributes = {names.SERVICE: metadata["name"], names.NAMESPACE: metadata["namespace"]}
    texts = [
        *(spec.get("clusterIPs") or [spec.get("clusterIP", "")]),  # "None" where it is headless
        *(spec.get("externalIPs") or ()),
        *(ingress.get("ip") for ingress in balancer.get("ingress") or ()),
    ]
    ports = [port["nodePort"] for port in spec.get("ports") or () if port.get("nodePort")
             and port.get("protocol", "TCP") == "TCP"]  # fmt: skip
    return _all([*_addresses(texts), *ports], Kind.SERVICE, attributes)


def by_node(item: Item) -> dict[Key, Meaning]:
    """Of a node."""
    texts = (each["address"] for each in item.get("status", {}).get("addresses") or ()
             if each.get("type") in ("InternalIP", "ExternalIP"))  # fmt: skip
    return _all(_addresses(texts), Kind.NODE, {names.NODE: item["metadata"]["name"]})


def _addresses(texts: Iterable[Any]) -> list[bytes]:
    return [address for text in texts if text and (address := packed(text)) is not None]


def _all(keys: Iterable[Key], kind: Kind, found: Mapping[str, str]) -> dict[Key, Meaning]:
    meaning = Meaning(kind, tuple((name, value) for name, value in found.items() if value))
    return dict.fromkeys(keys, meaning)


class Directory:
    """What addresses mean, of objects of one kind; a sink of their watch.

    Args:
        read: says of an object which addresses are its own.
        clock: seconds that go on.
    """

    def __init__(self, read: Reader, clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._items: dict[str, dict[Key, Meaning]] = {}  # by uid of the object
        self._meanings: dict[Key, tuple[Meaning, ...]] = {}  # whoever said it last comes last
        self._gone: dict[Key, tuple[Meaning, float]] = {}

    def get(self, key: Key) -> Meaning | None:
        """What an address or a node's port means; None where nobody says."""
        if found := self._meanings.get(key):
            return found[-1]
        gone = self._gone.get(key)
        return gone[0] if gone and self._clock() - gone[1] < REMEMBERED_S else None

    def __len__(self) -> int:
        return len(self._items)

    def take(self, uid: str, item: Item) -> None:
        """Learn which addresses are an object's now."""
        before, now = self._items.get(uid, {}), self._read(item)
        if before == now:
            return
        self._items[uid] = now
        for key, meaning in before.items():
            if now.get(key) != meaning:
                self._remove(key, meaning)
        for key, meaning in now.items():
            if before.get(key) != meaning:
                self._meanings[key] = (*self._meanings.get(key, ()), meaning)

    def gone(self, uid: str) -> None:
        """An object was deleted: its addresses mean it a little longer, unless somebody else has them."""
        for key, meaning in self._items.pop(uid, {}).items():
            self._remove(key, meaning)

    def listed(self, uids: set[str]) -> None:
        """All others are gone."""
        for uid in self._items.keys() - uids:
            self.gone(uid)

    def pause(self) -> None:
        """Forget what has been gone for long enough."""
        overdue_s = self._clock() - REMEMBERED_S
        for key in [key for key, (_, since_s) in self._gone.items() if since_s <= overdue_s]:
            del self._gone[key]

    def _remove(self, key: Key, meaning: Meaning) -> None:
        left = list(self._meanings.get(key, ()))
        if meaning in left:
            left.remove(meaning)
        if left:
            self._meanings[key] = tuple(left)
        else:
            self._meanings.pop(key, None)
            self._gone[key] = meaning, self._clock()


class Addresses:
    """What the addresses of a cluster mean, by all that is known.

    Args:
        own_pods: those of this node.
        told: what objects of the cluster say, by the API's names: `pods`, `endpointslices`, `services`, `nodes`.
        complete: whether no pod, Service or node of the cluster is missing, by now.
    """

    def __init__(self, own_pods: Directory, told: Mapping[str, Directory], complete: Callable[[], bool]) -> None:
        nobody = Directory(lambda _: {})
        self._own_pods, self._complete = own_pods, complete
        self._pods, self._endpoints, self._services, self._nodes = (
            told.get(name, nobody) for name in ("pods", "endpointslices", "services", "nodes")
        )
        # A pod on its node's own network is told from others only where the nodes' addresses are known.
        self._claimed = self._endpoints if "nodes" in told else nobody

    def meaning(self, address: bytes, port: int) -> Meaning | None:
        """What an address and port stand for; None: nobody says so."""
        if (listening := self._endpoints.get(Endpoint(address, port))) is not None:
            return self._pod(address) or listening
        if (node := self._nodes.get(address)) is not None:
            return self._services.get(port) or node
        return self._pod(address) or self._services.get(address) or self._claimed.get(address)

    def _pod(self, address: bytes) -> Meaning | None:
        return self._pods.get(address) or self._own_pods.get(address)

    def outside(self, address: bytes) -> Meaning | None:
        """What an address is that nobody claims: external, where that is certain."""
        parsed = _parsed(address)
        if parsed.is_loopback or parsed.is_link_local:
            return None
        return _EXTERNAL if self._complete() or (parsed.version == 4 and parsed.is_global) else None

    def may_appear(self, address: bytes) -> bool:
        """Whether an address that nobody claims may be that of a pod of which the server has not told yet."""
        parsed = _parsed(address)
        if parsed.is_loopback or parsed.is_link_local:
            return False
        return parsed.version == 6 or not parsed.is_global


_EXTERNAL = Meaning(Kind.EXTERNAL)


def _parsed(address: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if address.startswith(IPV4_PREFIX):
        return ipaddress.IPv4Address(address[12:])
    return ipaddress.IPv6Address(address)
