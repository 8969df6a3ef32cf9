"""Life stories of connections, written down as the kernel's (or a capture's) records of one end."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcpio_otel.batch import RECORD, Batch, Flag, Kind, Mark, Origin, State
from tcpio_otel.connections.events import Connection
from tcpio_otel.connections.table import ConnectionTable

MS = 1_000_000
SECOND = 1_000_000_000
FLAGS = {"S": Flag.SYN, "A": Flag.ACK, "F": Flag.FIN, "R": Flag.RST, "P": Flag.PUSH}
REASONS = {3: "TCP_ABORT_ON_CLOSE"}


def address(text: str) -> np.void:
    """An address as it stands in a record."""
    parsed = ipaddress.ip_address(text)
    packed = parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed
    return np.frombuffer(packed, "V16")[0]


@dataclass
class End:
    """One end of a connection, told record by record; every record is a millisecond after the one before."""

    isn: int = 1000
    peer_isn: int = 5000
    local: tuple[str, int] = ("192.0.2.1", 40000)
    peer: tuple[str, int] = ("192.0.2.2", 443)
    pid: int = 77
    time_ns: int = 10 * SECOND
    contexts: int = 0
    records: list[np.ndarray] = field(default_factory=list)

    def _record(self, kind: Kind, **fields: Any) -> "End":
        record = np.zeros(1, RECORD)
        record["kind"], record["time_ns"], record["netns"] = kind, self.time_ns, 9
        record["pid"], record["process_name"] = self.pid, b"app"
        for prefix in ("", "header_") if kind is Kind.PACKET else ("",):
            for side, (host, port) in (("local", self.local), ("peer", self.peer)):
                record[f"{prefix}{side}_address"], record[f"{prefix}{side}_port"] = address(host), port
        for name, value in fields.items():
            record[name] = value
        self.records.append(record)
        self.time_ns += MS
        return self

    def sends(self, flags: str, seq: int = 0, ack: int = 0, size: int = 0, **fields: Any) -> "End":
        """A segment sent; `seq` and `ack` count from the initial sequence numbers."""
        return self._packet(1, flags, self.isn + seq, self.peer_isn + ack, size, **fields)

    def gets(self, flags: str, seq: int = 0, ack: int = 0, size: int = 0, **fields: Any) -> "End":
        """A segment received; `seq` and `ack` count from the initial sequence numbers."""
        return self._packet(0, flags, self.peer_isn + seq, self.isn + ack, size, **fields)

    def _packet(self, direction: int, flags: str, seq: int, ack: int, size: int, **fields: Any) -> "End":
        bits = sum(FLAGS[letter] for letter in flags)
        acked = ack % 2**32 if "A" in flags else 0
        return self._record(
            Kind.PACKET, direction=direction, flags=bits, seq=seq % 2**32, ack=acked, payload_bytes=size,
            **{"window": 1000, "state": 1, "contexts": self.contexts, **fields},
        )  # fmt: skip

    def socket(self, old: State, new: State = State.CLOSE, sent: int = 0, received: int = 0, **fields: Any) -> "End":
        """The kernel's totals: payload sent, and received with the FIN if there was one."""
        numbers = {
            "bytes_sent": sent, "bytes_received": received, "segments_out": 5, "segments_in": 6,
            "rcv_nxt": (self.peer_isn + 1 + received) % 2**32, "rtt_smoothed_us": 1500, "rtt_min_us": 900,
        }  # fmt: skip
        return self._record(Kind.SOCKET, old_state=old, new_state=new, **{**numbers, **fields})

    def serves(self, ids: tuple[bytes, bytes], sent: int = 0, received: int = 0, **fields: Any) -> "End":
        """A context begins, by both places in the stream; `ids` are a trace id and a span id, zeros for none."""
        self.contexts += 1
        numbers = {
            "origin": Origin.TRACEPARENT, "serial": self.contexts, "sent_seq": (self.isn + sent) % 2**32,
            "received_seq": (self.peer_isn + received) % 2**32,
        }  # fmt: skip
        trace_id, span_id = np.frombuffer(ids[0], "V16")[0], np.frombuffer(ids[1], "V8")[0]
        return self._record(Kind.CONTEXT, trace_id=trace_id, span_id=span_id, **{**numbers, **fields})

    def resets(self, reason: int) -> "End":
        """The kernel says why it sends a RST."""
        return self._record(Kind.RESET, reason=reason)

    def waits(self, time_ns: int) -> "End":
        """Nothing happens for a while."""
        self.time_ns += time_ns
        return self

    def handshake(self, client: bool = True) -> "End":
        """Three segments, seen from one end."""
        if client:
            return self.sends("S", state=State.SYN_SENT).gets("SA", ack=1).sends("A", 1, 1)
        listener = {"marks": Mark.LISTENER, "state": State.LISTEN}
        return self.gets("S", **listener).sends("SA", ack=1, **listener).gets("A", 1, 1, **listener)


def told(*ends: End) -> np.ndarray:
    """The records of several ends in time order."""
    records = np.concatenate([record.view("V160") for end in ends for record in end.records]).view(RECORD)
    return records[np.argsort(records["time_ns"], kind="stable")].view("V160").copy().view(RECORD)


def table(**settings: Any) -> ConnectionTable:
    """A table with the defaults of the configuration, for the live source unless told otherwise."""
    return ConnectionTable(**{
        "limit": 1000, "linger_ns": 2 * SECOND, "handshake_timeout_ns": 130 * SECOND, "summary_interval_ns": 0,
        "kernel_totals": True, "older_told": True, "reset_reasons": REASONS, **settings,
    })  # fmt: skip


def lived(records: np.ndarray, then_ns: int = 0, **settings: Any) -> list[Connection]:
    """The connections that ended after all records, and after some more time."""
    followed = table(**settings)
    last_ns = int(records["time_ns"][-1])
    _, ended = followed.update(Batch(records, 0, 0, last_ns))
    _, later = followed.update(Batch(records[:0], 0, 0, last_ns + then_ns))
    return ended + later
