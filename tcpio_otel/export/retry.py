"""When a request may be sent again: the rules of the OTLP specification, as pure functions.

https://opentelemetry.io/docs/specs/otlp/ sections "Failures" of OTLP/gRPC and OTLP/HTTP.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRYABLE_HTTP = frozenset({429, 502, 503, 504})
RETRYABLE_GRPC = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})
"""RESOURCE_EXHAUSTED is retryable too, but only when the receiver sends RetryInfo with it."""


def grpc_retryable(code: str, has_retry_info: bool) -> bool:
    """Whether a gRPC status code allows another try."""
    return code in RETRYABLE_GRPC or (code == "RESOURCE_EXHAUSTED" and has_retry_info)


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """The wait that a Retry-After header asks for (RFC 9110, section 10.2.3): seconds or a date; None for nonsense."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - now).total_seconds())


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with jitter, all in seconds; `give_up_s` counts from the first try."""

    initial_s: float = 1.0
    factor: float = 1.5
    highest_s: float = 30.0
    give_up_s: float = 300.0
    jitter: Callable[[float, float], float] = random.uniform

    def wait_s(self, tries: int) -> float:
        """The wait after so many tries, half of it up to chance, so that many agents do not come back at once."""
        wait = min(self.highest_s, self.initial_s * self.factor ** (tries - 1))
        return self.jitter(wait / 2, wait)
