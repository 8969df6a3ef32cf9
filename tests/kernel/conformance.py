"""All scenarios on all lanes under an agent by each loader: what it told, beside what tcpdump and programs know."""

import ipaddress
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyroute2

from tcpio_otel.batch import Direction
from tcpio_otel.capture.loaders import Loader
from tests.kernel import capture, harness, hosts, marked, scenarios
from tests.kernel.capture import Segment
from tests.kernel.hosts import Lane
from tests.kernel.scenarios import PORTS_EACH, SCENARIOS, Place, Span

FIRST_PORT, PORTS_A_LANE = 10_000, 600
_KINDS = {1: "internal", 2: "server", 3: "client"}
_WAYS = {"wire": (True, False), "loopback": (True, False), "relay": (False,), "router": (True,)}

HANDSHAKE_TIMEOUT_S = 3
"""Longer than any handshake here is silent, so that a state change which a kernel does not show is made up for: one was
seen that runs no tracing program while the interrupted process is its init."""

LOADERS = (Loader.LIBBPF, Loader.BCC)
LANES = [
    f"{way}-ipv{family}" + ("" if offloads or way == "relay" else "-segmented")
    for way, choices in _WAYS.items()
    for offloads in choices
    for family in (4, 6)
]
"""Names of the lanes: over a pair of devices or on loopback, with offloads and without; by a relay; by a router."""


def applies(lane_name: str, scenario: str) -> bool:
    """Whether a scenario makes sense on a lane."""
    way, kind, *_ = lane_name.split("-")
    return SCENARIOS[scenario][1](Place(int(kind.removeprefix("ipv")), way))


@contextmanager
def lane(number: int, name: str, prefix: str) -> Iterator[tuple[Lane, list[hosts.Host]]]:
    """Hosts, devices and addresses of one lane, and the hosts to capture on."""
    way, kind, *rest = name.split("-")
    family = int(kind.removeprefix("ipv"))
    ports = FIRST_PORT + number * PORTS_A_LANE
    network, length = (f"10.{200 + number}.0.", 24) if family == 4 else (f"fd00:{number}::", 64)
    ends = f"{network}1", f"{network}2"
    addresses = [f"{end}/{length}" for end in ends]
    with ExitStack() as stack:
        client = stack.enter_context(hosts.host(f"{prefix}-{number}-c"))
        relay = None
        if way == "loopback":
            server = client
            hosts.add_address(client, "lo", *addresses)
        else:
            server = stack.enter_context(hosts.host(f"{prefix}-{number}-s"))
        if way == "wire":
            hosts.veth(client, server)
            for host, address in zip((client, server), addresses, strict=True):
                hosts.add_address(host, "eth0", address)
        if way == "relay":
            relay = stack.enter_context(hosts.Relay(client, server))
            for host, address in zip((client, server), addresses, strict=True):
                hosts.add_address(host, "tun0", address)
        if way == "router":
            router = stack.enter_context(hosts.host(f"{prefix}-{number}-r"))
            _route(client, router, server, family, number, ports)
            ends = _router_network(family, number, 0) + "2", _router_network(family, number, 1) + "2"
        for host in {client, server}:
            host.sysctl("ipv4/tcp_fastopen", 3)
            if rest:
                hosts.switch_offloads_off(host, "lo" if way == "loopback" else "eth0")
        if way == "wire":
            _default_route(client, ends[1])
        yield (
            Lane(name, family, client, server, *ends, ports, relay),
            list({client.name: client, server.name: server}.values()),
        )


def _router_network(family: int, number: int, side: int) -> str:
    return f"10.{200 + number}.{1 + side}." if family == 4 else f"fd00:{number}:{1 + side}::"


def _route(client: hosts.Host, router: hosts.Host, server: hosts.Host, family: int, number: int, ports: int) -> None:
    length = 24 if family == 4 else 64
    for side, end in enumerate((client, server)):
        network = _router_network(family, number, side)
        hosts.veth(router, end, f"eth{side}", "eth0")
        hosts.add_address(router, f"eth{side}", f"{network}1/{length}")
        hosts.add_address(end, "eth0", f"{network}2/{length}")
        _default_route(end, f"{network}1")
    router.sysctl("ipv4/ip_forward" if family == 4 else "ipv6/conf/all/forwarding", 1)
    server_address = _router_network(family, number, 1) + "2"
    names = list(SCENARIOS)
    port = ports + names.index("service_behind_router") * PORTS_EACH
    rules = scenarios.destination_nat(family, "prerouting", port, server_address, port)
    kind = "ip" if family == 4 else "ip6"
    masquerade = f"""table {kind} out {{
        chain leave {{
            type nat hook postrouting priority 100;
            oifname "eth1" masquerade
        }}
    }}"""
    router.run("nft", "-f", "-", input=rules + "\n" + masquerade)


def _default_route(where: hosts.Host, gateway: str) -> None:
    with pyroute2.NetNS(where.name, flags=0) as network:
        network.route("add", dst="default", gateway=gateway)


@dataclass
class Told:
    """What one agent told of a scenario."""

    segments: Counter[Segment] = field(default_factory=Counter)
    spans: list[dict[str, Any]] = field(default_factory=list)
    super_packets: list[tuple[int, int, int]] = field(default_factory=list)  # segments, payload, payload of each

    def judged(self) -> Counter[Span]:
        """The spans, by what is expected of them."""
        return Counter(
            Span(
                _KINDS[span["kind"]], told.get("tcp.close.reason"), told.get("tcp.close.initiator"),
                told["tcp.bytes.sent"], told["tcp.bytes.received"],
            )
            for span in self.spans
            for told in (span["attributes"],)
        )  # fmt: skip


@dataclass
class Outcome:
    """What came of one scenario on one lane. `without_socket`: segments that no full socket sent or received."""

    lane: Lane
    name: str
    expected: list[Span] = field(default_factory=list)
    failure: str = ""
    skipped: str = ""
    captured: Counter[Segment] = field(default_factory=Counter)
    without_socket: Counter[Segment] = field(default_factory=Counter)
    told: dict[Loader, Told] = field(default_factory=lambda: defaultdict(Told))

    def expected_of(self, loader: Loader) -> Counter[Segment]:
        """The captured segments that an agent has to tell of.

        Before 5.17, where the kernel gives no reason for a drop, the second of two received ones that are wholly alike
        may be missing. Without the kernel's types none is told that no full socket received. Of those that none sent,
        some kernels show a few: they are allowed, not asked for.
        """
        told, expected = self.told[loader].segments, self.captured
        if loader is Loader.BCC:
            expected = expected - Counter(
                {
                    segment: count
                    if segment[0] == "receive"
                    else max(0, min(count, self.captured[segment] - told[segment]))
                    for segment, count in self.without_socket.items()
                }
            )
        if hosts.KERNEL < (5, 17):
            twins = [segment for segment in expected if segment[0] == "receive" and told[segment]]
            expected = expected.copy()
            expected.update({segment: min(0, told[segment] - expected[segment]) for segment in twins})
        return expected


@dataclass
class Agent:
    """An agent that has seen all of it."""

    ledger: dict[str, int]
    hooks: list[str]
    stray: Counter[Segment] = field(default_factory=Counter)


@dataclass
class Run:
    """All outcomes, and the agents that told of them."""

    outcomes: dict[tuple[str, str], Outcome]
    agents: dict[Loader, Agent]
    stray: Counter[Segment]

    @property
    def segments(self) -> int:
        """How many segments were captured."""
        return sum(found.captured.total() for found in self.outcomes.values())

    def unseen(self, loader: Loader) -> int:
        """How many of them this loader cannot show."""
        return self.segments - sum(found.expected_of(loader).total() for found in self.outcomes.values())

    def differences(self, loader: Loader) -> int:
        """How many segments an agent told of that were not to be told, or the other way round."""
        pairs = [(self.agents[loader].stray, self.stray)]
        pairs += [(found.told[loader].segments, found.expected_of(loader)) for found in self.outcomes.values()]
        return sum((ours - theirs).total() + (theirs - ours).total() for ours, theirs in pairs)


def _work(outcomes: list[Outcome]) -> None:
    names = list(SCENARIOS)
    for outcome in outcomes:
        port = outcome.lane.ports + names.index(outcome.name) * PORTS_EACH
        try:
            outcome.expected = SCENARIOS[outcome.name][0](outcome.lane, port)
        except scenarios.NotHere as fact:
            outcome.skipped = str(fact)
        except BaseException:
            outcome.failure = traceback.format_exc()


def _work_all(outcomes: Iterable[Outcome]) -> None:
    lanes: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        lanes[outcome.lane.name].append(outcome)
    threads = [threading.Thread(target=_work, args=(one,)) for one in lanes.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(directory: Path, wanted: list[tuple[str, str]], loaders: list[Loader]) -> Run:
    """Run the wanted scenarios, given by lane and name, each lane in a thread of its own, under an agent a loader."""
    prefix = f"tcpio-{directory.name[:20]}"
    with ExitStack() as stack:
        lanes: dict[str, Lane] = {}
        captures: list[Path] = []
        with ExitStack() as recording:
            for number, name in enumerate(LANES):
                if any(lane_name == name for lane_name, _ in wanted):
                    lanes[name], where = stack.enter_context(lane(number, name, prefix))
                    for host in where:
                        captures.append(directory / f"{host.name}.pcap")
                        recording.enter_context(capture.tcpdump(host, captures[-1]))
            if Loader.BCC in loaders:
                recording.enter_context(_marking(directory / "marked"))
            agents = {
                loader: recording.enter_context(
                    harness.agent(
                        directory / loader, "run", "--loader", loader, "--otlp-file", str(directory / loader / "data"),
                        TCPIO_FILE_ROTATE="1GiB", TCPIO_CONNECTIONS_LINGER="1s",
                        TCPIO_CONNECTIONS_HANDSHAKE_TIMEOUT=f"{HANDSHAKE_TIMEOUT_S}s",
                    )
                )
                for loader in loaders
            }  # fmt: skip
            outcomes = {(lane_name, name): Outcome(lanes[lane_name], name) for lane_name, name in wanted}
            _work_all(outcomes.values())
            hosts.settle(HANDSHAKE_TIMEOUT_S + 1)
            for agent in agents.values():
                assert agent.stop() == 0, agent.stderr()
    owner = _Owners(outcomes, lanes)
    run = Run(outcomes, {}, _take_captures(owner, captures))
    if Loader.BCC in loaders:
        _take_marked(owner, directory / "marked")
    for loader, agent in agents.items():
        hooks = re.findall(r"attached at (.*)", agent.stderr())[0].split(", ")
        run.agents[loader] = Agent(agent.ledger(), hooks)
        _take_told(owner, loader, run.agents[loader], directory / loader / "data")
    return run


@contextmanager
def _marking(path: Path) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "tests.kernel.marked", str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"capturing\n"
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def _of_record(record: np.void) -> Segment:
    return (
        "transmit" if record["direction"] == Direction.TRANSMIT else "receive",
        *(text for end in ("local", "peer") for text in (
            _address(record[f"header_{end}_address"].tobytes()), int(record[f"header_{end}_port"])
        )),
        *(int(record[name]) for name in ("seq", "ack", "flags", "payload_bytes", "window")),
    )  # fmt: skip


def _address(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)


class _Owners:
    """Which scenario a port tells of."""

    def __init__(self, outcomes: dict[tuple[str, str], Outcome], lanes: dict[str, Lane]) -> None:
        self._outcomes, self._names = outcomes, list(SCENARIOS)
        self._lanes = {found.ports: found for found in lanes.values()}

    def __call__(self, *ports: int) -> Outcome | Lane | None:
        """The scenario that one of the ports belongs to; its lane when no scenario has that port."""
        for port in ports:
            base = port - (port - FIRST_PORT) % PORTS_A_LANE
            if base in self._lanes:
                number = (port - base) // PORTS_EACH
                name = self._names[number] if number < len(self._names) else ""
                return self._outcomes.get((self._lanes[base].name, name), self._lanes[base])
        return None


def _take_captures(owner: _Owners, captures: list[Path]) -> Counter[Segment]:
    """Give each outcome what tcpdump has of it; returns what of the lanes belongs to none."""
    stray: Counter[Segment] = Counter()
    for path in captures:
        for segment, count in capture.segments(path).items():
            found = owner(segment[2], segment[4])
            if isinstance(found, Outcome):
                direction, local, local_port, *peer = segment[:5]
                seen = scenarios.rewritten_before_tcp(found.name, found.lane, direction, (peer[0], peer[1]))
                found.captured[(direction, local, local_port, *seen, *segment[5:])] += count
            elif found:
                stray[segment] += count
    return stray


def _take_marked(owner: _Owners, path: Path) -> None:
    """Give each outcome the segments that no full socket sent or received."""
    for record in marked.read(path):
        found = owner(int(record["header_local_port"]), int(record["header_peer_port"]))
        if isinstance(found, Outcome):
            found.without_socket[_of_record(record)] += 1


def _take_told(owner: _Owners, loader: Loader, agent: Agent, data: Path) -> None:
    """Give each outcome the segments and spans that an agent told of."""
    for log in harness.logs(data):
        if "tcp.seq" not in log:
            continue
        found = owner(log["network.local.port"], log["network.peer.port"])
        if isinstance(found, Outcome):
            found.told[loader].segments.update(_as_captured(found, loader, log))
            if "tcp.gso.segments" in log:
                found.told[loader].super_packets.append(
                    (log["tcp.gso.segments"], log["tcp.payload.size"], log["tcp.gso.size"])
                )
        elif found:
            agent.stray[segment_of(log)] += 1
    for span in harness.spans(data):
        found = owner(span["attributes"]["network.local.port"], span["attributes"]["network.peer.port"])
        if isinstance(found, Outcome):
            found.told[loader].spans.append(span)


def _as_captured(outcome: Outcome, loader: Loader, log: dict[str, Any]) -> list[Segment]:
    """A packet log record as a capture on the same device must show it.

    A device that takes no super-packets, or none so long, has them cut up before the capture sees them.
    """
    segment, count = segment_of(log), log.get("tcp.gso.segments", 1)
    whole = outcome.captured[segment] > outcome.told[loader].segments[segment]
    if count == 1 or segment[0] == "receive" or whole:
        return [segment]
    return capture.cut(segment, count, log["tcp.gso.size"])


def segment_of(log: dict[str, Any]) -> Segment:
    return (
        log["network.io.direction"], log["network.local.address"], log["network.local.port"],
        log["network.peer.address"], log["network.peer.port"], log["tcp.seq"], log["tcp.ack"], log["tcp.flags.bits"],
        log["tcp.payload.size"], log["tcp.window"],
    )  # fmt: skip
