"""Requests to an OTLP/HTTP receiver, protobuf or JSON."""

import json
import ssl
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import urllib3
from google.protobuf.message import DecodeError
from isal import igzip
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tcpio_otel import __version__
from tcpio_otel.errors import UsageError
from tcpio_otel.export.retry import RETRYABLE_HTTP, retry_after_s
from tcpio_otel.export.settings import Compression, OtlpSettings, Protocol
from tcpio_otel.export.transport import Accepted, Refused, Reply, Retry, read_pem, rejected_items
from tcpio_otel.payload import Request, Signal

RESPONSE_LIMIT = 1 << 16
"""Bytes of a response that are read: an answer needs few, an error page is cut."""

GZIP_LEVEL = 1
"""ISA-L's level 1: a fifth of zlib's cost at the same size (docs/decisions/0003)."""

_RESPONSES: dict[Signal, Any] = {
    Signal.LOGS: ExportLogsServiceResponse,
    Signal.TRACES: ExportTraceServiceResponse,
    Signal.METRICS: ExportMetricsServiceResponse,
}


class HttpTransport:
    """One signal to one URL, over connections that are kept open.

    Raises:
        UsageError: on construction, when the endpoint or a certificate will not do.
    """

    def __init__(self, signal: Signal, settings: OtlpSettings) -> None:
        url = urlsplit(settings.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UsageError(f"bad endpoint {settings.endpoint!r}: give http://HOST:PORT, or https:// for TLS")
        self.destination = f"{settings.endpoint} (OTLP/HTTP)"
        self._settings, self._response = settings, _RESPONSES[signal]
        json_body = settings.protocol is Protocol.HTTP_JSON
        self._headers = {
            "Content-Type": "application/json" if json_body else "application/x-protobuf",
            "User-Agent": f"tcpio-otel/{__version__}",
            **dict(settings.headers),
        }
        if settings.compression is Compression.GZIP:
            self._headers["Content-Encoding"] = "gzip"
        self._pool = urllib3.PoolManager(
            num_pools=1, maxsize=1, retries=False, timeout=settings.timeout_s, ssl_context=_tls(settings, url.scheme)
        )

    def send(self, request: Request) -> Reply:
        """Send one request and read the answer by the OTLP specification."""
        compressed = self._settings.compression is Compression.GZIP
        body = igzip.compress(request.body, GZIP_LEVEL) if compressed else request.body
        try:
            response = self._pool.request(
                "POST", self._settings.endpoint, body=body, headers=self._headers, redirect=False, preload_content=False
            )
            try:
                content = response.read(RESPONSE_LIMIT)
            finally:
                response.drain_conn() if response.length_remaining in (0, None) else response.close()
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            return Retry(_explain(error))
        if response.status == 200:
            return self._success(content, response.headers.get("Content-Type", ""))
        cause = f"HTTP {response.status} {response.reason or ''}".strip()
        if response.status in RETRYABLE_HTTP:
            return Retry(cause, retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC)))
        hint = "; is this the path of an OTLP receiver?" if response.status in (404, 405) else ""
        return Refused(f"http_{response.status}", f"{cause}{hint}")

    def _success(self, content: bytes, content_type: str) -> Reply:
        """A 200 may carry a partial success; one that cannot be read is taken as whole, and said."""
        if not content:
            return Accepted()
        try:
            if content_type.startswith("application/json"):
                partial = json.loads(content).get("partialSuccess", {})
                counts = [int(value) for key, value in partial.items() if key.startswith("rejected")]
                return Accepted(sum(counts), str(partial.get("errorMessage", "")))
            partial = self._response.FromString(content).partial_success
        except (DecodeError, ValueError, AttributeError):
            return Accepted(0, f"an answer that is no OTLP response ({content_type or 'no content type'})")
        return Accepted(rejected_items(partial), partial.error_message)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()


def _tls(settings: OtlpSettings, scheme: str) -> ssl.SSLContext | None:
    if scheme != "https":
        return None
    for path, what in (
        (settings.certificate, "CA certificate"),
        (settings.client_certificate, "client certificate"),
        (settings.client_key, "client key"),
    ):
        read_pem(path, what)
    try:
        context = ssl.create_default_context(cafile=settings.certificate)
        if settings.client_certificate:
            context.load_cert_chain(settings.client_certificate, settings.client_key)
    except ssl.SSLError as error:
        raise UsageError(f"the certificates for {settings.endpoint} will not do: {error.reason or error}") from None
    return context


def _explain(error: urllib3.exceptions.HTTPError) -> str:
    """The innermost cause, in few words."""
    cause: BaseException = error
    while inner := _inner(cause):
        cause = inner
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate does not verify: {cause.verify_message}; check the CA certificate and the host name"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused; is a receiver listening there?"
    return f"{type(cause).__name__}: {cause}"


def _inner(error: BaseException) -> BaseException | None:
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, BaseException) else error.__cause__
