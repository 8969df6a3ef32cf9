"""The configuration's wishes for export, as outputs: encoders, batchers and senders of the three signals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.resources import Resource

from tcpio_otel import names
from tcpio_otel.aggregation.traffic import Traffic
from tcpio_otel.attribution.naming import NOTHING, UNKNOWN
from tcpio_otel.attribution.peers import Peers
from tcpio_otel.attribution.workloads import Workloads
from tcpio_otel.batch import Names
from tcpio_otel.capture.loaders import Vocabulary
from tcpio_otel.clock import Nanoseconds
from tcpio_otel.config import Config, Export
from tcpio_otel.connections.events import Connection, Ends
from tcpio_otel.correlation.events import Request as ServedRequest
from tcpio_otel.encoding import proto_json
from tcpio_otel.encoding.metrics import ExportCounts, Observation, resource_metrics
from tcpio_otel.encoding.otlp_logs import PacketLogEncoder
from tcpio_otel.encoding.packet_json import PacketJsonEncoder
from tcpio_otel.encoding.peer import peer_names, series_peer
from tcpio_otel.encoding.protobuf import ProtobufEnvelope
from tcpio_otel.encoding.requests import Links, request_log, request_log_json
from tcpio_otel.encoding.resource import Resources, host_resource
from tcpio_otel.encoding.rows import PeerNames, nobody
from tcpio_otel.encoding.spans import SCOPE, SpanEncoder, SpanJsonEncoder, items
from tcpio_otel.encoding.traffic import traffic as traffic_metrics
from tcpio_otel.encoding.traffic import traffic_requests
from tcpio_otel.errors import EnvironmentFault
from tcpio_otel.export.batcher import Batcher
from tcpio_otel.export.files import FileTransport
from tcpio_otel.export.grpc import GrpcTransport
from tcpio_otel.export.http import HttpTransport
from tcpio_otel.export.retry import Backoff
from tcpio_otel.export.sender import Outcome, Sender
from tcpio_otel.export.settings import Protocol
from tcpio_otel.export.transport import Accepted, Transport
from tcpio_otel.ledger import Ledger
from tcpio_otel.payload import Envelope, Items, Request, Signal, always
from tcpio_otel.pipeline import Output, PacketEncoder

if TYPE_CHECKING:
    from tcpio_otel.export.scrape import Scrape

logger = logging.getLogger(__name__)

LINE_BYTES = 1_000_000
"""Of an OTLP/JSON line: the Collector's file reader stops at 1 MiB."""

_JSON_KEYS = {
    Signal.LOGS: ("resourceLogs", "scopeLogs", "logRecords"),
    Signal.TRACES: ("resourceSpans", "scopeSpans", "spans"),
    Signal.METRICS: ("resourceMetrics", "scopeMetrics", "metrics"),
}


class Exports:
    """Counts what became of the items of each signal, and tells the ledger of packets."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._accepted: Counter[Signal] = Counter()
        self._submitted: Counter[Signal] = Counter()
        self._failed: dict[Signal, Counter[str]] = {signal: Counter() for signal in Signal}

    def submitted(self, request: Request) -> None:
        """A request is on its way."""
        self._submitted[request.signal] += request.items

    def outcome(self, request: Request, outcome: Outcome) -> None:
        """A request has come to its end; called from the thread of its signal."""
        self._accepted[request.signal] += outcome.accepted
        failed = self._failed[request.signal]
        for count, reason in ((outcome.rejected, "rejected"), (outcome.dropped, outcome.reason)):
            if count:
                failed[reason] += count
        if request.packets:
            self._ledger.exported(outcome.accepted)
            self._ledger.dropped(outcome.rejected, "rejected")
            self._ledger.dropped(outcome.dropped, outcome.reason)

    def lost(self) -> str:
        """What was not accepted, by signal and reason, in words; empty when everything was."""
        return ", ".join(
            f"{count} {signal.value} ({reason})" for signal in Signal for reason, count in self._failed[signal].items()
        )

    def counts(self) -> dict[Signal, ExportCounts]:
        """The counts of all signals by now."""
        return {
            signal: ExportCounts(
                accepted := self._accepted[signal],
                dict(self._failed[signal]),
                self._submitted[signal] - accepted - self._failed[signal].total(),
            )
            for signal in Signal
        }


class Outputs:
    """What the configuration makes of the three signals.

    Attributes:
        peer_names: says what is known of a peer, by its number, as attributes.
        series_peer: says of a connection and its peer's number which series it belongs to.
        packet_encoder: turns packet records into items of the logs signal.
        encode_spans: turns ended connections, and what each has served, into items of the traces signal.
        encode_summaries: turns open connections, and the Unix time of now, into items of the logs signal.
        encode_requests: turns requests that are over likewise, each with the connection that it went over.
        logs, summaries, traces: outputs of packets, of open connections and of spans, None where the signal is off.
        exports: the counts of all signals.
        destination: where everything goes, for people.

    Raises:
        UsageError: an endpoint or a certificate will not do.
        EnvironmentFault: the files cannot be written, or nobody can listen where metrics are to be scraped.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        ledger: Ledger,
        clock: Nanoseconds,
        workloads: Workloads | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._config, self._clock = config, clock
        self._ready = workloads.ready if workloads else always
        self._resource = host_resource(config.resource.service_name, config.resource.attributes)
        self._resources = Resources(self._resource, workloads.__getitem__ if workloads else lambda _: UNKNOWN)
        self._directory = config.file_directory
        self.exports = Exports(ledger)
        self._senders: list[Sender] = []
        as_json = self._json(Signal.LOGS)
        self.peer_names: PeerNames = (lambda number: peer_names(peers[number])) if peers else nobody
        self.series_peer: Callable[[int, Connection], Names] = lambda number, connection: series_peer(
            peers[number] if peers else NOTHING, connection
        )
        self._drop_reasons = vocabulary.drop_reasons
        encode_packets = PacketJsonEncoder if as_json else PacketLogEncoder
        self.packet_encoder: PacketEncoder = encode_packets(vocabulary.drop_reasons, self.peer_names)
        self.encode_spans: Callable[[list[Connection], list[Links]], Items] = self._connection_encoder(
            Signal.TRACES
        ).encode
        self.encode_summaries: Callable[[list[Connection], int], Items] = self._connection_encoder(
            Signal.LOGS
        ).encode_summaries
        encode_request = request_log_json if as_json else request_log

        def encode_requests(requests: list[tuple[ServedRequest, Ends | None]], observed_ns: int) -> Items:
            return items([encode_request(request, ends, observed_ns) for request, ends in requests])

        self.encode_requests = encode_requests
        logs = self._sender(Signal.LOGS)
        self.logs = self._output(Signal.LOGS, logs, packets=True)
        self.summaries = self._output(Signal.LOGS, logs)
        self.traces = self._output(Signal.TRACES, self._sender(Signal.TRACES))
        self._metrics = self._sender(Signal.METRICS)
        self._scrape = _scrape(config)

    @property
    def has_metrics(self) -> bool:
        """Whether metrics go anywhere."""
        return self._metrics is not None or self._scrape is not None

    @property
    def scraped(self) -> bool:
        """Whether somebody waits for metrics."""
        return self._scrape is not None and self._scrape.wanted

    @property
    def resource(self) -> Resource:
        """The agent itself."""
        return self._resource

    @property
    def destination(self) -> str:
        """Where everything goes, for people."""
        if self._directory:
            return f"{self._directory}/"
        return ", ".join(dict.fromkeys(sender.destination for sender in self._senders)) or "nowhere"

    def _json(self, signal: Signal) -> bool:
        settings = self._config.otlp(signal.value)
        return self._directory is not None or (settings is not None and settings.protocol is Protocol.HTTP_JSON)

    def _transport(self, signal: Signal) -> Transport | None:
        if getattr(self._config.signals, signal.value) is Export.NONE:
            return None
        if self._directory:
            file = self._config.file
            return FileTransport(signal, self._directory, rotate_bytes=file.rotate, keep=file.keep)
        settings = self._config.otlp(signal.value)
        if settings is None:
            return None
        return (GrpcTransport if settings.protocol is Protocol.GRPC else HttpTransport)(signal, settings)

    def _sender(self, signal: Signal) -> Sender | None:
        transport = self._transport(signal)
        if transport is None:
            return None
        sender = Sender(
            transport,
            queue_bytes=self._config.export.queue_memory,
            backoff=Backoff(give_up_s=float(self._config.export.retry_for)),
            on_outcome=self.exports.outcome,
            clock=self._clock,
        )
        self._senders.append(sender)
        return sender

    def _envelope(self, signal: Signal) -> Envelope:
        if not self._json(signal):
            return ProtobufEnvelope(self._resources.protobuf)
        scope = {"name": SCOPE.name, "version": SCOPE.version}
        return proto_json.JsonEnvelope(self._resources.json, scope, names.SCHEMA_URL, _JSON_KEYS[signal])

    def _connection_encoder(self, signal: Signal) -> SpanEncoder | SpanJsonEncoder:
        return (SpanJsonEncoder if self._json(signal) else SpanEncoder)(self._resource)

    def _output(self, signal: Signal, sender: Sender | None, *, packets: bool = False) -> Output | None:
        if sender is None:
            return None
        batch = self._config.batch
        batcher = Batcher(
            signal,
            self._envelope(signal),
            max_bytes=min(batch.max_bytes, LINE_BYTES) if self._directory else batch.max_bytes,
            max_items=batch.max_records,
            max_age_ns=int(batch.max_age * 1e9),
            packets=packets,
            ready=self._ready,
        )
        return Output(batcher, sender, self.exports.submitted)

    def send_traffic(self, traffic: Traffic, now_ns: int) -> None:
        """Queue the series of traffic, some workloads at a time; `now_ns` is Unix time."""
        for metrics, points in traffic_requests(traffic, self._resources.of, self._drop_reasons, now_ns):
            self.send_metrics(metrics, points)

    def answer_scrape(self, observation: Observation, traffic: Traffic | None) -> None:
        """Give who waits for metrics what an export would send as well."""
        if self._scrape is None:
            return
        found = [resource_metrics(observation, self._resource)]
        if traffic is not None:
            found += traffic_metrics(
                traffic, self._resources.of, self._drop_reasons, observation.now_ns, examples=False
            )
        self._scrape.answer(found)

    def send_metrics(self, metrics: ExportMetricsServiceRequest, points: int) -> None:
        """Queue one request of the metrics signal, if that is on."""
        if self._metrics is None:
            return
        line = self._json(Signal.METRICS)
        body = proto_json.as_line(metrics) if line else metrics.SerializeToString()
        request = Request(Signal.METRICS, body, points)
        self.exports.submitted(request)
        self._metrics.submit(request)

    def close(self, timeout_s: float) -> None:
        """Give every queue the same time to empty, then drop and count what is left."""
        if self._scrape is not None:
            self._scrape.close()
        deadline_ns = self._clock() + int(timeout_s * 1e9)
        for sender in self._senders:
            sender.close(max(0.0, (deadline_ns - self._clock()) / 1e9))


def _scrape(config: Config) -> Scrape | None:
    if config.metrics.listen is None:
        return None
    from tcpio_otel.encoding.prometheus import families
    from tcpio_otel.export.scrape import Scrape

    scrape = Scrape(config.metrics.listen, families)
    logger.info("metrics can be scraped at %s", scrape.url)
    return scrape


def reach(config: Config, name: str) -> str:
    """Send an empty request of a signal to its receiver, and say what it answered.

    Raises:
        EnvironmentFault: it did not take it.
    """
    signal, settings = Signal(name), config.otlp(name)
    if settings is None:
        raise EnvironmentFault("no endpoint is set")
    transport = (GrpcTransport if settings.protocol is Protocol.GRPC else HttpTransport)(signal, settings)
    try:
        body = b"{}" if settings.protocol is Protocol.HTTP_JSON else b""
        reply = transport.send(Request(signal, body, 0))
    finally:
        transport.close()
    if isinstance(reply, Accepted):
        return "takes " + name
    raise EnvironmentFault(f"{settings.endpoint}: {reply.cause}")
