"""Who the peers of connections are, what is waited for, and for how long."""

from typing import Any

import numpy as np
import pytest

from tcpio_otel.attribution.addresses import Addresses, Directory, packed
from tcpio_otel.attribution.naming import NOTHING, Kind, Known, Meaning
from tcpio_otel.attribution.peers import (
    FAMILIAR_NS,
    RETRY_NS,
    TIDY_NS,
    TRANSLATION_NS,
    Peers,
)
from tcpio_otel.batch import FLOW, RECORD, Batch, Birth, Endpoint, Mark

WAIT_NS = 5_000_000_000
US = Endpoint(packed("10.1.0.1") or b"", 40000)
SERVICE, BACKEND = Endpoint(packed("10.96.0.1") or b"", 80), Endpoint(packed("10.1.0.2") or b"", 8080)
STRANGER, WORLD = Endpoint(packed("10.1.0.9") or b"", 55000), Endpoint(packed("9.9.9.9") or b"", 443)
OF_SERVICE, OF_POD, EXTERNAL = Meaning(Kind.SERVICE), Meaning(Kind.POD), Meaning(Kind.EXTERNAL)


class Nat:
    """What is known of translations."""

    def __init__(self) -> None:
        self.known: dict[tuple[Endpoint, Endpoint], Endpoint] = {}

    def peer(self, local: Endpoint, peer: Endpoint) -> Endpoint | None:
        """Who really is the peer."""
        return self.known.get((local, peer))


class World:
    """Connections of a host in a cluster, and when it is."""

    def __init__(self, *, nat: bool = False, wait_ns: int = WAIT_NS) -> None:
        self.pods = Directory(lambda item: {item["address"]: OF_POD})
        services = Directory(lambda item: {item["address"]: OF_SERVICE})
        services.take("service", {"address": SERVICE.address})
        self.nat = Nat() if nat else None
        addresses = Addresses(Directory(lambda _: {}), {"pods": self.pods, "services": services}, lambda: False)
        self.peers = Peers(addresses, self.nat, wait_ns)  # type: ignore[arg-type]
        self.flows = np.zeros(8, FLOW)
        self.now_ns, self.renewed, self._born = 1_000_000_000_000, list[int](), 0

    def goes_on(self, later_ns: int = RETRY_NS, records: Any = None, slots: Any = (), births: Any = ()) -> None:
        """A batch."""
        self.now_ns += later_ns
        batch = Batch(np.empty(0, RECORD) if records is None else records, 0, 0, self.now_ns)
        self.peers.assign(batch, self.flows, np.array(slots, np.int64), births, self.renewed.append)

    def opens(self, slot: int, peer: Endpoint, shown: Endpoint | None = None) -> None:
        """A new connection; its first segment shows the peer as the kernel sends it."""
        self._born += 1
        self.flows[slot] = np.zeros((), FLOW)
        self.flows["born"][slot] = self._born
        record = np.zeros(1, RECORD)
        record["kind"] = 1
        if shown:
            record["marks"] = Mark.TRANSLATED
            record["peer_address"], record["peer_port"] = np.frombuffer(peer.address, "V16"), peer.port
            record["header_peer_address"] = np.frombuffer(shown.address, "V16")
            record["header_peer_port"] = shown.port
        self.goes_on(1, record, [slot], [Birth(slot, 1, US, peer, accepted=False)])

    def known(self, slot: int) -> Known:
        """What is known of the peer."""
        return self.peers[int(self.flows["peer"][slot])]

    def waits(self, slot: int) -> bool:
        """Whether more may be known soon."""
        found = self.peers.waiting(np.array([slot]))
        return found is not None and bool(found[0])


def test_what_is_known_is_known_at_once() -> None:
    """And what is certainly outside is too; nobody waits."""
    world = World()
    world.pods.take("a", {"address": BACKEND.address})
    for slot, (peer, meaning) in enumerate([(BACKEND, OF_POD), (SERVICE, OF_SERVICE), (WORLD, EXTERNAL)]):
        world.opens(slot, peer)
        assert (world.known(slot), world.waits(slot)) == (Known(meaning), False)
    assert world.renewed == []


def test_a_new_pod_is_waited_for() -> None:
    """Until it is known, and the flow is renewed then."""
    world = World()
    world.opens(3, STRANGER)
    assert (world.known(3), world.waits(3)) == (NOTHING, True)
    world.goes_on()
    assert world.waits(3)
    world.pods.take("a", {"address": STRANGER.address})
    world.goes_on()
    assert (world.known(3), world.waits(3), world.renewed) == (Known(OF_POD), False, [3])


def test_nobody_waits_twice_for_a_stranger() -> None:
    """A database outside of the cluster, say: the first connection waits in vain, the next do not for a while."""
    world = World()
    world.opens(0, STRANGER)
    world.goes_on(WAIT_NS - RETRY_NS)
    assert world.waits(0)
    world.goes_on()
    assert (world.known(0), world.waits(0), world.renewed) == (NOTHING, False, [])
    world.opens(1, STRANGER)
    assert not world.waits(1)
    world.goes_on(FAMILIAR_NS)
    world.opens(2, STRANGER)
    assert world.waits(2)


def test_no_time_to_wait_is_none() -> None:
    """With `kubernetes.wait: 0s`."""
    world = World(wait_ns=0)
    world.opens(0, STRANGER)
    assert not world.waits(0)


def test_who_is_behind_a_service_is_waited_for_briefly() -> None:
    """The kernel tells at once, as a rule; where it does not, the Service is what is known."""
    world = World(nat=True)
    assert world.nat
    world.pods.take("a", {"address": BACKEND.address})
    world.opens(0, SERVICE)
    world.opens(1, SERVICE)
    assert world.waits(0)
    world.nat.known[US, SERVICE] = BACKEND
    world.goes_on()
    assert world.known(0) == world.known(1) == Known(OF_SERVICE, BACKEND, OF_POD)
    world.nat.known.clear()
    world.opens(2, SERVICE)
    world.goes_on(TRANSLATION_NS)
    assert (world.known(2), world.waits(2)) == (Known(OF_SERVICE), False)


def test_a_pod_behind_a_service_may_be_new_too() -> None:
    """Both waits in one."""
    world = World(nat=True)
    assert world.nat
    world.nat.known[US, SERVICE] = STRANGER
    world.opens(0, SERVICE)
    assert world.waits(0)
    world.goes_on()
    world.pods.take("a", {"address": STRANGER.address})
    world.goes_on()
    assert world.known(0) == Known(OF_SERVICE, STRANGER, OF_POD)


@pytest.mark.parametrize("known_soon", [True, False])
def test_headers_show_who_is_behind_a_service(known_soon: bool) -> None:
    """Where the socket's own network translates; that is kept while the pod is waited for."""
    world = World()
    if known_soon:
        world.pods.take("a", {"address": BACKEND.address})
    world.opens(0, SERVICE, shown=BACKEND)
    assert world.waits(0) is not known_soon
    world.pods.take("a", {"address": BACKEND.address})
    world.goes_on()
    assert world.known(0) == Known(OF_SERVICE, BACKEND, OF_POD)


def test_a_slot_that_is_another_connections_by_then_is_let_be() -> None:
    """Whether somebody new has it, or nobody."""
    world = World()
    world.opens(0, STRANGER)
    world.opens(1, STRANGER)
    world.opens(0, WORLD)
    world.flows["born"][1] = 0
    world.pods.take("a", {"address": STRANGER.address})
    world.goes_on()
    assert world.known(0) == Known(EXTERNAL)
    assert world.flows["peer"][1] == 0
    assert world.peers.waiting(np.array([0, 1])) is None


def test_giving_up_leaves_what_is_known() -> None:
    """When the agent stops."""
    world = World(nat=True)
    world.opens(0, SERVICE)
    world.opens(1, STRANGER)
    world.peers.give_up(world.flows)
    assert [world.known(slot) for slot in (0, 1)] == [Known(OF_SERVICE), NOTHING]
    assert world.peers.waiting(np.array([0, 1])) is None


def test_numbers_are_used_again() -> None:
    """Peers that come and go for years, each by another port, stay within bounds; who has a connection stays known."""
    world = World(nat=True)
    assert world.nat
    world.pods.take("a", {"address": BACKEND.address})
    world.opens(7, BACKEND)
    for number in range(200):
        real = Endpoint(BACKEND.address, number)
        world.nat.known[US, SERVICE] = real
        world.goes_on(TIDY_NS // 4)
        world.opens(0, SERVICE)
        assert world.known(0) == Known(OF_SERVICE, real, OF_POD)
        assert world.known(7) == Known(OF_POD)
    assert len(world.peers._known) < 10
