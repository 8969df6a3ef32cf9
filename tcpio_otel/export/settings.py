"""Where and how one signal is sent: what configuration and environment come to, whatever they came from."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple


class Protocol(StrEnum):
    """OTLP transports, by the names of `OTEL_EXPORTER_OTLP_PROTOCOL`."""

    GRPC = "grpc"
    HTTP_PROTOBUF = "http/protobuf"
    HTTP_JSON = "http/json"


class Compression(StrEnum):
    """Request compression, by the names of `OTEL_EXPORTER_OTLP_COMPRESSION`."""

    GZIP = "gzip"
    NONE = "none"


@dataclass(frozen=True)
class OtlpSettings:
    """An OTLP receiver for one signal.

    `endpoint` is a whole URL: for HTTP with the signal's path, for gRPC scheme, host and port (`http` means
    plaintext, `https` TLS). `timeout_s` bounds one attempt. Certificates are PEM files; None: the system's roots.
    """

    endpoint: str
    protocol: Protocol
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 10.0
    compression: Compression = Compression.NONE
    certificate: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None


class Listen(NamedTuple):
    """An address and a port to listen on; in text `0.0.0.0:9464`, `[::]:9464`, or `:9464` for all of IPv4."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
