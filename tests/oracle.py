"""The slow, obvious encoding of a packet record by the official protobuf classes: what the fast ones must equal."""

import ipaddress
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ScopeLogs

from tcpio_otel.batch import Contexts, Mark

FLAGS = ("FIN", "SYN", "RST", "PUSH", "ACK", "URG", "ECE", "CWR")


def address(raw: Any) -> tuple[str, bool]:
    """Text of 16 bytes, and whether it is IPv4."""
    value = ipaddress.IPv6Address(bytes(raw))
    return (str(value.ipv4_mapped), True) if value.ipv4_mapped else (str(value), False)


def peer_names(number: int) -> tuple[tuple[str, str | int], ...]:
    """What is known of a peer, by its number: nothing of 0."""
    names = (("tcp.peer.kind", "pod"), ("tcp.peer.k8s.pod.name", f'"web" \u00e9-{number}'), ("tcp.peer.port", number))
    return names[:number]


def tcpio_line(record: Any) -> str:
    """A row of `tcpio.d`."""
    ends = []
    for name in ("header_local_address", "header_peer_address"):
        text, ipv4 = address(record[name])
        ends.append(text if ipv4 else f"[{text}]")
    flags = "|".join(name for bit, name in enumerate(FLAGS) if record["flags"] >> bit & 1) or "null"
    return " %3d %16s:%-5d %s %16s:%-5d %6d  (%s)" % (
        record["cpu"], ends[0], record["header_local_port"], "->" if record["direction"] else "<-", ends[1],
        record["header_peer_port"], record["payload_bytes"], flags,
    )  # fmt: skip


def attributes(record: Any, flow: Any, drop_reasons: Mapping[int, str]) -> dict[str, str | int | bool]:
    """The attributes of a packet log record, in the order in which they are encoded."""
    flags = "|".join(name for bit, name in enumerate(FLAGS) if record["flags"] >> bit & 1) or "null"
    marks = int(record["marks"])
    local, ipv4 = address(record["header_local_address"])
    found: dict[str, str | int | bool] = {
        "tcp.flags": flags,
        "tcp.flags.bits": int(record["flags"]),
        "cpu.logical_number": int(record["cpu"]),
        "tcp.payload.size": int(record["payload_bytes"]),
        "tcp.window": int(record["window"]),
    }
    if record["gso_segments"] > 1:
        found["tcp.gso.segments"] = int(record["gso_segments"])
        found["tcp.gso.size"] = int(record["gso_size"])
    if marks & Mark.RETRANSMIT:
        found["tcp.retransmit"] = True
    if marks & Mark.DROPPED and record["drop_reason"]:
        reason = int(record["drop_reason"])
        found["tcp.drop.reason"] = drop_reasons.get(reason, str(reason))
    found["tcp.seq"] = int(record["seq"])
    found["tcp.ack"] = int(record["ack"])
    found |= {
        "network.transport": "tcp",
        "network.type": "ipv4" if ipv4 else "ipv6",
        "network.local.address": local,
        "network.local.port": int(record["header_local_port"]),
        "network.peer.address": address(record["header_peer_address"])[0],
        "network.peer.port": int(record["header_peer_port"]),
        "network.io.direction": "transmit" if record["direction"] else "receive",
    }
    if marks & Mark.TRANSLATED:
        found["tcp.socket.local.address"] = address(record["local_address"])[0]
        found["tcp.socket.local.port"] = int(record["local_port"])
        found["tcp.socket.peer.address"] = address(record["peer_address"])[0]
        found["tcp.socket.peer.port"] = int(record["peer_port"])
    if flow["pid"]:
        found["process.pid"] = int(flow["pid"])
    if flow["process_name"]:
        found["process.executable.name"] = bytes(flow["process_name"]).decode("utf-8", "replace")
    if flow["identified"]:
        found["tcp.connection.id"] = bytes(flow["trace_id"])[:8].hex()
    return found | dict(peer_names(int(flow["peer"])))


def _value(value: str | int | bool) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    return AnyValue(string_value=value) if isinstance(value, str) else AnyValue(int_value=value)


def context_of(contexts: Contexts | None, row: int) -> tuple[tuple[bytes, bytes] | None, list[KeyValue]]:
    """The ids of the context that a packet served, and what it says of others."""
    if contexts is None:
        return None, []
    number, spans = int(contexts.numbers[row]), int(contexts.spans[row])
    ids = contexts.ids[number]
    said = []
    if spans:
        texts = [f"{trace_id.hex()}-{span_id.hex()}" for trace_id, span_id in contexts.sets[spans - 1]]
        array = ArrayValue(values=[AnyValue(string_value=text) for text in texts])
        said.append(KeyValue(key="tcp.contexts", value=AnyValue(array_value=array)))
    elif number == 1:
        said.append(KeyValue(key="tcp.contexts.interleaved", value=AnyValue(bool_value=True)))
    return (bytes(ids["trace_id"]), bytes(ids["span_id"])) if number > 1 else None, said


def log_record(
    record: Any,
    flow: Any,
    unix_offset_ns: int,
    observed_ns: int,
    drop_reasons: Mapping[int, str],
    context: tuple[tuple[bytes, bytes] | None, list[KeyValue]] = (None, []),
) -> LogRecord:
    """A packet as an official `LogRecord`."""
    ids, said = context
    if ids is None:
        ids = (bytes(flow["trace_id"]), bytes(flow["span_id"])) if flow["identified"] else (b"", b"")
    warn = bool(record["flags"] & 0x04 or record["marks"] & Mark.RETRANSMIT)
    return LogRecord(
        time_unix_nano=int(record["time_ns"]) + unix_offset_ns,
        observed_time_unix_nano=observed_ns,
        severity_number=13 if warn else 9,
        severity_text="WARN" if warn else "INFO",
        body=AnyValue(string_value=tcpio_line(record).lstrip()),
        attributes=[
            *(KeyValue(key=key, value=_value(value)) for key, value in attributes(record, flow, drop_reasons).items()),
            *said,
        ],
        trace_id=ids[0],
        span_id=ids[1],
        event_name="tcp.packet",
    )  # fmt: skip


def items(
    records: NDArray[np.void],
    slots: NDArray[np.int64],
    flows: NDArray[np.void],
    unix_offset_ns: int,
    observed_ns: int,
    drop_reasons: Mapping[int, str],
    contexts: Contexts | None = None,
) -> list[bytes]:
    """Each record as the bytes of one `ScopeLogs.log_records` field."""
    return [
        ScopeLogs(
            log_records=[
                log_record(record, flows[slot], unix_offset_ns, observed_ns, drop_reasons, context_of(contexts, row))
            ]
        ).SerializeToString(deterministic=True)
        for row, (record, slot) in enumerate(zip(records, slots.tolist(), strict=True))
    ]
