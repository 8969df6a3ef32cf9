"""A bounded queue of requests and the thread that sends them: every request comes to exactly one outcome."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tcpio_otel.clock import Nanoseconds
from tcpio_otel.export.retry import Backoff
from tcpio_otel.export.transport import Accepted, Refused, Reply, Transport
from tcpio_otel.payload import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a request, in items: accepted, rejected by the receiver, or dropped for a reason."""

    accepted: int = 0
    rejected: int = 0
    dropped: int = 0
    reason: str = ""


class Sender:
    """Sends the requests of one signal, in order, one at a time.

    Args:
        transport: the way to the receiver; the sender closes it.
        queue_bytes: bodies that may wait; a request that finds no room is dropped, unless it may block.
        backoff: when to try again, and when to give up.
        on_outcome: told of every request once, from the sending thread (or the caller's, for a full queue).
        clock: monotonic.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queue_bytes: int,
        backoff: Backoff,
        on_outcome: Callable[[Request, Outcome], None],
        clock: Nanoseconds,
    ) -> None:
        self._transport, self._queue_bytes, self._backoff = transport, queue_bytes, backoff
        self._on_outcome, self._clock = on_outcome, clock
        self._queue: deque[Request] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._full = False
        self._failing = ""
        self._thread = threading.Thread(target=self._work, name=f"export to {transport.destination}", daemon=True)
        self._thread.start()

    @property
    def destination(self) -> str:
        """Where the requests go, for people."""
        return self._transport.destination

    def submit(self, request: Request, *, block: bool = False) -> None:
        """Queue a request. A full queue drops it, or, if `block`, makes the caller wait."""
        with self._changed:
            while block and not self._room(request) and not self._abandoned:
                self._changed.wait()
            room = self._room(request) and not self._closing
            if room:
                self._queue.append(request)
                self._queued_bytes += len(request.body)
                self._changed.notify_all()
            full, self._full = self._full, not room
        if not room:
            if not full:
                logger.warning("the queue to %s is full: what comes now is dropped", self.destination)
            self._on_outcome(request, Outcome(dropped=request.items, reason="queue_full"))

    def _room(self, request: Request) -> bool:
        return not self._queued_bytes or self._queued_bytes + len(request.body) <= self._queue_bytes

    def close(self, timeout_s: float) -> None:
        """Send what is queued for so long at most; what is left is dropped, and counted. Then close the transport."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        # A try that is under way ends by the transport's own time limit, and still comes to an outcome.
        self._thread.join()
        self._transport.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                request = self._queue[0]
            outcome = self._deliver(request)
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= len(request.body)
                self._changed.notify_all()
            self._on_outcome(request, outcome)

    def _deliver(self, request: Request) -> Outcome:
        """Try until the receiver has decided, or time is up."""
        give_up_ns = self._clock() + int(self._backoff.give_up_s * 1e9)
        tries = taken = 0

        def dropped(reason: str) -> Outcome:
            return Outcome(accepted=taken, dropped=request.items - taken, reason=reason)

        while not self._abandoned:
            tries += 1
            reply = self._send(request)
            if isinstance(reply, Accepted):
                return self._accepted(request, reply)
            self._say_failing(reply.cause)
            taken = reply.taken
            if isinstance(reply, Refused):
                return dropped(reply.reason)
            wait_s = max(self._backoff.wait_s(tries), reply.after_s or 0.0)
            if self._clock() + int(wait_s * 1e9) > give_up_ns:
                return dropped("retries_exhausted")
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned, wait_s)
        return dropped("shutdown")

    def _send(self, request: Request) -> Reply:
        try:
            return self._transport.send(request)
        except Exception as error:
            # The thread must not die of a fault in a library: the ledger would never balance again.
            logger.exception("sending to %s failed unexpectedly", self.destination)
            return Refused("internal_error", repr(error))

    def _accepted(self, request: Request, reply: Accepted) -> Outcome:
        if self._failing:
            logger.info("%s takes %s again", self.destination, request.signal.value)
            self._failing = ""
        rejected = min(reply.rejected, request.items)
        if rejected or reply.message:
            logger.warning(
                "%s rejected %d of %d %s: %s",
                *(self.destination, rejected, request.items, request.signal.value, reply.message or "no reason given"),
            )
        return Outcome(accepted=request.items - rejected, rejected=rejected)

    def _say_failing(self, cause: str) -> None:
        """One line for each change of cause, not for each try."""
        if cause != self._failing:
            self._failing = cause
            logger.warning("%s: %s", self.destination, cause)
