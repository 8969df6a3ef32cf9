"""One end of one connection: segments in, states and milestones out.

Two rules hold here. A connection is judged by what crossed the wire (RFC 9293, figure 5, seen from outside), and a
segment that does not fit never raises: the observer may have missed what came before it. And nothing here does
I/O, looks at a clock, or knows where a segment came from.
"""

from enum import StrEnum
from typing import NamedTuple

from tcpio_otel import names
from tcpio_otel.batch import Flag, Mark
from tcpio_otel.connections.events import CloseReason, Phase, Role

_MODULUS = 1 << 32
_WITH_SYN = 1 << 16  # a segment's worth, and the SYN itself
_FIN, _SYN, _RST, _ACK = int(Flag.FIN), int(Flag.SYN), int(Flag.RST), int(Flag.ACK)
_RETRANSMIT = int(Mark.RETRANSMIT)

MILESTONE_LIMIT = 128
"""Span events of one connection; `tcp.fin` and `tcp.rst` find room beyond what the others may take."""
_RESERVED_FOR_END = 8


HANDSHAKE = (Phase.CLOSED, Phase.SYN_SENT, Phase.SYN_RECEIVED)
"""Phases of a connection that is not established yet."""


class Event(StrEnum):
    """What a segment can mean to a connection; one segment may mean several, in this order."""

    RST = "rst"
    SYN_SENT = "syn_sent"
    SYN_RECEIVED = "syn_received"
    ESTABLISHED = "established"  # the ACK that completes the handshake
    FIN_ACKED = "fin_acked"  # the peer acknowledges our FIN
    PEER_FIN_ACKED = "peer_fin_acked"  # we acknowledge the peer's FIN
    FIN_SENT = "fin_sent"
    FIN_RECEIVED = "fin_received"


# Looking a member up on its class costs Python 3.11 as much as everything else here does to a segment.
CLOSED, SYN_SENT, SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK, FINISHED, RESET = (
    Phase
)
_RST_EVENT, _SYN_OUT, _SYN_IN, _OPENED, _FIN_ACKED, _PEER_FIN_ACKED, _FIN_OUT, _FIN_IN = Event
_UNKNOWN, _CLIENT, _SERVER = Role.UNKNOWN, Role.CLIENT, Role.SERVER

_OPEN = (CLOSED, SYN_SENT, SYN_RECEIVED, ESTABLISHED)
TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (CLOSED, _SYN_OUT): SYN_SENT,
    (CLOSED, _SYN_IN): SYN_RECEIVED,
    (SYN_SENT, _SYN_IN): SYN_RECEIVED,
    (SYN_SENT, _OPENED): ESTABLISHED,
    (SYN_RECEIVED, _OPENED): ESTABLISHED,
    **{(phase, _FIN_OUT): FIN_WAIT_1 for phase in _OPEN},
    **{(phase, _FIN_IN): CLOSE_WAIT for phase in _OPEN},
    (FIN_WAIT_1, _FIN_ACKED): FIN_WAIT_2,
    (FIN_WAIT_1, _FIN_IN): CLOSING,
    (FIN_WAIT_2, _PEER_FIN_ACKED): FINISHED,
    (CLOSE_WAIT, _FIN_OUT): LAST_ACK,
    (LAST_ACK, _FIN_ACKED): FINISHED,
    **{(phase, _RST_EVENT): RESET for phase in Phase if phase not in (FINISHED, RESET)},
}
"""From a phase, by an event, to a phase; what is not here changes nothing. CLOSING ends when both FINs have been
acknowledged, in either order, which `Life` sees to."""

ENDED = frozenset({FINISHED, RESET})


class Segment(NamedTuple):
    """A segment as the lifecycle sees it. `time_ns` is any clock's; `end` is one past its last sequence number."""

    time_ns: int
    sent: bool
    flags: int
    seq: int
    ack: int
    payload_bytes: int
    window: int
    marks: int
    segments: int


class Note(NamedTuple):
    """A milestone in the making: its name, and the segment that made it."""

    name: str
    segment: Segment


def _reached(ack: int, target: int) -> bool:
    """Whether `ack` is at or past `target`, modulo 2^32 (RFC 9293, section 3.4)."""
    return (ack - target) % _MODULUS < _MODULUS >> 1


class Life:
    """The state of one connection end, moved on by `segment`.

    Attributes:
        phase: where the connection stands.
        role: which end this is.
        local_isn, peer_isn: initial sequence numbers, None until seen.
        started_ns, ended_ns: first segment seen; last segment that matters for its length.
        established_ns: when the handshake was complete, None if that was not seen.
        fin_first: "local" or "peer", whoever sent the first FIN; None before.
        reset_by: "local" or "peer", whoever sent the RST that ended it.
        notes, notes_dropped: milestones, and how many did not fit.
    """

    __slots__ = (
        "_before_reset", "_fin_acked", "_fin_end", "_peer_fin_acked", "answered", "ended_ns", "established_ns",
        "fin_first", "local_isn", "notes", "notes_dropped", "payload_received", "payload_sent", "peer_fin_end",
        "peer_isn", "phase", "refused", "reset_by", "role", "started_ns", "zero_window",
    )  # fmt: skip

    def __init__(self, started_ns: int) -> None:
        self.phase = CLOSED
        self.role = _UNKNOWN
        self.local_isn: int | None = None
        self.peer_isn: int | None = None
        self.started_ns = self.ended_ns = started_ns
        self.established_ns: int | None = None
        self.fin_first: str | None = None
        self.reset_by: str | None = None
        self.refused = self.answered = False
        self.payload_sent = self.payload_received = False
        self.zero_window = [False, False]
        self.peer_fin_end: int | None = None
        self._fin_end: int | None = None
        self._before_reset: Phase | None = None
        self._fin_acked = self._peer_fin_acked = False
        self.notes: list[Note] = []
        self.notes_dropped = 0

    @property
    def steady(self) -> bool:
        """Whether plain data can no longer change anything: open, payload seen both ways, no window shut."""
        return self.phase is ESTABLISHED and self.payload_sent and self.payload_received and not any(self.zero_window)

    @property
    def ended(self) -> bool:
        """Whether the wire has seen its end."""
        return self.phase in ENDED

    def inherit(self, *, opened_by_us: bool | None, local_isn: int | None, peer_isn: int | None) -> None:
        """Take over a connection whose start was not seen; None for what is not known."""
        self.phase = ESTABLISHED
        if opened_by_us is not None:
            self.role = _CLIENT if opened_by_us else _SERVER
        self.local_isn, self.peer_isn = local_isn, peer_isn

    def segment(self, segment: Segment) -> None:
        """Move on by one segment, in the order in which segments crossed this end."""
        flags = segment.flags
        if flags & _RST:
            self._reset(segment)
            return
        if self.ended:
            return
        if flags & _SYN:
            self._synchronise(segment)
        elif flags & _ACK:
            self._complete_handshake(segment)
        if flags & _ACK:
            self._acknowledge(segment)
        if segment.payload_bytes and not flags & _SYN:
            self._carry(segment)
        if segment.marks & _RETRANSMIT:
            self._note(names.RETRANSMITTED, segment)
        self._watch_window(segment)
        if flags & _FIN:
            self._finish(segment)
        if self._fin_acked and self._peer_fin_acked:
            self.phase = FINISHED
        self.ended_ns = segment.time_ns

    def survive_reset(self) -> None:
        """Go on after the peer's RST, since the socket does: its kernel did not believe it (RFC 5961 section 3)."""
        if self.phase is RESET and self._before_reset:
            self.phase, self.reset_by = self._before_reset, None

    def lose_socket(self) -> None:
        """Hear that the kernel closed the socket: with no FIN about, by a RST that it went on after for a moment."""
        if self._before_reset and not self.ended and not self.fin_first:
            self.phase, self.reset_by = RESET, "peer"

    def _move(self, event: Event) -> None:
        self.phase = TRANSITIONS.get((self.phase, event), self.phase)

    def _note(self, name: str, segment: Segment, *, last: bool = False) -> None:
        if len(self.notes) < MILESTONE_LIMIT - (0 if last else _RESERVED_FOR_END):
            self.notes.append(Note(name, segment))
        else:
            self.notes_dropped += 1

    def _reset(self, segment: Segment) -> None:
        if self.phase is SYN_SENT and not segment.sent and not self._answers_our_syn(segment):
            return
        self._note(names.RST, segment, last=True)
        if self.phase is SYN_SENT and segment.sent:
            return  # it answers what came for an older connection; the attempt goes on (RFC 9293 section 3.10.7.3)
        if not self.ended:
            self.reset_by = "local" if segment.sent else "peer"
            self.refused = self.phase is SYN_SENT and not segment.sent
            self.ended_ns = segment.time_ns
            self._before_reset = None if segment.sent or self.refused else self.phase
        self._move(_RST_EVENT)

    def _answers_our_syn(self, segment: Segment) -> bool:
        """Whether a RST is acceptable while we wait: it acknowledges our SYN, or data that went with it."""
        ahead = (segment.ack - (self.local_isn or 0)) % _MODULUS
        return not segment.flags & _ACK or 0 < ahead <= _WITH_SYN

    def _synchronise(self, segment: Segment) -> None:
        if not segment.sent and self.phase not in (CLOSED, SYN_SENT, SYN_RECEIVED):
            return  # repeated, or astray: an open connection answers it with an ACK (RFC 5961 section 4)
        answer = bool(segment.flags & _ACK)
        if segment.sent:
            self.answered |= answer
            repeated = self.local_isn == segment.seq
            if not repeated:
                self.local_isn = segment.seq
            if not answer and self.role is _UNKNOWN and self.phase is CLOSED:
                self.role = _CLIENT
            self._move(_SYN_OUT)
        else:
            repeated = self.peer_isn == segment.seq
            self.peer_isn = segment.seq
            if answer:
                self.answered = True
            elif self.phase is SYN_SENT:
                self.role = _UNKNOWN  # simultaneous open: both ends are clients
                self._move(_SYN_IN)
            elif self.phase is CLOSED:
                self.role = _SERVER
                self._move(_SYN_IN)
        if repeated and segment.sent and answer:
            self._note(names.RETRANSMITTED, segment)
        elif not repeated:
            self._note(names.SYN_ACK if answer else names.SYN, segment)

    def _complete_handshake(self, segment: Segment) -> None:
        """The client's handshake ends with the ACK that it sends, the server's with the one that it receives."""
        waiting = (self.phase is SYN_SENT and segment.sent and self.peer_isn is not None) or (
            self.phase is SYN_RECEIVED and not segment.sent and self.local_isn is not None
        )
        if waiting:
            self.established_ns = segment.time_ns
            self._note(names.ESTABLISHED, segment)
            self._move(_OPENED)

    def _acknowledge(self, segment: Segment) -> None:
        if segment.sent:
            if self.peer_fin_end is not None and _reached(segment.ack, self.peer_fin_end):
                self._peer_fin_acked = True
                self._move(_PEER_FIN_ACKED)
        elif self._fin_end is not None and _reached(segment.ack, self._fin_end):
            self._fin_acked = True
            self._move(_FIN_ACKED)

    def _carry(self, segment: Segment) -> None:
        if segment.sent:
            if not self.payload_sent:
                self.payload_sent = True
                self._note(names.FIRST_SENT, segment)
        elif not self.payload_received:
            self.payload_received = True
            self._note(names.FIRST_RECEIVED, segment)

    def _watch_window(self, segment: Segment) -> None:
        closed = segment.window == 0
        if closed and not self.zero_window[segment.sent]:
            self._note(names.ZERO_WINDOW, segment)
        self.zero_window[segment.sent] = closed

    def _finish(self, segment: Segment) -> None:
        end = (segment.seq + segment.payload_bytes + 1) % _MODULUS
        if segment.sent:
            first, self._fin_end = self._fin_end is None, end
        else:
            first, self.peer_fin_end = self.peer_fin_end is None, end
        if not first:
            return
        self.fin_first = self.fin_first or ("local" if segment.sent else "peer")
        self._note(names.FIN, segment, last=True)
        self._move(_FIN_OUT if segment.sent else _FIN_IN)

    @property
    def fin_sent(self) -> bool:
        """Whether our FIN was seen."""
        return self._fin_end is not None

    def verdict(self, errno_name: str | None) -> tuple[CloseReason | None, str | None, str | None]:
        """How it ended: reason, initiator ("local" or "peer"), `error.type`; None for what does not apply.

        `errno_name` is the symbolic name of the error that the socket closed with, where there is one.
        """
        if self.refused:
            return CloseReason.REFUSED, "peer", "connection_refused"
        if failure := _FAILURES.get(errno_name or ""):
            return failure[0], None, failure[1]  # before the RST that a socket may send as it gives up
        if self.reset_by or errno_name == "ECONNRESET":
            return CloseReason.RESET, self.reset_by, "connection_reset"
        if self.fin_first:
            return CloseReason.FIN, self.fin_first, None
        return None, None, None


_FAILURES = {
    "ETIMEDOUT": (CloseReason.TIMEOUT, "timeout"),
    "EHOSTUNREACH": (CloseReason.UNREACHABLE, "host_unreachable"),
    "EHOSTDOWN": (CloseReason.UNREACHABLE, "host_unreachable"),
    "ENETUNREACH": (CloseReason.UNREACHABLE, "network_unreachable"),
    "ECONNREFUSED": (CloseReason.REFUSED, "connection_refused"),
}
