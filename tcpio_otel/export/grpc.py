"""Requests to an OTLP/gRPC receiver."""

import logging
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tcpio_otel import __version__
from tcpio_otel.errors import UsageError
from tcpio_otel.export.retry import grpc_retryable
from tcpio_otel.export.settings import Compression, OtlpSettings
from tcpio_otel.export.transport import Accepted, Refused, Reply, Retry, read_pem, rejected_items
from tcpio_otel.payload import Request, Signal

logger = logging.getLogger(__name__)

_SERVICES: dict[Signal, tuple[str, Any]] = {
    Signal.LOGS: ("logs.v1.LogsService", ExportLogsServiceResponse),
    Signal.TRACES: ("trace.v1.TraceService", ExportTraceServiceResponse),
    Signal.METRICS: ("metrics.v1.MetricsService", ExportMetricsServiceResponse),
}


class GrpcTransport:
    """One signal to one receiver, as bytes that are protobuf already.

    Raises:
        UsageError: on construction, when the endpoint or a certificate will not do.
    """

    def __init__(self, signal: Signal, settings: OtlpSettings) -> None:
        url = urlsplit(settings.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UsageError(f"bad endpoint {settings.endpoint!r}: give http://HOST:PORT, or https:// for TLS")
        target = f"{url.hostname if ':' not in url.hostname else f'[{url.hostname}]'}:{url.port or 4317}"
        self._settings, self.destination = settings, f"{url.scheme}://{target} (OTLP/gRPC)"
        compression = (
            grpc.Compression.Gzip if settings.compression is Compression.GZIP else grpc.Compression.NoCompression
        )
        options = [("grpc.primary_user_agent", f"tcpio-otel/{__version__}")]
        if url.scheme == "https":
            credentials = grpc.ssl_channel_credentials(
                root_certificates=read_pem(settings.certificate, "CA certificate"),
                private_key=read_pem(settings.client_key, "client key"),
                certificate_chain=read_pem(settings.client_certificate, "client certificate"),
            )
            self._channel = grpc.secure_channel(target, credentials, options, compression)
        else:
            self._channel = grpc.insecure_channel(target, options, compression)
        service, response = _SERVICES[signal]
        self._call = self._channel.unary_unary(
            f"/opentelemetry.proto.collector.{service}/Export",
            request_serializer=None,
            response_deserializer=response.FromString,
        )
        self._metadata = tuple((key.lower(), value) for key, value in settings.headers)

    def send(self, request: Request) -> Reply:
        """Send one request and read the answer by the OTLP specification."""
        try:
            response = self._call(request.body, timeout=self._settings.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            return self._failed(error)
        partial = response.partial_success
        return Accepted(rejected_items(partial), partial.error_message)

    def _failed(self, error: Any) -> Reply:
        code, details = error.code(), (error.details() or "").strip()
        delay_s = _retry_delay_s(error.trailing_metadata() or ())
        cause = f"{code.name}: {details or 'no details given'}"
        if code is grpc.StatusCode.UNAVAILABLE and "certificate" in details.lower():
            cause += "; check the CA certificate and the host name in the endpoint"
        if grpc_retryable(code.name, delay_s is not None):
            return Retry(cause, delay_s)
        return Refused(f"grpc_{code.name.lower()}", cause)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _retry_delay_s(metadata: Any) -> float | None:
    """The delay in a google.rpc.RetryInfo of the status details, None where there is none."""
    for key, value in metadata:
        if key != "grpc-status-details-bin":
            continue
        status, info = Status(), RetryInfo()
        try:
            status.ParseFromString(value)
            for detail in status.details:
                if detail.Unpack(info):
                    return float(info.retry_delay.seconds) + float(info.retry_delay.nanos) / 1e9
        except DecodeError:
            logger.debug("status details that are no google.rpc.Status")
    return None
