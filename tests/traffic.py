"""Synthetic packet records and flows for tests of encoders and for benchmarks; seeded, so that runs repeat."""

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import FLOW, RECORD, Contexts, Kind, Mark

UNIX_NS = 1_795_000_000_000_000_000


def mapped(octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """IPv4 addresses (n, 4) as 16 bytes each."""
    addresses = np.zeros((len(octets), 16), np.uint8)
    addresses[:, 10:12] = 0xFF
    addresses[:, 12:] = octets
    return addresses


def flows_and_records(
    packets: int, connections: int = 1000, seed: int = 1, cpus: int = 64
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.void]]:
    """What a busy host gives: four in five connections IPv4, bulk and small payloads, few flags.

    Returns records (dtype RECORD, shape (packets,)), their slots, and flows (dtype FLOW) by slot.
    """
    random = np.random.default_rng(seed)
    ipv6 = random.random(connections) < 0.2
    local = mapped(
        np.stack([np.full(connections, value) for value in (10, 20, 3)] + [random.integers(1, 5, connections)], 1)
    )
    peer = mapped(random.integers(1, 255, (connections, 4)).astype(np.uint8))
    prefix = np.frombuffer(bytes.fromhex("20010db8001200340000000000000000"), np.uint8)
    local[ipv6] = prefix
    local[ipv6, 15] = random.integers(1, 9, ipv6.sum())
    peer[ipv6] = prefix
    peer[ipv6, 4:] = random.integers(0, 256, (ipv6.sum(), 12))
    local_port = random.choice([22, 80, 443, 5432, 8080, 9092], connections)
    peer_port = random.integers(32768, 61000, connections)

    flows = np.zeros(connections, FLOW)
    flows["version"] = np.arange(1, connections + 1)
    flows["trace_id"] = random.integers(0, 256, (connections, 16)).astype(np.uint8).view("V16").ravel()
    flows["span_id"] = random.integers(0, 256, (connections, 8)).astype(np.uint8).view("V8").ravel()
    flows["identified"] = True
    flows["pid"] = random.integers(300, 60000, connections)
    flows["process_name"] = random.choice([b"nginx", b"postgres", b"envoy", b"python3.11"], connections)

    slots = random.integers(0, connections, packets)
    records = np.zeros(packets, RECORD)
    records["kind"] = Kind.PACKET
    for prefix_name in ("", "header_"):
        records[f"{prefix_name}local_address"] = local.view("V16").ravel()[slots]
        records[f"{prefix_name}peer_address"] = peer.view("V16").ravel()[slots]
        records[f"{prefix_name}local_port"] = local_port[slots]
        records[f"{prefix_name}peer_port"] = peer_port[slots]
    records["pid"] = flows["pid"][slots]
    records["process_name"] = flows["process_name"][slots]
    records["netns"] = 4026531840
    records["state"] = 1
    records["direction"] = random.integers(0, 2, packets)
    records["cpu"] = random.integers(0, cpus, packets)
    records["window"] = random.integers(100, 65535, packets)
    kind = random.random(packets)
    bulk = 1448 * random.integers(2, 46, packets)
    records["payload_bytes"] = np.select(
        [kind < 0.4, kind < 0.65, kind < 0.85], [0, 1448, random.integers(1, 1448, packets)], bulk
    )
    records["gso_segments"] = np.where(kind < 0.85, 1, bulk // 1448)
    records["gso_size"] = np.where(kind < 0.85, 0, 1448)
    draw = random.random(packets)
    data = (records["payload_bytes"] > 0) & (draw < 0.8)
    records["flags"] = np.select(
        [draw < 0.01, draw < 0.02, draw < 0.04, draw < 0.045, data], [0x02, 0x12, 0x11, 0x04, 0x18], 0x10
    )
    records["marks"] = np.where(random.random(packets) < 0.005, Mark.RETRANSMIT, 0)
    records["time_ns"] = 10**15 + np.cumsum(random.exponential(2000, packets).astype(np.uint64) + 1)
    records["seq"] = random.integers(0, 1 << 32, packets)
    records["ack"] = random.integers(0, 1 << 32, packets)
    return records, slots, flows


def wild_contexts(packets: int, seed: int) -> Contexts:
    """Contexts for so many packets: none, one, several at a time, and some that reach over two or three."""
    random = np.random.default_rng(seed)
    ids = np.zeros(50, [("trace_id", "V16"), ("span_id", "V8"), ("else", "V7")])
    for name, width in (("trace_id", 16), ("span_id", 8)):
        ids[name] = random.integers(0, 256, (50, width)).astype(np.uint8).view(f"V{width}").ravel()
    pairs = [(row["trace_id"].tobytes(), row["span_id"].tobytes()) for row in ids]
    sets = tuple(tuple(pairs[at : at + 2 + at % 2]) for at in range(0, 12, 3))
    numbers = np.where(random.random(packets) < 0.3, random.integers(0, 2, packets), random.integers(0, 50, packets))
    spans = np.where(random.random(packets) < 0.1, random.integers(1, len(sets) + 1, packets), 0).astype(np.int32)
    return Contexts(numbers, spans, sets, ids)


def wild(packets: int, slots: int, seed: int) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.void]]:
    """Every field anything that it can hold; same shapes as `flows_and_records`.

    Records of one slot share their tuple, as they do in the agent, unless they are translated.
    """
    random = np.random.default_rng(seed)

    def some(values: list[int], bits: int, count: int = packets) -> NDArray[np.uint64]:
        widths = random.integers(0, bits + 1, count).astype(np.uint64)
        numbers = random.integers(0, 1 << 63, count).astype(np.uint64) >> (np.uint64(63) - widths)
        return np.where(random.random(count) < 0.2, random.choice(values, count), numbers).astype(np.uint64)

    def addresses(count: int) -> NDArray[np.void]:
        wide = random.integers(0, 256, (count, 16)).astype(np.uint8)
        wide[random.random(count) < 0.2, 2:14] = 0
        some_mapped = mapped(random.integers(0, 256, (count, 4)).astype(np.uint8))
        chosen = np.where(random.random((count, 1)) < 0.5, wide, some_mapped)
        return np.ascontiguousarray(chosen).view("V16").ravel()

    flows = np.zeros(slots, FLOW)
    flows["version"] = random.permutation(slots) + 1 + seed * slots
    flows["trace_id"], flows["span_id"] = addresses(slots), addresses(slots).view("V8")[::2]
    flows["identified"] = random.random(slots) < 0.8
    flows["pid"] = np.where(random.random(slots) < 0.2, 0, some([1, 4194304], 32, slots))
    names = [
        b"",
        b"a",
        b"nginx",
        b"\xff\xfe\x00x",
        "grüße".encode(),
        b"fifteen-letters",
        b"\xe2\x82",
        b'qu"o\\te\n\t\x01',
    ]
    flows["process_name"] = random.choice(np.array(names, "S16"), slots)

    row = random.integers(0, slots, packets)
    records = np.zeros(packets, RECORD)
    records["kind"] = Kind.PACKET
    for name in ("local_address", "peer_address"):
        records[name] = addresses(slots)[row]
    for name in ("local_port", "peer_port"):
        records[name] = some([0, 65535], 16, slots)[row]
    records["marks"] = random.choice([0, 0, 0, 1, 2, 3, 4, 5, 8, 16, 18, 31], packets)
    translated = (records["marks"] & Mark.TRANSLATED) != 0
    for name in ("local_address", "peer_address", "local_port", "peer_port"):
        other = addresses(packets) if name.endswith("address") else some([0], 16)
        # Some connections keep their translation, as they should; some change it from packet to packet.
        other = np.where(row % 2 == 0, other, other[row % packets])
        records[f"header_{name}"] = np.where(translated, other.astype(records[name].dtype), records[name])
    records["time_ns"] = random.integers(0, 1 << 62, packets)
    for name, bits in (
        ("seq", 32),
        ("ack", 32),
        ("payload_bytes", 32),
        ("window", 16),
        ("gso_segments", 16),
        ("gso_size", 16),
        ("cpu", 16),
    ):
        records[name] = some([0, 1, (1 << bits) - 1], bits)
    calm = random.random(packets) < 0.5
    records["payload_bytes"] = np.where(calm, records["payload_bytes"] & 0xFFFF, records["payload_bytes"])
    records["cpu"] = np.where(calm, records["cpu"] & 0x7F, records["cpu"])
    records["flags"] = random.integers(0, 256, packets)
    records["direction"] = random.integers(0, 2, packets)
    records["drop_reason"] = random.choice([0, 2, 3, 77, 65535], packets)
    return records, row, flows
