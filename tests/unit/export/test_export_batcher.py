"""Items to requests: nothing lost, nothing doubled, nothing too large."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.resource import host_resource, message
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.payload import Items, Part, Request, Signal


class Bracketed:
    """An envelope that shows what it was told: each part behind the number of its resource, in brackets."""

    def wrap(self, parts: list[Part]) -> bytes:
        """Parts side by side."""
        assert all(sum(map(len, part.runs)) == part.length for part in parts)
        return b"".join(b"<%03d:%s>" % (part.resource, b"".join(part.runs)) for part in parts)

    def overhead_bytes(self, resource: int) -> int:
        """The brackets, the number, the colon."""
        assert resource < 1000
        return OVERHEAD


OVERHEAD = 6


def unwrapped(body: bytes) -> list[tuple[int, bytes]]:
    """The parts of a request: the resource and the items of each."""
    return [(int(number), found) for number, found in re.findall(rb"<(\d{3}):([^>]*)>", body)]


def batcher(max_bytes: int = 1000, max_items: int = 10, max_age_ns: int = 100) -> Batcher:
    """A batcher of packets."""
    return Batcher(
        Signal.LOGS, Bracketed(), max_bytes=max_bytes, max_items=max_items, max_age_ns=max_age_ns, packets=True
    )  # fmt: skip


def items(sizes: list[int], first: int = 0) -> Items:
    """Items of given sizes, each of one letter."""
    parts = [bytes([97 + (first + number) % 26]) * size for number, size in enumerate(sizes)]
    return Items(memoryview(bytearray(b"".join(parts))), np.cumsum(sizes, dtype=np.int64))


@pytest.mark.parametrize("label", ["x", "x" * 20_000])
def test_a_request_keeps_within_its_bound_whatever_the_resource(label: str) -> None:
    """What stands around the items counts, however large it is."""
    resource = message(host_resource("edge", {"note": label})).SerializeToString()
    full = Batcher(Signal.LOGS, ProtobufEnvelope(lambda _: resource), max_bytes=65_536, max_items=100_000, max_age_ns=0)
    sizes = [len(request.body) for request in full.add(items([100] * 3000), 0)]
    assert len(sizes) > 3
    assert all(65_000 < size <= 65_536 for size in sizes)


@given(
    st.lists(st.lists(st.lists(st.integers(1, 120), max_size=12), max_size=4), max_size=8),
    st.integers(20, 300),
    st.integers(1, 15),
)
def test_every_item_goes_once_and_in_order(batches: list[list[list[int]]], max_bytes: int, max_items: int) -> None:
    """Whatever the sizes and the resources: bodies within bounds, items in order, the too large ones counted."""
    gathered, requests = batcher(max_bytes, max_items), list[Request]()
    sent: dict[int, bytes] = {}
    too_large = total = 0
    for number, groups in enumerate(batches):
        batch = items([size for sizes in groups for size in sizes], number)
        lasts = np.cumsum([len(sizes) for sizes in groups]).tolist()
        resources = [(number + place) % 3 for place in range(len(groups))]
        batch = replace(batch, groups=tuple(zip(resources, lasts, strict=True)))
        requests += gathered.add(batch, 0)
        start = first = 0
        for resource, last in batch.grouped():
            for end in batch.ends[first:last].tolist():
                if end - start <= max_bytes - OVERHEAD:
                    sent[resource] = sent.get(resource, b"") + bytes(batch.buffer[start:end])
                    total += 1
                else:
                    too_large += 1
                start = end
            first = last
        # The encoder uses its buffer again: what waits must have been copied.
        batch.buffer[:] = b"!" * len(batch.buffer)
    requests += gathered.flush()
    found: dict[int, bytes] = {}
    for request in requests:
        parts = unwrapped(request.body)
        assert len({resource for resource, _ in parts}) == len(parts) > 0
        for resource, body in parts:
            found[resource] = found.get(resource, b"") + body
    assert found == sent
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


def test_what_is_young_goes_when_somebody_asks() -> None:
    """But not what is not ready."""
    gathered = Batcher(
        Signal.LOGS, Bracketed(), max_bytes=1000, max_items=10, max_age_ns=100, packets=True, ready={1}.__contains__
    )  # fmt: skip
    assert list(gathered.release(0)) == []
    assert list(gathered.add(replace(items([5, 5, 5]), groups=((1, 1), (2, 3))), 0)) == []
    (request,) = gathered.release(1)
    assert unwrapped(request.body) == [(1, b"aaaaa")]
    assert (request.items, gathered.held) == (1, 2)
    assert list(gathered.release(2)) == []


def test_what_is_not_ready_waits_while_others_go() -> None:
    """By age only what is ready; once it is, or when everything must go, the rest."""
    known: set[int] = {1}
    gathered = Batcher(
        Signal.LOGS, Bracketed(), max_bytes=1000, max_items=10, max_age_ns=100, packets=True, ready=known.__contains__
    )  # fmt: skip
    assert list(gathered.add(replace(items([5, 5, 5]), groups=((1, 1), (2, 3))), 0)) == []
    (request,) = gathered.poll(100)
    assert unwrapped(request.body) == [(1, b"aaaaa")]
    assert (request.items, gathered.held) == (1, 2)
    assert list(gathered.poll(1000)) == []
    known.add(2)
    (request,) = gathered.poll(1000)
    assert unwrapped(request.body) == [(2, b"bbbbbccccc")]
    assert list(gathered.add(replace(items([5]), groups=((3, 1),)), 0)) == []
    (request,) = gathered.flush()
    assert unwrapped(request.body) == [(3, b"aaaaa")]


@pytest.mark.parametrize(("ready", "first"), [(6, [(1, 6)]), (4, [(2, 6), (1, 4)])])
def test_a_full_request_takes_what_is_ready_if_that_is_enough(ready: int, first: list[tuple[int, int]]) -> None:
    """Where most of it waits there is no room to: all goes."""
    gathered = Batcher(
        Signal.LOGS, Bracketed(), max_bytes=1000, max_items=10, max_age_ns=100, ready=(1).__eq__
    )  # fmt: skip
    parts = ((2, 10 - ready), (1, 10))
    (request,) = gathered.add(replace(items([1] * 10), groups=parts), 0)
    assert [(resource, len(found)) for resource, found in unwrapped(request.body)] == first
    assert gathered.held == 10 - request.items


def test_a_resource_may_grow_while_something_waits_for_it() -> None:
    """The request is within its bound all the same."""
    told = [b"r" * 100]
    gathered = Batcher(
        Signal.LOGS, ProtobufEnvelope(lambda _: told[0]), max_bytes=65_536, max_items=100_000, max_age_ns=0,
        ready=lambda _: len(told[0]) > 100,
    )  # fmt: skip
    assert list(gathered.add(items([100] * 550), 0)) == []
    told[0] = b"r" * 8000
    (request,) = gathered.poll(0)
    assert request.items == 550
    assert len(request.body) <= 65_536
