"""The agent: privileges, then stages, then batches until it is stopped, then everything put away in order.

What runs with privileges comes first, and imports neither NumPy nor gRPC: both start threads, and a thread keeps the
capabilities that it was born with. So the imports of everything else stand in the functions that run afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import socket
from typing import IO, TYPE_CHECKING, Any

from tcpio_otel import privileges
from tcpio_otel.attribution.conntrack import listen
from tcpio_otel.capture.control import ContextSources, Filters
from tcpio_otel.capture.loaders import Vocabulary
from tcpio_otel.capture.probe import Probe, cgroup_root, memory_hierarchy
from tcpio_otel.clock import boot_ns
from tcpio_otel.config import Config
from tcpio_otel.errors import EnvironmentFault, UsageError
from tcpio_otel.ledger import Ledger
from tcpio_otel.memory import GiveBack, share_one_heap

if TYPE_CHECKING:
    from tcpio_otel.attribution.peers import Peers
    from tcpio_otel.attribution.workloads import Workloads
    from tcpio_otel.batch import Batch
    from tcpio_otel.encoding.metrics import Observation
    from tcpio_otel.outputs import Outputs
    from tcpio_otel.pipeline import Pipeline, Source
    from tcpio_otel.summary import Status

logger = logging.getLogger(__name__)

IDLE_S = 0.25
"""How often stages to which nothing comes are called all the same, to look after their timers."""

SCREEN_REFRESH_NS = 500_000_000
LOG_REFRESH_NS = 10_000_000_000
LOOK_AHEAD_NS = 1_000_000_000
"""How long before metrics are due sockets are looked at, so that what they tell has come through by then."""

BUSIEST = 8


class Stop:
    """Whether the agent was asked to stop: by a signal, or because its time is over."""

    def __init__(self, duration_s: float | None) -> None:
        self._asked = False
        self._deadline_ns: int | None = None
        if duration_s is not None:
            self.within(duration_s)

    def __call__(self) -> bool:
        """Whether to stop now."""
        return self._asked or (self._deadline_ns is not None and boot_ns() >= self._deadline_ns)

    def within(self, duration_s: float) -> None:
        """Stop by itself after this, from now on."""
        self._deadline_ns = boot_ns() + int(duration_s * 1e9)

    def ask(self) -> None:
        """Ask it to stop."""
        self._asked = True

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """Let SIGINT and SIGTERM ask for it; a second one ends the process at once."""

        def ask(number: int, frame: object) -> None:
            del frame
            if self._asked:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def opened(
    config: Config,
    ledger: Ledger,
    prepare: Callable[[], None] = lambda: None,
    contexts: ContextSources | None = None,
    idle_s: float = IDLE_S,
) -> Iterator[tuple[Source, Vocabulary]]:
    """The source that the configuration names, ready to be read; all privileges are gone then.

    Args:
        config: what to capture.
        ledger: told what the source sees.
        prepare: what else needs privileges, done before they go.
        contexts: where a probe looks for trace contexts; nowhere, if not given.
        idle_s: how often a live source yields an empty batch when nothing comes.

    Raises:
        EnvironmentFault: the live source cannot run here.
    """
    filters = Filters(config.capture.ports, config.capture.cidrs, _netns(config.capture.network_namespace))
    with ExitStack() as stack:
        prepare()
        if (path := config.capture_file) is not None:
            privileges.drop_all()
            from tcpio_otel.capture.pcap import PcapSource

            yield (
                stack.enter_context(PcapSource(path, ledger, local=config.capture.local, filters=filters)),
                Vocabulary(),
            )
            return
        if missing := privileges.missing_to_load():
            names = ", ".join(f"CAP_{capability.name}" for capability in missing)
            raise EnvironmentFault(
                f"live capture needs {names}: run as root (sudo), or replay a file with --source pcap:FILE"
            )
        probe = stack.enter_context(
            Probe(
                filters=filters,
                memory_bytes=config.capture.ring_memory,
                cgroup=config.capture.cgroup,
                loader=config.capture.loader,
                contexts=contexts or ContextSources(),
            )
        )
        privileges.drop_all()
        logger.info("capturing: loaded by %s, attached at %s", probe.loader, ", ".join(probe.hooks()))
        for consequence in probe.loading.missing.values():
            logger.warning("here, %s", consequence)
        from tcpio_otel.capture.live import LiveSource

        yield (
            stack.enter_context(
                LiveSource(
                    probe,
                    ledger,
                    latency_s=float(config.capture.latency),
                    queue_bytes=config.capture.queue_memory,
                    idle_s=idle_s,
                )
            ),
            probe.loading.vocabulary,
        )


def batches(source: Source, stop: Callable[[], bool]) -> Iterator[Batch]:
    """The batches of a source until it ends or `stop` says so."""
    for batch in source:
        yield batch
        if stop():
            return


def run(config: Config, terminal: IO[str]) -> int:
    """Export until stopped; returns the exit code.

    Raises:
        TcpioError: what stands in the way, before anything was exported; or a fault of the source, after all that
            it had yielded was exported.
    """
    ledger, stop = Ledger(), Stop(config.duration)
    heard: list[socket] = []

    def prepare() -> None:
        _make_directory(config)
        heard.extend(listen_to_nat(config))

    share_one_heap()
    with (
        stop.on_signals(),
        opened(config, ledger, prepare, _contexts(config)) as (source, vocabulary),
        ExitStack() as stack,
    ):
        from tcpio_otel.outputs import Outputs

        workloads, peers = attribution(config, heard, stack)
        outputs = Outputs(config, vocabulary, ledger, boot_ns, workloads, peers)
        pipeline = _pipeline(config, ledger, vocabulary, outputs, source, workloads, peers)
        view = _View(config, terminal, ledger, pipeline, outputs, source)
        fault = record(source, pipeline, stop, GiveBack(outputs.packet_encoder.forget), view.refresh, shown=view)
        view.send_metrics()
        outputs.close(float(config.export.flush_timeout))
        view.last_word()
    if fault:
        raise fault
    if source.paced and (lost := outputs.exports.lost()):
        raise EnvironmentFault(f"not everything reached {outputs.destination}: {lost}; see the lines above")
    return 0


def record(
    source: Source,
    pipeline: Pipeline,
    stop: Callable[[], bool],
    give_back: GiveBack,
    between: Callable[[], None],
    shown: contextlib.AbstractContextManager[object] | None = None,
) -> BaseException | None:
    """Take in what a source yields until it ends or is told to stop, then what it has left.

    Args:
        source: where batches come from.
        pipeline: where they go.
        stop: whether to stop now.
        give_back: gives back memory that a burst took.
        between: called after each batch.
        shown: entered until the source has ended, and not beyond.

    Returns:
        The fault that ended it, after which everything before it was taken in; None: there was none.

    Raises:
        EnvironmentFault: what stands in the way is no fault of ours.
    """
    fault: BaseException | None = None
    try:
        with shown or contextlib.nullcontext():
            for batch in batches(source, stop):
                pipeline.process(batch)
                give_back.after(len(batch))
                between()
    except EnvironmentFault:
        raise
    except Exception as error:
        fault = error  # what came before it is still exported
    snapshot = source.snapshot()
    for batch in source.finish():
        pipeline.process(batch)
    pipeline.finish(source.now_ns(), snapshot)
    return fault


def _netns(file: Path | None) -> int:
    """The inode of a network namespace; 0 without one.

    Raises:
        EnvironmentFault: there is no such file, or it is none.
    """
    if file is None:
        return 0
    try:
        found = file.stat()
    except OSError as error:
        raise EnvironmentFault(f"cannot read the network namespace {file}: {error.strerror}") from None
    if found.st_dev != Path("/proc/self/ns/net").stat().st_dev:
        raise EnvironmentFault(f"{file} is no network namespace: give one such as /run/netns/NAME or /proc/PID/ns/net")
    return found.st_ino


def _context_table(config: Config) -> Any:
    """The table of trace contexts; None where nothing can tell of any."""
    wanted = config.correlation
    late = wanted.socket_tags or wanted.published_contexts
    if config.capture_file is not None or not (late or wanted.http_headers):
        return None
    from tcpio_otel.correlation.contexts import ContextTable

    return ContextTable(quiet_ns=int(wanted.quiet * 1e9), late=late)


def listen_to_nat(config: Config) -> list[socket]:
    """What hears of connections that are translated, where that is wanted and the kernel tells; it takes privileges."""
    if not config.kubernetes.backends or config.capture_file is not None:
        return []
    try:
        return [listen()]
    except EnvironmentFault as fault:
        logger.warning("nobody will tell which pods are behind Services: %s", fault)
        return []


def attribution(config: Config, heard: list[socket], stack: ExitStack) -> tuple[Workloads | None, Peers | None]:
    """Whose connections are, and who is at their other ends; None where nobody asks, or nothing tells.

    `heard` tells of translated connections; `stack` ends what watches.

    Raises:
        EnvironmentFault: it is not said how to reach the API server.
    """
    if config.capture_file is not None or not config.attribution.workloads:
        return None, None
    from tcpio_otel.attribution.cgroups import Cgroups, Hierarchy
    from tcpio_otel.attribution.workloads import Workloads

    roots = {Hierarchy.UNIFIED: config.capture.cgroup or cgroup_root()}
    if memory := memory_hierarchy():
        roots[Hierarchy.MEMORY] = memory
    cgroups, wanted = Cgroups(roots, boot_ns()), config.kubernetes
    if not wanted.enabled:
        return Workloads(cgroups), None
    try:
        from tcpio_otel.attribution.cluster import Cluster
        from tcpio_otel.attribution.kubelet import Kubelet
        from tcpio_otel.attribution.kubernetes import NodePods, connected
    except ImportError as error:
        raise EnvironmentFault(
            f"kubernetes.enabled needs the official client ({error}): install tcpio-otel[kubernetes]"
        ) from None
    from tcpio_otel.attribution.peers import Peers
    from tcpio_otel.attribution.pods import Wanted
    from tcpio_otel.attribution.translations import Translations

    client, wait_ns = connected(wanted.kubeconfig), int(wanted.wait * 1e9)
    attributes = Wanted(wanted.labels, wanted.annotations, wanted.service_labels)
    peers, others = None, []
    if wanted.peers:
        cluster = stack.enter_context(Cluster(client, wanted.peers, attributes))
        translations = [stack.enter_context(Translations(each)) for each in heard]
        peers = Peers(cluster.addresses, translations[0] if translations else None, wait_ns)
        others.append(cluster.own_pods)
    kubelet, node = None, wanted.node_name or ""
    if wanted.kubelet:
        kubelet = Kubelet(wanted.kubelet, node, client.configuration, wanted.kubelet_certificate)
    pods = NodePods(client, node, attributes, cache=wanted.cache, others=others, kubelet=kubelet)
    return Workloads(cgroups, stack.enter_context(pods), wait_ns), peers


def _contexts(config: Config) -> ContextSources:
    wanted = config.correlation
    return ContextSources(
        wanted.socket_tags, wanted.http_headers, wanted.published_map if wanted.published_contexts else None
    )


def _make_directory(config: Config) -> None:
    """Make the directory of the files while that is still allowed everywhere.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    if directory := config.file_directory:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"cannot make the directory {directory}: {error.strerror}") from None


def _pipeline(
    config: Config,
    ledger: Ledger,
    vocabulary: Vocabulary,
    outputs: Outputs,
    source: Source,
    workloads: Workloads | None,
    peers: Peers | None,
) -> Pipeline:
    from tcpio_otel.aggregation.traffic import Traffic
    from tcpio_otel.pipeline import Pipeline

    return Pipeline(
        ledger=ledger,
        contexts=_context_table(config),
        workloads=workloads,
        peers=peers,
        peer_names=outputs.peer_names,
        traffic=Traffic(config.metrics.series_limit) if config.metrics.traffic and outputs.has_metrics else None,
        series_peer=outputs.series_peer,
        connections=connection_table(config, vocabulary, source, float(config.connections.summary_interval)),
        packet_encoder=outputs.packet_encoder,
        encode_spans=outputs.encode_spans,
        encode_summaries=outputs.encode_summaries,
        encode_requests=outputs.encode_requests,
        logs=outputs.logs,
        summaries=outputs.summaries,
        traces=outputs.traces,
        clock=boot_ns,
        handshake_wait_ns=int(config.connections.handshake_wait * 1e9),
        context_wait_ns=int(config.correlation.wait * 1e9),
        paced=source.paced,
    )


def connection_table(config: Config, vocabulary: Vocabulary, source: Source, summary_interval_s: float) -> Any:
    """The connection table that the configuration names."""
    from tcpio_otel.connections.table import ConnectionTable

    return ConnectionTable(
        limit=config.connections.limit,
        linger_ns=int(config.connections.linger * 1e9),
        handshake_timeout_ns=int(config.connections.handshake_timeout * 1e9),
        summary_interval_ns=int(summary_interval_s * 1e9),
        kernel_totals=config.capture_file is None,
        older_told=source.older_told,
        reset_reasons=vocabulary.reset_reasons,
    )


class _View:
    """What a running agent shows of itself: a live view on a terminal, plain lines elsewhere, metrics to a receiver."""

    def __init__(
        self, config: Config, terminal: IO[str], ledger: Ledger, pipeline: Pipeline, outputs: Outputs, source: Source
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._config, self._ledger, self._pipeline = config, ledger, pipeline
        self._outputs, self._source, self._terminal = outputs, source, terminal
        self._started_ns = time.time_ns()
        self._live = (
            Live(console=Console(file=terminal), auto_refresh=False, transient=True) if terminal.isatty() else None
        )
        self._every_ns = SCREEN_REFRESH_NS if self._live else LOG_REFRESH_NS
        self._before = self._status()
        self._answer_due_ns: int | None = None
        self._metrics_next(boot_ns())

    def __enter__(self) -> None:
        logger.info("recording to %s", self._outputs.destination)
        if self._live:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def _status(self) -> Status:
        from tcpio_otel.encoding.endpoints import bracketed
        from tcpio_otel.summary import Status, Talker

        table, progress = self._pipeline.connections, self._pipeline.progress
        talkers = [
            Talker(
                local=f"{bracketed(talker.local.address)}:{talker.local.port}",
                peer=f"{bracketed(talker.peer.address)}:{talker.peer.port}",
                process=f"{talker.process_name} {talker.pid}" if talker.pid else "",
                packets=talker.packets,
                payload_bytes=talker.payload_bytes,
            )
            for talker in (table.talkers(BUSIEST) if self._live else ())
        ]
        return Status(
            boot_ns(), progress.packets, progress.payload_bytes, table.open_connections, progress.spans,
            self._ledger.balance(), talkers,
        )  # fmt: skip

    def _metrics_next(self, now_ns: int) -> None:
        """Have metrics be due after the next interval, and sockets looked at before, if what they say is told."""
        self._metrics_due_ns = now_ns + int(self._config.metrics.interval * 1e9)
        self._looked = not self._pipeline.counts_traffic

    def refresh(self) -> None:
        """Show, and send metrics, when it is time to."""
        now_ns = boot_ns()
        if not self._looked and now_ns >= self._metrics_due_ns - LOOK_AHEAD_NS:
            self._looked = True
            self._source.look_again()
        if now_ns >= self._metrics_due_ns:
            self._metrics_next(now_ns)
            self.send_metrics()
        if self._outputs.scraped:
            self._answer(now_ns)
        if now_ns - self._before.at_ns < self._every_ns:
            return
        from tcpio_otel.summary import log_line, screen

        status = self._status()
        if self._live:
            self._live.update(screen(status, self._before, self._outputs.destination), refresh=True)
        else:
            logger.info("%s", log_line(status, self._before))
        self._before = status

    def _answer(self, now_ns: int) -> None:
        """Answer who waits for metrics, once it is known what sockets say."""
        if self._answer_due_ns is None:
            self._answer_due_ns = now_ns
            if self._pipeline.counts_traffic:
                self._answer_due_ns += LOOK_AHEAD_NS
                self._source.look_again()
        if now_ns >= self._answer_due_ns:
            self._answer_due_ns = None
            self._outputs.answer_scrape(self._observation(), self._pipeline.traffic(self._source.now_ns()))

    def _faults(self) -> dict[str, int]:
        return self._source.faults() | self._pipeline.faults()

    def _observation(self) -> Observation:
        from tcpio_otel.encoding.metrics import Observation

        return Observation(
            self._started_ns, time.time_ns(), self._ledger.balance(), self._pipeline.connections.open_connections,
            self._faults(), self._outputs.exports.counts(),
        )  # fmt: skip

    def send_metrics(self) -> None:
        """Queue metrics as of now."""
        from tcpio_otel.encoding.metrics import metrics_request

        observation = self._observation()
        self._outputs.send_metrics(*metrics_request(observation, self._outputs.resource))
        if (traffic := self._pipeline.traffic(self._source.now_ns())) is not None:
            self._outputs.send_traffic(traffic, observation.now_ns)

    def last_word(self) -> None:
        """The ledger, and what else is worth knowing at the end."""
        from tcpio_otel.summary import ledger_line

        faults = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self._faults().items() if count)
        lines = [ledger_line(self._ledger.balance())]
        for signal_name, counts in self._outputs.exports.counts().items():
            failed = ", ".join(f"{reason} {count}" for reason, count in (counts.failed or {}).items())
            lines.append(f"{signal_name.value}: exported {counts.accepted}" + (f", failed: {failed}" if failed else ""))
        if faults:
            lines.append(f"also: {faults}")
        try:
            print(*lines, sep="\n", file=self._terminal, flush=True)
        except OSError:
            silence(self._terminal)  # nobody reads any more: `| tee` dies of the same Ctrl-C


def silence(stream: IO[Any]) -> None:
    """Let what is still buffered go nowhere, the interpreter's own last flush included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def printing(stream: IO[Any]) -> Iterator[None]:
    """Where something is printed: a reader that has gone, which is how `| head` ends, ends it without a word.

    Raises:
        EnvironmentFault: the stream cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        silence(stream)
    except OSError as error:
        silence(stream)
        raise EnvironmentFault(f"cannot print: {error.strerror}") from None


def watch(config: Config, *, json: bool, time_of_day: bool, process: bool, seq: bool) -> int:
    """Print packets until stopped, or until nobody reads; returns the exit code.

    Raises:
        TcpioError: what stands in the way; also when standard output cannot be written.
    """
    if sys.stdout is None:
        raise UsageError("watch prints to standard output, which is closed")
    ledger, stop = Ledger(), Stop(config.duration)
    with stop.on_signals(), opened(config, ledger) as (source, vocabulary):
        from tcpio_otel.batch import Packets
        from tcpio_otel.encoding.packet_json import JsonLines
        from tcpio_otel.encoding.table import PacketTable
        from tcpio_otel.summary import ledger_line

        table = PacketTable(time=time_of_day, process=process, seq=seq)
        encoder = JsonLines(vocabulary.drop_reasons) if json else table
        connections = connection_table(config, vocabulary, source, summary_interval_s=0)
        out = sys.stdout.buffer
        with printing(out):
            if not json:
                out.write(table.header())
                out.flush()
            for batch in _and_the_rest(source, stop):
                slots, _ = connections.update(batch)
                if len(slots):
                    packets = Packets(batch.packets, slots, connections.flows, batch.unix_offset_ns, batch.observed_ns)
                    out.write(encoder.encode(packets).buffer)
                    out.flush()
                    ledger.exported(len(slots))
            logger.info("%s", ledger_line(ledger.balance()))
    return 0


def _and_the_rest(source: Source, stop: Stop) -> Iterator[Batch]:
    yield from batches(source, stop)
    yield from source.finish()


def tell(text: str) -> None:
    """Print; once the reader has gone, nothing.

    Raises:
        TcpioError: standard output is closed, or cannot be written.
    """
    if sys.stdout is None:
        raise UsageError("there is nowhere to print: standard output is closed")
    with printing(sys.stdout):
        sys.stdout.write(text)
        sys.stdout.flush()


def check(config: Config) -> int:
    """Say what this host and the receivers allow; returns the exit code."""
    from tcpio_otel.check import findings

    good = True
    for finding in findings(_receivers(config), config.capture.loader, config.capture.cgroup):
        tell(f"{finding}\n")
        good &= finding.good or not finding.needed
    return 0 if good else EnvironmentFault.exit_code


def _receivers(config: Config) -> dict[str, Callable[[], str]]:
    """For each receiver, a call that sends it an empty request and says what it answered."""

    def reach(name: str) -> str:
        from tcpio_otel.outputs import reach

        return reach(config, name)

    endpoints: dict[str, Callable[[], str]] = {}
    for name in ("logs", "traces", "metrics"):
        if settings := config.otlp(name):
            endpoints.setdefault(f"{settings.endpoint} ({name})", lambda name=name: reach(name))  # type: ignore[misc]
    return endpoints
