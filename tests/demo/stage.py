"""What the demo runs on: two hosts and a wire that loses one packet, a Collector, the agent, and the services.

The hosts are network namespaces without a way out, so each has a door to the Collector. Everything goes when the block
that made it is left, however it is left.
"""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.integration.collector import collector
from tests.kernel import hosts
from tests.kernel.harness import agent
from tests.kernel.hosts import Direction, Host, Packet, Relay
from tests.kernel.scenarios import flags_of, payload_of, tcp_offset

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SHOP_ADDRESS, STOCK_ADDRESS = "10.213.0.1", "10.213.0.2"
SHOP_PORT, OTLP_PORT = 8080, 4318
LONG_ANSWER_BYTES = 4000
"""More than a TLS handshake takes, less than the list of items."""

START_S = 60.0
EXPORT_S = 1.0
"""The services export what they have twice in that time."""


class StageError(Exception):
    """Something on the stage did not start, or did not answer."""


@dataclass(frozen=True)
class Run:
    """One way in which the services talk."""

    name: str
    title: str
    tls: bool
    joined_by: str
    """`tcp.context.source` of its packets."""
    stock_port: int


RUNS = (
    Run("plain", "Plain HTTP, no tags: the traceparent header says whose packets they are", False, "traceparent", 8081),
    Run("tls", "TLS: the header is encrypted, the tag on the socket says it", True, "tag", 8443),
)


@dataclass(frozen=True)
class Lost:
    """A packet that never arrived; `seq` is its first byte's sequence number."""

    seq: int
    payload_bytes: int
    time_ns: int


class Loss:
    """Loses one packet, the first time that it is sent: the answer to the request that follows a long answer.

    That is told by sizes alone, so it is the same packet whether or not anybody can read it.
    """

    def __init__(self) -> None:
        self.lost: Lost | None = None
        self._answered_bytes = 0
        self._armed = False

    def __call__(self, packet: Packet, way: Direction) -> list[Packet]:
        payload_bytes = payload_of(packet) if flags_of(packet) else 0
        if not payload_bytes:
            return [packet]
        if way.name == "to_server":
            self._armed = self._answered_bytes > LONG_ANSWER_BYTES
            self._answered_bytes = 0
        elif self._armed and not self.lost:
            at = tcp_offset(packet) + 4
            self.lost = Lost(int.from_bytes(packet[at : at + 4], "big"), payload_bytes, time.time_ns())
            return []
        else:
            self._answered_bytes += payload_bytes
        return [packet]


@dataclass
class Stage:
    """Everything but the services, up and running."""

    directory: Path
    shop: Host
    stock: Host
    relay: Relay
    received: Path
    """What the Collector received, once the stage is gone."""


@contextmanager
def stage(directory: Path) -> Iterator[Stage]:
    """Make the hosts, and start the Collector and the agent."""
    name = f"tcpio-demo-{uuid.uuid4().hex[:6]}"
    with ExitStack() as stack:
        running = stack.enter_context(collector(directory))
        shop, stock = (stack.enter_context(hosts.host(f"{name}-{role}")) for role in ("shop", "stock"))
        relay = stack.enter_context(Relay(shop, stock))
        for host, address in ((shop, SHOP_ADDRESS), (stock, STOCK_ADDRESS)):
            hosts.add_address(host, "tun0", f"{address}/24")
            stack.enter_context(_door(host, running.http_port))
        ports = [part for run in RUNS for part in ("--port", str(run.stock_port))]
        endpoint = f"http://127.0.0.1:{running.http_port}"
        with agent(directory / "agent", "run", "--otlp-endpoint", endpoint, *ports) as recording:
            yield Stage(directory, shop, stock, relay, directory / "received.json")
            time.sleep(EXPORT_S)
            if code := recording.stop():
                raise StageError(f"the agent ended with {code}: {_last_words(directory / 'agent' / 'stderr')}")


def order(on: Stage, run: Run) -> Loss:
    """Start the services, have one order made, stop them; returns what was lost meanwhile."""
    directory, loss = on.directory / run.name, Loss()
    directory.mkdir()
    scheme, tls_flags, variables = "http", [], {"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "tcpio"}
    if run.tls:
        scheme, variables = "https", {"REQUESTS_CA_BUNDLE": str(directory / "authority.pem")}
        tls_flags = _certify(directory)
    stock_url = f"{scheme}://{STOCK_ADDRESS}:{run.stock_port}"
    stock = ["uvicorn", "tests.demo.stock:app", "--host", STOCK_ADDRESS, "--port", str(run.stock_port), *tls_flags]
    shop = ["gunicorn", "tests.demo.shop:app", "--bind", f"127.0.0.1:{SHOP_PORT}", "--threads", "2"]
    with (
        on.relay.policy(loss),
        _service(on.stock, "stock", stock, "Uvicorn running", directory, run, variables),
        _service(
            on.shop, "shop", [*shop, "--no-control-socket"], "Listening at", directory, run,
            variables | {"DEMO_STOCK_URL": stock_url},
        ),
    ):  # fmt: skip
        _customer_orders(on.shop)
        time.sleep(EXPORT_S)
    return loss


def _certify(directory: Path) -> list[str]:
    """Write the stock's certificate and who signed it; returns uvicorn's flags for it."""
    authority = trustme.CA()
    certificate = authority.issue_cert(STOCK_ADDRESS)
    authority.cert_pem.write_to_path(str(directory / "authority.pem"))
    certificate.private_key_pem.write_to_path(str(directory / "stock.key"))
    certificate.cert_chain_pems[0].write_to_path(str(directory / "stock.pem"))
    return ["--ssl-keyfile", str(directory / "stock.key"), "--ssl-certfile", str(directory / "stock.pem")]


def _customer_orders(shop: Host) -> None:
    customer = http.client.HTTPConnection("127.0.0.1", SHOP_PORT, timeout=START_S)
    try:
        with shop.inside():
            customer.request("POST", "/orders")
        answer = customer.getresponse()
        if answer.status != http.HTTPStatus.CREATED:
            raise StageError(f"the shop answered {answer.status} to the order")
        answer.read()
    finally:
        customer.close()


@contextmanager
def _service(
    where: Host, name: str, command: list[str], ready: str, directory: Path, run: Run, variables: dict[str, str]
) -> Iterator[None]:
    """Start a service as OpenTelemetry instruments it without a line of code, and wait until it says it is ready."""
    environment = os.environ | variables | {
        "PYTHONPATH": str(CHECKOUT),
        "no_proxy": "*",
        "OTEL_SERVICE_NAME": name,
        "OTEL_RESOURCE_ATTRIBUTES": f"deployment.environment.name={run.name}",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{OTLP_PORT}",
        "OTEL_BSP_SCHEDULE_DELAY": str(int(EXPORT_S / 2 * 1000)),
        "OTEL_SEMCONV_STABILITY_OPT_IN": "http",
    }  # fmt: skip
    said = directory / f"{name}.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", where.name, BIN / "opentelemetry-instrument", BIN / command[0], *command[1:]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=directory,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while ready not in said.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise StageError(f"the {name} did not start: {_last_words(said)}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["it said nothing"])[-1]


@contextmanager
def _door(where: Host, collector_port: int) -> Iterator[None]:
    """A port on a host's loopback that leads to the Collector on this machine's."""
    with where.socket(socket.AF_INET) as listener:
        listener.settimeout(None)
        listener.bind(("127.0.0.1", OTLP_PORT))
        listener.listen()
        opening = threading.Thread(target=_open, args=(listener, collector_port), name="door")
        opening.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            opening.join()


def _open(listener: socket.socket, collector_port: int) -> None:
    with suppress(OSError):  # which is how accept ends
        while True:
            inside, _ = listener.accept()
            outside = socket.create_connection(("127.0.0.1", collector_port))
            for ways in ((inside, outside), (outside, inside)):
                threading.Thread(target=_carry, args=ways, daemon=True).start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
