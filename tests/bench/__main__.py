"""Nanoseconds a record, stage by stage, against the OpenTelemetry SDK's own log path, interleaved in one run.

    python -m tests.bench            the figures
    python -m tests.bench --quick    fewer rounds, to see that it runs

CPU time of the process, so that a busy neighbour counts less; the median of the rounds, with the best beside it.
Compare by ratio: absolute figures belong to the machine.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs  # the only way to it in this release
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult

from tcpio_otel import names
from tcpio_otel.attribution.addresses import Addresses, Directory
from tcpio_otel.attribution.cgroups import Cgroups
from tcpio_otel.attribution.naming import Kind as PeerKind
from tcpio_otel.attribution.naming import Meaning
from tcpio_otel.attribution.peers import Peers
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import RECORD, Batch, Birth, Flag, Kind, Origin, Packets
from tcpio_otel.capture.ring import SLOT, Merger, parse
from tcpio_otel.connections.table import ConnectionTable
from tcpio_otel.correlation.contexts import ContextTable
from tcpio_otel.encoding.otlp_logs import PacketLogEncoder
from tcpio_otel.encoding.packet_json import PacketJsonEncoder
from tcpio_otel.encoding.peer import peer_names
from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.rows import nobody
from tcpio_otel.encoding.table import PacketTable
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.payload import Items, Signal
from tests import oracle, traffic
from tests.bench import probe

BATCH = 8192
CONNECTIONS = 1000
WHOLE, SDK = "drained batch to encoded bytes", "OpenTelemetry SDK: emit to bytes"
OUTSIDE, INSIDE = "correlation, no packet in context", "correlation, every packet in one"
WORKLOADS, ATTRIBUTED = 50, "attribution, 50 workloads"
NAMED = "the same, and peers are pods"
ENVELOPE = ProtobufEnvelope(lambda _: b"")


class Inlet:
    """Ring contents to batches: what `Rings.drain` does, but for the kernel's part."""

    def __init__(self, records: np.ndarray) -> None:
        slots = np.zeros(len(records), SLOT)
        slots["length"] = RECORD.itemsize
        slots["record"] = records
        self._data = slots.view(np.uint8)
        self._barrier = threading.Lock()

    def drain(self) -> np.ndarray:
        """Parse, sort and copy, as one ring's drain."""
        records, _, _ = parse(self._data, len(self._data), self._barrier)
        return Merger().merge([records], None)


def established(records: np.ndarray) -> ConnectionTable:
    """A table that knows the connections of `records`, open and in steady state."""
    table = ConnectionTable(
        limit=10 * CONNECTIONS,
        linger_ns=10**18,
        handshake_timeout_ns=10**18,
        summary_interval_ns=0,
        kernel_totals=True,
        older_told=True,
        reset_reasons={},
    )
    opening = records.copy()
    opening["time_ns"] -= np.uint64(10**12)
    for flags, direction in ((Flag.SYN, 1), (Flag.SYN | Flag.ACK, 0), (Flag.ACK, 1), (Flag.ACK, 1), (Flag.ACK, 0)):
        opening["flags"], opening["direction"], opening["marks"] = int(flags), direction, 0
        opening["payload_bytes"] = 100 if flags == Flag.ACK else 0
        opening["seq"], opening["ack"] = 1000 * (1 + direction), 1
        table.update(Batch(opening, 0, 0, 0))
    return table


def in_order(records: np.ndarray, slots: np.ndarray) -> None:
    """Number the bytes of each connection as its ends do: what follows, follows."""
    at = {slot: [1, 1] for slot in np.unique(slots).tolist()}
    numbers = []
    for slot, direction, payload in zip(
        slots.tolist(), records["direction"].tolist(), records["payload_bytes"].tolist(), strict=True
    ):
        sent = at[slot]
        numbers.append((sent[direction], sent[1 - direction]))
        sent[direction] += payload
    records["seq"], records["ack"] = np.array(numbers).T


def in_contexts(records: np.ndarray, table: ConnectionTable) -> ContextTable:
    """Contexts of the connections of `records`, each with one under way in both directions."""
    contexts = ContextTable(quiet_ns=10**18)
    _, first = np.unique(np.stack([records["local_port"], records["peer_port"]]), axis=1, return_index=True)
    beginnings = records.view("V160")[first].copy().view(RECORD)
    beginnings["kind"], beginnings["origin"], beginnings["serial"] = Kind.CONTEXT, Origin.TRACEPARENT, 1
    ids = np.arange(16 * len(beginnings), dtype=np.uint8)
    beginnings["trace_id"] = ids.reshape(len(beginnings), 16).view("V16").ravel()
    beginnings["span_id"] = np.frombuffer(b"spanspan", "V8")[0]
    beginnings["sent_seq"] = beginnings["received_seq"] = 1
    batch = Batch(beginnings, 0, 0, 0)
    table.update(batch)
    contexts.follow(batch, table.record_slots, table.flows, table.births)
    return contexts


class _Discard(LogRecordExporter):
    """Encodes and serialises, as the OTLP exporters do, and sends nothing."""

    def export(self, batch: object) -> LogRecordExportResult:
        encode_logs(batch).SerializeToString()  # type: ignore[arg-type]
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        return None

    def force_flush(self, timeout_millis: int = 10_000) -> bool:
        return True


class Sdk:
    """The SDK's log path: emit, batch, encode, serialise."""

    def __init__(self, records: np.ndarray, slots: np.ndarray, flows: np.ndarray) -> None:
        self._prepared = [
            (int(record["time_ns"]), oracle.tcpio_line(record), oracle.attributes(record, flows[slot], {}))
            for record, slot in zip(records, slots.tolist(), strict=True)
        ]
        self._provider = LoggerProvider()
        self._provider.add_log_record_processor(
            BatchLogRecordProcessor(_Discard(), max_queue_size=1 << 20, max_export_batch_size=4096)
        )

    def run(self) -> None:
        """Emit every record, and flush."""
        logger = self._provider.get_logger("bench")
        for time_ns, body, attributes in self._prepared:
            logger.emit(
                LogRecord(
                    timestamp=time_ns, observed_timestamp=time_ns, severity_text="INFO",
                    severity_number=SeverityNumber.INFO, body=body, attributes=attributes, event_name="tcp.packet",
                )
            )  # fmt: skip
        self._provider.force_flush()


def correlated(records: np.ndarray, *, inside: bool) -> Callable[[slice], Items]:
    """From a drained batch to encoded bytes, with what correlation does in between."""
    table, encoder = established(records), PacketLogEncoder({})
    contexts = in_contexts(records, table) if inside else ContextTable(quiet_ns=10**18)

    def work(part: slice) -> Items:
        batch = Batch(records[part], 0, 0, 0)
        slots, _ = table.update(batch)
        found = contexts.follow(batch, table.record_slots, table.flows, table.births).contexts
        return encoder.encode(Packets(batch.packets, slots, table.flows, 0, 1, found))

    return work


def pods(table: ConnectionTable) -> Peers:
    """The peer of each connection is a pod of its own, with the names that one has."""
    known = Directory(lambda item: {item["address"]: Meaning(PeerKind.POD, tuple(item["attributes"].items()))})
    births = []
    for slot in range(CONNECTIONS):
        ends = table.ends(slot)
        assert ends
        attributes = {
            names.POD_UID: f"5e0f7d3c-9d4c-4c6b-8a57-{slot:012x}", names.POD_NAME: f"checkout-7d9c5b6f4d-{slot:05x}",
            names.NAMESPACE: "shop", names.NODE: "node-12", names.DEPLOYMENT: "checkout",
            names.SERVICE_NAME: "checkout", names.SERVICE_NAMESPACE: "shop",
        }  # fmt: skip
        known.take(str(slot), {"address": ends.peer.address, "attributes": attributes})
        births.append(Birth(slot, 1, ends.local, ends.peer, accepted=False))
    peers = Peers(Addresses(known, {}, lambda: False), None, 0)
    nothing = Batch(np.empty(0, RECORD), 0, 0, 0)
    peers.assign(nothing, table.flows, np.empty(0, np.int64), births, table.renew)
    assert np.count_nonzero(table.flows["peer"]) == CONNECTIONS
    return peers


def attributed(records: np.ndarray, *, named: bool) -> Callable[[slice], Items]:
    """From a drained batch to encoded bytes, those of one workload side by side; with names of peers or without."""
    table = established(records)
    peers = pods(table) if named else None
    encoder = PacketLogEncoder({}, (lambda number: peer_names(peers[number])) if peers else nobody)
    workloads = Workloads(Cgroups({}, 0))
    table.flows["process_name"] = [b"program%d" % (slot % WORKLOADS) for slot in range(len(table.flows))]
    workloads.assign(Batch(records[:0], 0, 0, 0), table.flows, range(CONNECTIONS))

    def work(part: slice) -> Items:
        batch = Batch(records[part], 0, 0, 0)
        slots, _ = table.update(batch)
        workloads.assign(batch, table.flows, table.owned)
        if peers:
            peers.assign(batch, table.flows, slots, table.births, table.renew)
        order, groups = workloads.arrange(table.flows, slots)
        assert len(groups) == WORKLOADS
        return encoder.encode(Packets(batch.packets, slots, table.flows, 0, 1, None, order))

    return work


Stage = tuple[Callable[[], object], int]
"""Work, and how many records it is about."""


def stages() -> dict[str, Stage]:
    """What is measured, by its name."""
    records, slots, flows = traffic.flows_and_records(8 * BATCH, CONNECTIONS)
    # Steady state: what opens and closes connections is measured apart.
    records["flags"] &= ~np.uint8(Flag.SYN | Flag.FIN | Flag.RST)
    records["flags"] |= np.uint8(Flag.ACK)
    records["marks"] = 0
    in_order(records, slots)
    parts = [slice(start, start + BATCH) for start in range(0, len(records), BATCH)]
    table, inlets = established(records), [Inlet(records[part]) for part in parts]
    # An encoder for each: shared, they would make every connection's rows anew at each turn.
    protobuf, following, json_lines = PacketLogEncoder({}), PacketLogEncoder({}), PacketJsonEncoder({})
    outside, inside = correlated(records, inside=False), correlated(records, inside=True)
    apart, named = attributed(records, named=False), attributed(records, named=True)
    text = PacketTable(time=False, process=False, seq=False)

    def each(work: Callable[[slice], object]) -> Stage:
        return lambda: [work(part) for part in parts], len(records)

    def encoded(encoder: Any) -> Stage:
        return each(lambda part: encoder.encode(Packets(records[part], slots[part], flows, 0, 1)))

    def whole(part: slice) -> Items:
        batch = Batch(records[part], 0, 0, 0)
        slots, _ = table.update(batch)
        return following.encode(Packets(batch.packets, slots, table.flows, 0, 1))

    def requested(part: slice) -> None:
        items = whole(part)
        batcher = Batcher(Signal.LOGS, ENVELOPE, max_bytes=1 << 26, max_items=BATCH, max_age_ns=0, packets=True)
        (request,) = batcher.add(items, 0)
        assert request.items == BATCH

    return {
        "drain: parse, merge, copy": (lambda: [inlet.drain() for inlet in inlets], len(records)),
        "connections: look up and count": each(lambda part: table.update(Batch(records[part], 0, 0, 0))),
        "encode OTLP protobuf": encoded(protobuf),
        WHOLE: each(whole),
        OUTSIDE: each(outside),
        INSIDE: each(inside),
        ATTRIBUTED: each(apart),
        NAMED: each(named),
        "drained batch to a request": each(requested),
        "encode OTLP/JSON": encoded(json_lines),
        "encode the tcpio table": encoded(text),
        SDK: (Sdk(records[:2000], slots[:2000], flows).run, 2000),
    }


def measure(work: Callable[[], object], count: int) -> float:
    """Nanoseconds of CPU time a record, of one round."""
    started = time.process_time_ns()
    work()
    return (time.process_time_ns() - started) / count


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    rounds = 3 if parser.parse_args().quick else 15
    figures = probe.measure(4 * rounds) if os.geteuid() == 0 else None
    measured = stages()
    taken: dict[str, list[float]] = {name: [] for name in measured}
    compared = [WHOLE, OUTSIDE, INSIDE, ATTRIBUTED, NAMED]
    for _ in range(rounds + 1):
        for name in [name for name in measured if name not in compared]:
            taken[name].append(measure(*measured[name]))
    for turn in range(4 * rounds + 1):  # side by side, each as often behind the one as behind the other
        for name in compared if turn % 2 else reversed(compared):
            taken[name].append(measure(*measured[name]))
    taken = {name: times[1:] for name, times in taken.items()}  # the first round warms caches and tables
    print(f"{CONNECTIONS} connections, batches of {BATCH}, {rounds} rounds; ns a record, CPU time")
    print(f"{'stage':34}{'median':>10}{'best':>10}{'records/s':>14}")
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:34}{median:10.0f}{min(times):10.0f}{1e9 / median:14,.0f}")
    ratio = statistics.median(taken[SDK]) / statistics.median(taken[WHOLE])
    print(f"{WHOLE}: {ratio:.0f} times the SDK's rate")
    for name in (OUTSIDE, INSIDE, ATTRIBUTED, NAMED):
        more = [on - off for on, off in zip(taken[name], taken[WHOLE], strict=True)]
        print(f"{name}: round by round {probe.middle(more)}")
    print(probe.report(figures) if figures else "the probe's cost was not measured: it takes root")


if __name__ == "__main__":
    main()
