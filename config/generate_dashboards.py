"""Questions of docs/queries.md to Grafana dashboards: config/dashboards/*.json.

The tables of a dashboard are the queries of that page, over the dashboard's time range; series over time are written
here. Run it after a change of either; a test compares its output with the files.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "queries.md"
DASHBOARDS = ROOT / "config" / "dashboards"
BLOCK = re.compile(r"^```(\w+)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
COLUMNS = 24

Json = dict[str, Any]


def asked(title: str, language: str, number: int = 0) -> str:
    """A query of the page: the one with that number among those in the language below the heading."""
    _, _, below = PAGE.read_text().partition(f"\n## {title}\n")
    section, _, _ = below.partition("\n## ")
    return [text for kind, text in BLOCK.findall(section) if kind == language][number]


@dataclass(frozen=True)
class Panel:
    """What a panel shows, and how large it is: columns of 24, and rows."""

    title: str
    kind: str
    query: str
    width: int = 12
    height: int = 9
    unit: str = "short"
    legend: str = ""
    """For series of Prometheus: what each is called."""


@dataclass(frozen=True)
class Source:
    """A kind of data source, and how a query is written down for it."""

    plugin: str
    target: Callable[[Panel], Json]


def _of_clickhouse(panel: Panel) -> Json:
    table = panel.kind != "timeseries"
    # `format` is what the plugin's backend reads, `queryType` what its editor shows.
    kind = {"queryType": "table", "format": 1} if table else {"queryType": "timeseries", "format": 0}
    sql = panel.query.strip().replace("Timestamp > now() - INTERVAL 1 HOUR", "$__timeFilter(Timestamp)")
    return {
        "pluginVersion": "4.0.0",
        "editorType": "sql",
        "rawSql": sql.replace("{trace:String}", "'${trace}'"),
        **kind,
    }


def _of_victorialogs(panel: Panel) -> Json:
    kind = {"timeseries": "statsRange", "table": "stats", "stat": "stats", "logs": "instant"}[panel.kind]
    query = re.sub(r"\s+", " ", panel.query).removeprefix("_time:1h ").replace("{trace}", '"${trace}"')
    return {"expr": query, "queryType": kind, "editorMode": "code"}


def _of_prometheus(panel: Panel) -> Json:
    return {"expr": panel.query, "instant": panel.kind != "timeseries", "legendFormat": panel.legend}


CLICKHOUSE = Source("grafana-clickhouse-datasource", _of_clickhouse)
VICTORIALOGS = Source("victoriametrics-logs-datasource", _of_victorialogs)
PROMETHEUS = Source("prometheus", _of_prometheus)

CONNECTIONS = """
FROM otel_traces
WHERE SpanName = 'tcp.connection' AND Timestamp > now() - INTERVAL 1 HOUR"""
FAILED = """
SELECT uniqExactIf(TraceId, SpanAttributes['error.type'] != '') / uniqExact(TraceId) AS failed"""
AGAIN = """
SELECT
    sum(toUInt64OrZero(SpanAttributes['tcp.retransmits'])) / sum(toUInt64OrZero(SpanAttributes['tcp.packets.sent']))
        AS again"""
ROUND_TRIP = """
SELECT quantile(0.95)(toFloat64OrNull(SpanAttributes['tcp.rtt.smoothed'])) AS seconds"""
AGAIN_OVER_TIME = """
SELECT $__timeInterval(Timestamp) AS time, ServiceName, count() AS again
FROM otel_logs
WHERE EventName = 'tcp.packet' AND LogAttributes['tcp.retransmit'] = 'true' AND Timestamp > now() - INTERVAL 1 HOUR
GROUP BY time, ServiceName
ORDER BY time"""
FAILED_OVER_TIME = f"""
SELECT $__timeInterval(Timestamp) AS time, SpanAttributes['error.type'] AS error, uniqExact(TraceId) AS connections
{CONNECTIONS.strip()} AND error != ''
GROUP BY time, error
ORDER BY time"""
TABLES = (
    "Which pods retransmit",
    "Whose handshakes are slow",
    "Whose backlog is full",
    "Who resets whom",
    "Top talkers",
    "Connections that never closed",
    "Asymmetric loss between two ends",
)

CONNECTION_PANELS = (
    Panel("Connections that ended", "stat", f"SELECT uniqExact(TraceId) AS connections{CONNECTIONS}", 6, 4),
    Panel("Connections that failed", "stat", FAILED + CONNECTIONS, 6, 4, "percentunit"),
    Panel("Segments sent again", "stat", AGAIN + CONNECTIONS, 6, 4, "percentunit"),
    Panel("Round trip, 95 of 100 below", "stat", ROUND_TRIP + CONNECTIONS, 6, 4, "s"),
    Panel("Segments sent again, by who sent them", "timeseries", AGAIN_OVER_TIME),
    Panel("Connections that failed, by why", "timeseries", FAILED_OVER_TIME),
    *(Panel(title, "table", asked(title, "sql")) for title in TABLES),
    Panel("The packets of trace ${trace}", "table", asked("The packets of this trace", "sql"), COLUMNS, 12),
    Panel("What its requests came to on the wire", "table", asked("The packets of this trace", "sql", 1)),
    Panel("The connections that carried it", "table", asked("The packets of this trace", "sql", 2)),
)

PACKET = 'event_name:="tcp.packet"'
PACKET_PANELS = (
    Panel("Packets", "stat", f"{PACKET} | stats count() packets", 8, 4),
    Panel("Sent again", "stat", f"{PACKET} tcp.retransmit:=true | stats count() again", 8, 4),
    Panel("Resets", "stat", f'{PACKET} tcp.flags:~"RST" network.io.direction:=transmit | stats count() resets', 8, 4),
    Panel(
        "Payload sent, by who sent it", "timeseries",
        f"{PACKET} network.io.direction:=transmit | stats by (service.name) sum(tcp.payload.size) bytes",
        unit="bytes",
    ),
    Panel(
        "Sent again, by who sent it", "timeseries",
        f"{PACKET} tcp.retransmit:=true | stats by (service.name) count() again",
    ),
    *(
        Panel(title, "table", asked(title, "logsql"))
        for title in ("Which pods retransmit", "Who resets whom", "Top talkers")
    ),
    Panel(
        "Received and dropped, by why", "table",
        f"{PACKET} tcp.drop.reason:* | stats by (k8s.pod.name, tcp.drop.reason) count() dropped",
    ),
    Panel("The packets of trace ${trace}", "logs", asked("The packets of this trace", "logsql"), COLUMNS, 12),
)  # fmt: skip

NODE = "{{instance}}"
AGENT_PANELS = (
    Panel(
        "Packets seen", "timeseries", "sum by (instance) (rate(tcpio_packets_seen_total[$__rate_interval]))",
        unit="pps", legend=NODE,
    ),
    Panel("Open connections", "timeseries", "sum by (instance) (tcpio_connections_open)", legend=NODE),
    Panel(
        "What became of packets", "timeseries", "sum by (tcpio_outcome, tcpio_reason) (tcpio_packets)",
        legend="{{tcpio_outcome}} {{tcpio_reason}}",
    ),
    Panel(
        "Dropped, by why", "timeseries", asked("Is it the agent", "promql"), legend=f"{NODE} {{{{tcpio_reason}}}}"
    ),
    Panel(
        "What went wrong without costing a packet", "timeseries", asked("Is it the agent", "promql", 1),
        legend=f"{NODE} {{{{tcpio_fault}}}}",
    ),
    *(
        Panel(
            title, "timeseries",
            f"sum by (instance, error_type) (rate(otel_sdk_exporter_{signal}_exported_total[$__rate_interval]))",
            legend=f"{NODE} {{{{error_type}}}}",
        )
        for title, signal in (("Log records exported", "log"), ("Spans exported", "span"))
    ),
)  # fmt: skip

PAIR = "{{job}} to {{tcp_peer_service_name}}"
CLIENTS = '{tcp_connection_role="client"}'


def rate(metric: str, labels: str = "") -> str:
    """Of a counter, by workload and peer."""
    return f"sum by (job, tcp_peer_service_name) (rate({metric}{labels}[$__rate_interval]))"


def slowest(histogram: str) -> str:
    """Of 100 what 99 are below, by workload and peer."""
    return f"histogram_quantile(0.99, {rate(histogram, CLIENTS)})"


TRAFFIC_PANELS = (
    Panel("Payload each way", "timeseries", rate("tcp_io_bytes_total", CLIENTS), unit="Bps", legend=PAIR),
    Panel(
        "Segments sent again, of those sent", "timeseries",
        rate("tcp_retransmits_total") + " / " + rate("tcp_packets_total", '{network_io_direction="transmit"}'),
        unit="percentunit", legend=PAIR,
    ),
    Panel("Connections made", "timeseries", rate("tcp_connections_opened_total", CLIENTS), unit="cps", legend=PAIR),
    Panel("Connections that failed", "timeseries", rate("tcp_connections_failed_total"), unit="cps", legend=PAIR),
    Panel(
        "Resets, by who sent them", "timeseries", rate("tcp_resets_total", '{tcp_close_initiator="local"}'),
        unit="cps", legend=PAIR,
    ),
    Panel(
        "Handshakes, 99 of 100 below", "timeseries", slowest("tcp_handshake_duration_seconds"), unit="s", legend=PAIR
    ),
    Panel("Round trips, 99 of 100 below", "timeseries", slowest("tcp_rtt_smoothed_seconds"), unit="s", legend=PAIR),
    Panel(
        "Received and dropped, by why", "timeseries",
        "sum by (job, tcp_drop_reason) (rate(tcp_drops_total[$__rate_interval]))",
        legend="{{job}} {{tcp_drop_reason}}",
    ),
)  # fmt: skip


def placed(panels: Iterable[Panel]) -> Iterator[tuple[Panel, Json]]:
    """Panels from left to right, line by line."""
    x = y = line = 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, y, line = 0, y + line, 0
        yield panel, {"x": x, "y": y, "w": panel.width, "h": panel.height}
        x, line = x + panel.width, max(line, panel.height)


def dashboard(uid: str, title: str, source: Source, panels: Iterable[Panel], *, traces: bool) -> str:
    """A dashboard's JSON; with `traces` it has a field for the id of one."""
    chosen = {"type": source.plugin, "uid": "${source}"}
    variables: list[Json] = [{"name": "source", "label": "Data source", "type": "datasource", "query": source.plugin}]
    if traces:
        variables.append({"name": "trace", "label": "Trace id", "type": "textbox", "query": ""})
    ids = count(1)
    shown = [
        {
            "id": next(ids),
            "title": panel.title,
            "type": panel.kind,
            "gridPos": place,
            "datasource": chosen,
            "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
            "targets": [{"refId": "A", "datasource": chosen, **source.target(panel)}],
        }
        for panel, place in placed(panels)
    ]
    whole = {
        "uid": uid,
        "title": title,
        "description": "Generated by config/generate_dashboards.py of tcpio-otel; not to be edited.",
        "tags": ["tcpio-otel"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "1m",
        "templating": {"list": variables},
        "panels": shown,
    }
    return json.dumps(whole, indent=2) + "\n"


FILES = {
    DASHBOARDS / "connections.json": lambda: dashboard(
        "tcpio-connections", "TCP connections", CLICKHOUSE, CONNECTION_PANELS, traces=True
    ),
    DASHBOARDS / "packets.json": lambda: dashboard(
        "tcpio-packets", "TCP packets", VICTORIALOGS, PACKET_PANELS, traces=True
    ),
    DASHBOARDS / "traffic.json": lambda: dashboard(
        "tcpio-traffic", "TCP traffic", PROMETHEUS, TRAFFIC_PANELS, traces=False
    ),
    DASHBOARDS / "agents.json": lambda: dashboard(
        "tcpio-agents", "tcpio-otel agents", PROMETHEUS, AGENT_PANELS, traces=False
    ),
}

if __name__ == "__main__":
    DASHBOARDS.mkdir(exist_ok=True)
    for path, content in FILES.items():
        path.write_text(content())
