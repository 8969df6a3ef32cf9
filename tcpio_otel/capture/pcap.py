"""Capture files as a source: the batches that the probe would have made of the same packets, anywhere and unprivileged.

dpkt reads pcap, python-pcapng reads pcapng; what the frames mean is ours.
"""

import io
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import dpkt
import numpy as np
import pcapng

from tcpio_otel.batch import IPV4_PREFIX, RECORD, Batch, Direction, Flag, Kind, Mark
from tcpio_otel.capture.control import Filters, Network
from tcpio_otel.capture.headers import Decoded, Skipped, decode, supported
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.errors import InputError
from tcpio_otel.ledger import Ledger

BATCH_RECORDS = 8192
CONVERSATIONS = 1 << 16
"""Conversations remembered, for which end is local and what was sent already; beyond it the longest silent go."""

_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
_SYN, _ACK, _FIN, _RST = int(Flag.SYN), int(Flag.ACK), int(Flag.FIN), int(Flag.RST)
_MODULUS = 1 << 32


class Frame(NamedTuple):
    """A frame as it stands in the file."""

    unix_ns: int
    link_type: int
    content: bytes
    wire_bytes: int


class _Limited(io.RawIOBase):
    """A file that never promises more than it holds, so that a corrupt length cannot ask for the memory of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if size < 0 else min(size, left))

    def tell(self) -> int:
        return self._file.tell()


def frames(path: Path) -> Iterator[Frame]:
    """The frames of a pcap or pcapng file.

    Raises:
        InputError: the file cannot be read, is no capture, or ends in the middle; what came before was yielded.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the capture {path}: {error.strerror}") from None
    with file:
        magic = file.read(4)
        file.seek(0)
        limited = _Limited(file, size)
        count = 0
        try:
            for frame in _pcapng(limited) if magic == _PCAPNG_MAGIC else _pcap(limited, path):
                yield frame
                count += 1
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"cannot read the capture {path}: {error.strerror}") from None
        except Exception as error:
            # The readers raise whatever their parsing stumbles over; to the user all of it means one thing.
            what = f"is truncated or corrupt after packet {count}" if count else "is no pcap or pcapng capture"
            raise InputError(f"{path} {what} ({' '.join(str(error).split()) or type(error).__name__})") from error


def _pcap(file: _Limited, path: Path) -> Iterator[Frame]:
    reader = dpkt.pcap.Reader(file)
    link_type = reader.datalink() & 0xFFFF  # the upper half holds flags
    if not supported(link_type):
        raise InputError(f"{path}: frames of link type {link_type} are not understood; capture with tcpdump -i any")
    header = reader._Reader__ph  # the only way to the length on the wire, which its iterator leaves out
    nanoseconds = isinstance(reader._divisor, Decimal)
    header_bytes = header.__hdr_len__
    while raw := file.read(header_bytes):
        packet = header(raw)
        content = file.read(packet.caplen)
        if len(raw) < header_bytes or len(content) < packet.caplen:
            raise ValueError("the file ends in the middle of a packet")
        fraction_ns = packet.tv_usec if nanoseconds else packet.tv_usec * 1000
        yield Frame(packet.tv_sec * 1_000_000_000 + fraction_ns, link_type, content, packet.len)


def _pcapng(file: _Limited) -> Iterator[Frame]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pcapng.exceptions.PcapngStrictnessWarning)
        for block in pcapng.FileScanner(file):
            if isinstance(
                block, pcapng.blocks.EnhancedPacket | pcapng.blocks.SimplePacket | pcapng.blocks.ObsoletePacket
            ):
                yield Frame(_pcapng_time_ns(block), block.interface.link_type, block.packet_data, block.packet_len)


def _pcapng_time_ns(block: object) -> int:
    """Exact nanoseconds: the library multiplies floats, which lose the last three digits of today's time."""
    if not hasattr(block, "timestamp_high"):
        return 0  # a Simple Packet Block has no time
    ticks = (block.timestamp_high << 32) + getattr(block, "timestamp_low", 0)
    options = block.interface.options  # type: ignore[attr-defined]
    resolution = options.get("if_tsresol", b"\x06")
    code = resolution[0] if isinstance(resolution, bytes) else int(resolution)
    scale = 1 << (code & 0x7F) if code & 0x80 else 10 ** (code & 0x7F)
    offset_s = int(options["if_tsoffset"]) if "if_tsoffset" in options else 0
    return int(ticks) * 1_000_000_000 // scale + offset_s * 1_000_000_000


class _Conversation:
    """What must be remembered of two ends: which is local, and how far each has sent."""

    __slots__ = ("first_is_local", "sent")

    def __init__(self, first_is_local: bool) -> None:
        self.first_is_local = first_is_local
        self.sent: list[int | None] = [None, None]  # one past the highest sequence number, by end


class PcapSource:
    """Batches of a capture file.

    Which end of a packet is local: what a cooked capture says of its direction; else `local`, and loopback
    addresses; else whoever sent the SYN of the conversation, or, when that was not captured, the end with the higher
    port. A packet between two local ends makes two records, as on a live host: sent by one, received by the other.

    Args:
        path: a pcap or pcapng file.
        ledger: told what was seen and filtered.
        local: networks whose addresses are this host's.
        filters: as for the probe.
        clock: Unix time, for when a record was read.
    """

    paced = True

    def __init__(
        self,
        path: Path,
        ledger: Ledger,
        *,
        local: Sequence[Network] = (),
        filters: Filters | None = None,
        clock: Nanoseconds = time.time_ns,
    ) -> None:
        self._path, self._ledger, self._clock = path, ledger, clock
        self._filters = filters or Filters()
        self._local = _prefixes(local)
        self._wanted = _prefixes(self._filters.networks)
        self._is_local: dict[bytes, bool] = {}
        self._conversations: OrderedDict[tuple[bytes, int, bytes, int], _Conversation] = OrderedDict()
        self._rows: list[tuple[object, ...]] = []
        self._seen = 0
        self._filtered: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self._last_ns = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.clear()

    def now_ns(self) -> int:
        """The time of the youngest packet read."""
        return self._last_ns

    def finish(self) -> Iterator[Batch]:
        """Nothing: a file has said all that it has to say."""
        return iter(())

    def snapshot(self) -> None:
        """Nothing: a file knows of no sockets."""

    def faults(self) -> dict[str, int]:
        """Frames that hold no TCP segment, by why."""
        return {f"skipped {reason}": count for reason, count in self.skipped.items()}

    def __iter__(self) -> Iterator[Batch]:
        """Read the file.

        Raises:
            InputError: as `frames` says, or there is no TCP packet in it; batches read until then were yielded.
        """
        fault: InputError | None = None
        try:
            for frame in frames(self._path):
                self._take(frame)
                if len(self._rows) >= BATCH_RECORDS:
                    yield self._batch()
        except InputError as error:
            fault = error
        yield self._batch()
        if fault:
            raise fault
        if not self._seen:
            found = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "no packet at all"
            raise InputError(f"{self._path} holds no TCP packet: {found}")

    def _take(self, frame: Frame) -> None:
        try:
            segment = decode(frame.link_type, frame.content, frame.wire_bytes)
        except Skipped as reason:
            self.skipped[str(reason)] += 1
            return
        source, destination = segment.source, segment.destination
        conversation, source_is_first = self._conversation(segment)
        repeated = _repeats(segment, conversation, 0 if source_is_first else 1)
        both = self._local_address(source) and self._local_address(destination)
        if segment.outgoing is not None and not both:
            sent = segment.outgoing
        else:
            sent = conversation.first_is_local == source_is_first
        for transmit in (True, False) if both else (sent,):
            self._seen += 1
            if stopped := self._filter(segment):
                self._filtered[stopped] += 1
                continue
            ends = (source, destination) if transmit else (destination, source)
            ports = (segment.source_port, segment.destination_port)
            self._rows.append(
                (
                    *(frame.unix_ns, *ends, *(ports if transmit else ports[::-1])),
                    *(segment.seq, segment.ack, segment.payload_bytes, segment.window, segment.flags),
                    Direction.TRANSMIT if transmit else Direction.RECEIVE,
                    Mark.RETRANSMIT if repeated and transmit else 0,
                )
            )

    def _conversation(self, segment: Decoded) -> tuple[_Conversation, bool]:
        """The state of a segment's conversation, and whether its sender is the conversation's first end."""
        key = (segment.source, segment.source_port, segment.destination, segment.destination_port)
        source_is_first = key[:2] <= key[2:]
        if not source_is_first:
            key = key[2:] + key[:2]
        conversation = self._conversations.get(key)
        opening = segment.flags & (_SYN | _ACK | _RST) == _SYN
        if conversation is None:
            if len(self._conversations) >= CONVERSATIONS:
                self._conversations.popitem(last=False)
            conversation = _Conversation(self._first_is_local(segment, source_is_first, opening))
            self._conversations[key] = conversation
        else:
            self._conversations.move_to_end(key)
            if opening:
                conversation.first_is_local = self._first_is_local(segment, source_is_first, opening)
        return conversation, source_is_first

    def _first_is_local(self, segment: Decoded, source_is_first: bool, opening: bool) -> bool:
        source, destination = self._local_address(segment.source), self._local_address(segment.destination)
        if source != destination:
            return source == source_is_first
        if opening:
            return source_is_first
        if segment.flags & (_SYN | _ACK) == _SYN | _ACK:
            return not source_is_first
        return (segment.source_port > segment.destination_port) == source_is_first

    def _local_address(self, address: bytes) -> bool:
        known = self._is_local.get(address)
        if known is None:
            loopback = address[:13] == IPV4_PREFIX + b"\x7f" or address == bytes(15) + b"\1"
            known = self._is_local[address] = loopback or _matches(address, self._local)
        return known

    def _filter(self, segment: Decoded) -> str | None:
        """The filter that a segment does not pass, if there is one."""
        ports = (segment.source_port, segment.destination_port)
        if self._filters.ports and not any(
            first <= port <= last for port in ports for first, last in self._filters.ports
        ):
            return "port"
        if self._wanted and not any(
            _matches(address, self._wanted) for address in (segment.source, segment.destination)
        ):
            return "cidr"
        return None

    def _batch(self) -> Batch:
        records = np.zeros(len(self._rows), RECORD)
        if self._rows:
            columns = list(zip(*self._rows, strict=True))
            times = np.array(columns[0], np.uint64)
            order = np.argsort(times, kind="stable")  # captures of several queues are not quite in order
            records["kind"] = Kind.PACKET
            records["time_ns"] = times[order]
            for name, column in zip(_ADDRESSES, columns[1:3], strict=True):
                values = np.frombuffer(b"".join(column), "V16")[order]
                records[name] = records[f"header_{name}"] = values
            for name, column in zip(_NUMBERS, columns[3:], strict=True):
                records[name] = np.array(column)[order]
            for name in ("local_port", "peer_port"):
                records[f"header_{name}"] = records[name]
            self._last_ns = max(self._last_ns, int(records["time_ns"][-1]))
            self._rows = []
        self._ledger.source(seen=self._seen, filtered=dict(self._filtered), dropped={}, pending=0)
        self._ledger.taken(len(records))
        return Batch(records, 0, self._clock())


_ADDRESSES = ("local_address", "peer_address")
_NUMBERS = ("local_port", "peer_port", "seq", "ack", "payload_bytes", "window", "flags", "direction", "marks")


def _repeats(segment: Decoded, conversation: _Conversation, end: int) -> bool:
    """Whether a segment carries sequence numbers that its sender has sent before; notes how far it came."""
    flags = segment.flags
    if flags & _RST:
        return False
    length = segment.payload_bytes + bool(flags & _SYN) + bool(flags & _FIN)
    until, sent = (segment.seq + length) % _MODULUS, conversation.sent[end]
    opens = flags & (_SYN | _ACK) == _SYN
    if sent is None or (opens and segment.seq != (sent - 1) % _MODULUS):
        conversation.sent[end] = until
        return False
    if (until - sent) % _MODULUS < _MODULUS >> 1:
        conversation.sent[end] = until
    return bool(length) and (segment.seq - sent) % _MODULUS >= _MODULUS >> 1


def _prefixes(networks: Sequence[Network]) -> list[tuple[int, int]]:
    """Networks as (value, shift) of mapped addresses."""
    prefixes = []
    for network in networks:
        packed = network.network_address.packed
        bits = network.prefixlen + (96 if network.version == 4 else 0)
        value = int.from_bytes(IPV4_PREFIX + packed if network.version == 4 else packed)
        prefixes.append((value >> (128 - bits), 128 - bits))
    return prefixes


def _matches(address: bytes, prefixes: list[tuple[int, int]]) -> bool:
    number = int.from_bytes(address)
    return any(number >> shift == value for value, shift in prefixes)
