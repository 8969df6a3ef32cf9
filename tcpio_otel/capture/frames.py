"""A capture file to the frames in it: pcap in its variants, or pcapng, compressed with gzip or not.

dpkt knows the headers of both formats. Its readers are not used: they turn times into floats, leave out a frame's
length on the wire, take a frame that was cut off for a whole one, and know one interface in a pcapng file.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import dpkt

from tcpio_otel.capture.headers import LINK_LAYERS
from tcpio_otel.errors import InputError

PIECE_BYTES_LIMIT = 1 << 24
"""No frame and no block of a sane file is longer; a length beyond it is corrupt, and must not ask for the memory."""

_GZIP_MAGIC = b"\x1f\x8b"
_SECTION_TYPE = b"\x0a\x0d\x0d\x0a"  # the same in both byte orders
_BYTE_ORDERS = {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}
_TIME_NS_LIMIT = 1 << 63


class Frame(NamedTuple):
    """A frame as it stands in the file; `content` may be less than the `wire_bytes` that it had."""

    unix_ns: int
    link_type: int
    wire_bytes: int
    content: bytes


def frames(path: Path) -> Iterator[Frame]:
    """The frames of a capture file, in its order.

    Raises:
        InputError: the file cannot be read, is no capture, is of a link type that nobody here understands, or is cut
            off or corrupt; what stands before that was yielded.
    """
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] == _GZIP_MAGIC:
                with gzip.open(file) as unpacked:
                    yield from _decoded(_Stream(unpacked, path))
            else:
                yield from _decoded(_Stream(file, path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged gzip ({error}); what came before was read; compress it again") from error
    except OSError as error:
        raise InputError(f"cannot read the capture {path}: {error.strerror}; check the path and its rights") from error


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Stream:
    """A file read in pieces that are whole or an error, and how far it was read."""

    def __init__(self, file: _Readable, path: Path) -> None:
        self._file, self.path = file, path
        self._offset_bytes = self.packets = 0

    def fault(self, what: str) -> InputError:
        """The error that says so, and where."""
        return InputError(
            f"{self.path} {what} at packet {self.packets + 1}, byte {self._offset_bytes}; "
            "what came before was read; copy or capture it again"
        )

    def take(self, size: int, *, may_end: bool = False) -> bytes:
        """The next `size` bytes; none where the file ends, if it may end here."""
        if size > PIECE_BYTES_LIMIT:
            raise self.fault(f"is corrupt (a length of {size} bytes)")
        piece = self._file.read(size)
        if len(piece) < size and (piece or not may_end):
            raise self.fault("is cut off")
        self._offset_bytes += size
        return piece


def _decoded(stream: _Stream) -> Iterator[Frame]:
    magic = stream.take(4, may_end=True)
    if not magic:
        raise InputError(f"{stream.path} is empty; was the capture stopped before its first packet?")
    if magic == _SECTION_TYPE:
        return _pcapng(stream)
    if int.from_bytes(magic) in dpkt.pcap.MAGIC_TO_PKT_HDR:
        return _pcap(stream, magic)
    raise InputError(f"{stream.path} is neither pcap nor pcapng; write one with tcpdump -w or dumpcap -w")


def _pcap(stream: _Stream, magic: bytes) -> Iterator[Frame]:
    packet_header = dpkt.pcap.MAGIC_TO_PKT_HDR[int.from_bytes(magic)]
    byte_order = packet_header.__hdr_fmt__[0]
    file_header_type = dpkt.pcap.LEFileHdr if byte_order == "<" else dpkt.pcap.FileHdr
    file_header = file_header_type(magic + stream.take(file_header_type.__hdr_len__ - len(magic)))
    link_type = file_header.linktype & 0xFFFF  # the upper half holds flags
    if link_type not in LINK_LAYERS:
        raise InputError(f"{stream.path} holds frames of link type {link_type}, not understood; try tcpdump -i any")
    tick_ns = 1 if file_header.magic == dpkt.pcap.TCPDUMP_MAGIC_NANO else 1000
    header_bytes, unpack = packet_header.__hdr_len__, struct.Struct(f"{byte_order}4I").unpack_from
    while header := stream.take(header_bytes, may_end=True):
        seconds, ticks, captured_bytes, wire_bytes = unpack(header)
        content = stream.take(captured_bytes)
        stream.packets += 1
        yield Frame(seconds * 1_000_000_000 + ticks * tick_ns, link_type, wire_bytes, content)


class _Interface(NamedTuple):
    """What an interface description says of the packets that name it."""

    link_type: int
    snap_bytes: int
    ticks_per_s: int
    offset_ns: int


def _interface(block: bytes, byte_order: str) -> _Interface:
    description = (dpkt.pcapng.InterfaceDescriptionBlockLE if byte_order == "<" else
                   dpkt.pcapng.InterfaceDescriptionBlock)(block)  # fmt: skip
    ticks_per_s, offset_s = 1_000_000, 0
    for option in description.opts:
        if option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL:
            (resolution,) = option.data
            ticks_per_s = (2 if resolution & 0x80 else 10) ** (resolution & 0x7F)
        elif option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSOFFSET:
            (offset_s,) = struct.unpack(f"{byte_order}q", option.data)
    return _Interface(description.linktype, description.snaplen, ticks_per_s, offset_s * 1_000_000_000)


def _pcapng(stream: _Stream) -> Iterator[Frame]:
    interfaces: list[_Interface] = []
    byte_order, unix_ns, head = "", 0, _SECTION_TYPE + stream.take(4)
    while head:
        rest = b""
        if head[:4] == _SECTION_TYPE:
            rest = stream.take(4)
            if rest not in _BYTE_ORDERS:
                raise stream.fault("is corrupt (a section without byte order)")
            byte_order, interfaces = _BYTE_ORDERS[rest], []
        kind, block_bytes = struct.unpack(f"{byte_order}2I", head)
        if block_bytes < 16 or block_bytes % 4:
            raise stream.fault(f"is corrupt (a block of {block_bytes} bytes)")
        rest += stream.take(block_bytes - len(head) - len(rest))
        if rest[-4:] != head[4:]:
            raise stream.fault("is corrupt (a block of two lengths)")
        try:
            if kind == dpkt.pcapng.PCAPNG_BT_IDB:
                interfaces.append(_interface(head + rest, byte_order))
            elif kind in _PACKET_HEADERS:
                frame = _frame(kind, rest[:-4], byte_order, interfaces, unix_ns)
                unix_ns = frame.unix_ns
                stream.packets += 1
                yield frame
        except (dpkt.Error, struct.error, ValueError, IndexError) as error:
            raise stream.fault(f"is corrupt (a block of type {kind} that breaks the format)") from error
        head = stream.take(8, may_end=True)


_PACKET_HEADERS = {
    dpkt.pcapng.PCAPNG_BT_EPB: "5I",
    dpkt.pcapng.PCAPNG_BT_PB: "H2x4I",
    dpkt.pcapng.PCAPNG_BT_SPB: "I",
}
"""What stands before a packet in its block: interface, time (upper and lower half), captured and wire length; in a
Simple Packet Block only the last."""


def _frame(kind: int, body: bytes, byte_order: str, interfaces: list[_Interface], before_ns: int) -> Frame:
    layout = byte_order + _PACKET_HEADERS[kind]
    if kind == dpkt.pcapng.PCAPNG_BT_SPB:
        (wire_bytes,) = struct.unpack_from(layout, body)
        interface = interfaces[0]
        captured_bytes = min(wire_bytes, interface.snap_bytes or wire_bytes)
        unix_ns = before_ns  # it has no time of its own
    else:
        index, upper, lower, captured_bytes, wire_bytes = struct.unpack_from(layout, body)
        interface = interfaces[index]
        unix_ns = ((upper << 32) + lower) * 1_000_000_000 // interface.ticks_per_s + interface.offset_ns
    start = struct.calcsize(layout)
    content = body[start : start + captured_bytes]
    if len(content) < captured_bytes or not 0 <= unix_ns < _TIME_NS_LIMIT:
        raise ValueError("a packet longer than its block, or of no time")
    return Frame(unix_ns, interface.link_type, wire_bytes, content)
