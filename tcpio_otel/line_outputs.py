"""The configuration's wishes for Telegraf, as outputs: packets, connections and totals as lines on standard output."""

import threading
from collections.abc import Iterable

from tcpio_otel import names
from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import NOTHING, UNKNOWN
from tcpio_otel.attribution.peers import Peers
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import Names
from tcpio_otel.capture.loaders import Vocabulary
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.config import Config, LineTag
from tcpio_otel.connections.events import Connection, Role
from tcpio_otel.encoding import line_protocol as lines
from tcpio_otel.encoding.endpoints import address_text
from tcpio_otel.encoding.metrics import Observation
from tcpio_otel.encoding.peer import peer_names, series_peer
from tcpio_otel.encoding.requests import Links
from tcpio_otel.encoding.rows import PeerNames, nobody
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.export.retry import Backoff
from tcpio_otel.export.sender import Sender
from tcpio_otel.export.stdout import StdoutTransport, wait_until_read
from tcpio_otel.ledger import Ledger
from tcpio_otel.outputs import Exports
from tcpio_otel.payload import Items, Request, Signal, always
from tcpio_otel.pipeline import Output

NEVER_NS = 1 << 62
AGAIN = Backoff(initial_s=0.05, factor=1, highest_s=0.05, give_up_s=1e9)
"""Whoever does not read may do so later; what waits for that is bounded by the queue."""

_ATTRIBUTES = {
    LineTag.LOCAL_ADDRESS: names.LOCAL_ADDRESS,
    LineTag.LOCAL_PORT: names.LOCAL_PORT,
    LineTag.PEER_ADDRESS: names.PEER_ADDRESS,
    LineTag.PEER_PORT: names.PEER_PORT,
    LineTag.CLIENT_ADDRESS: names.CLIENT_ADDRESS,
    LineTag.CLIENT_PORT: names.CLIENT_PORT,
    LineTag.SERVER_ADDRESS: names.SERVER_ADDRESS,
    LineTag.SERVER_PORT: names.SERVER_PORT,
}


class LineOutputs:
    """What becomes of packets, connections and totals.

    Attributes:
        peer_names: says what is known of a peer, by its number, as attributes.
        packet_encoder: turns packet records into lines.
        packets, connections: outputs of these, None where they are off.
        traffic: totals by workload and peer, None where they are off.
        exports: the counts of all three, as signals.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        ledger: Ledger,
        clock: Nanoseconds,
        workloads: Workloads | None,
        peers: Peers | None,
        stdout: int,
    ) -> None:
        self._config, self._clock, self._peers, self._stdout = config, clock, peers, stdout
        self._drop_reasons = vocabulary.drop_reasons
        self._ready = workloads.ready if workloads else always
        self._envelope = lines.LineEnvelope(workloads.__getitem__ if workloads else lambda _: UNKNOWN)
        self._turn = threading.Lock()
        self._moments = {signal: lines.Moments() for signal in (Signal.LOGS, Signal.TRACES)}
        self._asked = frozenset(_ATTRIBUTES[tag] for tag in config.telegraf.tags)
        self.exports = Exports(ledger)
        self.peer_names: PeerNames = (lambda number: peer_names(peers[number])) if peers else nobody
        self.packet_encoder = lines.PacketLines(
            vocabulary.drop_reasons, self._moments[Signal.LOGS], self.peer_names, self._asked
        )
        self._connections = lines.ConnectionLines(self._moments[Signal.TRACES], self._asked)
        wanted = config.telegraf
        # Each has a queue of its own, so that packets, which are many, do not cost connections or totals their place.
        self._senders: dict[Signal, Sender] = {}
        self.packets = self._output(Signal.LOGS) if wanted.packets else None
        self.connections = self._output(Signal.TRACES) if wanted.connections else None
        self.traffic = Traffic(config.metrics.series_limit, lines.like) if wanted.peers else None
        self._totals = self._sender()

    def _sender(self) -> Sender:
        return Sender(
            StdoutTransport(self._stdout, self._turn),
            queue_bytes=self._config.export.queue_memory,
            backoff=AGAIN,
            on_outcome=self.exports.outcome,
            clock=self._clock,
        )

    def _output(self, signal: Signal) -> Output:
        batch = self._config.batch
        self._senders[signal] = self._sender()
        batcher = Batcher(
            signal,
            self._envelope,
            max_bytes=batch.max_bytes,
            max_items=batch.max_records,
            max_age_ns=NEVER_NS,  # until somebody asks
            packets=signal is Signal.LOGS,
            ready=self._ready,
        )
        return Output(batcher, self._senders[signal], self.exports.submitted)

    def encode_connections(self, connections: list[Connection], served: list[Links]) -> Items:
        """Lines of connections; that applications' spans were served is no matter of metrics."""
        del served
        return self._connections.encode(connections)

    def series_peer(self, number: int, connection: Connection) -> Names:
        """What a series says of a connection's peer, which has that number; clients' addresses only if asked for."""
        found = lines.lasting(
            series_peer(self._peers[number] if self._peers else NOTHING, connection), names.PEER_PREFIX
        )
        if found or connection.role is not Role.SERVER or names.CLIENT_ADDRESS not in self._asked:
            return found
        return ((names.CLIENT_ADDRESS, address_text(connection.peer.address)),)

    def faults(self) -> dict[str, int]:
        """How many lines of each kind were moved in time, because theirs was taken."""
        return {names.TIMESTAMPS_MOVED: sum(moments.moved for moments in self._moments.values())}

    def lost(self) -> str:
        """What was not written, by kind and reason, in words; empty when everything was."""
        return ", ".join(
            f"{count} lines of {lines.KINDS[signal]} ({reason})"
            for signal, counts in self.exports.counts().items()
            for reason, count in (counts.failed or {}).items()
        )

    def flush(self) -> None:
        """Queue what has been gathered."""
        for output in (self.packets, self.connections):
            if output:
                output.release(self._clock())

    def send_totals(self, traffic: Traffic | None, observation: Observation) -> None:
        """Queue the totals as of now."""
        found = [
            *lines.series_lines(traffic or (), self._drop_reasons, observation.now_ns),
            *lines.agent_lines(observation),
        ]
        request = Request(Signal.METRICS, b"".join(found), len(found))
        self.exports.submitted(request)
        self._totals.submit(request)

    def close_details(self, deadline_ns: int) -> None:
        """Write what of packets and connections is queued; what is left by then is dropped and counted."""
        self._close(self._senders.values(), deadline_ns)

    def close(self, deadline_ns: int) -> None:
        """Likewise the totals; then wait until everything is read."""
        self._close([self._totals], deadline_ns)
        wait_until_read(self._stdout, self._left_s(deadline_ns))

    def _close(self, senders: Iterable[Sender], deadline_ns: int) -> None:
        for sender in senders:
            sender.close(self._left_s(deadline_ns))

    def _left_s(self, deadline_ns: int) -> float:
        return max(0.0, (deadline_ns - self._clock()) / 1e9)
