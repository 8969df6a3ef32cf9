"""The addresses of a whole cluster, as the API server has them: a watch for each kind of object that tells of them."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from kubernetes import client as kubernetes_client

from tcpio_otel.attribution.addresses import (
    Addresses,
    Directory,
    Reader,
    by_endpoint_slice,
    by_node,
    by_pod,
    by_service,
)
from tcpio_otel.attribution.pods import Wanted
from tcpio_otel.attribution.watch import Watch

_ALL = {"services", "nodes", "pods"}
"""Whoever watches these knows every address of the cluster."""


class Cluster:
    """What the API server says of a cluster's addresses, as a context manager around the watches.

    Args:
        client: of the API server.
        objects: what is watched, by the API's names: `services`, `endpointslices`, `nodes`, `pods`.
        wanted: what of a pod becomes attributes.

    Attributes:
        addresses: what they mean.
        own_pods: a sink for the pods of this node, which are watched anyway.
    """

    def __init__(self, client: Any, objects: Collection[str], wanted: Wanted) -> None:
        core, discovery = kubernetes_client.CoreV1Api(client), kubernetes_client.DiscoveryV1Api(client)
        readers: dict[str, tuple[Reader, Callable[..., Any]]] = {
            "pods": (partial(by_pod, wanted=wanted), core.list_pod_for_all_namespaces),
            "endpointslices": (by_endpoint_slice, discovery.list_endpoint_slice_for_all_namespaces),
            "services": (by_service, core.list_service_for_all_namespaces),
            "nodes": (by_node, core.list_node),
        }
        told = {name: Directory(readers[name][0]) for name in objects}
        self._watches = {
            name: Watch(f"the {name} of the cluster", readers[name][1], [directory]) for name, directory in told.items()
        }
        self.own_pods = Directory(readers["pods"][0])
        self.addresses = Addresses(self.own_pods, told, self._complete)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for watch in self._watches.values():
            self._stack.enter_context(watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _complete(self) -> bool:
        return self._watches.keys() >= _ALL and all(watch.complete for watch in self._watches.values())
