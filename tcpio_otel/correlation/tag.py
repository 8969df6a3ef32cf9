"""A socket and a span in; the agent on this host then knows which trace that TCP connection serves from now on.

`docs/socket-option.md` is the contract. The standard library suffices; opentelemetry-api is used where it is installed.
"""

import ctypes
import errno
import functools
import math
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # an application may have no OpenTelemetry at run time
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext

LEVEL = int.from_bytes(b"otel", "big")
ONE_CONTEXT = 1
SHARED_CONTEXT = 2
TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8
RETRY_AFTER_S = 30.0

_NO_CONTEXT = bytes(TRACE_ID_BYTES + SPAN_ID_BYTES)
# A kernel that knows no such level answers the first; some sandboxes answer one of the others.
_UNKNOWN_LEVEL = frozenset({errno.ENOPROTOOPT, errno.EINVAL, errno.EPERM})
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


class HasFileno(Protocol):
    """A socket of any make: the standard library's, or that of ssl, asyncio, uvloop, trio, gevent."""

    def fileno(self) -> int:
        """Return its file descriptor; negative when it is closed."""


class Tagger:
    """Tags sockets, and remembers for `RETRY_AFTER_S` that no agent answers.

    Threads may share one without a lock: all it keeps is one number, and a thread that reads the old one makes one
    system call too many.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._absent_until_s = -math.inf if sys.platform == "linux" else math.inf

    def tag(
        self,
        sock: HasFileno | int | None,
        context: "SpanContext | Span | Context | tuple[int | bytes, int | bytes] | str | None" = None,
        *,
        shared: bool = False,
    ) -> bool:
        """Say which trace the connection of `sock` serves from now on; one system call.

        A client calls this before it sends its request, a server once it has read (the beginning of) the request and
        before it answers.

        Args:
            sock: A connected TCP socket, or its file descriptor. None, a closed socket and one of another family are
                let pass, since frameworks hand those out too.
            context: None for the current OpenTelemetry span; or a SpanContext, a Span, a Context, a pair of trace id
                and span id (ints, or 16 and 8 bytes), or a W3C `traceparent`. One that is absent or invalid tags
                nothing.
            shared: The context is one of several that use the connection at a time, as streams of HTTP/2 do.

        Returns:
            Whether an agent took it. Whatever the kernel says, this does not raise.

        Raises:
            TypeError, ValueError: `context` is nothing of the kind listed above.
            AttributeError: `sock` is no socket.
        """
        if self._clock() < self._absent_until_s:
            return False
        value = option_value(context)
        return value is not None and self._set(sock, SHARED_CONTEXT if shared else ONE_CONTEXT, value)

    def clear(self, sock: HasFileno | int | None) -> bool:
        """Say that the connection of `sock` serves no trace from now on; returns and raises as `tag` does."""
        return self._clock() >= self._absent_until_s and self._set(sock, ONE_CONTEXT, _NO_CONTEXT)

    def _set(self, sock: HasFileno | int | None, name: int, value: bytes) -> bool:
        descriptor = _descriptor(sock)
        if descriptor < 0:
            return False
        error = _setsockopt(descriptor, name, value)
        # An agent leaves what it does not take to the kernel, so only a socket that it would take tells of its absence.
        if error in _UNKNOWN_LEVEL and _is_tcp_connection(descriptor):
            self._absent_until_s = self._clock() + RETRY_AFTER_S
        return error == 0


# One for the process, since one agent serves all of it.
_TAGGER = Tagger()
tag = _TAGGER.tag
clear = _TAGGER.clear


def option_value(
    context: "SpanContext | Span | Context | tuple[int | bytes, int | bytes] | str | None",
) -> bytes | None:
    """The option's 24 bytes for a context as `tag` takes it; None where that is absent or invalid."""
    if isinstance(context, str):
        return _traceparent_value(context)
    found: Any = context
    if found is None or isinstance(found, Mapping):
        trace = _opentelemetry_trace()
        if trace is None:
            return None
        found = trace.get_current_span(found)
    if hasattr(found, "get_span_context"):
        found = found.get_span_context()
    # A SpanContext is a tuple too, of more than the two.
    trace_id, span_id = (found.trace_id, found.span_id) if hasattr(found, "trace_id") else found
    first, second = _id_bytes(trace_id, TRACE_ID_BYTES), _id_bytes(span_id, SPAN_ID_BYTES)
    return first + second if first and second else None


def _traceparent_value(traceparent: str) -> bytes | None:
    """The ids of a `traceparent` header, by section 3.2 of W3C Trace Context."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):  # later versions may append fields
        return None
    return option_value((bytes.fromhex(trace_id), bytes.fromhex(span_id)))


def _id_bytes(identifier: int | bytes, length: int) -> bytes | None:
    """An id in W3C byte order; None if it is zero or does not fit."""
    if isinstance(identifier, bytes):
        return identifier if len(identifier) == length and any(identifier) else None
    return identifier.to_bytes(length, "big") if 0 < identifier < 1 << 8 * length else None


def _descriptor(sock: HasFileno | int | None) -> int:
    """The file descriptor; -1 where it is plain without a system call that this is no open TCP socket."""
    if isinstance(sock, int):
        return sock
    if (
        sock is None
        or getattr(sock, "family", socket.AF_INET) not in {socket.AF_INET, socket.AF_INET6}
        or getattr(sock, "type", socket.SOCK_STREAM) != socket.SOCK_STREAM
    ):
        return -1
    try:
        return sock.fileno()
    except (OSError, ValueError):  # what file objects raise once they are closed
        return -1


@functools.cache
def _opentelemetry_trace() -> ModuleType | None:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _setsockopt(descriptor: int, name: int, value: bytes) -> int:
    """Call setsockopt(2) at the agent's level; the errno, 0 where it was taken.

    By file descriptor, since uvloop's sockets refuse `setsockopt`, and without an exception, since a refusal is an
    ordinary answer.
    """
    if _libc().setsockopt(descriptor, LEVEL, name, value, len(value)) == 0:
        return 0
    return ctypes.get_errno()


def _is_tcp_connection(descriptor: int) -> bool:
    """Whether an agent that is there would have taken a tag for this socket: a TCP stream that does not listen."""
    expected = {socket.SO_TYPE: socket.SOCK_STREAM, socket.SO_PROTOCOL: socket.IPPROTO_TCP, socket.SO_ACCEPTCONN: 0}
    answer, size = ctypes.c_int(), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    return all(
        _libc().getsockopt(descriptor, socket.SOL_SOCKET, option, ctypes.byref(answer), ctypes.byref(size)) == 0
        and answer.value == value
        for option, value in expected.items()
    )
