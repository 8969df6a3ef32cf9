"""What the agent exports, against what a real Collector says that it received."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trustme

from tcpio_otel import privileges
from tests.integration.collector import Collector, collector
from tests.kernel.harness import AGENT, TRAFFIC, agent, plain
from tests.kernel.harness import logs as logs_in_files

PROTOCOLS = ["grpc", "http/protobuf", "http/json"]
LOGS = ("resourceLogs", "scopeLogs", "logRecords")
SPANS = ("resourceSpans", "scopeSpans", "spans")


def endpoint(running: Collector, protocol: str, scheme: str = "http") -> list[str]:
    """The flags that name a Collector."""
    port = running.grpc_port if protocol == "grpc" else running.http_port
    return ["--otlp-endpoint", f"{scheme}://localhost:{port}", "--otlp-protocol", protocol]


def capture(path: Path, packets: int = 4000) -> Path:
    """A capture of many connections, by a writer of three lines."""
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    body = b""
    for number in range(packets):
        port, step = 10_000 + number // 4, number % 4
        client, flags, seq, ack = [(1, 2, 9, 0), (0, 18, 70, 10), (1, 16, 10, 71), (1, 20, 10, 71)][step]
        ends = (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
        ports = (port, 443)
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + ends[1 - client] + ends[client]
        tcp = struct.pack(">HHIIBBHHH", ports[1 - client], ports[client], seq, ack, 80, flags, 100, 0, 0)
        body += struct.pack("<IIII", 1_700_000_000 + number // 1000, number % 1000 * 1000, 40, 40) + ip + tcp
    path.write_bytes(head + body)
    return path


def replay(source: Path, directory: Path, *arguments: str, **environment: str) -> dict[str, int]:
    """Run the agent on a capture, and return its last account."""
    result = subprocess.run(
        [*AGENT, "run", "--source", f"pcap:{source}", *arguments],
        cwd=directory, capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    (ledger,) = re.findall(r"^seen .*", result.stderr, re.M)
    found = dict(re.findall(r"(seen|exported|in flight) (\d+)", ledger))
    assert "UNACCOUNTED" not in result.stderr
    return {name: int(count) for name, count in found.items()} | {
        f"{signal}": int(count) for signal, count in re.findall(r"^(logs|traces): exported (\d+)", result.stderr, re.M)
    }


def as_counter(records: list[dict[str, Any]]) -> Counter[str]:
    """Log records as a multiset."""
    return Counter(json.dumps(record, sort_keys=True) for record in records)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_collector_receives_what_the_ledger_says(tmp_path: Path, protocol: str) -> None:
    """As many log records and spans as were exported, each like the one that went to a file."""
    source = capture(tmp_path / "made.pcap")
    with collector(tmp_path) as running:
        counted = replay(source, tmp_path, *endpoint(running, protocol))
    records = running.received(*LOGS)
    assert counted["exported"] == counted["logs"] == len(records) == 4000
    assert counted["traces"] == len(running.received(*SPANS)) == 1000
    replay(source, tmp_path, "--otlp-file", str(tmp_path / "files"))
    assert as_counter([plain(record["attributes"]) for record in records]) == as_counter(
        logs_in_files(tmp_path / "files")
    )
    assert {record["eventName"] for record in records} == {"tcp.packet"}
    for record in records:
        assert plain(record["attributes"])["tcp.connection.id"] == record["traceId"][:16]


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_tls_both_ways(tmp_path: Path, protocol: str) -> None:
    """A Collector that shows a certificate and asks for one gets everything."""
    authority = trustme.CA()
    server, client = authority.issue_cert("localhost"), authority.issue_cert("agent")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, certificate in (("server", server), ("client", client)):
        certificate.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
    tls = {name: str(tmp_path / file) for name, file in
           (("cert_file", "server.pem"), ("key_file", "server.key"), ("client_ca_file", "ca.pem"))}  # fmt: skip
    with collector(tmp_path, tls) as running:
        counted = replay(
            capture(tmp_path / "made.pcap", 400), tmp_path, *endpoint(running, protocol, "https"),
            OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "ca.pem"),
            OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=str(tmp_path / "client.pem"),
            OTEL_EXPORTER_OTLP_CLIENT_KEY=str(tmp_path / "client.key"),
        )  # fmt: skip
    assert counted["exported"] == len(running.received(*LOGS)) == 400


@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_a_collector_that_restarts_misses_nothing(tmp_path: Path, protocol: str) -> None:
    """Requests wait and are tried again while the receiver is away."""
    with collector(tmp_path) as running:
        running.stop()
        back = threading.Timer(2.5, running.start)
        back.start()
        counted = replay(
            capture(tmp_path / "made.pcap", 400),
            tmp_path,
            *endpoint(running, protocol),
            TCPIO_EXPORT_FLUSH_TIMEOUT="30s",
        )
        back.join()
        time.sleep(0.2)
    assert counted["exported"] == len(running.received(*LOGS)) == 400


@pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")
@pytest.mark.parametrize("protocol", PROTOCOLS[:2])
def test_live_traffic_arrives_without_our_own(tmp_path: Path, protocol: str) -> None:
    """Packets and spans of real traffic arrive; the agent's own connections, to a Collector on this host, do not."""
    with collector(tmp_path) as running:
        with agent(tmp_path, "run", *endpoint(running, protocol)) as exporting:
            program = [sys.executable, str(TRAFFIC), "exchange", "4", "50", "100", "5000"]
            subprocess.run(program, check=True, capture_output=True)
            time.sleep(2.5)
            assert exporting.stop() == 0
        ledger = exporting.ledger()
    records = [plain(record["attributes"]) for record in running.received(*LOGS)]
    assert ledger["exported"] == len(records)
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"] + ledger["dropped"]
    assert ledger["filtered"] > 0
    ports = {running.grpc_port, running.http_port}
    own = [record for record in records if ports & {record["network.local.port"], record["network.peer.port"]}]
    assert [record for record in own if record["process.pid"] == exporting.pid] == []
