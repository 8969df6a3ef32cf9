"""Real libraries, instrumented as OpenTelemetry does it, talk over loopback; the system call alone is stood in for."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias
from wsgiref import simple_server

import aiohttp
import aiohttp.web
import fastapi
import flask
import httpx
import hypercorn.asyncio
import hypercorn.config
import pytest
import requests
import trustme
import urllib3
import uvicorn
import waitress.server
import waitress.wasyncore
import werkzeug.serving
from opentelemetry import trace
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.instrumentation.aiohttp_server import AioHttpServerInstrumentor
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware as TracedAsgi
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware as TracedWsgi
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from tcpio_otel.correlation import tag as tag_module
from tcpio_otel.correlation.instrumentor import HOOKS, TcpioInstrumentor
from tcpio_otel.correlation.tag import ONE_CONTEXT, SHARED_CONTEXT

ROOT = Path(__file__).parents[3]
NO_CONTEXT = (0, 0)


class Tag(NamedTuple):
    """One system call, and where the connection stood."""

    local_port: int
    peer_port: int
    name: int
    ids: tuple[int, int]
    written_bytes: int


class Recorder:
    """An agent that keeps what it is told."""

    def __init__(self) -> None:
        self.tags: list[Tag] = []

    def __call__(self, descriptor: int, name: int, value: bytes) -> int:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            local, peer = sock.getsockname()[1], sock.getpeername()[1]
        # struct tcp_info of linux/tcp.h, kernel 4.19: what the application has written is either sent or not yet.
        (not_sent,) = struct.unpack_from("=I", info, 144)
        sent, sent_again = struct.unpack_from("=QQ", info, 200)
        ids = int.from_bytes(value[:16], "big"), int.from_bytes(value[16:], "big")
        self.tags.append(Tag(local, peer, name, ids, sent - sent_again + not_sent))
        return 0

    def of_clients(self, port: int) -> list[Tag]:
        """What was said of connections to a port."""
        return [tag for tag in self.tags if tag.peer_port == port]

    def of_server(self, port: int) -> list[Tag]:
        """What was said of connections that a server at a port took."""
        return [tag for tag in self.tags if tag.local_port == port]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands for the system call; other tests may have found that no agent is there."""
    recorder = Recorder()
    monkeypatch.setattr(tag_module, "_setsockopt", recorder)
    monkeypatch.setattr(tag_module._TAGGER, "_absent_until_s", 0.0)
    return recorder


@pytest.fixture
def instrumented(recorder: Recorder) -> Iterator[Recorder]:
    """The instrumentor at work."""
    instrumentor = TcpioInstrumentor()
    instrumentor.instrument()
    yield recorder
    instrumentor.uninstrument()


@pytest.fixture(params=[ALWAYS_ON, ALWAYS_OFF], ids=["sampled", "unsampled"])
def provider(request: pytest.FixtureRequest) -> TracerProvider:
    """Spans have ids whether or not anybody keeps them."""
    return TracerProvider(sampler=request.param)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signs the servers' certificates."""
    return trustme.CA()


def ids_of(traceparent: str) -> tuple[int, int]:
    """Trace id and span id of a header that a propagator wrote."""
    _, trace_id, span_id, _ = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16)


# Clients, against an origin that knows at which byte of which connection each request began.


class Seen(NamedTuple):
    """A request as it arrived; ids are those of its traceparent."""

    peer_port: int
    ids: tuple[int, int]
    offset_bytes: int


class Origin:
    """An HTTP/1.1 server of a few lines, which keeps connections open."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.requests: list[Seen] = []
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, (_, peer_port) = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection, peer_port), daemon=True).start()

    def _serve(self, connection: socket.socket, peer_port: int) -> None:
        offset = 0
        sock = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
        with sock, sock.makefile("rb") as lines:
            while lines.readable() and (head := self._head(lines)):
                fields = http_fields(head)
                length = int(fields.get("content-length", 0))
                self.requests.append(Seen(peer_port, ids_of(fields.get("traceparent", "00-0-0-00")), offset))
                offset += len(head) + len(lines.read(length))
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    @staticmethod
    def _head(lines: Any) -> bytes:
        head = b""
        with contextlib.suppress(OSError):
            while not head.endswith(b"\r\n\r\n") and (line := lines.readline()):
                head += line
        return head


def http_fields(head: bytes) -> dict[str, str]:
    """The fields of a request or an answer."""
    lines = head.decode().split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}


class Client(NamedTuple):
    """A library: how OpenTelemetry instruments it, and how it asks."""

    instrumentor: Callable[[], Any] | None
    ask: Callable[[str, ssl.SSLContext, trace.Tracer], None]


def ask_http_client(url: str, tls: ssl.SSLContext, tracer: trace.Tracer) -> None:
    scheme, _, authority = url.partition("://")
    if scheme == "http":
        connection = http.client.HTTPConnection(authority)
    else:
        connection = http.client.HTTPSConnection(authority, context=tls)
    for method, body in (("GET", None), ("POST", b"x" * 5000), ("PUT", iter([b"two", b"parts"]))):
        with tracer.start_as_current_span("request"):
            headers = {"Content-Length": "8"} if method == "PUT" else {}
            inject(headers)
            connection.request(method, "/", body=body, headers=headers)
            assert connection.getresponse().read() == b"ok"
    connection.close()


def ask_urllib3(url: str, tls: ssl.SSLContext, _: trace.Tracer) -> None:
    with urllib3.PoolManager(ssl_context=tls) as pool:
        for method, body in (("GET", None), ("POST", b"x" * 5000), ("GET", None)):
            assert pool.request(method, url, body=body).data == b"ok"


def ask_requests(url: str, tls: ssl.SSLContext, _: trace.Tracer) -> None:
    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, ssl_context=tls)

    with requests.Session() as session:
        session.mount("https://", Adapter())
        for method, body in (("GET", None), ("POST", b"x" * 5000), ("GET", None)):
            assert session.request(method, url, data=body).content == b"ok"


def ask_httpx(url: str, tls: ssl.SSLContext, _: trace.Tracer) -> None:
    with httpx.Client(verify=tls) as client:
        for method, body in (("GET", None), ("POST", b"x" * 5000), ("GET", None)):
            assert client.request(method, url, content=body).content == b"ok"


def ask_httpx_async(url: str, tls: ssl.SSLContext, _: trace.Tracer) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(verify=tls) as client:
            for method, body in (("GET", None), ("POST", b"x" * 5000), ("GET", None)):
                assert (await client.request(method, url, content=body)).content == b"ok"

    asyncio.run(ask())


def ask_aiohttp(url: str, tls: ssl.SSLContext, _: trace.Tracer) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            for method, body in (("GET", None), ("POST", b"x" * 5000), ("GET", None)):
                async with session.request(method, url, data=body, ssl=tls) as answer:
                    assert await answer.read() == b"ok"

    asyncio.run(ask())


CLIENTS = {
    "http.client": Client(None, ask_http_client),
    "urllib3": Client(URLLib3Instrumentor, ask_urllib3),
    "requests": Client(RequestsInstrumentor, ask_requests),
    "httpx": Client(HTTPXClientInstrumentor, ask_httpx),
    "httpx, async": Client(HTTPXClientInstrumentor, ask_httpx_async),
    "aiohttp": Client(AioHttpClientInstrumentor, ask_aiohttp),
}


@contextlib.contextmanager
def traced(client: Client, provider: TracerProvider) -> Iterator[None]:
    """A library under its OpenTelemetry instrumentation."""
    if client.instrumentor is None:
        yield
        return
    instrumentor = client.instrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        instrumentor.uninstrument()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_each_request_tags_its_connection_before_its_first_byte(
    instrumented: Recorder, provider: TracerProvider, authority: trustme.CA, client: Client, scheme: str
) -> None:
    """Three requests on one connection: three tags, with the ids that the server was sent, where each request began."""
    serving, asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    authority.configure_trust(asking)
    with Origin(serving if scheme == "https" else None) as origin, traced(client, provider):
        client.ask(f"{scheme}://127.0.0.1:{origin.port}", asking, provider.get_tracer("test"))
    tags = instrumented.of_clients(origin.port)
    assert len({tag.ids for tag in tags} - {NO_CONTEXT}) == 3
    assert {tag.name for tag in tags} == {ONE_CONTEXT}
    if scheme == "http":
        assert [Seen(tag.local_port, tag.ids, tag.written_bytes) for tag in tags] == origin.requests
    else:  # here the offset is one of ciphertext
        assert [(tag.local_port, tag.ids) for tag in tags] == [seen[:2] for seen in origin.requests]
        assert 0 < tags[0].written_bytes < tags[1].written_bytes < tags[2].written_bytes
        assert tags[2].written_bytes - tags[1].written_bytes > 5000 or client.instrumentor is None
    assert len({tag.local_port for tag in tags}) == 1


def test_a_request_without_a_span_is_not_given_that_of_the_one_before(
    instrumented: Recorder, provider: TracerProvider
) -> None:
    """On a pooled connection, a request that nobody traces, or whose tracing is suppressed, takes the tag off."""
    with Origin(None) as origin, urllib3.PoolManager() as pool:
        url = f"http://127.0.0.1:{origin.port}"
        with provider.get_tracer("test").start_as_current_span("request") as span:
            context = span.get_span_context()
            pool.request("GET", url)
            with suppress_instrumentation():
                pool.request("GET", url)
            pool.request("GET", url)
        pool.request("GET", url)
    ids = (context.trace_id, context.span_id)
    assert [tag.ids for tag in instrumented.of_clients(origin.port)] == [ids, NO_CONTEXT, ids, NO_CONTEXT]


@pytest.mark.usefixtures("instrumented")
def test_failures_stay_what_they_were() -> None:
    """A refused connection is the library's own exception, raised once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port).request("GET", "/")
    with pytest.raises(requests.ConnectionError), requests.Session() as session:
        session.get(f"http://127.0.0.1:{port}")


def test_what_cannot_be_tagged_is_said_once(
    instrumented: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours costs a line in the log, and no request."""

    def broken(*_: object) -> int:
        raise RuntimeError("broken")

    monkeypatch.setattr(tag_module, "_setsockopt", broken)
    with Origin(None) as origin, urllib3.PoolManager() as pool:
        for _ in range(3):
            assert pool.request("GET", f"http://127.0.0.1:{origin.port}").data == b"ok"
    assert [record.message for record in caplog.records if record.name.startswith("tcpio_otel")] == [
        "cannot tag a connection: http_client_connected: RuntimeError: broken"
    ]


Serving: TypeAlias = Callable[[TracerProvider], AbstractContextManager[int]]

# Servers, asked by hand; each answers with the ids of the span in which its handler ran.


def current_ids() -> str:
    """What a handler answers."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}-{context.span_id:016x}"


def wsgi_app(_: Any, start_response: Any) -> list[bytes]:
    body = current_ids().encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def traced_wsgi(provider: TracerProvider) -> Callable[..., Any]:
    """That application under its OpenTelemetry instrumentation, but for its health check."""
    traced_app = TracedWsgi(wsgi_app, tracer_provider=provider)

    def app(environ: Any, start_response: Any) -> Any:
        return (wsgi_app if environ["PATH_INFO"] == "/health" else traced_app)(environ, start_response)

    return app


async def asgi_app(scope: Any, _: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    body = current_ids().encode()
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": body.decode()})
        await send({"type": "websocket.close"})
        return
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving_wsgiref(provider: TracerProvider) -> Iterator[int]:
    """Closes each connection, as HTTP/1.0 does."""

    class Handler(simple_server.WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

    with (
        simple_server.make_server("127.0.0.1", 0, traced_wsgi(provider), handler_class=Handler) as server,
        running(server),
    ):
        yield server.server_port


@contextlib.contextmanager
def serving_flask(provider: TracerProvider) -> Iterator[int]:
    """Werkzeug's server."""
    app = flask.Flask("app")
    app.add_url_rule("/", "root", current_ids)
    app.add_url_rule("/health", "health", current_ids)
    FlaskInstrumentor().instrument_app(app, tracer_provider=provider, excluded_urls="health")  # type: ignore[no-untyped-call]
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True)
    with running(server):
        yield server.server_port
    server.server_close()


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
    """A server of the standard library's kind, in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()


@contextlib.contextmanager
def serving_uvicorn(app: Any, **options: Any) -> Iterator[int]:
    """Uvicorn, with any of its protocols and event loops."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def serving_fastapi(**options: Any) -> Serving:
    """FastAPI by uvicorn."""

    @contextlib.contextmanager
    def serving(provider: TracerProvider) -> Iterator[int]:
        app = fastapi.FastAPI()
        app.add_api_route("/", plain_answer)
        app.add_api_route("/health", plain_answer)
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="health")
        with serving_uvicorn(app, **options) as port:
            yield port

    return serving


def serving_asgi(**options: Any) -> Serving:
    """A bare application by uvicorn."""
    return lambda provider: serving_uvicorn(TracedAsgi(asgi_app, tracer_provider=provider), **options)


async def plain_answer() -> fastapi.Response:
    return fastapi.Response(current_ids())


@contextlib.contextmanager
def serving_hypercorn(provider: TracerProvider) -> Iterator[int]:
    """Hypercorn, which speaks HTTP/2 too."""
    app = TracedAsgi(asgi_app, tracer_provider=provider, excluded_urls="health")
    config = hypercorn.config.Config()
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config.bind = [f"fd://{os.dup(listener.fileno())}"]

        async def stopped() -> None:
            await asyncio.to_thread(stop.wait)

        def serve() -> None:
            asyncio.run(hypercorn.asyncio.serve(app, config, shutdown_trigger=stopped))  # type: ignore[arg-type]

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()


@contextlib.contextmanager
def serving_waitress(provider: TracerProvider) -> Iterator[int]:
    """Waitress, which answers in threads of its own."""
    stop, channels = threading.Event(), dict[int, Any]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = waitress.server.create_server(traced_wsgi(provider), map=channels, sockets=[listener], threads=2)

        def loop() -> None:
            while not stop.is_set():
                waitress.wasyncore.loop(timeout=0.05, map=channels, count=1)

        thread = threading.Thread(target=loop)
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()
        server.task_dispatcher.shutdown()
        waitress.wasyncore.close_all(channels)


@contextlib.contextmanager
def serving_aiohttp(provider: TracerProvider) -> Iterator[int]:
    """Aiohttp's own server."""

    async def answer(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text=current_ids())

    async def serve(listener: socket.socket) -> None:
        app = aiohttp.web.Application()
        app.add_routes([aiohttp.web.get("/", answer), aiohttp.web.get("/health", answer)])
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        await aiohttp.web.SockSite(runner, listener).start()
        await asyncio.to_thread(stop.wait)
        await runner.cleanup()

    stop = threading.Event()
    instrumentor = AioHttpServerInstrumentor()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_PYTHON_AIOHTTP_SERVER_EXCLUDED_URLS", "health")
        instrumentor.instrument(tracer_provider=provider)
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener.dup())))
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()
        instrumentor.uninstrument()


class Answer(NamedTuple):
    """What a server said, and how many bytes that were."""

    ids: tuple[int, int]
    size_bytes: int
    closes: bool


def ask_by_hand(port: int, *paths: str) -> list[Answer]:
    """One request after another, on one connection where the server keeps it."""
    answers: list[Answer] = []
    with ExitStack() as connection:
        stream: Any = None
        for path in paths:
            if stream is None or answers[-1].closes:
                connection.pop_all().close()
                sock = connection.enter_context(socket.create_connection(("127.0.0.1", port)))
                stream = connection.enter_context(sock.makefile("rwb"))
            stream.write(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
            stream.flush()
            head = Origin._head(stream)
            fields = http_fields(head)
            body = stream.read(int(fields["content-length"]))
            trace_id, span_id = body.decode().split("-")
            closes = head.startswith(b"HTTP/1.0") or fields.get("connection", "") == "close"
            answers.append(Answer((int(trace_id, 16), int(span_id, 16)), len(head) + len(body), closes))
    return answers


SERVERS: dict[str, Serving] = {
    "wsgiref": serving_wsgiref,
    "flask": serving_flask,
    "fastapi, h11": serving_fastapi(http="h11", loop="asyncio"),
    "fastapi, httptools": serving_fastapi(http="httptools", loop="uvloop"),
    "hypercorn": serving_hypercorn,
    "waitress": serving_waitress,
    "aiohttp": serving_aiohttp,
}


@pytest.mark.parametrize("serving", SERVERS.values(), ids=SERVERS)
def test_each_request_tags_the_connection_it_came_by_before_its_answer(
    instrumented: Recorder, provider: TracerProvider, serving: Serving
) -> None:
    """The server span's ids, at the byte where its answer begins; a request without a span takes them off."""
    with serving(provider) as port:
        answers = ask_by_hand(port, "/", "/", "/health", "/")
    tags = instrumented.of_server(port)
    assert [tag.ids for tag in tags] == [answer.ids for answer in answers]
    assert [answer.ids == NO_CONTEXT for answer in answers] == [False, False, True, False]
    assert len({answer.ids for answer in answers}) == 4
    written = 0
    for tag, answer in zip(tags, answers, strict=True):
        assert (tag.name, tag.written_bytes) == (ONE_CONTEXT, written)
        written = 0 if answer.closes else written + answer.size_bytes


def test_streams_share_their_connection(instrumented: Recorder, provider: TracerProvider) -> None:
    """Both ends of HTTP/2 say that the context is one of several, and neither takes one off."""

    async def ask(port: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(http1=False, http2=True) as client:
            url = f"http://127.0.0.1:{port}"
            await client.get(url)
            return list(await asyncio.gather(*(client.get(url) for _ in range(5)), client.get(url + "/health")))

    with serving_hypercorn(provider) as port, traced(CLIENTS["httpx"], provider):
        answers = asyncio.run(ask(port))
    assert {answer.http_version for answer in answers} == {"HTTP/2"}
    tags = instrumented.of_clients(port)
    assert len({tag.ids for tag in tags}) == len(tags) == 7
    assert len({tag.local_port for tag in tags}) == 1
    served = instrumented.of_server(port)
    assert {tag.ids for tag in served} > {ids_of(f"00-{a.text}-00") for a in answers} - {NO_CONTEXT}
    assert len(served) == 6
    assert {tag.name for tag in tags + served} == {SHARED_CONTEXT}


WEBSOCKET_SERVERS = {
    "uvicorn, websockets": serving_asgi(ws="websockets"),
    "uvicorn, websockets-sansio": serving_asgi(ws="websockets-sansio"),
    "uvicorn, wsproto": serving_asgi(ws="wsproto"),
    "hypercorn": serving_hypercorn,
}


@pytest.mark.filterwarnings("ignore:.*websockets", "ignore:remove second argument")
@pytest.mark.parametrize("serving", WEBSOCKET_SERVERS.values(), ids=WEBSOCKET_SERVERS)
def test_a_websocket_serves_one_span(instrumented: Recorder, provider: TracerProvider, serving: Serving) -> None:
    """Its connection is tagged before the handshake is answered, and keeps the span that the handshake began."""

    async def ask(port: int) -> str:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://127.0.0.1:{port}") as connection:
            return await connection.receive_str()

    with serving(provider) as port:
        text = asyncio.run(ask(port))
    (tag,) = instrumented.of_server(port)
    assert (tag.name, tag.ids, tag.written_bytes) == (ONE_CONTEXT, ids_of(f"00-{text}-00"), 0)


def test_only_the_first_server_span_of_a_request_tags(instrumented: Recorder, provider: TracerProvider) -> None:
    """Neither a span of another kind before it does, nor what a task that the request left behind starts later."""
    started = threading.Event()
    tracer = provider.get_tracer("test")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def later() -> None:
            tracer.start_span("later", kind=trace.SpanKind.SERVER).end()
            started.set()

        tracer.start_span("before").end()
        await TracedAsgi(asgi_app, tracer_provider=provider)(scope, receive, send)
        scope["state"]["task"] = asyncio.create_task(later())

    with serving_uvicorn(app, http="h11") as port:
        answers = ask_by_hand(port, "/")
        assert started.wait(10)
    assert [tag.ids for tag in instrumented.of_server(port)] == [answer.ids for answer in answers]


GUNICORN = """
import json, sys
sys.path.insert(0, {root!r})
from tcpio_otel.correlation import tag
from tcpio_otel.correlation.instrumentor import TcpioInstrumentor
from tests.unit.correlation import test_correlation_instrumentor as test

recorder = tag._setsockopt = test.Recorder()
TcpioInstrumentor().instrument()
traced = test.traced_wsgi(test.TracerProvider(sampler=test.ALWAYS_OFF))

def app(environ, start_response):
    if environ["PATH_INFO"] != "/tags":
        return traced(environ, start_response)
    body = json.dumps(recorder.tags).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_gunicorn_is_hooked_in_its_workers(tmp_path: Path, worker: str) -> None:
    """What holds for servers in this process holds after a fork; sync alone closes each connection."""
    if worker == "gevent":
        pytest.importorskip("gevent")
    (tmp_path / "served.py").write_text(GUNICORN.format(root=str(ROOT)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "-b", f"fd://{listener.fileno()}", "-k", worker, "served:app"]
        server = subprocess.Popen(command, cwd=tmp_path, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
        try:
            answers = ask_by_hand(port, "/", "/", "/health", "/")
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                connection.request("GET", "/tags")
                tags = [Tag(*fields) for fields in json.loads(connection.getresponse().read())]
        finally:
            server.terminate()
            server.wait()
    assert [tuple(tag.ids) for tag in tags] == [answer.ids for answer in answers]
    assert {answer.closes for answer in answers} == {worker == "sync"}
    starts = [0, *(answer.size_bytes for answer in answers[:3])]
    written = [sum(starts[: i + 1]) if worker != "sync" else 0 for i in range(4)]
    assert [tag.written_bytes for tag in tags] == written


# The instrumentor itself.


def hooked_methods() -> dict[tuple[str, str, str], Any]:
    """The methods as they are now, of the libraries that are here."""
    found = {}
    for hook in HOOKS:
        with contextlib.suppress(ImportError):
            owner = getattr(import_module(hook.module), hook.owner)
            found[hook[:3]] = vars(owner)[hook.method]
    return found


@pytest.mark.filterwarnings("ignore:.*websockets")
def test_uninstrumenting_restores_every_method(recorder: Recorder) -> None:
    """Each method is replaced, once, and is afterwards the very function that it was; and so a second time."""
    before = hooked_methods()
    assert len(before) >= len(HOOKS) - 3  # uvicorn's three for zttp are not here
    for _ in range(2):
        TcpioInstrumentor().instrument()
        during = hooked_methods()
        assert {name for name in before if during[name].__wrapped__ is not before[name]} == set()
        TcpioInstrumentor().uninstrument()
        assert hooked_methods() == before


def run_python(program: str, *arguments: str, **environment: str) -> str:
    """What a program printed in a process of its own."""
    command = [sys.executable, *arguments, "-c", program]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_libraries_are_hooked_when_they_are_imported() -> None:
    """No library is brought in by this; one that comes later is hooked, unless that was undone by then."""
    run_python("""
import sys
from tcpio_otel.correlation.instrumentor import TcpioInstrumentor
before = set(sys.modules)
TcpioInstrumentor().instrument()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"aiohttp", "gunicorn", "httpcore", "hypercorn", "uvicorn", "werkzeug", "ssl"}, new
import httpcore
assert hasattr(httpcore.HTTP11Connection._send_request_headers, "__wrapped__")
TcpioInstrumentor().uninstrument()
import aiohttp
assert not hasattr(httpcore.HTTP11Connection._send_request_headers, "__wrapped__")
assert not hasattr(aiohttp.ClientRequest.send, "__wrapped__")
TcpioInstrumentor().instrument()
assert hasattr(aiohttp.ClientRequest.send, "__wrapped__")
""")


def test_opentelemetry_instrument_picks_it_up() -> None:
    """The entry point is all that an unchanged application needs."""
    if not entry_points(group="opentelemetry_instrumentor", name="tcpio"):
        pytest.skip("installed before the entry point was declared; install again")
    program = "import http.client; print(hasattr(http.client.HTTPConnection.endheaders, '__wrapped__'))"
    command = [str(Path(sys.executable).parent / "opentelemetry-instrument"), sys.executable, "-c", program]
    exporters = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")}
    result = subprocess.run(command, env={**os.environ, **exporters}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True"]
