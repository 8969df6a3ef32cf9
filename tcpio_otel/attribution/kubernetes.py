"""The pods of this node, as the API server has them.

What is known stays good while the server cannot be reached, and across restarts by a file. Nothing here waits for
anybody: who asks gets what is known by now.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import urllib3
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config

from tcpio_otel.attribution.kubelet import Kubelet
from tcpio_otel.attribution.pods import Item, Pod, Wanted, pod_of
from tcpio_otel.attribution.watch import Sink, Watch
from tcpio_otel.errors import EnvironmentFault

logger = logging.getLogger(__name__)

REMEMBERED_S = 300.0
"""For how long a pod that was deleted is known: its last records may still come."""

SAVE_S = 10.0


def connected(kubeconfig: Path | None) -> Any:
    """A client of the API server, `kubernetes.client.ApiClient`: by a kubeconfig, or as a pod's service account.

    Raises:
        EnvironmentFault: there is neither.
    """
    settings = kubernetes_client.Configuration()
    try:
        if kubeconfig:
            kubernetes_config.load_kube_config(str(kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        else:
            kubernetes_config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    except (kubernetes_config.ConfigException, OSError) as error:
        where = kubeconfig or "a service account's files"
        raise EnvironmentFault(f"cannot reach Kubernetes by {where}: {' '.join(str(error).split())}") from None
    settings.retries = urllib3.Retry(0)
    return kubernetes_client.ApiClient(settings)


class NodePods:
    """The pods of one node, as a context manager around their watch.

    Args:
        client: of the API server.
        node: its name.
        wanted: what of a pod becomes attributes.
        cache: a file that keeps them across restarts; None: none does.
        others: who else wants to know of these pods.
        kubelet: who tells of them while the API server does not answer; None: nobody does.
        clock: seconds that go on.

    Attributes:
        version: rises with every change.
    """

    def __init__(
        self,
        client: Any,
        node: str,
        wanted: Wanted,
        *,
        cache: Path | None = None,
        others: Sequence[Sink] = (),
        kubelet: Kubelet | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._wanted, self._cache, self._clock = node, wanted, cache, clock
        self._pods: dict[str, Pod] = {}  # by each of their uids
        self._items: dict[str, str] = {}  # what the file keeps, by uid: JSON, at a fifth of the memory of its objects
        self._deleted: dict[str, float] = {}  # when, by uid
        self._saved_s = clock()
        self._unsaved = False
        self.version = 0
        api = kubernetes_client.CoreV1Api(client)
        ask = partial(api.list_pod_for_all_namespaces, field_selector=f"spec.nodeName={node}")
        self._watch = Watch(f"the pods of node {node}", ask, (self, *others), kubelet)

    def __enter__(self) -> Self:
        self._load()
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__()
        self._save()

    def __getitem__(self, uid: str) -> Pod | None:
        """The pod with a uid, as a cgroup's name has it; None while it is not known."""
        return self._pods.get(uid)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def fault(self) -> str:
        """Why nothing new is learnt, in words; empty when all is well."""
        return self._watch.fault

    # A sink.

    def take(self, uid: str, item: Item) -> None:
        """Learn what a pod is now."""
        pod = pod_of(item, self._wanted)
        self._deleted.pop(uid, None)
        known = self._pods.get(uid)
        if known == pod or (known and known.uids[0] != uid):
            return  # a static pod, which the kubelet knows by another uid than the API server
        for each in pod.uids:
            self._pods[each] = pod
            self._items.pop(each, None)
        self._items[uid] = json.dumps(_essential(item))
        self.version += 1
        self._unsaved = True

    def gone(self, uid: str) -> None:
        """Forget a pod in a while."""
        self._deleted[uid] = self._clock()

    def listed(self, uids: set[str]) -> None:
        """Forget all others in a while."""
        for uid in self._items.keys() - uids - self._deleted.keys():
            if uids.isdisjoint(self._pods[uid].uids):
                self.gone(uid)

    def pause(self) -> None:
        """Forget, and write the file, where it is time to."""
        self._forget_deleted()
        if self._unsaved and self._clock() - self._saved_s >= SAVE_S:
            self._save()

    def _forget_deleted(self) -> None:
        for uid, since_s in list(self._deleted.items()):
            if self._clock() - since_s >= REMEMBERED_S:
                del self._deleted[uid]
                self._items.pop(uid, None)
                pod = self._pods.get(uid)
                if pod and pod.uids[0] == uid:
                    for each in pod.uids:
                        self._pods.pop(each, None)
                self._unsaved = True

    # The file.

    def _load(self) -> None:
        if self._cache is None:
            return
        try:
            kept = json.loads(self._cache.read_text())
            items = kept["items"] if kept.get("node") == self._node else []
            for item in items:
                self.take(item["metadata"]["uid"], item)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("cannot use %s, where pods were kept: %s", self._cache, error)
        self._unsaved = False

    def _save(self) -> None:
        if self._cache is None or not self._unsaved:
            return
        self._saved_s, self._unsaved = self._clock(), False
        fresh = self._cache.with_suffix(".new")
        try:
            fresh.write_text(f'{{"node": {json.dumps(self._node)}, "items": [{", ".join(self._items.values())}]}}')
            fresh.replace(self._cache)
        except OSError as error:
            logger.warning("cannot keep pods in %s: %s", self._cache, error.strerror)


def _essential(item: Mapping[str, Any]) -> dict[str, Any]:
    """Of a pod, what attributes are made of: the rest may hold what a file should not."""
    metadata, status = item["metadata"], item.get("status", {})
    keep = ("uid", "name", "namespace", "labels", "annotations", "ownerReferences")
    statuses = ("startTime", "initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses")
    found: dict[str, Any] = {
        "metadata": {key: metadata[key] for key in keep if key in metadata},
        "spec": {"nodeName": item.get("spec", {}).get("nodeName", "")},
        "status": {key: status[key] for key in statuses if key in status},
    }
    return found
