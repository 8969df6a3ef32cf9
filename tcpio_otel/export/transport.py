"""What a transport answers when it was given a request: the outcome, or that it may be tried again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tcpio_otel.errors import UsageError
from tcpio_otel.payload import Request


@dataclass(frozen=True)
class Accepted:
    """The receiver took the request, but for `rejected` items (partial success), and may have said why."""

    rejected: int = 0
    message: str = ""


@dataclass(frozen=True)
class Retry:
    """The receiver may take it later: not before `after_s`, where it said so; `taken` items it has already."""

    cause: str
    after_s: float | None = None
    taken: int = 0


@dataclass(frozen=True)
class Refused:
    """The receiver will not take it, ever, but for `taken` items that it has.

    `reason` is one word for the ledger, `cause` a line for people.
    """

    reason: str
    cause: str
    taken: int = 0


Reply = Accepted | Retry | Refused


class Transport(Protocol):
    """A way to one receiver. Used by one thread at a time."""

    @property
    def destination(self) -> str:
        """Where it leads, for people."""

    def send(self, request: Request) -> Reply:
        """Send one request, once, within the transport's own time limit."""

    def close(self) -> None:
        """Let go of connections and files."""


def read_pem(path: Path | None, what: str) -> bytes | None:
    """A PEM file's bytes.

    Raises:
        UsageError: it cannot be read, or is no PEM.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise UsageError(f"the {what} {path} is no PEM file: it holds no BEGIN line")
    return content


def rejected_items(partial_success: Any) -> int:
    """The count in a `partial_success`, whatever its signal calls it."""
    for name in ("rejected_log_records", "rejected_spans", "rejected_data_points"):
        if hasattr(partial_success, name):
            return int(getattr(partial_success, name))
    return 0
