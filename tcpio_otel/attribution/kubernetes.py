"""The pods of this node, watched at the API server.

A thread lists them, then follows what changes, and starts again when the server says that it has forgotten where that
was (410 Gone). What it knows stays good while the server cannot be reached, and across restarts by a file. Nothing here
waits for anybody: who asks gets what is known by now.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import urllib3
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config

from tcpio_otel.attribution.pods import Pod, Wanted, pod_of
from tcpio_otel.errors import EnvironmentFault

logger = logging.getLogger(__name__)

PAGE = 500
"""Pods in one answer to a list: the API server's memory is shared by all its clients."""

WATCH_S = 300
"""How long one watch lasts before it is begun anew, with a deviation, so that agents do not do so all at once."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
TIMEOUT_S = 10.0
"""For a connection to the server, and between two things that it says; a watch has bookmarks every minute."""

SILENCE_S = 150.0

REMEMBERED_S = 300.0
"""For how long a pod that was deleted is known: its last records may still come."""

SAVE_S = 10.0
GONE = 410


class _ForgottenError(Exception):
    """The server does not know any more where the watch was."""


def connected(kubeconfig: Path | None) -> Any:
    """A client of the API server: by a kubeconfig, or as a pod's service account.

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
    return kubernetes_client.CoreV1Api(kubernetes_client.ApiClient(settings))


class NodePods:
    """The pods of one node, as a context manager around the thread that watches them.

    Args:
        api: `kubernetes.client.CoreV1Api`.
        node: its name.
        wanted: what of a pod becomes attributes.
        cache: a file that keeps them across restarts; None: none does.
        clock: seconds that go on.

    Attributes:
        version: rises with every change.
    """

    def __init__(
        self,
        api: Any,
        node: str,
        wanted: Wanted,
        *,
        cache: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._node, self._wanted, self._cache, self._clock = api, node, wanted, cache, clock
        self._pods: dict[str, Pod] = {}  # by each of their uids
        self._items: dict[str, str] = {}  # what the file keeps, by uid: JSON, at a fifth of the memory of its objects
        self._deleted: dict[str, float] = {}  # when, by uid
        self._stop = threading.Event()
        self._watching: Any = None
        self._position = ""  # in the history of the API server's objects
        self._said: str | None = None  # nothing so far
        self._pause_s = FIRST_PAUSE_S
        self._saved_s = clock()
        self._unsaved = False
        self.version = 0
        self._thread = threading.Thread(target=self._run, name="pod watch", daemon=True)

    def __enter__(self) -> Self:
        self._load()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if (watching := self._watching) is not None:
            watching.shutdown()
        self._thread.join(TIMEOUT_S)
        self._save()

    def __getitem__(self, uid: str) -> Pod | None:
        """The pod with a uid, as a cgroup's name has it; None while it is not known."""
        return self._pods.get(uid)

    @property
    def fault(self) -> str:
        """Why nothing new is learnt, in words; empty when all is well."""
        return self._said or ""

    # The thread.

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if not self._position:
                    self._list()
                self._watch()
            except kubernetes_client.ApiException as error:
                self._tell(_words(error))
                if error.status == GONE:
                    self._position = ""
            except _ForgottenError:
                self._position = ""
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                self._tell(f"cannot reach it: {_cause(error)}")
            except (LookupError, TypeError, AttributeError) as error:
                self._tell(f"it says what no API server says: {type(error).__name__} {error}")
                self._position = ""
            else:
                continue
            self._forget_deleted()
            self._stop.wait(self._pause_s * random.uniform(0.5, 1))  # noqa: S311 - not for secrets
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _tell(self, fault: str) -> None:
        """Say it once when something stands in the way, and when it does not any more."""
        if self._stop.is_set() or fault == self._said:
            return
        if fault:
            logger.warning("pods are not up to date; the API server: %s", fault)
        else:
            logger.info("watching the pods of node %s: %d known", self._node, len(self._items))
        self._said = fault

    def _ask(self, **options: Any) -> Any:
        return self._api.list_pod_for_all_namespaces(
            field_selector=f"spec.nodeName={self._node}", _preload_content=False, **options
        )

    def _list(self) -> None:
        """Learn which pods there are now."""
        found: set[str] = set()
        token: str | None = None
        while True:
            options = {"_continue": token} if token else {}
            answer = json.loads(self._ask(limit=PAGE, _request_timeout=(TIMEOUT_S, SILENCE_S), **options).data)
            for item in answer["items"]:
                found.add(item["metadata"]["uid"])
                self._take(item["metadata"]["uid"], item)
            token = answer["metadata"].get("continue")
            if not token:
                break
        for uid in self._items.keys() - found - self._deleted.keys():
            self._deleted[uid] = self._clock()
        self._forget_deleted()
        self._position = answer["metadata"]["resourceVersion"]

    def _watch(self) -> None:
        """Follow what changes until the server ends it."""
        answer = self._ask(
            watch=True, resource_version=self._position, allow_watch_bookmarks=True,
            timeout_seconds=int(WATCH_S * random.uniform(0.8, 1.2)),  # noqa: S311 - not for secrets
            _request_timeout=(TIMEOUT_S, SILENCE_S),
        )  # fmt: skip
        self._watching = answer
        self._pause_s = FIRST_PAUSE_S
        self._tell("")
        try:
            for kind, item in _events(answer):
                if kind == "ERROR":
                    if item.get("code") == GONE:
                        raise _ForgottenError
                    raise ValueError(item.get("message", "an error without a message"))
                if kind == "DELETED":
                    self._deleted[item["metadata"]["uid"]] = self._clock()
                elif kind != "BOOKMARK":
                    self._take(item["metadata"]["uid"], item)
                self._position = item["metadata"]["resourceVersion"]
                self._forget_deleted()
                self._save_now_and_then()
        finally:
            self._watching = None
            answer.release_conn()

    def _take(self, uid: str, item: Mapping[str, Any]) -> None:
        """Learn what a pod is now."""
        pod = pod_of(item, self._wanted)
        self._deleted.pop(uid, None)
        if self._pods.get(uid) == pod:
            return
        for known in pod.uids:
            self._pods[known] = pod
        self._items[uid] = json.dumps(_essential(item))
        self.version += 1
        self._unsaved = True

    def _forget_deleted(self) -> None:
        for uid, since_s in list(self._deleted.items()):
            if self._clock() - since_s >= REMEMBERED_S:
                del self._deleted[uid]
                self._items.pop(uid, None)
                if pod := self._pods.get(uid):
                    for known in pod.uids:
                        self._pods.pop(known, None)
                self._unsaved = True

    # The file.

    def _load(self) -> None:
        if self._cache is None:
            return
        try:
            kept = json.loads(self._cache.read_text())
            items = kept["items"] if kept.get("node") == self._node else []
            for item in items:
                self._take(item["metadata"]["uid"], item)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("cannot use %s, where pods were kept: %s", self._cache, error)
        self._unsaved = False

    def _save_now_and_then(self) -> None:
        if self._unsaved and self._clock() - self._saved_s >= SAVE_S:
            self._save()

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


def _events(answer: Any) -> Iterator[tuple[str, Any]]:
    """The lines of a watch: what happened, and to what."""
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                event = json.loads(line)
                yield event["type"], event["object"]


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


def _cause(error: Exception) -> str:
    """Why there is no connection, without what urllib3 puts around it."""
    return " ".join(str(getattr(error, "reason", error)).rpartition("): ")[2].split())


def _words(error: Any) -> str:
    """What the API server said, on one line."""
    try:
        said = json.loads(error.body)["message"]
    except (ValueError, KeyError, TypeError):
        said = error.reason or "no reason given"
    return f"{error.status} {' '.join(str(said).split())}"
