"""Items to requests: nothing lost, nothing doubled, nothing too large."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.resource import host_resource, message
from tcpio_otel.export.batcher import LENGTHS_BYTES, Batcher
from tcpio_otel.payload import Items, Request, Signal

ENVELOPE = b"<envelope>"


def wrap(runs: list[memoryview], length: int) -> bytes:
    """An envelope that shows the bytes it was told of."""
    body = b"".join(runs)
    assert len(body) == length
    return ENVELOPE + body


def batcher(max_bytes: int = 1000, max_items: int = 10, max_age_ns: int = 100) -> Batcher:
    """A batcher of packets."""
    return Batcher(
        Signal.LOGS, wrap, max_bytes=max_bytes + LENGTHS_BYTES, max_items=max_items, max_age_ns=max_age_ns, packets=True
    )  # fmt: skip


def items(sizes: list[int], first: int = 0) -> Items:
    """Items of given sizes, each of one letter."""
    parts = [bytes([97 + (first + number) % 26]) * size for number, size in enumerate(sizes)]
    return Items(memoryview(bytearray(b"".join(parts))), np.cumsum(sizes, dtype=np.int64))


@pytest.mark.parametrize("label", ["x", "x" * 20_000])
def test_a_request_keeps_within_its_bound_whatever_the_resource(label: str) -> None:
    """What stands around the items counts, however large it is."""
    resource = message(host_resource("edge", {"note": label})).SerializeToString()
    full = Batcher(
        Signal.LOGS, ProtobufEnvelope(resource).wrap, max_bytes=65_536, max_items=100_000, max_age_ns=0, packets=True
    )
    sizes = [len(request.body) for request in full.add(items([100] * 3000), 0)]
    assert len(sizes) > 3
    assert all(65_000 < size <= 65_536 for size in sizes)


@given(st.lists(st.lists(st.integers(1, 120), max_size=40), max_size=8), st.integers(20, 300), st.integers(1, 15))
def test_every_item_goes_once_and_in_order(runs: list[list[int]], max_bytes: int, max_items: int) -> None:
    """Whatever the sizes: bodies within bounds, items in order, the too large ones counted."""
    gathered, requests, sent = batcher(max_bytes, max_items), list[Request](), b""
    room, too_large, total = max_bytes - len(ENVELOPE), 0, 0
    for number, sizes in enumerate(runs):
        batch = items(sizes, number)
        requests += gathered.add(batch, 0)
        start = 0
        for end, size in zip(batch.ends.tolist(), sizes, strict=True):
            if size <= room:
                sent += bytes(batch.buffer[start:end])
                total += 1
            else:
                too_large += 1
            start = end
        # The encoder uses its buffer again: what waits must have been copied.
        batch.buffer[:] = b"!" * len(batch.buffer)
    requests += gathered.flush()
    assert b"".join(request.body.removeprefix(ENVELOPE) for request in requests) == sent
    assert all(len(request.body) <= max_bytes and request.items <= max_items for request in requests)
    assert sum(request.items for request in requests) == sum(request.packets for request in requests) == total
    assert (gathered.too_large, gathered.held) == (too_large, 0)


def test_age_counts_from_the_first_item() -> None:
    """A request leaves when its oldest item has waited long enough, not sooner."""
    gathered = batcher(max_age_ns=100)
    assert list(gathered.add(items([5]), 0)) == []
    assert list(gathered.add(items([5]), 90)) == []
    assert list(gathered.poll(99)) == []
    (request,) = gathered.poll(100)
    assert request.items == 2
    assert list(gathered.poll(1000)) == []
