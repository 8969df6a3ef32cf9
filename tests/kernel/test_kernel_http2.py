"""HTTP/2 in clear text: a connection links to the traces whose ids stand in its headers as they are."""

import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.kernel.harness import Namespace, agent, logs_with_ids, spans

CALLS = Path(__file__).with_name("calls.py")
PORT = 50_443

Ids = tuple[str, str]


def new_ids(count: int) -> list[Ids]:
    """Trace ids and span ids that nobody has used."""
    return [(uuid4().hex, uuid4().hex[:16]) for _ in range(count)]


@pytest.mark.parametrize(
    ("program", "calls", "seen"),
    [
        ("grpcio", 5, slice(0, 5)),
        ("never_indexed_then_indexed", 4, slice(0, 3)),
        ("huffman_coded", 2, slice(0, 0)),
    ],
)
def test_both_ends_link_to_calls_whose_ids_are_written_out(
    namespace: Namespace, tmp_path: Path, program: str, calls: int, seen: slice
) -> None:
    """To these and no others; packets keep the connection's own ids, and no request gets a record of its own."""
    ids = new_ids(calls)
    with agent(tmp_path, "run", "--otlp-file", "out", "--port", str(PORT)) as running:
        traceparents = [f"00-{trace}-{span}-01" for trace, span in ids]
        namespace.run(sys.executable, str(CALLS), program, str(PORT), *traceparents)
        assert running.stop() == 0
    ends = spans(tmp_path / "out")
    assert {span["kind"] for span in ends} == {2, 3}
    for span in ends:
        assert [(link["traceId"], link["spanId"]) for link in span.get("links", ())] == ids[seen]
    records = logs_with_ids(tmp_path / "out")
    assert {record["eventName"] for record in records} == {"tcp.packet"}
    own = {(span["traceId"], span["spanId"]) for span in ends}
    assert {(packet["traceId"], packet["spanId"]) for packet in records} == own
    for direction in ("transmit", "receive"):
        told = [
            "tcp.contexts.interleaved" in packet
            for packet in records
            if packet["network.io.direction"] == direction and packet["tcp.payload.size"]
        ]
        assert any(told) == bool(ids[seen])
        assert told == sorted(told)  # from the first call on, and to the end
