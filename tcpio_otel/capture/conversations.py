"""Segments in time order to what the kernel would have known of their sender: is it local, has it sent this before?"""

from collections import OrderedDict

from tcpio_otel.batch import Flag
from tcpio_otel.capture.headers import Segment
from tcpio_otel.capture.networks import Networks

CONVERSATIONS_LIMIT = 1 << 16
"""Conversations remembered; beyond it the longest silent are forgotten."""

_SYN, _ACK, _FIN, _RST = int(Flag.SYN), int(Flag.ACK), int(Flag.FIN), int(Flag.RST)
_MODULUS, _HALF = 1 << 32, 1 << 31


class Sender:
    """One end of a conversation, as the sender of its segments.

    `is_local` and `both_local` say which ends are on the captured host; `placed`, that configured networks said so.
    """

    __slots__ = ("_sent", "both_local", "initial_seq", "is_local", "placed")

    def __init__(self, *, is_local: bool, both_local: bool, placed: bool) -> None:
        self.is_local, self.both_local, self.placed = is_local, both_local, placed
        self.forget()

    @property
    def is_fresh(self) -> bool:
        """Whether it sent nothing yet in this connection."""
        return self._sent is None

    def forget(self) -> None:
        """Start over: another connection takes the same addresses and ports."""
        self.initial_seq: int | None = None
        self._sent: int | None = None  # one past the highest sequence number

    def repeats(self, segment: Segment) -> bool:
        """Whether a segment starts with sequence numbers that were sent before; notes how far it came.

        A keep-alive carries none, so it repeats none. Modulo 2**32, as RFC 9293 section 3.4 has it.
        """
        flags, seq = segment.flags, segment.seq
        if flags & _RST:
            return False
        length = segment.payload_bytes + bool(flags & _SYN) + bool(flags & _FIN)
        before = self._sent
        if before is None or (seq + length - before) % _MODULUS < _HALF:
            self._sent = (seq + length) % _MODULUS
        return length > 0 and before is not None and (seq - before) % _MODULUS >= _HALF


class Conversations:
    """The senders of the conversations heard last.

    Where `local` does not tell the ends apart, the end that sent the first SYN is the local one; where none was
    captured, the end with the higher port.
    """

    def __init__(self, local: Networks, limit: int = CONVERSATIONS_LIMIT) -> None:
        self._local, self._limit = local, 2 * limit
        self._senders: OrderedDict[tuple[bytes, bytes, int, int], Sender] = OrderedDict()

    def sender(self, segment: Segment) -> Sender:
        """The sender of a segment, which is taken note of."""
        key = segment[:4]
        sender = self._senders.get(key)
        if sender is None:
            sender = self._senders[key] = self._met(segment)
            if len(self._senders) > self._limit:
                self._senders.popitem(last=False)
        else:
            self._senders.move_to_end(key)
        if segment.flags & (_SYN | _RST) == _SYN and segment.seq != sender.initial_seq:
            self._open(sender, segment)
        return sender

    def _peer(self, segment: Segment) -> Sender | None:
        return self._senders.get((segment.destination, segment.source, segment.destination_port, segment.source_port))

    def _met(self, segment: Segment) -> Sender:
        if peer := self._peer(segment):
            return Sender(is_local=not peer.is_local, both_local=peer.both_local, placed=peer.placed)
        source, destination = self._local.holds(segment.source), self._local.holds(segment.destination)
        if source != destination:
            return Sender(is_local=source, both_local=False, placed=True)
        sent_syn = segment.flags & (_SYN | _ACK) == _SYN
        answers_syn = segment.flags & (_SYN | _ACK) == _SYN | _ACK
        is_local = sent_syn or (not answers_syn and segment.source_port > segment.destination_port)
        return Sender(is_local=is_local, both_local=source, placed=False)

    def _open(self, sender: Sender, segment: Segment) -> None:
        """Note the first SYN of a connection, by which ports may be used again."""
        peer = self._peer(segment)
        if peer and not segment.flags & _ACK:
            if not sender.is_fresh:
                peer.forget()
            if peer.initial_seq is None and not sender.placed:  # else a simultaneous open, and the peer's came first
                sender.is_local, peer.is_local = True, False
        sender.forget()
        sender.initial_seq = segment.seq
