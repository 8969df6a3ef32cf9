"""Metrics that are scraped, against programs' own counts, against what goes by OTLP, and by the real Prometheus."""

import re
import signal
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.kernel.harness import Agent, Namespace, Samples, agent, drawing, only, scrape, wait_for
from tests.kernel.hosts import KERNEL
from tests.kernel.test_kernel_traffic import last_points
from tests.peers import prometheus
from tests.peers.go import or_skip

SCRAPED = {"TCPIO_METRICS_LISTEN": "127.0.0.1:0", "TCPIO_METRICS_INTERVAL": "1h"}
"""So that nothing but a scrape has sockets looked at."""


def url(watcher: Agent) -> str:
    """Where it can be scraped, as it says."""
    found = re.search(r"metrics can be scraped at (http://\S+)", watcher.stderr())
    assert found, watcher.stderr()
    return found[1]


def total(samples: Samples, name: str, **wanted: object) -> float:
    """The sum over series with these labels."""
    return sum(
        value
        for labels, value in samples.get(name, [])
        if all(labels.get(label) == str(text) for label, text in wanted.items())
    )


def test_a_scrape_tells_what_programs_counted(namespace: Namespace, tmp_path: Path) -> None:
    """And what goes by OTLP, under the names that Prometheus gives to that."""
    with agent(tmp_path, "run", "--otlp-file", "out", **only(namespace), **SCRAPED) as watcher:
        counted = namespace.traffic("exchange", "4", "50", "1000", "30000")
        namespace.traffic("reset")

        def client(direction: str) -> float:
            of = {"tcp_connection_role": "client", "server_port": counted["port"], "network_io_direction": direction}
            return total(scrape(url(watcher)), "tcp_io_bytes_total", **of)

        wait_for(lambda: client("transmit") == counted["server_received"], "what was sent")
        assert client("receive") == counted["client_received"]
        found = scrape(url(watcher))
        assert watcher.stop() == 0
    points = last_points(tmp_path / "out")
    names = {
        "tcp.packets": "tcp_packets_total", "tcp.retransmits": "tcp_retransmits_total", "tcp.io": "tcp_io_bytes_total",
        "tcp.resets": "tcp_resets_total", "tcp.connections.closed": "tcp_connections_closed_total",
    }  # fmt: skip
    for name, scraped in names.items():
        assert total(found, scraped) == sum(int(point["asInt"]) for _, point in points[name]), name
    for name, scraped in (("handshake.duration", "handshake_duration"), ("rtt.smoothed", "rtt_smoothed")):
        counts = [int(point["count"]) for _, point in points[f"tcp.{name}"]]
        assert total(found, f"tcp_{scraped}_seconds_count") == sum(counts)
        assert total(found, f"tcp_{scraped}_seconds_bucket", le="+Inf") == sum(counts)
        assert total(found, f"tcp_{scraped}_seconds_bucket", le="64.0") == sum(counts)
    assert total(found, "target_info", job="tcpio-otel") == 1


@pytest.mark.skipif(KERNEL < (5, 19), reason="before 5.19 nobody may look at sockets without privileges")
def test_a_scrape_is_exact_while_connections_go_on_and_packets_are_lost(namespace: Namespace, tmp_path: Path) -> None:
    """Sockets are looked at for it."""
    small = {"TCPIO_CAPTURE_RING_MEMORY": "1MiB"}
    with (
        agent(tmp_path, "run", "--otlp-file", "out", **only(namespace), **SCRAPED, **small) as watcher,
        drawing(namespace, 3, 20_000_000) as conversation,
    ):
        for _ in range(2):
            watcher.process.send_signal(signal.SIGSTOP)
            counted, _rtt_us = conversation.draw()
            watcher.process.send_signal(signal.SIGCONT)
            found = scrape(url(watcher))
            for role, direction in (("client", "receive"), ("server", "transmit")):
                of = {"tcp_connection_role": role, "network_io_direction": direction}
                assert total(found, "tcp_io_bytes_total", server_port=conversation.port, **of) == counted
        assert (
            total(found, "tcp_rtt_smoothed_seconds_count", server_port=conversation.port, tcp_connection_role="server")
            == 6
        )
        conversation.end()
        assert watcher.stop() == 0
    assert watcher.ledger()["dropped"] > 0


def test_prometheus_scrapes_it(namespace: Namespace, tmp_path: Path) -> None:
    """What it keeps is whose the traffic was, and what programs counted."""
    or_skip(prometheus.build)
    signals = {"TCPIO_SIGNALS_LOGS": "none", "TCPIO_SIGNALS_TRACES": "none", "TCPIO_SIGNALS_METRICS": "none"}
    with agent(tmp_path, "run", **only(namespace), **SCRAPED, **signals) as watcher:
        counted = namespace.traffic("exchange", "4", "50", "1000", "30000")
        with prometheus.started(tmp_path, urlsplit(url(watcher)).netloc) as asked:
            sent = f'tcp_io_bytes_total{{server_port="{counted["port"]}",tcp_connection_role="client"}}'
            query = f"sum by (job, network_io_direction) ({sent})"

            def told() -> dict[str, float]:
                return {labels["network_io_direction"]: value for labels, value in asked.query(query)}

            both = {"transmit": counted["server_received"], "receive": counted["client_received"]}
            wait_for(lambda: told() == both, "a scrape with everything")
            assert [value for _, value in asked.query("up")] == [1]
            ((labels, value),) = asked.query("tcpio_packets_seen_total")
            assert (labels["job"], value > 0) == ("tcpio-otel", True)
            median = f'histogram_quantile(0.5, tcp_handshake_duration_seconds{{server_port="{counted["port"]}"}})'
            assert all(0 < value < 1 for _, value in asked.query(median))
            assert len(asked.query(median)) == 2
            joined = f"{sent} * on (job, instance) group_left (os_type) target_info"
            assert {labels["os_type"] for labels, _ in asked.query(joined)} == {"linux"}
        assert watcher.stop() == 0


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """Ends it with one line, before anything was recorded."""
    with agent(tmp_path / "one", "run", "--otlp-file", "out", **SCRAPED) as watcher:
        taken = urlsplit(url(watcher)).netloc
        with pytest.raises(AssertionError, match=f"cannot listen on {taken} .metrics.listen.: Address already in use"):
            agent(tmp_path / "two", "run", "--otlp-file", "out", TCPIO_METRICS_LISTEN=taken).__enter__()
