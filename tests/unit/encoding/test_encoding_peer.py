"""What is known of a peer, as attributes."""

import pytest

from tcpio_otel.attribution.naming import NOTHING, Kind, Known, Meaning
from tcpio_otel.batch import IPV4_PREFIX, Endpoint
from tcpio_otel.encoding.peer import peer_names

POD = Meaning(Kind.POD, (("k8s.pod.name", "web-1"), ("k8s.namespace.name", "shop")))
SERVICE = Meaning(Kind.SERVICE, (("k8s.service.name", "web"), ("k8s.namespace.name", "shop")))
NODE = Meaning(Kind.NODE, (("k8s.node.name", "node-1"),))
REAL = Endpoint(IPV4_PREFIX + bytes([10, 1, 0, 2]), 8080)
AT = {"address": "10.1.0.2", "port": 8080}
OF_POD = {"k8s.pod.name": "web-1", "k8s.namespace.name": "shop"}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (NOTHING, {}),
        (Known(POD), {"kind": "pod", **OF_POD}),
        (Known(NODE), {"kind": "node", "k8s.node.name": "node-1"}),
        (Known(Meaning(Kind.EXTERNAL)), {"kind": "external"}),
        (Known(SERVICE, REAL, POD), {"kind": "service", "k8s.service.name": "web", **OF_POD, **AT}),
        (
            Known(SERVICE, REAL, None),
            {"kind": "service", "k8s.service.name": "web", "k8s.namespace.name": "shop", **AT},
        ),
        (Known(NODE, REAL, POD), {"kind": "pod", **OF_POD, **AT}),  # whose address the node has changed
        (Known(None, REAL, None), AT),
    ],
)
def test_names(known: Known, expected: dict[str, str | int]) -> None:
    """A Service stays one, whoever is behind it; a node that only lends its address is nobody."""
    assert {name.removeprefix("tcp.peer."): value for name, value in peer_names(known)} == expected
