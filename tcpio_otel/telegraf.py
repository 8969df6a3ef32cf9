"""The agent as a program of Telegraf's: lines on standard output, when it asks for them, until it has had enough.

As in `agent`, what runs with privileges comes first; imports of everything else stand in the functions that follow.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from contextlib import ExitStack
from socket import socket
from typing import TYPE_CHECKING

from tcpio_otel.agent import Stop, attribution, connection_table, listen_to_nat, opened, record
from tcpio_otel.clock import boot_ns
from tcpio_otel.config import Config
from tcpio_otel.errors import EnvironmentFault, UsageError
from tcpio_otel.execd import Flushes, Orders
from tcpio_otel.ledger import Ledger
from tcpio_otel.memory import GiveBack, share_one_heap

if TYPE_CHECKING:
    from tcpio_otel.attribution.peers import Peers
    from tcpio_otel.attribution.workloads import Workloads
    from tcpio_otel.capture.loaders import Vocabulary
    from tcpio_otel.line_outputs import LineOutputs
    from tcpio_otel.payload import Items
    from tcpio_otel.pipeline import Pipeline, Source

logger = logging.getLogger(__name__)

ONCE_S = 2.0
"""How long a capture of `--once` takes: `inputs.exec` waits for five seconds in all, if it is told nothing else."""


def telegraf(config: Config, orders: Orders, *, once: bool) -> int:
    """Tell Telegraf until it has had enough, or once; returns the exit code.

    Args:
        config: what to capture and to tell.
        orders: Telegraf's; listened to already.
        once: whether to capture for the configured duration, tell, and end.

    Raises:
        TcpioError: what stands in the way, before anything was told; or a fault of the source, after all that it had
            yielded was told.
    """
    stdout = _stdout(once)
    if once and config.duration is None and config.capture_file is None:
        config = dataclasses.replace(config, duration=type(config.telegraf.interval)(ONCE_S))
    ledger, stop, started_ns = Ledger(), Stop(config.duration), time.time_ns()
    heard: list[socket] = []
    share_one_heap()
    with (
        stop.on_signals(),
        opened(config, ledger, lambda: heard.extend(listen_to_nat(config))) as (source, vocabulary),
        ExitStack() as stack,
    ):
        from tcpio_otel.encoding.metrics import Observation
        from tcpio_otel.line_outputs import LineOutputs
        from tcpio_otel.summary import ledger_line

        workloads, peers = attribution(config, heard, stack)
        outputs = LineOutputs(config, vocabulary, ledger, boot_ns, workloads, peers, stdout)
        pipeline = _pipeline(config, ledger, vocabulary, outputs, source, workloads, peers)

        def tell_totals() -> None:
            observation = Observation(
                started_ns, time.time_ns(), ledger.balance(), pipeline.connections.open_connections,
                source.faults() | pipeline.faults() | outputs.faults(), outputs.exports.counts(),
            )  # fmt: skip
            outputs.send_totals(pipeline.traffic(source.now_ns()), observation)

        flushes = Flushes(orders, 0 if once else int(config.telegraf.interval * 1e9), boot_ns())

        def flush_when_due() -> None:
            if flushes.due(boot_ns()):
                outputs.flush()
                tell_totals()
                if pipeline.counts_traffic:
                    source.look_again()

        give_back = GiveBack(outputs.packet_encoder.forget)
        fault = record(source, pipeline, lambda: stop() or orders.over, give_back, flush_when_due)
        deadline_ns = boot_ns() + int(config.export.flush_timeout * 1e9)
        outputs.close_details(deadline_ns)
        tell_totals()  # now that nothing is in flight any more
        outputs.close(deadline_ns)
        logger.info("%s", ledger_line(ledger.balance()))
    if fault:
        raise fault
    if lost := outputs.lost():
        if source.paced:
            raise EnvironmentFault(f"not everything reached standard output: {lost}")
        logger.warning("not everything was read: %s", lost)
    return 0


def _stdout(once: bool) -> int:
    """Standard output, if it can be used, and input as well if that is needed."""
    if sys.stdout is None:
        raise UsageError("telegraf prints to standard output, which is closed")
    if sys.stdin is None and not once:
        raise UsageError("telegraf takes its orders from standard input, which is closed; give --once to do without")
    return sys.stdout.fileno()


def _pipeline(
    config: Config,
    ledger: Ledger,
    vocabulary: Vocabulary,
    outputs: LineOutputs,
    source: Source,
    workloads: Workloads | None,
    peers: Peers | None,
) -> Pipeline:
    from tcpio_otel.encoding.spans import items
    from tcpio_otel.pipeline import Pipeline

    def nothing(*_: object) -> Items:
        return items([])

    return Pipeline(
        ledger=ledger,
        contexts=None,
        workloads=workloads,
        peers=peers,
        peer_names=outputs.peer_names,
        traffic=outputs.traffic,
        series_peer=outputs.series_peer,
        connections=connection_table(config, vocabulary, source, summary_interval_s=0),
        packet_encoder=outputs.packet_encoder,
        encode_spans=outputs.encode_connections,
        encode_summaries=nothing,
        encode_requests=nothing,
        logs=outputs.packets,
        summaries=None,
        traces=outputs.connections,
        clock=boot_ns,
        handshake_wait_ns=int(config.connections.handshake_wait * 1e9),
        context_wait_ns=0,
        paced=source.paced,
    )
