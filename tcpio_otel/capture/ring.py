"""Ring buffers, mapped into memory, to batches of records in time order.

Layout and protocol are the kernel's (kernel/bpf/ringbuf.c): a consumer position that the reader writes, a producer
position that it reads, and the data, mapped twice in a row so that nothing ever wraps. All records have one size, so
what lies between the positions is an array: no call per record.
"""

import mmap
import select
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import RAW, RECORD, pick
from tcpio_otel.clock import Nanoseconds, boot_ns
from tcpio_otel.errors import EnvironmentFault

BUSY, DISCARD = 1 << 31, 1 << 30
_LENGTH = DISCARD - 1

SLOT = np.dtype([("length", "<u4"), ("page_offset", "<u4"), ("record", RECORD)])
"""A record with the header that the kernel puts in front of it."""

_RAW_SLOT = np.dtype([("header", "V8"), ("record", RAW)])

DRAIN_LIMIT = 1 << 13
"""Records taken from one ring at a time: batches stay small enough for the processor's cache."""

HOLD_BACK_NS = 1_000_000
"""A segment that caused a reply is stamped just before it, after the fact (bpf/tcpio.bpf.c): younger records wait."""


class Ring:
    """One ring buffer: mapped on construction, drained by `take`."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._mask = size_bytes - 1
        self._consumer_page = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._pages = mmap.mmap(fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_page, "<u8", 1)
        self._producer = np.frombuffer(self._pages, "<u8", 1)
        self._data = np.frombuffer(self._pages, "u1", 2 * size_bytes, page)
        # Taking a lock orders memory: records must not be read before the header that says they are complete.
        self._barrier = threading.Lock()

    def take(self, limit: int = DRAIN_LIMIT) -> tuple[NDArray[np.void], bool]:
        """Up to `limit` complete records (dtype RECORD, copied), and whether some were left behind.

        Raises:
            EnvironmentFault: the ring holds something else than records of this version.
        """
        consumer, producer = int(self._consumer[0]), int(self._producer[0])
        records, taken, left = parse(self._data[consumer & self._mask :][: producer - consumer], limit, self._barrier)
        if taken:
            self._consumer[0] = consumer + taken
        return records, left


def parse(data: NDArray[np.uint8], limit: int, barrier: threading.Lock) -> tuple[NDArray[np.void], int, bool]:
    """The complete records at the head of `data` (uint8), the bytes they took, and whether some were left behind.

    Stops before the first record that is still being written, leaves out those that were discarded.

    Raises:
        EnvironmentFault: a header tells of a record of another size.
    """
    available = len(data) // SLOT.itemsize
    slots = data[: available * SLOT.itemsize].view(SLOT)[:limit]
    headers = slots["length"].copy()
    with barrier:
        pass
    busy = headers & BUSY != 0
    if busy.any():
        slots = slots[: int(busy.argmax())]
        headers = headers[: len(slots)]
    lengths = headers & _LENGTH
    if len(data) % SLOT.itemsize or (lengths != RECORD.itemsize).any():
        raise EnvironmentFault(
            "the ring buffer holds records of another size: probe and agent are not of one version; reinstall"
        )
    kept = headers & DISCARD == 0
    records = data[: len(slots) * SLOT.itemsize].view(_RAW_SLOT)["record"][kept].view(RECORD)
    return records, len(slots) * SLOT.itemsize, len(slots) < available


class Merger:
    """Runs of records from several rings to one run in time order.

    Programs on one CPU interrupt each other, so one ring is not quite sorted either; and while one ring is read
    others fill. So each merge releases only what is older than everything that may still come, and keeps the rest.
    """

    def __init__(self, held: NDArray[np.void] | None = None) -> None:
        self._held = np.empty(0, RECORD) if held is None else held
        self._released_ns = 0
        self.late = 0

    def hold(self, records: NDArray[np.void]) -> None:
        """Have records come out in their place in time; none is older than the last that did."""
        self._held = np.concatenate([self._held.view(RAW), records.view(RAW)]).view(RECORD)

    @property
    def held_packets(self) -> int:
        """Packet records that wait for younger ones."""
        return int(np.count_nonzero(self._held["kind"] == 1))

    def merge(self, runs: Sequence[NDArray[np.void]], watermark_ns: int | None) -> NDArray[np.void]:
        """Records up to the watermark in time order (all of them when it is None); the others stay held."""
        if not runs and not len(self._held):
            return self._held
        records = np.concatenate([run.view(RAW) for run in (self._held, *runs)]).view(RECORD)
        times = records["time_ns"]
        order = np.argsort(times, kind="stable")
        cut = len(order) if watermark_ns is None else int(np.searchsorted(times, watermark_ns, "right", order))
        self._held, released = pick(records, order[cut:]), pick(records, order[:cut])
        if cut:
            times = released["time_ns"]
            self.late += int(np.searchsorted(times, self._released_ns))
            self._released_ns = max(self._released_ns, int(times[-1]))
        return released


class Rings:
    """All rings of a probe, waited for and drained together.

    `first` are records to come out in their place in time: a snapshot of sockets. `clock` is that of the records.
    """

    def __init__(
        self, fds: Sequence[int], size_bytes: int, first: NDArray[np.void], clock: Nanoseconds = boot_ns
    ) -> None:
        self._rings = [Ring(fd, size_bytes) for fd in fds]
        self._clock = clock
        self._merger = Merger(first)
        self._poll = select.epoll()
        for fd in fds:
            # Edge-triggered: the level is "holds a record", and the reader would never sleep.
            self._poll.register(fd, select.EPOLLIN | select.EPOLLET)

    @property
    def late(self) -> int:
        """Records that came out behind younger ones."""
        return self._merger.late

    @property
    def held_packets(self) -> int:
        """Packet records that were drained and not yet released."""
        return self._merger.held_packets

    def wait(self, timeout_s: float) -> None:
        """Until a ring has filled to its mark, or the time is over."""
        self._poll.poll(timeout_s)

    def hold(self, records: NDArray[np.void]) -> None:
        """Have records come out in their place in time; to be called between two drains."""
        self._merger.hold(records)

    def drain(self, *, everything: bool = False) -> tuple[NDArray[np.void], bool]:
        """Records in time order (dtype RECORD), and whether more are waiting already.

        `everything` also releases the youngest: for the last drains, when nothing more comes.
        """
        watermark_ns = self._clock() - HOLD_BACK_NS
        runs, more = [], False
        for ring in self._rings:
            records, left = ring.take()
            if len(records):
                runs.append(records)
            if left:  # at the least behind a record that is still being written, whose time nobody knows
                watermark_ns = min(watermark_ns, int(records["time_ns"][-1]) if len(records) else 0)
            more |= left and len(records) == DRAIN_LIMIT
        return self._merger.merge(runs, None if everything and not more else watermark_ns), more

    def close(self) -> None:
        """Stop waiting; the memory goes with the object."""
        self._poll.close()
