"""Metrics for who asks: an HTTP server that Prometheus scrapes, in its text format or OpenMetrics."""

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client import Metric as Family

from tcpio_otel.errors import EnvironmentFault
from tcpio_otel.export.settings import Listen

logger = logging.getLogger(__name__)

PATH = "/metrics"

PATIENCE_S = 8.0
"""How long a scrape waits for the agent: Prometheus itself waits for ten seconds."""

_CLIENT_S = 5.0
"""How long a client may keep silent: there is one at a time."""

_CLOSE_S = 1.0
_POLL_S = 0.25


class Scrape:
    """Listens on construction, and answers from a thread of its own with what the agent's thread gives it.

    Args:
        where: address and port to listen on; port 0 is one that is free.
        render: metrics, as they are given to `answer`, to what is shown of them.

    Raises:
        EnvironmentFault: it cannot listen there.
    """

    def __init__(self, where: Listen, render: Callable[[Any], Iterable[Family]]) -> None:
        self._render = render
        self._changed = threading.Condition()
        self._answer: Any = None
        self._wanted = self._closed = False
        try:
            self._server = _Server(where)
        except OSError as error:
            raise EnvironmentFault(f"cannot listen on {where} (metrics.listen): {error.strerror}") from None
        self.url = f"http://{where._replace(port=self._server.server_port)}{PATH}"
        self._server.set_app(self._serve)
        self._thread = threading.Thread(target=self._listen, name="scrapes", daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for an answer."""
        return self._wanted

    def answer(self, found: Any) -> None:
        """Give who waits the metrics as of now."""
        with self._changed:
            self._answer, self._wanted = found, False
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening; who waits is told so, and who has not finished asking does not keep the agent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        self._server.server_close()

    # The server's thread.

    def _listen(self) -> None:
        while not self._closed:
            self._server.handle_request()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            return _plain(start_response, "404 Not Found", f"Metrics are at {PATH}.")
        if environ["REQUEST_METHOD"] != "GET":
            return _plain(start_response, "405 Method Not Allowed", "There is nothing but GET.")
        with self._changed:
            self._answer, self._wanted = None, True
            self._changed.wait_for(lambda: self._answer is not None or self._closed, PATIENCE_S)
            found, self._answer, self._wanted = self._answer, None, False
        if found is None:
            why = "it is stopping" if self._closed else f"it has had no time for {PATIENCE_S:.0f} s"
            return _plain(start_response, "503 Service Unavailable", f"The agent does not answer: {why}.")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Shown(self._render(found)))
        return cast("Iterable[bytes]", make_wsgi_app(registry)(environ, start_response))


class _Shown:
    """What a registry collects."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _plain(start_response: Callable[..., Any], status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_S

    def log_message(self, *_: Any) -> None:
        """A scrape is not worth a line."""


class _Server(WSGIServer):
    timeout = _POLL_S
    """How long it waits for a client, before it looks whether it is to go on."""

    def __init__(self, where: Listen) -> None:
        self.address_family = AF_INET6 if ":" in where.host else AF_INET
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        """Without asking DNS for this host's name, as the base class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, *_: Any) -> None:
        """A client that goes away, or says nothing, is no fault of the agent's."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("a scrape failed")
