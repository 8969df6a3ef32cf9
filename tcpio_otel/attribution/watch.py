"""Objects of one kind, kept up with at the API server.

A thread lists them, then follows what changes, and lists them again when the server says that it has forgotten where
that was (410 Gone). While the server cannot be reached it asks again, less and less often, and meanwhile somebody else
who knows, where there is one.
"""

import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import urllib3
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config

from tcpio_otel.attribution.kubelet import Kubelet, RefusedError
from tcpio_otel.attribution.pods import Item

logger = logging.getLogger(__name__)

PAGE = 500
"""Objects in one answer to a list: the API server's memory is shared by all its clients."""

WATCH_S = 300
"""How long one watch lasts before it is begun anew, with a deviation, so that agents do not do so all at once."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
KUBELET_PAUSE_S = 10.0
"""Between two questions to the kubelet, which is asked by nobody but its node's own agents."""

TIMEOUT_S = 10.0
"""For a connection to the server, and between two things that it says; a watch has bookmarks every minute."""

SILENCE_S = 150.0
GONE = 410


class Sink(Protocol):
    """Who wants to know of objects; called from the thread of a watch."""

    def __len__(self) -> int:
        """How many are known."""

    def take(self, uid: str, item: Item) -> None:
        """An object is there, or has changed."""

    def gone(self, uid: str) -> None:
        """An object was deleted; it may not have been known."""

    def listed(self, uids: set[str]) -> None:
        """There are these objects now, and no others."""

    def pause(self) -> None:
        """Nothing more has come for now."""


class _ForgottenError(Exception):
    """The server does not know any more where the watch was."""


class Watch:
    """Keeps sinks up to date, as a context manager around its thread.

    Args:
        what: the objects, for people: "the pods of node n1".
        ask: a list of them from the official client, which takes the parameters of the API and returns the answer as
            it came.
        sinks: who wants to know.
        kubelet: who is asked for them while the server does not answer; None: nobody is.
    """

    def __init__(
        self, what: str, ask: Callable[..., Any], sinks: Sequence[Sink], kubelet: Kubelet | None = None
    ) -> None:
        self._what, self._list_or_watch, self._sinks, self._kubelet = what, ask, sinks, kubelet
        self._stop = threading.Event()
        self._watching: Any = None
        self._position = ""  # in the history of the API server's objects
        self._said: str | None = None  # nothing so far
        self._pause_s = FIRST_PAUSE_S
        self._thread = threading.Thread(target=self._run, name=f"watch {what}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if (watching := self._watching) is not None:
            watching.shutdown()
        self._thread.join(TIMEOUT_S)

    @property
    def fault(self) -> str:
        """Why nothing new is learnt, in words; empty when all is well."""
        return self._said or ""

    @property
    def complete(self) -> bool:
        """Whether all objects were listed, and what changes is being followed."""
        return self._said == ""

    def _run(self) -> None:
        while not self._stop.is_set():
            fault = self._follow()
            if fault is None:
                continue
            for sink in self._sinks:
                sink.pause()
            self._wait(fault)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _follow(self) -> str | None:
        """List and watch, until the server ends the watch; else why to wait, in words where there are any."""
        try:
            if not self._position:
                self._list()
            self._watch()
        except kubernetes_client.ApiException as error:
            if error.status == GONE:
                self._position = ""
            return _words(error)
        except _ForgottenError:
            self._position = ""
            return ""
        except kubernetes_config.ConfigException as error:
            return f"cannot ask it: {error}"
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return f"cannot reach it: {_cause(error)}"
        except (LookupError, TypeError, AttributeError) as error:
            self._position = ""
            return f"it says what no API server says: {type(error).__name__} {error}"
        return None

    def _wait(self, fault: str) -> None:
        """Before the server is asked again."""
        left_s = self._pause_s * random.uniform(0.5, 1)  # noqa: S311 - not for secrets
        while not self._stop.is_set():
            if fault:
                self._tell(fault if self._kubelet is None else f"{fault}; {self._ask_kubelet(self._kubelet)}")
            self._stop.wait(min(left_s, KUBELET_PAUSE_S))
            left_s -= KUBELET_PAUSE_S
            if left_s <= 0:
                break

    def _ask_kubelet(self, kubelet: Kubelet) -> str:
        """Learn from it; what came of that, in words."""
        try:
            items = {item["metadata"]["uid"]: item for item in kubelet.pods()}
            for uid, item in items.items():
                for sink in self._sinks:
                    sink.take(uid, item)
        except RefusedError as error:
            return f"the kubelet: {error}"
        except kubernetes_config.ConfigException as error:
            return f"cannot ask the kubelet: {error}"
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return f"cannot reach the kubelet: {_cause(error)}"
        except (LookupError, TypeError, AttributeError) as error:
            return f"the kubelet says what no kubelet says: {type(error).__name__} {error}"
        for sink in self._sinks:
            sink.listed(set(items))
            sink.pause()
        return "the kubelet tells of them instead"

    def _tell(self, fault: str) -> None:
        """Say it once when something stands in the way, and when it does not any more."""
        if self._stop.is_set() or fault == self._said:
            return
        if fault:
            logger.warning("%s are not up to date; the API server: %s", self._what, fault)
        else:
            logger.info("watching %s: %d known", self._what, len(self._sinks[0]))
        self._said = fault

    def _list(self) -> None:
        """Learn which objects there are now."""
        found: set[str] = set()
        token: str | None = None
        while True:
            options = {"_continue": token} if token else {}
            answer = json.loads(self._ask(limit=PAGE, **options).data)
            for item in answer["items"]:
                uid = item["metadata"]["uid"]
                found.add(uid)
                for sink in self._sinks:
                    sink.take(uid, item)
            token = answer["metadata"].get("continue")
            if not token:
                break
        for sink in self._sinks:
            sink.listed(found)
        self._position = answer["metadata"]["resourceVersion"]

    def _watch(self) -> None:
        """Follow what changes until the server ends it."""
        answer = self._ask(
            watch=True, resource_version=self._position, allow_watch_bookmarks=True,
            timeout_seconds=int(WATCH_S * random.uniform(0.8, 1.2)),  # noqa: S311 - not for secrets
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
                uid = item["metadata"].get("uid", "")
                for sink in self._sinks:
                    if kind == "DELETED":
                        sink.gone(uid)
                    elif kind != "BOOKMARK":
                        sink.take(uid, item)
                    sink.pause()
                self._position = item["metadata"]["resourceVersion"]
        finally:
            self._watching = None
            answer.release_conn()

    def _ask(self, **options: Any) -> Any:
        return self._list_or_watch(_preload_content=False, _request_timeout=(TIMEOUT_S, SILENCE_S), **options)


def _events(answer: Any) -> Iterator[tuple[str, Any]]:
    """The lines of a watch: what happened, and to what."""
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                event = json.loads(line)
                yield event["type"], event["object"]


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
