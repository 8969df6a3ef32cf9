"""Where contexts come from, on real sockets: heads of requests that mean harm, a published map, two hosts."""

import ctypes
import os
import re
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyroute2
import pytest

from tcpio_otel.capture.libbpf import CGROUP_SKB, GET_CURRENT_PID_TGID, Library, helper_allowed
from tests.kernel import hosts
from tests.kernel.harness import Agent, Namespace, agent, attached, logs_with_ids, spans

PORT = 8700
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTHER, OTHER_SPAN = "1" * 32, "2" * 16
TRACEPARENT = f"traceparent: 00-{TRACE}-{SPAN}-01\r\n"
DECOY = f"traceparent: 00-{OTHER}-{OTHER_SPAN}-01\r\n"
START = "GET /a HTTP/1.1\r\nHost: x\r\n"
OWN = None
"""What stands for the ids of the connection's span."""


def post(body: str, headers: str = TRACEPARENT) -> list[str]:
    """A request whose body goes in a segment of its own."""
    return [f"POST / HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n", body]


CRAFTED: dict[str, tuple[list[str], Any]] = {
    "plain": ([START + TRACEPARENT + "\r\n"], TRACE),
    "shouted": ([START + TRACEPARENT.replace("traceparent", "TRACEPARENT") + "\r\n"], TRACE),
    "first of all headers": (["GET / HTTP/1.1\r\n" + TRACEPARENT + "Host: x\r\n\r\n"], TRACE),
    "behind 3,900 bytes": ([START + f"Cookie: {'c' * 3800}\r\n{TRACEPARENT}\r\n"], TRACE),
    "in two segments": ([START + TRACEPARENT[:30], TRACEPARENT[30:] + "\r\n"], TRACE),
    "in the second segment": ([START, TRACEPARENT + "\r\n"], TRACE),
    "b3": ([START + f"b3: {TRACE}-{SPAN}-1\r\n\r\n"], TRACE),
    "b3 of 64 bits": ([START + f"b3: {TRACE[16:]}-{SPAN}\r\n\r\n"], "0" * 16 + TRACE[16:]),
    "later version": ([START + f"traceparent: 01-{TRACE}-{SPAN}-01-what-comes\r\n\r\n"], TRACE),
    "in the target": ([f"GET /?traceparent:%2000-{OTHER}-{OTHER_SPAN}-01 HTTP/1.1\r\nHost: x\r\n\r\n"], OWN),
    "in a value": ([START + f"X-Note: {DECOY}\r\n"], OWN),
    "folded": ([START + f"X-Note: a\r\n {DECOY}\r\n"], OWN),
    "folded behind": ([START + DECOY + " more\r\n\r\n"], OWN),
    "longer name": ([START + "x-" + DECOY + "\r\n"], OWN),
    "blank before the colon": ([START + DECOY.replace(":", " :") + "\r\n"], OWN),
    "upper-case ids": ([START + f"traceparent: 00-{'A' * 32}-{OTHER_SPAN}-01\r\n\r\n"], OWN),
    "zero trace": ([START + f"traceparent: 00-{'0' * 32}-{OTHER_SPAN}-01\r\n\r\n"], OWN),
    "zero span": ([START + f"traceparent: 00-{OTHER}-{'0' * 16}-01\r\n\r\n"], OWN),
    "version ff": ([START + f"traceparent: ff-{OTHER}-{OTHER_SPAN}-01\r\n\r\n"], OWN),
    "too long for its version": ([START + f"traceparent: 00-{OTHER}-{OTHER_SPAN}-01-x\r\n\r\n"], OWN),
    "cut short": ([START + f"traceparent: 00-{OTHER}-{OTHER_SPAN}\r\n\r\n"], OWN),
    "twice": ([START + TRACEPARENT + DECOY + "\r\n"], OWN),
    "no HTTP": (["GET something\r\n" + DECOY + "\r\n"], OWN),
    "HTTP/0.9": (["GET / HTTP/0.9\r\n" + DECOY + "\r\n"], OWN),
    "in the body": (["POST / HTTP/1.1\r\nContent-Length: 90\r\n\r\n" + (DECOY + " " * 90)[:90]], OWN),
    "a request in the body": (post(START + DECOY + "\r\n"), TRACE),
    "a request in a chunked body": (
        [f"POST / HTTP/1.1\r\n{TRACEPARENT}Transfer-Encoding: chunked\r\n\r\n", START + DECOY + "\r\n"],
        TRACE,
    ),
    "a request in the body of one without ids": (post(START + DECOY + "\r\n", ""), OWN),
    "a banner": (["220 ready\r\n", START + DECOY + "\r\n"], OWN),
}
"""What a client sends, segment by segment, and the trace that these belong to."""


def exchange(namespace: Namespace, port: int, segments: list[str]) -> None:
    """A client sends segments, each on its own, and a server answers in the end."""
    program = f"""
import socket, sys, time
listener = socket.create_server(("127.0.0.1", {port}))
client = socket.create_connection(("127.0.0.1", {port}))
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
server, _ = listener.accept()
for segment in {segments!r}:
    client.sendall(segment.encode())
    assert server.recv(1 << 16, socket.MSG_WAITALL if len(segment) > 60000 else 0)
    time.sleep(0.01)
server.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
client.recv(1000)
client.close(); server.close()
"""
    namespace.run(sys.executable, "-c", program)


def test_no_crafted_head_gives_wrong_ids(namespace: Namespace, tmp_path: Path) -> None:
    """On real sockets, at both ends: the request's own ids, or none."""
    with agent(tmp_path, "run", "--otlp-file", "out", "--port", f"{PORT}-{PORT + len(CRAFTED)}") as running:
        for number, (segments, _) in enumerate(CRAFTED.values()):
            exchange(namespace, PORT + number, segments)
        assert running.stop() == 0
    records = [record for record in logs_with_ids(tmp_path / "out") if record["eventName"] == "tcp.packet"]
    found: dict[str, Any] = {}
    for number, (name, (segments, _)) in enumerate(CRAFTED.items()):
        for side, direction in (("peer", "transmit"), ("local", "receive")):
            payload = [
                record["traceId"] if not record["traceId"].startswith(record["tcp.connection.id"]) else OWN
                for record in records
                if record[f"network.{side}.port"] == PORT + number
                and record["network.io.direction"] == direction
                and record["tcp.payload.size"]
            ]
            assert len(payload) == len(segments), name
            found[f"{name}, {direction}"] = payload[-1]
    assert found == {
        f"{name}, {direction}": trace for name, (_, trace) in CRAFTED.items() for direction in ("transmit", "receive")
    }


@pytest.mark.parametrize(("greetings", "expected"), [(2, [OWN, TRACE]), (20, [OWN, OWN])], ids=["short", "long"])
def test_requests_behind_a_greeting_are_read_once_one_was_answered(
    namespace: Namespace, tmp_path: Path, greetings: int, expected: list[str | None]
) -> None:
    """A proxy's greeting may come first, of 32 segments with data at most: what is longer is no HTTP."""
    port = PORT + len(CRAFTED) + 1
    requests = [START + header + "\r\n" for header in (DECOY, TRACEPARENT)]
    program = f"""
import socket
listener = socket.create_server(("127.0.0.1", {port}))
client = socket.create_connection(("127.0.0.1", {port}))
server, _ = listener.accept()
def say(one, other, words):
    one.sendall(words.encode())
    assert other.recv(1000) == words.encode()
for _ in range({greetings}):
    say(client, server, "hello")
    say(server, client, "welcome")
for request in {requests!r}:
    say(client, server, request)
    say(server, client, "HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
"""
    with agent(tmp_path, "run", "--otlp-file", "out", "--port", str(port)) as running:
        namespace.run(sys.executable, "-c", program)
        assert running.stop() == 0
    records = [record for record in logs_with_ids(tmp_path / "out") if record["eventName"] == "tcp.packet"]
    for side, direction in (("peer", "transmit"), ("local", "receive")):
        traces = [
            record["traceId"] if not record["traceId"].startswith(record["tcp.connection.id"]) else OWN
            for record in records
            if record[f"network.{side}.port"] == port
            and record["network.io.direction"] == direction
            and record["tcp.payload.size"] > len("hello")
        ]
        assert traces == expected, direction


def test_heads_are_not_read_where_nobody_wants_them(namespace: Namespace, tmp_path: Path) -> None:
    """One switch: packets then have their connection's ids."""
    with agent(
        tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), TCPIO_CORRELATION_HTTP_HEADERS="false"
    ) as on:
        exchange(namespace, PORT, [START + TRACEPARENT + "\r\n"])
        assert on.stop() == 0
    assert TRACE not in {record["traceId"] for record in logs_with_ids(tmp_path / "out")}


class Published:
    """A map as OpenTelemetry eBPF Instrumentation pins it: thread to trace id and span id."""

    LRU_HASH, ENTRIES = 9, 1 << 14

    def __init__(self, pinned: Path) -> None:
        self._library = Library()
        self.descriptor = self._library.bpf_map_create(self.LRU_HASH, b"traces_ctx_v1", 8, 24, self.ENTRIES, None)
        assert self.descriptor >= 0
        pin = ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_obj_pin
        assert pin(self.descriptor, str(pinned).encode()) == 0, os.strerror(ctypes.get_errno())

    def publish(self, process: int, thread: int, trace: str, span: str) -> None:
        """The context of a thread."""
        key = struct.pack("<Q", process << 32 | thread)
        assert not self._library.bpf_map_update_elem(self.descriptor, key, bytes.fromhex(trace + span), 0)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Published, Path]]:
    """A map, pinned in a BPF file system of the test's own."""
    mounted = tmp_path / "bpf"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", mounted], check=True)
    try:
        pinned = mounted / "traces_ctx_v1"
        made = Published(pinned)
        yield made, pinned
        os.close(made.descriptor)
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_threads_published_context_is_its_packets(
    namespace: Namespace, published: tuple[Published, Path], tmp_path: Path
) -> None:
    """What a thread sends belongs to the context that is published for it then, and so does what it gets back."""
    if not helper_allowed(Library(), CGROUP_SKB, GET_CURRENT_PID_TGID):
        pytest.skip("this kernel does not tell cgroup_skb which thread sends (from 6.10 on)")
    table, pinned = published
    program = f"""
import os, socket, sys, threading
listener = socket.create_server(("127.0.0.1", {PORT}))
client = socket.create_connection(("127.0.0.1", {PORT}))
server, _ = listener.accept()
print(os.getpid(), threading.get_native_id(), flush=True)
for size in (100, 200):
    sys.stdin.readline()
    client.sendall(b"q" * size)
    server.recv(1000)
    server.sendall(b"r" * size)
    client.recv(1000)
    print("done", flush=True)
client.close(); server.close()
"""
    variables = {"TCPIO_CORRELATION_PUBLISHED_MAP": str(pinned)}
    with agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT), **variables) as running:
        talker = subprocess.Popen(
            ["ip", "netns", "exec", namespace.name, sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert talker.stdin is not None
        assert talker.stdout is not None
        process, thread = map(int, talker.stdout.readline().split())
        for trace, span in ((TRACE, SPAN), (OTHER, OTHER_SPAN)):
            table.publish(process, thread, trace, span)
            print(file=talker.stdin, flush=True)
            assert talker.stdout.readline() == "done\n"
        assert talker.wait() == 0
        assert running.stop() == 0
    traces = {
        (record["network.io.direction"], record["tcp.payload.size"]): record["traceId"]
        for record in logs_with_ids(tmp_path / "out")
        if record["eventName"] == "tcp.packet" and record["network.peer.port"] == PORT and record["tcp.payload.size"]
    }
    assert traces == {
        (direction, size): trace
        for size, trace in ((100, TRACE), (200, OTHER))
        for direction in ("transmit", "receive")
    }


@contextmanager
def _two_hosts_behind_nat() -> Iterator[tuple[hosts.Host, hosts.Host, str]]:
    """A client and a server with a router between them: the service address is rewritten, and so is the client's."""
    name = f"nat-{uuid.uuid4().hex[:6]}"
    with ExitStack() as stack:
        client, router, server = (stack.enter_context(hosts.host(f"{name}-{part}")) for part in "crs")
        for side, end in enumerate((client, server)):
            hosts.veth(router, end, f"eth{side}", "eth0")
            hosts.add_address(router, f"eth{side}", f"10.77.{side}.1/24")
            hosts.add_address(end, "eth0", f"10.77.{side}.2/24")
            with pyroute2.NetNS(end.name, flags=0) as network:
                network.route("add", dst="default", gateway=f"10.77.{side}.1")
        router.sysctl("ipv4/ip_forward", 1)
        router.run(
            "nft", "-f", "-",
            input=f"""table ip nat {{
                chain pre {{
                    type nat hook prerouting priority -100;
                    ip daddr 10.99.0.1 tcp dport {PORT} dnat to 10.77.1.2:{PORT}
                }}
                chain post {{
                    type nat hook postrouting priority 100;
                    oifname "eth1" masquerade
                }}
            }}""",
        )  # fmt: skip
        yield client, server, "10.99.0.1"


def test_two_agents_on_two_hosts_tell_one_trace_through_nat(tmp_path: Path) -> None:
    """Each records its own host; both ends of a connection are one trace, and both name the request that it carried."""
    with _two_hosts_behind_nat() as (client, server, service), ExitStack() as stack:
        told: dict[str, tuple[Agent, Path]] = {}
        for name, host in (("client", client), ("server", server)):
            directory = tmp_path / name
            running = stack.enter_context(
                agent(directory, "run", "--otlp-file", "out",
                      TCPIO_CAPTURE_NETWORK_NAMESPACE=f"/run/netns/{host.name}")
            )  # fmt: skip
            told[name] = running, directory / "out"
        listener = stack.enter_context(server.socket(socket.AF_INET))
        listener.bind(("10.77.1.2", PORT))
        listener.listen()
        end = stack.enter_context(client.socket(socket.AF_INET))
        end.connect((service, PORT))
        accepted, _ = listener.accept()
        with closing(accepted):
            end.sendall((START + TRACEPARENT + "\r\n").encode())
            accepted.recv(1000)
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            end.recv(1000)
            end.close()
            assert accepted.recv(1) == b""
        time.sleep(0.3)
        for running, _ in told.values():
            assert running.stop() == 0
            assert re.search(r"filtered \d+ \(.*netns \d+", running.stderr()), running.stderr()
    ends = {name: [span for span in spans(out) if span["kind"] != 1] for name, (_, out) in told.items()}
    (ours,), (theirs,) = ends["client"], ends["server"]
    assert (ours["kind"], theirs["kind"]) == (3, 2)
    assert ours["traceId"] == theirs["traceId"]
    assert theirs["parentSpanId"] == ours["spanId"]
    assert ours["attributes"]["network.peer.address"] == service
    assert theirs["attributes"]["network.local.address"] == "10.77.1.2"
    for span in (ours, theirs):
        assert [(link["traceId"], link["spanId"]) for link in span["links"]] == [(TRACE, SPAN)]
    for _, out in told.values():
        records = logs_with_ids(out)
        assert {record["traceId"] for record in records if record["tcp.connection.id"]} == {TRACE, ours["traceId"]}
        (summary,) = [record for record in records if record["eventName"] == "tcp.request"]
        assert (summary["traceId"], summary["spanId"]) == (TRACE, SPAN)


def test_programs_go_with_the_agent_that_tags(tmp_path: Path) -> None:
    """The option's program goes as all others do: the next tag meets the kernel's own answer."""
    before = attached()
    with agent(tmp_path, "run", "--otlp-file", "out") as running:
        assert attached() >= before + 8  # older kernels lack two
        assert running.stop() == 0
    assert attached() == before


def test_a_tag_reaches_every_agent(namespace: Namespace, tmp_path: Path) -> None:
    """Two agents on one host both hear it, whichever program runs first."""
    program = f"""
import socket
listener = socket.create_server(("127.0.0.1", {PORT}))
client = socket.create_connection(("127.0.0.1", {PORT}))
server, _ = listener.accept()
client.setsockopt(0x6f74656c, 1, bytes.fromhex("{TRACE}{SPAN}"))
client.sendall(b"q" * 100)
server.recv(1000)
client.close(); server.close()
"""
    names = ("one", "other")
    with ExitStack() as stack:
        agents = [
            stack.enter_context(agent(tmp_path / name, "run", "--otlp-file", "out", "--port", str(PORT)))
            for name in names
        ]
        namespace.run(sys.executable, "-c", program)
        for running in agents:
            assert running.stop() == 0
    for name in names:
        sent = [
            record["traceId"]
            for record in logs_with_ids(tmp_path / name / "out")
            if record["eventName"] == "tcp.packet"
            and record["tcp.payload.size"]
            and record["network.io.direction"] == "transmit"
        ]
        assert sent == [TRACE]
