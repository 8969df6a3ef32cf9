"""The one call that applications make: what goes to the kernel, and what becomes of an answer."""

import asyncio
import errno
import os
import socket
import ssl
import string
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags

from tcpio_otel.correlation import tag as tag_module
from tcpio_otel.correlation.tag import LEVEL, RETRY_AFTER_S, SHARED_CONTEXT, Tagger, option_value

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736
SPAN_ID = 0x00F067AA0BA902B7
VALUE = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e473600f067aa0ba902b7")
SPAN_CONTEXT = SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(0))


class Kernel:
    """Stands for the system call: keeps what it was given, and gives what it is told."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int, bytes]] = []

    def __call__(self, descriptor: int, name: int, value: bytes) -> int:
        self.calls.append((descriptor, name, value))
        return self.answer


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel with an agent."""
    kernel = Kernel(0)
    monkeypatch.setattr(tag_module, "_setsockopt", kernel)
    return kernel


@pytest.fixture
def no_agent(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel without one."""
    kernel = Kernel(errno.ENOPROTOOPT)
    monkeypatch.setattr(tag_module, "_setsockopt", kernel)
    return kernel


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def connected(listener: socket.socket) -> Iterator[socket.socket]:
    """A TCP connection's near end."""
    with socket.create_connection(listener.getsockname()) as sock:
        yield sock


@pytest.mark.parametrize(
    "context",
    [
        SPAN_CONTEXT,
        NonRecordingSpan(SPAN_CONTEXT),
        trace.set_span_in_context(NonRecordingSpan(SPAN_CONTEXT), Context()),
        (TRACE_ID, SPAN_ID),
        (VALUE[:16], VALUE[16:]),
        (TRACE_ID, VALUE[16:]),
        TRACEPARENT,
    ],
    ids=["SpanContext", "Span", "Context", "ints", "bytes", "mixed", "traceparent"],
)
def test_a_context_comes_in_many_forms(agent: Kernel, connected: socket.socket, context: object) -> None:
    """Each gives the same 24 bytes, sampled or not, and says that an agent took them."""
    assert Tagger().tag(connected, context)  # type: ignore[arg-type]
    assert agent.calls == [(connected.fileno(), 1, VALUE)]


def test_the_current_span_is_the_default(agent: Kernel, connected: socket.socket) -> None:
    """No context given means that of the span in which the call is made."""
    tagger = Tagger()
    with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
        assert tagger.tag(connected)
    assert agent.calls == [(connected.fileno(), 1, option_value(span))]


def test_a_shared_context_has_its_own_name(agent: Kernel, connected: socket.socket) -> None:
    """Streams of HTTP/2 are told apart from a connection that serves one request at a time; clearing is all zero."""
    tagger = Tagger()
    assert tagger.tag(connected, TRACEPARENT, shared=True)
    assert tagger.clear(connected)
    assert agent.calls == [(connected.fileno(), SHARED_CONTEXT, VALUE), (connected.fileno(), 1, bytes(24))]


@pytest.mark.parametrize(
    "context",
    [
        None,
        INVALID_SPAN,
        INVALID_SPAN.get_span_context(),
        Context(),
        (0, SPAN_ID),
        (TRACE_ID, 0),
        (1 << 128, SPAN_ID),
        (TRACE_ID, -1),
        (bytes(16), VALUE[16:]),
        (VALUE[:16], VALUE[16:-1]),
        (VALUE[:16].hex().encode(), VALUE[16:]),
        "",
        "garbage",
        TRACEPARENT.upper(),
        "ff" + TRACEPARENT[2:],
        TRACEPARENT + "-00",
        TRACEPARENT + "\n",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
    ],
)
def test_without_a_valid_context_nothing_is_tagged(agent: Kernel, connected: socket.socket, context: object) -> None:
    """A request that nobody traces costs no system call, and raises nothing."""
    assert not Tagger().tag(connected, context)  # type: ignore[arg-type]
    assert agent.calls == []


@pytest.mark.parametrize("context", [7, 7.5, object(), (1,), (1, 2, 3), ("4bf9", "00f0"), [TRACE_ID, None]])
def test_what_is_no_context_is_refused(agent: Kernel, connected: socket.socket, context: object) -> None:
    """A programmer's mistake is not mistaken for a request without a trace."""
    with pytest.raises((TypeError, ValueError)):
        Tagger().tag(connected, context)  # type: ignore[arg-type]
    assert agent.calls == []


@pytest.mark.parametrize("answer", [errno.ENOPROTOOPT, errno.EINVAL, errno.EPERM])
def test_an_absent_agent_costs_one_call_in_half_a_minute(
    no_agent: Kernel, connected: socket.socket, answer: int
) -> None:
    """The refusal is remembered for all sockets, and asked about again once it is old."""
    no_agent.answer = answer
    clock = Clock()
    tagger = Tagger(clock)
    assert not tagger.tag(connected, TRACEPARENT)
    clock.now_s += RETRY_AFTER_S - 0.001
    assert not tagger.tag(connected, TRACEPARENT)
    assert not tagger.clear(connected)
    assert len(no_agent.calls) == 1
    clock.now_s += 0.001
    no_agent.answer = 0
    assert tagger.tag(connected, TRACEPARENT)
    assert tagger.tag(connected, TRACEPARENT)
    assert len(no_agent.calls) == 3


def test_the_kernel_itself_refuses(connected: socket.socket) -> None:
    """Without a stand-in: this kernel's own answer to a level that it does not know."""
    answer = tag_module._setsockopt(connected.fileno(), 1, VALUE)
    if answer == 0:
        pytest.skip("an agent runs on this host")
    assert answer == errno.ENOPROTOOPT
    with pytest.raises(OSError, match="not available") as refused:
        connected.setsockopt(LEVEL, 1, VALUE)
    assert refused.value.errno == answer
    assert not Tagger().tag(connected, TRACEPARENT)


def test_another_kind_of_socket_says_nothing_of_the_agent(
    no_agent: Kernel, listener: socket.socket, connected: socket.socket
) -> None:
    """After a Unix or UDP socket, by object or by number, and a listening one, a TCP connection is still tried."""
    tagger = Tagger(Clock())
    near, far = socket.socketpair()
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, far, datagram:
        for sock in (near, datagram):
            assert not tagger.tag(sock, TRACEPARENT)
            assert no_agent.calls == []
        for other in (near.fileno(), datagram.fileno(), listener, listener.fileno()):
            assert not tagger.tag(other, TRACEPARENT)
        assert len(no_agent.calls) == 4
    no_agent.answer = 0
    assert tagger.tag(connected, TRACEPARENT)


def test_a_closed_socket_is_let_pass(agent: Kernel, connected: socket.socket) -> None:
    """A connection that broke, a transport without a socket and a stale number break no request."""
    tagger = Tagger()
    connected.close()
    assert not tagger.tag(connected, TRACEPARENT)
    assert not tagger.tag(None, TRACEPARENT)
    with open(os.devnull) as file:
        pass
    assert not tagger.tag(file, TRACEPARENT)
    assert not tagger.clear(connected)
    assert agent.calls == []
    agent.answer = errno.EBADF
    assert not tagger.tag(1 << 20, TRACEPARENT)
    agent.answer = 0
    assert tagger.tag(1 << 20, TRACEPARENT)


def test_what_is_no_socket_is_refused(agent: Kernel) -> None:
    """A programmer's mistake shows the first time it is made."""
    with pytest.raises(AttributeError, match="fileno"):
        Tagger().tag("127.0.0.1:80", TRACEPARENT)  # type: ignore[arg-type]


def test_sockets_of_other_makes(agent: Kernel, listener: socket.socket) -> None:
    """A number, an SSL socket, and what asyncio's and uvloop's transports hand out are all taken."""
    tagger = Tagger()
    with socket.create_connection(listener.getsockname()) as plain:
        assert tagger.tag(plain.fileno(), TRACEPARENT)
        with ssl.create_default_context().wrap_socket(
            plain, server_hostname="localhost", do_handshake_on_connect=False
        ) as secure:
            assert tagger.tag(secure, TRACEPARENT)

    async def by_transport() -> None:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert tagger.tag(writer.get_extra_info("socket"), TRACEPARENT)
        writer.close()
        await writer.wait_closed()

    asyncio.run(by_transport())
    uvloop = pytest.importorskip("uvloop")
    uvloop.run(by_transport())
    assert [value for _, _, value in agent.calls] == [VALUE] * 4


def test_importing_it_is_light() -> None:
    """An application that only tags pays for neither the agent nor OpenTelemetry, and needs none installed."""
    program = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
import socket
from tcpio_otel.correlation.tag import option_value, tag
assert not {"numpy", "grpc", "yaml", "urllib3"} & set(sys.modules), sys.modules
assert not tag(socket.socket())
assert option_value((1, 2)) == bytes(15) + b"\\1" + bytes(7) + b"\\2"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@given(trace_id=st.integers(0, 1 << 130), span_id=st.integers(0, 1 << 66))
def test_ids_are_encoded_as_w3c_orders_them(trace_id: int, span_id: int) -> None:
    """Big-endian, trace id first; what is zero or does not fit is no context, in every form alike."""
    fits = 0 < trace_id < 1 << 128 and 0 < span_id < 1 << 64
    expected = struct.pack(">QQQ", trace_id >> 64, trace_id & (1 << 64) - 1, span_id) if fits else None
    assert option_value((trace_id, span_id)) == expected
    assert option_value(f"00-{trace_id:032x}-{span_id:016x}-00") == expected
    if trace_id < 1 << 128 and span_id < 1 << 64:
        assert option_value((trace_id.to_bytes(16, "big"), span_id.to_bytes(8, "big"))) == expected


def slow_option_value(header: str) -> bytes | None:
    """W3C Trace Context, section 3.2, one rule a line."""
    fields = header.split("-", 4)
    if len(fields) < 4 or any(set(field) - set("0123456789abcdef") for field in fields[:4]) or "\n" in header:
        return None
    if [len(field) for field in fields[:4]] != [2, 32, 16, 2]:
        return None
    if fields[0] == "ff" or (fields[0] == "00" and len(fields) == 5):
        return None
    if not int(fields[1], 16) or not int(fields[2], 16):
        return None
    return bytes.fromhex(fields[1] + fields[2])


def hex_field(length: int) -> st.SearchStrategy[str]:
    """A field that is mostly right."""
    right = st.text("0123456789abcdef", min_size=length, max_size=length)
    wrong = st.text("0123456789abcdefABCG \u0660", max_size=length + 1)
    return st.one_of(right, right, right, right, st.just("0" * length), st.just("f" * length), wrong)


@given(
    st.one_of(
        st.text(string.printable + "\u0660", max_size=60),
        st.builds(
            lambda fields, more: "-".join(fields) + more,
            st.tuples(
                st.one_of(st.just("00"), st.sampled_from(["00", "01", "cc", "fe", "ff"]), hex_field(2)),
                hex_field(32),
                hex_field(16),
                hex_field(2),
            ),
            st.one_of(st.just(""), st.just("-"), st.text("-ab0 \n", max_size=4)),
        ),
    )
)
def test_a_traceparent_is_valid_by_the_letter(header: str) -> None:
    """Lower-case hexadecimal, no version ff, no zero id, more fields only from a later version; never an exception."""
    assert option_value(header) == slow_option_value(header)
