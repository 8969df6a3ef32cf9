"""Requests to outcomes: queues, retries, and receivers that fail in every way."""

import http.server
import json
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.any_pb2 import Any as ProtobufAny
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from isal import igzip
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsPartialSuccess,
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)

from tcpio_otel.clock import boot_ns
from tcpio_otel.errors import EnvironmentFault, UsageError
from tcpio_otel.export.files import FileTransport
from tcpio_otel.export.grpc import GrpcTransport
from tcpio_otel.export.http import HttpTransport
from tcpio_otel.export.retry import Backoff, grpc_retryable, retry_after_s
from tcpio_otel.export.sender import Outcome, Sender
from tcpio_otel.export.settings import Compression, OtlpSettings, Protocol
from tcpio_otel.export.transport import Accepted, Refused, Reply, Retry
from tcpio_otel.payload import Request, Signal

BODY = ExportLogsServiceRequest().SerializeToString() or b""
REQUEST = Request(Signal.LOGS, b"\x0a\x00", 5, 5)


class Scripted:
    """A transport that answers by a script, the last answer again and again."""

    destination = "a script"

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.sent, self.closed = list(replies), 0, False

    def send(self, request: Request) -> Reply:
        self.sent += 1
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def close(self) -> None:
        self.closed = True


def delivered(*replies: Reply, give_up_s: float = 300, **settings: Any) -> tuple[Outcome, Scripted]:
    """What became of one request."""
    outcomes: list[Outcome] = []
    transport = Scripted(*replies)
    backoff = Backoff(initial_s=0.001, highest_s=0.002, give_up_s=give_up_s)
    sender = Sender(
        transport, queue_bytes=1 << 20, backoff=backoff, on_outcome=lambda _, outcome: outcomes.append(outcome),
        clock=boot_ns, **settings,
    )  # fmt: skip
    sender.submit(REQUEST)
    sender.close(30)
    (outcome,) = outcomes
    assert transport.closed
    return outcome, transport


def test_accepted_is_accepted() -> None:
    """The plain case."""
    assert delivered(Accepted())[0] == Outcome(accepted=5)


def test_partial_success_is_counted_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Rejected items are lost, said so, and never sent a second time."""
    outcome, transport = delivered(Accepted(2, "no room"))
    assert (outcome, transport.sent) == (Outcome(accepted=3, rejected=2), 1)
    assert "rejected 2 of 5 logs: no room" in caplog.text


def test_a_retry_succeeds_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """The same failure is said once, and so is the recovery."""
    with caplog.at_level(logging.INFO):
        outcome, transport = delivered(Retry("down"), Retry("down"), Accepted())
    assert (outcome, transport.sent) == (Outcome(accepted=5), 3)
    assert caplog.text.count("a script: down") == 1
    assert "takes logs again" in caplog.text


def test_what_is_refused_is_not_tried_again() -> None:
    """A receiver that will never take it costs one try."""
    outcome, transport = delivered(Refused("http_400", "no"))
    assert (outcome, transport.sent) == (Outcome(dropped=5, reason="http_400"), 1)


def test_retries_come_to_an_end() -> None:
    """A receiver that stays away loses the request after the time that was set, and the ledger hears of it."""
    assert delivered(Retry("down"), give_up_s=0.01)[0] == Outcome(dropped=5, reason="retries_exhausted")


def test_what_was_taken_before_it_failed_counts() -> None:
    """A receiver that takes a part and then no more has that part."""
    assert delivered(Retry("stuck", taken=2), give_up_s=0.01)[0] == Outcome(2, 0, 3, "retries_exhausted")
    assert delivered(Retry("stuck", taken=2), Refused("gone", "", 4))[0] == Outcome(4, 0, 1, "gone")
    assert delivered(Retry("stuck", taken=2), Accepted())[0] == Outcome(accepted=5)


def test_a_full_queue_drops_the_newest_and_never_blocks() -> None:
    """While a receiver hangs, what finds no room is dropped at once; everything comes to one outcome."""
    outcomes: list[Outcome] = []
    hold = threading.Event()

    class Hanging(Scripted):
        def send(self, request: Request) -> Reply:
            hold.wait(30)
            return super().send(request)

    sender = Sender(
        Hanging(Accepted()), queue_bytes=300, backoff=Backoff(), clock=boot_ns,
        on_outcome=lambda _, outcome: outcomes.append(outcome),
    )  # fmt: skip
    for _ in range(10):
        sender.submit(Request(Signal.LOGS, bytes(100), 1))
    assert outcomes == [Outcome(dropped=1, reason="queue_full")] * 7
    hold.set()
    sender.close(30)
    assert outcomes[7:] == [Outcome(accepted=1)] * 3


def test_a_paced_source_waits_instead() -> None:
    """A capture file can be held up: nothing is dropped for want of room."""
    outcomes: list[Outcome] = []
    sender = Sender(
        Scripted(Accepted()), queue_bytes=100, backoff=Backoff(), clock=boot_ns,
        on_outcome=lambda _, outcome: outcomes.append(outcome),
    )  # fmt: skip
    for _ in range(50):
        sender.submit(Request(Signal.LOGS, bytes(100), 1), block=True)
    sender.close(30)
    assert outcomes == [Outcome(accepted=1)] * 50


def test_shutdown_drops_what_does_not_get_through() -> None:
    """A receiver that is away does not hold the agent up for longer than it was told."""
    outcomes: list[Outcome] = []
    sender = Sender(
        Scripted(Retry("down")), queue_bytes=1 << 20, backoff=Backoff(initial_s=60, highest_s=60), clock=boot_ns,
        on_outcome=lambda _, outcome: outcomes.append(outcome),
    )  # fmt: skip
    for _ in range(3):
        sender.submit(REQUEST)
    sender.close(0.05)
    assert outcomes == [Outcome(dropped=5, reason="shutdown")] * 3


@pytest.mark.parametrize(
    ("code", "info", "expected"),
    [
        ("UNAVAILABLE", False, True), ("DEADLINE_EXCEEDED", False, True), ("ABORTED", False, True),
        ("OUT_OF_RANGE", False, True), ("DATA_LOSS", False, True), ("CANCELLED", False, True),
        ("RESOURCE_EXHAUSTED", False, False), ("RESOURCE_EXHAUSTED", True, True),
        ("INVALID_ARGUMENT", True, False), ("UNAUTHENTICATED", False, False), ("INTERNAL", False, False),
    ],
)  # fmt: skip
def test_grpc_codes_are_retried_as_the_specification_says(code: str, info: bool, expected: bool) -> None:
    """RESOURCE_EXHAUSTED only with RetryInfo, and no code that means that the request is at fault."""
    assert grpc_retryable(code, info) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7.0), (" 0 ", 0.0), ("Tue, 24 Nov 2026 00:00:30 GMT", 30.0), ("Mon, 23 Nov 2026 00:00:00 GMT", 0.0),
     ("soon", None), ("-3", None), (None, None), ("٣", None)],
)  # fmt: skip
def test_retry_after_in_both_forms(text: str | None, expected: float | None) -> None:
    """Seconds or a date; nonsense is no wait."""
    assert retry_after_s(text, datetime(2026, 11, 24, tzinfo=UTC)) == expected


def test_backoff_grows_within_bounds() -> None:
    """Each wait is longer than the one before, up to the highest, with up to half of it left to chance."""
    longest = Backoff(jitter=lambda _, high: high)
    shortest = Backoff(jitter=lambda low, _: low)
    assert [longest.wait_s(tries) for tries in (1, 2, 3, 20)] == [1.0, 1.5, 2.25, 30.0]
    assert shortest.wait_s(1) == 0.5


# Real receivers on loopback.

Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


@contextmanager
def http_receiver(answer: Answer) -> Iterator[str]:
    """An HTTP server that answers POST requests by a function; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/logs"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def replies(status: int, content: bytes = b"", content_type: str = "application/x-protobuf", **headers: str) -> Answer:
    """An answer that is always the same."""

    def answer(handler: http.server.BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def over_http(url: str, **settings: Any) -> Reply:
    """One try over HTTP."""
    transport = HttpTransport(
        Signal.LOGS, OtlpSettings(url, settings.pop("protocol", Protocol.HTTP_PROTOBUF), **settings)
    )
    try:
        return transport.send(REQUEST)
    finally:
        transport.close()


def test_http_sends_what_was_asked() -> None:
    """Body, compression, content type, headers and user agent arrive."""
    seen: dict[str, Any] = {}

    def answer(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        seen.update(handler.headers.items(), body=body, path=handler.path)
        replies(200)(handler, body)

    with http_receiver(answer) as url:
        reply = over_http(url, compression=Compression.GZIP, headers=(("X-Token", "secret"),))
    assert reply == Accepted()
    assert igzip.decompress(seen["body"]) == REQUEST.body
    assert (seen["Content-Encoding"], seen["X-Token"], seen["path"]) == ("gzip", "secret", "/v1/logs")
    assert seen["User-Agent"].startswith("tcpio-otel/")


PARTIAL = ExportLogsServiceResponse(partial_success=ExportLogsPartialSuccess(rejected_log_records=3, error_message="x"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (replies(200, PARTIAL.SerializeToString()), Accepted(3, "x")),
        (replies(200, b'{"partialSuccess":{"rejectedLogRecords":"3"}}', "application/json"), Accepted(3)),
        (replies(200, b"<html>", "text/html"), Accepted(0, "an answer that is no OTLP response (text/html)")),
        (replies(429, Retry_After="9"), Retry("HTTP 429 Too Many Requests", 9.0)),
        (replies(503), Retry("HTTP 503 Service Unavailable")),
        (replies(413), Refused("http_413", "HTTP 413 Request Entity Too Large")),
        (replies(404), Refused("http_404", "HTTP 404 Not Found; is this the path of an OTLP receiver?")),
        (replies(302, Location="http://127.0.0.1:1/"), Refused("http_302", "HTTP 302 Found")),
    ],
)  # fmt: skip
def test_http_answers(answer: Answer, expected: Reply) -> None:
    """Each status is read as the OTLP specification says."""
    with http_receiver(answer) as url:
        assert over_http(url) == expected


def test_http_without_a_receiver_is_a_retry() -> None:
    """A refused connection may be taken later."""
    reply = over_http("http://127.0.0.1:9/v1/logs")
    assert isinstance(reply, Retry)
    assert "is a receiver listening there?" in reply.cause


def test_http_that_hangs_ends_by_its_timeout() -> None:
    """A receiver that never answers costs one timeout."""
    released = threading.Event()
    with http_receiver(lambda *_: released.wait(10) and None) as url:
        reply = over_http(url, timeout_s=0.1)
        released.set()
    assert isinstance(reply, Retry)


Handle = Callable[[bytes, grpc.ServicerContext], bytes]


@contextmanager
def grpc_receiver(handle: Handle, credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """A gRPC server whose logs service is a function over bytes; yields its port."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(handle)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("opentelemetry.proto.collector.logs.v1.LogsService", {"Export": method}),)
    )
    address = "localhost:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def over_grpc(endpoint: str, **settings: Any) -> Reply:
    """One try over gRPC."""
    transport = GrpcTransport(Signal.LOGS, OtlpSettings(endpoint, Protocol.GRPC, **settings))
    try:
        return transport.send(REQUEST)
    finally:
        transport.close()


@pytest.mark.parametrize("compression", list(Compression))
def test_grpc_sends_what_was_asked(compression: Compression) -> None:
    """Bytes as they are, headers as metadata, and a partial success is read."""
    seen: dict[str, Any] = {}

    def handle(body: bytes, context: grpc.ServicerContext) -> bytes:
        seen.update(dict(context.invocation_metadata()), body=body)
        return PARTIAL.SerializeToString()

    with grpc_receiver(handle) as port:
        reply = over_grpc(f"http://localhost:{port}", compression=compression, headers=(("X-Token", "secret"),))
    assert reply == Accepted(3, "x")
    assert (seen["body"], seen["x-token"]) == (REQUEST.body, "secret")
    assert "tcpio-otel/" in seen["user-agent"]


def failing(code: grpc.StatusCode, delay_s: int | None = None) -> Handle:
    """A service that fails, perhaps with RetryInfo."""

    def handle(_: bytes, context: grpc.ServicerContext) -> bytes:
        if delay_s is not None:
            detail = ProtobufAny()
            detail.Pack(RetryInfo(retry_delay=Duration(seconds=delay_s)))
            status = Status(code=code.value[0], details=[detail])
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, "because")
        raise AssertionError("abort raises")

    return handle


@pytest.mark.parametrize(
    ("code", "delay_s", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, None, Retry("UNAVAILABLE: because")),
        (grpc.StatusCode.UNAVAILABLE, 4, Retry("UNAVAILABLE: because", 4.0)),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 7, Retry("RESOURCE_EXHAUSTED: because", 7.0)),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, Refused("grpc_resource_exhausted", "RESOURCE_EXHAUSTED: because")),
        (grpc.StatusCode.INVALID_ARGUMENT, None, Refused("grpc_invalid_argument", "INVALID_ARGUMENT: because")),
    ],
)
def test_grpc_failures(code: grpc.StatusCode, delay_s: int | None, expected: Reply) -> None:
    """Each status is read as the OTLP specification says, RetryInfo included."""
    with grpc_receiver(failing(code, delay_s)) as port:
        assert over_grpc(f"http://localhost:{port}") == expected


def test_grpc_over_tls_and_mtls(tmp_path: Path) -> None:
    """A receiver with a certificate of its own authority, one that asks for ours, and one that is not who it says."""
    authority, stranger = trustme.CA(), trustme.CA()
    server, client = authority.issue_cert("localhost"), authority.issue_cert("client")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    stranger.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())], authority.cert_pem.bytes(), True
    )
    mine = {"client_certificate": tmp_path / "cert.pem", "client_key": tmp_path / "key.pem"}
    with grpc_receiver(lambda *_: b"", credentials) as port:
        endpoint = f"https://localhost:{port}"
        assert over_grpc(endpoint, certificate=tmp_path / "ca.pem", **mine) == Accepted()
        for settings in ({"certificate": tmp_path / "ca.pem"}, {"certificate": tmp_path / "other.pem", **mine}):
            assert isinstance(over_grpc(endpoint, timeout_s=3, **settings), Retry)


@pytest.mark.parametrize("transport", [GrpcTransport, HttpTransport])
def test_bad_settings_are_said_at_once(transport: Any, tmp_path: Path) -> None:
    """A wrong endpoint or certificate is one line before anything is sent."""
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("hello")
    protocol = Protocol.GRPC if transport is GrpcTransport else Protocol.HTTP_PROTOBUF
    for endpoint, certificate, said in (
        ("ftp://x", None, "bad endpoint 'ftp://x'"),
        ("https://localhost:1", tmp_path / "missing.pem", "No such file"),
        ("https://localhost:1", no_pem, "is no PEM file"),
    ):
        with pytest.raises(UsageError, match=said) as raised:
            transport(Signal.LOGS, OtlpSettings(endpoint, protocol, certificate=certificate))
        assert "\n" not in str(raised.value)


# Files.


def test_files_rotate_by_size_and_are_bounded(tmp_path: Path) -> None:
    """A signal takes no more than it may, and no line is cut."""
    transport = FileTransport(Signal.LOGS, tmp_path / "new" / "data", rotate_bytes=100, keep=2)
    for number in range(20):
        line = (f'{{"n":{number}}}'.ljust(39) + "\n").encode()
        assert transport.send(Request(Signal.LOGS, line, 1)) == Accepted()
    transport.close()
    files = sorted((tmp_path / "new" / "data").iterdir())
    assert [path.name.startswith("logs-") for path in files] == [True, True, False]
    assert all(path.stat().st_size <= 100 for path in files)
    numbers = [json.loads(line)["n"] for path in files for line in path.read_text().splitlines()]
    assert sorted(numbers) == list(range(14, 20))


def test_what_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    """A write that stops in the middle is taken back, and dropped with a reason."""
    transport = FileTransport(Signal.LOGS, tmp_path, rotate_bytes=1 << 20, keep=1)
    line = b"x" * 99 + b"\n"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        assert transport.send(Request(Signal.LOGS, line, 1)) == Accepted()
        refused = transport.send(Request(Signal.LOGS, line, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(refused, Refused)
    assert refused.reason == "write_failed"
    assert (tmp_path / "logs.jsonl").read_bytes() == line
    assert transport.send(Request(Signal.LOGS, line, 1)) == Accepted()
    transport.close()
    assert (tmp_path / "logs.jsonl").read_bytes() == 2 * line


def test_a_directory_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    """One line says which, and why."""
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file/data"):
        FileTransport(Signal.LOGS, tmp_path / "file" / "data", rotate_bytes=1, keep=1)
