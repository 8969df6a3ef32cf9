"""What a real Collector takes to pass on, or to store, what agents sent; and what it comes to in a columnar store."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import urllib3
from isal import igzip

from tcpio_otel.export.http import GZIP_LEVEL
from tests.bench.scale.node import Requests
from tests.bench.scale.usage import spent_s
from tests.integration.collector import Collector, collector
from tests.kernel.harness import resident_bytes
from tests.peers.clickhouse import ClickHouse, started
from tests.peers.collector_contrib import shown

METHODS = {
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
}
TABLES = {"logs": "otel_logs", "traces": "otel_traces"}
PATIENCE_S = 120

Sender = Callable[[Collector, str, list[bytes]], None]
Sent = dict[str, dict[str, Requests]]
"""What agents sent, by how they were configured and by signal."""


def _by_http(to: Collector, signal: str, bodies: list[bytes]) -> None:
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
    with urllib3.PoolManager() as pool:
        for body in bodies:
            url, packed = f"http://127.0.0.1:{to.http_port}/v1/{signal}", igzip.compress(body, GZIP_LEVEL)
            assert pool.request("POST", url, packed, headers=headers).status == 200


def _by_grpc(to: Collector, signal: str, bodies: list[bytes]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{to.grpc_port}") as channel:
        export = channel.unary_unary(METHODS[signal], None, None)
        for body in bodies:
            export(body)


SENDERS: dict[str, Sender] = {"HTTP, gzip": _by_http, "gRPC": _by_grpc}


def passed_on(directory: Path, sent: dict[str, Requests], rounds: int) -> Iterator[str]:
    """A line for each signal and protocol: the gateway that we show, with another Collector behind it."""
    yield f"{'gateway.yaml to another Collector':44}{'items':>10}{'CPU s a million':>18}{'MB':>8}"
    for signal, requests in sent.items():
        for protocol, send in SENDERS.items():
            figures, memory = [], []
            for turn in range(rounds):
                place = directory / f"{signal}-{protocol.partition(',')[0]}-{turn}"
                (place / "behind").mkdir(parents=True)
                with ExitStack() as stack:
                    behind = stack.enter_context(collector(place / "behind"))
                    endpoint = f"127.0.0.1:{behind.grpc_port}"
                    gateway = stack.enter_context(shown(place, "gateway", OTLP_ENDPOINT=endpoint, OTLP_INSECURE="true"))
                    assert gateway.process
                    pid = gateway.process.pid
                    spent = spent_s(lambda: send(gateway, signal, requests.bodies), pid)  # noqa: B023 - at once
                    figures.append(1e6 * spent / requests.items)
                    memory.append(resident_bytes(pid) / 1e6)
                (place / "behind" / "received.json").unlink()
            yield (
                f"{signal + ' by ' + protocol:44}{requests.items:10,}{statistics.median(figures):18.1f}"
                f"{statistics.median(memory):8.0f}"
            )


def _rows(store: ClickHouse, table: str) -> int:
    return int(store.query(f"SELECT count() AS rows FROM {table}")[0]["rows"])


def stored(directory: Path, sent: Sent) -> Iterator[str]:
    """A line for each configuration of an agent: the exporter's CPU time, and the bytes on disk."""
    head = f"{'clickhouse.yaml to ClickHouse':52}{'rows':>9}{'CPU s a million':>18}{'bytes a row':>12}{'raw':>8}"
    yield f"{head}   largest columns"
    for number, (name, of_signals) in enumerate(sent.items()):
        place = directory / f"stored-{number}"
        place.mkdir()
        queue = {"batch": {"flush_timeout": "1s"}}
        overrides = {"exporters": {"clickhouse": {"compress": "none", "sending_queue": queue}}}  # what chdb takes
        with (
            started(place) as store,
            shown(place, "clickhouse", overrides=overrides, CLICKHOUSE_ENDPOINT=store.url) as gateway,
        ):
            assert gateway.process
            for signal, requests in of_signals.items():
                yield f"{name + ', ' + signal:52}" + _stored(store, gateway, signal, requests)


def _stored(store: ClickHouse, gateway: Collector, signal: str, requests: Requests) -> str:
    table = TABLES[signal]
    before = _rows(store, table)

    def work() -> None:
        _by_http(gateway, signal, requests.bodies)
        deadline = time.monotonic() + PATIENCE_S
        while _rows(store, table) - before < requests.items:
            assert time.monotonic() < deadline, f"{_rows(store, table) - before} of {requests.items} rows came"
            time.sleep(0.5)

    assert gateway.process
    spent = spent_s(work, gateway.process.pid)
    store.query(f"OPTIMIZE TABLE {table} FINAL")
    (size,) = store.query(
        "SELECT sum(rows) AS rows, sum(bytes_on_disk) AS disk, sum(data_uncompressed_bytes) AS raw FROM system.parts "
        f"WHERE active AND table = '{table}'"
    )
    columns = store.query(
        "SELECT column, sum(column_data_compressed_bytes) AS bytes FROM system.parts_columns "
        f"WHERE active AND table = '{table}' GROUP BY column ORDER BY bytes DESC LIMIT 4"
    )
    rows = int(size["rows"])
    largest = ", ".join(f"{each['column']} {int(each['bytes']) / rows:.1f}" for each in columns)
    return (
        f"{rows:9,}{1e6 * spent / requests.items:18.1f}{int(size['disk']) / rows:12.1f}{int(size['raw']) / rows:8.0f}"
        f"   {largest}"
    )
