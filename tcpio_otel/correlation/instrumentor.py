"""An OpenTelemetry instrumentor: tags the connections of HTTP libraries, with no line in the application.

A client's socket is tagged by the method that is about to write a request, where the client span is current. A server's
socket is remembered when its request is read, and tagged when the first span of kind SERVER starts in that request.
That is seen by a wrapper around `Tracer.start_span`, not by a span processor: a processor is shown no span that is not
sampled, has to be added to a provider that may come later, and cannot be taken out again.

A request without a span takes the tag of an earlier one off a connection that is kept alive.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import wrapt
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import Span, SpanKind

from tcpio_otel.correlation.tag import HasFileno, clear, tag

_log = logging.getLogger(__name__)

Method: TypeAlias = Callable[..., Any]


@dataclass(slots=True)
class Request:
    """A request that a server has read and not yet answered; `sock` is None once it is settled what that serves."""

    sock: HasFileno | None
    shared: bool


_REQUEST: ContextVar[Request | None] = ContextVar("tcpio_request", default=None)
# Hypercorn's tasks know their request, but only the one that they descend from knows the connection.
_CONNECTION: ContextVar[HasFileno | None] = ContextVar("tcpio_connection", default=None)


def _quietly(act: Method) -> Method:
    """Nothing that goes wrong here, as when a library has changed inside, reaches the application; it is said once."""

    @functools.wraps(act)
    def quiet(*args: Any, **kwargs: Any) -> None:
        try:
            act(*args, **kwargs)
        except Exception as error:
            _say_once(act.__name__, f"{type(error).__name__}: {error}")

    return quiet


@functools.lru_cache(maxsize=64)
def _say_once(act: str, reason: str) -> None:
    _log.warning("cannot tag a connection: %s: %s", act.strip("_"), reason)


def _follow_span(sock: HasFileno | None, *, shared: bool = False) -> None:
    """The socket serves the current span from now on; no trace where there is none, or nobody wants one."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid and is_instrumentation_enabled():
        tag(sock, context, shared=shared)
    elif not shared:
        clear(sock)


# What clients do before they write a request: each act takes the arguments of the method that it precedes.


def _http_client_sends(connection: Any, *_: Any, **__: Any) -> None:
    if connection.sock is None and connection.auto_open:
        connection.connect()  # as send() is about to; if this fails, that is the caller's to see
    _http_client_connected(connection)


@_quietly
def _http_client_connected(connection: Any) -> None:
    _follow_span(connection.sock)


@_quietly
def _httpcore_sends(connection: Any, *_: Any, **__: Any) -> None:
    _follow_span(connection._network_stream.get_extra_info("socket"))


@_quietly
def _httpcore_sends_stream(connection: Any, *_: Any, **__: Any) -> None:
    _follow_span(connection._network_stream.get_extra_info("socket"), shared=True)


@_quietly
def _aiohttp_sends(_: Any, connection: Any) -> None:
    transport = connection.transport
    if transport is not None:  # closed meanwhile
        _follow_span(transport.get_extra_info("socket"))


# What servers do: first a request is read, then perhaps its span starts, then it is answered.


def _request_is_read(sock: HasFileno | None, *, shared: bool = False) -> None:
    _REQUEST.set(Request(sock, shared))


@_quietly
def _http_server_reads(handler: Any, *_: Any) -> None:
    _request_is_read(getattr(handler, "connection", None))


@_quietly
def _gunicorn_reads(_: Any, request: Any, sock: Any, *__: Any, **___: Any) -> None:
    _request_is_read(sock, shared=request.version >= (2, 0))


@_quietly
def _waitress_reads(task: Any) -> None:
    _request_is_read(task.channel.socket)


@_quietly
def _aiohttp_reads(_: Any, request: Any, *__: Any, **___: Any) -> None:
    if request.transport is not None:  # closed meanwhile
        _request_is_read(request.transport.get_extra_info("socket"))


@_quietly
def _uvicorn_reads(cycle: Any, *_: Any) -> None:
    _request_is_read(cycle.transport.get_extra_info("socket"))


@_quietly
def _uvicorn_reads_stream(cycle: Any, *_: Any) -> None:
    _request_is_read(cycle.transport.get_extra_info("socket"), shared=True)


@_quietly
def _hypercorn_connects(server: Any) -> None:
    _CONNECTION.set(server.writer.get_extra_info("socket"))


@_quietly
def _hypercorn_reads(_: Any, __: Any, ___: Any, scope: Any, *____: Any) -> None:
    _request_is_read(_CONNECTION.get(), shared=scope["http_version"] == "2")


@_quietly
def _server_span_starts(span: Span) -> None:
    request = _REQUEST.get()
    if request is not None and request.sock is not None:
        tag(request.sock, span, shared=request.shared)
        request.sock = None


@_quietly
def _server_answers(*_: Any, **__: Any) -> None:
    request = _REQUEST.get()
    if request is not None and request.sock is not None:
        if not request.shared:
            clear(request.sock)
        request.sock = None


def _before(act: Method) -> Callable[[Method], Method]:
    """Wraps a method so that `act` comes first; in the task that awaits it, if it is asynchronous."""

    def around(original: Method) -> Method:
        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def replacement(*args: Any, **kwargs: Any) -> Any:
                act(*args, **kwargs)
                return await original(*args, **kwargs)
        else:

            @functools.wraps(original)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                act(*args, **kwargs)
                return original(*args, **kwargs)

        return replacement

    return around


def _around_start_span(original: Method) -> Method:
    @functools.wraps(original)
    def start_span(
        tracer: Any,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        *args: Any,
        **kwargs: Any,
    ) -> Span:
        span: Span = original(tracer, name, context, kind, *args, **kwargs)
        if kind is SpanKind.SERVER:
            _server_span_starts(span)
        return span

    return start_span


class Hook(NamedTuple):
    """A method of a library, and what wraps it."""

    module: str
    owner: str
    method: str
    around: Callable[[Method], Method]


_ANSWERS = _before(_server_answers)

HOOKS = (
    # The standard library's client carries urllib3, requests and botocore too.
    Hook("http.client", "HTTPConnection", "endheaders", _before(_http_client_sends)),
    # The public methods above these do not know yet whether the connection is theirs.
    Hook("httpcore._sync.http11", "HTTP11Connection", "_send_request_headers", _before(_httpcore_sends)),
    Hook("httpcore._async.http11", "AsyncHTTP11Connection", "_send_request_headers", _before(_httpcore_sends)),
    Hook("httpcore._sync.http2", "HTTP2Connection", "_send_request_headers", _before(_httpcore_sends_stream)),
    Hook("httpcore._async.http2", "AsyncHTTP2Connection", "_send_request_headers", _before(_httpcore_sends_stream)),
    Hook("aiohttp.client_reqrep", "ClientRequest", "send", _before(_aiohttp_sends)),
    # wsgiref, werkzeug and Django's runserver are built on the standard library's server.
    Hook("http.server", "BaseHTTPRequestHandler", "parse_request", _before(_http_server_reads)),
    Hook("http.server", "BaseHTTPRequestHandler", "send_response", _ANSWERS),
    Hook("wsgiref.handlers", "BaseHandler", "send_headers", _ANSWERS),
    Hook("gunicorn.http.wsgi", "Response", "__init__", _before(_gunicorn_reads)),
    Hook("gunicorn.http.wsgi", "Response", "send_headers", _ANSWERS),
    Hook("waitress.task", "WSGITask", "execute", _before(_waitress_reads)),
    Hook("waitress.task", "Task", "build_response_header", _ANSWERS),
    Hook("aiohttp.web_protocol", "RequestHandler", "_handle_request", _before(_aiohttp_reads)),
    Hook("aiohttp.web_response", "StreamResponse", "_write_headers", _ANSWERS),
    Hook("uvicorn.protocols.http.h11_impl", "RequestResponseCycle", "run_asgi", _before(_uvicorn_reads)),
    Hook("uvicorn.protocols.http.h11_impl", "RequestResponseCycle", "send", _ANSWERS),
    Hook("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle", "run_asgi", _before(_uvicorn_reads)),
    Hook("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle", "send", _ANSWERS),
    Hook("uvicorn.protocols.http.zttp_impl", "RequestResponseCycle", "run_asgi", _before(_uvicorn_reads)),
    Hook("uvicorn.protocols.http.zttp_impl", "RequestResponseCycle", "send", _ANSWERS),
    Hook("uvicorn.protocols.http.zttp_h2_impl", "RequestResponseCycle", "run_asgi", _before(_uvicorn_reads_stream)),
    Hook("uvicorn.protocols.websockets.websockets_impl", "WebSocketProtocol", "run_asgi", _before(_uvicorn_reads)),
    Hook("uvicorn.protocols.websockets.websockets_impl", "WebSocketProtocol", "asgi_send", _ANSWERS),
    Hook(
        "uvicorn.protocols.websockets.websockets_sansio_impl",
        "WebSocketsSansIOProtocol",
        "run_asgi",
        _before(_uvicorn_reads),
    ),
    Hook("uvicorn.protocols.websockets.websockets_sansio_impl", "WebSocketsSansIOProtocol", "send", _ANSWERS),
    Hook("uvicorn.protocols.websockets.wsproto_impl", "WSProtocol", "run_asgi", _before(_uvicorn_reads)),
    Hook("uvicorn.protocols.websockets.wsproto_impl", "WSProtocol", "send", _ANSWERS),
    Hook("hypercorn.asyncio.tcp_server", "TCPServer", "run", _before(_hypercorn_connects)),
    Hook("hypercorn.asyncio.task_group", "TaskGroup", "spawn_app", _before(_hypercorn_reads)),
    Hook("hypercorn.protocol.http_stream", "HTTPStream", "app_send", _ANSWERS),
    Hook("hypercorn.protocol.ws_stream", "WSStream", "app_send", _ANSWERS),
    Hook("opentelemetry.sdk.trace", "Tracer", "start_span", _around_start_span),
)


class TcpioInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Tags the connections of the libraries in `HOOKS`, whether or not their spans are sampled.

    A library is hooked when the application has imported it, before or after this; none is imported for it.
    """

    _originals: dict[tuple[type, str], Method] | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: a library that is not there is not hooked."""
        return ()

    def _instrument(self, **_: Any) -> None:
        self._originals = {}
        for module in {hook.module for hook in HOOKS}:
            wrapt.register_post_import_hook(self._hook, module)

    def _hook(self, module: ModuleType) -> None:
        if self._originals is None:  # imported after _uninstrument
            return
        for hook in HOOKS:
            if hook.module != module.__name__:
                continue
            owner = getattr(module, hook.owner, None)
            original = vars(owner).get(hook.method) if isinstance(owner, type) else None
            if owner is None or original is None:
                _log.warning(
                    "connections are not tagged: no %s.%s in this %s", hook.owner, hook.method, module.__name__
                )
            elif (owner, hook.method) not in self._originals:  # instrumented twice before the import
                self._originals[owner, hook.method] = original
                setattr(owner, hook.method, hook.around(original))

    def _uninstrument(self, **_: Any) -> None:
        originals, self._originals = self._originals or {}, None
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
