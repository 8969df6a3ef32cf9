"""A real Telegraf: what comes out of it is what programs counted, and what the ledger says."""

import os
import random
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from tcpio_otel import privileges
from tcpio_otel.encoding import line_protocol as lines
from tests.emitted import Emitted, account
from tests.integration.collector import collector
from tests.kernel.harness import Namespace, new_namespace, only, plain, resident_bytes, wait_for
from tests.peers.go import or_skip
from tests.peers.telegraf import SHIPPED, Metric, Telegraf, build, telegraf
from tests.unit.encoding.test_encoding_line_protocol import sayable

EXECD = (SHIPPED / "tcpio-otel-execd.conf").read_text()
EXEC = (SHIPPED / "tcpio-otel-exec.conf").read_text()
LEDGER = re.compile(r"seen (\d+) = exported (\d+) \+ filtered (\d+).*? \+ dropped (\d+).*? \+ in flight (\d+)")
NAMES = ("packets_seen", "packets_exported", "packets_filtered", "packets_dropped", "packets_in_flight")


@pytest.fixture(scope="module", autouse=True)
def _telegraf_is_built() -> None:
    or_skip(build)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace of the test's own, on a host where the probe can be loaded."""
    if missing := privileges.missing_to_load():
        pytest.skip(f"needs {', '.join(f'CAP_{name.name}' for name in missing)}: run the tests as root")
    with new_namespace() as made:
        yield made


def environment(namespace: Namespace, **more: str) -> dict[str, str]:
    """The agent's: that namespace, with packets, and what comes beside."""
    return {**only(namespace), "TCPIO_TELEGRAF_PACKETS": "true", **more}


def ledgers(running: Telegraf) -> list[dict[str, int]]:
    """What the agent has said of its ledger at its ends, as numbers."""
    assert "UNACCOUNTED" not in running.log
    return [dict(zip(NAMES, map(int, found), strict=True)) for found in LEDGER.findall(running.log)]


def last(metrics: list[Metric]) -> list[Metric]:
    """What each series said last."""
    return list({(one.name, *sorted(one.tags.items())): one for one in metrics}.values())


def total(metrics: list[Metric], field: str, **tags: str) -> int:
    """The sum of a field over metrics with these tags."""
    return sum(int(one.fields[field]) for one in metrics if tags.items() <= one.tags.items())


def agree(running: Telegraf, counted: list[dict[str, Any]]) -> dict[str, int]:
    """Connections and totals are what programs counted, packets are what the ledger says; returns what the agent said.

    Everything has another time, and totals do not depend on whether connections found room.
    """
    for kind, taken in (("tag", attrgetter("tags")), ("field", attrgetter("fields"))):
        account(Emitted(lines={(one.name, kind, name) for one in running.metrics() for name in taken(one)}))
    agent = running.metrics("tcpio")[-1].fields
    ledger = {name: int(agent[name]) for name in NAMES}
    assert ledgers(running) in ([ledger], [])  # of what inputs.exec starts, Telegraf shows one line
    assert len(running.metrics("tcp_packet")) == ledger["packets_exported"]
    assert ledger["packets_in_flight"] == 0
    for name in ("tcp_packet", "tcp_connection"):
        times = [one.time_ns for one in running.metrics(name)]
        assert len(set(times)) == len(times)
    connections, series = running.metrics("tcp_connection"), last(running.metrics("tcp_peer"))
    assert len(connections) == agent["lines_of_connections_written"]
    assert total(series, "connections_closed") == len(connections) + agent["lines_of_connections_dropped"]
    if not agent["lines_of_connections_dropped"]:
        for field in ("bytes_sent", "bytes_received", "packets_sent", "packets_received", "retransmits"):
            assert total(series, field) == total(connections, field)
    for one in counted:
        port = {"server_port": str(one["port"])}
        for role, sent, received in (("client", "server", "client"), ("server", "client", "server")):
            of = {"connection_role": role}
            assert total(series, "bytes_sent", **of, **port) == one[f"{sent}_received"]
            assert total(series, "bytes_received", **of, **port) == one[f"{received}_received"]
            assert total(series, "connections_opened", **of, **port) == one["connections"]
            assert total(series, "connections_closed", **of, **port) == one["connections"]
    return agent


@pytest.mark.parametrize("mode", ["none", "STDIN", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_telegraf_is_told_what_happened(namespace: Namespace, tmp_path: Path, mode: str) -> None:
    """However it asks: once for each time, and the rest when it closes the agent's input."""
    inputs = EXECD.replace('signal = "STDIN"', f'signal = "{mode}"')
    # A signal that comes before it is listened to would end the agent.
    inputs += '  collection_offset = "2s"\n' if mode.startswith("SIG") else ""
    with telegraf(tmp_path, inputs, environment=environment(namespace, TCPIO_TELEGRAF_INTERVAL="1s")) as running:
        running.child()
        began, before, counted = time.time(), len(running.metrics("tcpio")), []
        for run in (("4", "50", "1000", "30000"), ("6", "20", "70000", "10")):
            counted.append(namespace.traffic("exchange", *run))
            told = len(running.metrics("tcpio"))
            wait_for(lambda told=told: len(running.metrics("tcpio")) > told + 1, "Telegraf to ask again")  # type: ignore[misc]
        namespace.traffic("refused", "4")
        namespace.traffic("reset")
        assert running.stop() == 0
    assert running.errors() == []
    agree(running, counted)
    series = last(running.metrics("tcp_peer"))
    assert total(series, "connections_failed") == 1
    assert total(series, "resets") == 2
    # All totals told at once have one time, and there are no more of these than Telegraf asked: at both ends of
    # that time, what was under way when it began, and the end.
    assert len(running.metrics("tcpio")) - before <= time.time() - began + 3
    assert {one.time_ns for one in running.metrics("tcp_peer")} <= {one.time_ns for one in running.metrics("tcpio")}


def test_a_capture_now_and_then(namespace: Namespace, tmp_path: Path) -> None:
    """inputs.exec: bounded, with times to the nanosecond."""
    with telegraf(tmp_path, EXEC, "--once", environment=environment(namespace)) as running:
        running.child()
        counted = [namespace.traffic("exchange", "4", "50", "1000", "30000")]
        assert running.process.wait(60) == 0
    assert running.errors() == []
    agree(running, counted)
    assert len({one.time_ns % 1000 for one in running.metrics("tcp_packet")}) > 10


def test_a_telegraf_that_stands_still_costs_detail_alone(namespace: Namespace, tmp_path: Path) -> None:
    """Traffic goes on, memory stays bounded, what finds no room is counted, and the totals are exact all the same."""
    settings = environment(
        namespace, TCPIO_EXPORT_QUEUE_MEMORY="1MiB", TCPIO_BATCH_MAX_BYTES="256KiB", TCPIO_LOG_LEVEL="debug"
    )
    with telegraf(tmp_path, EXECD, environment=settings) as running:
        child = running.child()
        counted = [namespace.traffic("exchange", "4", "20", "1000", "30000")]
        running.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        counted += [namespace.traffic("exchange", "4", "1000", "100", "100000") for _ in range(3)]
        assert time.monotonic() - began < 60  # nobody waits for Telegraf, which stands still for as long as it takes
        time.sleep(2)
        assert resident_bytes(child) < 400_000_000
        running.process.send_signal(signal.SIGCONT)
        wait_for(lambda: "takes" in running.log, "Telegraf to read again")
        assert running.stop() == 0
    assert running.errors() == []
    agent = agree(running, counted)
    assert agent["packets_dropped"] > 0
    reasons = {
        one.tags["reason"]: one.fields["packets"]
        for one in running.metrics("tcpio_packets")
        if one.tags["outcome"] == "dropped"
    }
    assert reasons["queue_full"] == agent["packets_dropped"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, "<nil>"), (signal.SIGKILL, "signal: killed")])
def test_telegraf_starts_the_agent_again(namespace: Namespace, tmp_path: Path, number: int, code: str) -> None:
    """Whether it ended in order, having told everything, or not; its totals begin anew."""
    inputs = EXECD.replace('restart_delay = "10s"', 'restart_delay = "1s"')
    with telegraf(tmp_path, inputs, environment=environment(namespace)) as running:
        first = running.child()
        before = namespace.traffic("exchange", "4", "10", "100", "100")
        os.kill(first, number)
        wait_for(lambda: f"exited: {code}" in running.log, "the agent to end")
        wait_for(lambda: running.child() != first, "another agent", 60)
        counted = namespace.traffic("exchange", "4", "30", "1000", "1000")
        assert running.stop() == 0
    # The rest is what Telegraf says when it asks while there is nobody.
    assert [line for line in running.errors() if not re.search("exited|closed file", line)] == []
    port = {"server_port": str(counted["port"]), "connection_role": "server"}
    assert total(last(running.metrics("tcp_peer")), "bytes_received", **port) == counted["server_received"]
    told = [one for one in running.metrics("tcp_connection") if one.fields["server_port"] == before["port"]]
    if number == signal.SIGTERM:
        assert len(told) == 2 * before["connections"]
        assert sum(each["packets_exported"] for each in ledgers(running)) == len(running.metrics("tcp_packet"))


def test_telegraf_is_killed(namespace: Namespace, tmp_path: Path) -> None:
    """Its end of the pipes is closed then, and the agent ends too."""
    with telegraf(tmp_path, EXECD, environment=environment(namespace)) as running:
        child = running.child()
        namespace.traffic("exchange", "4", "10", "100", "100")
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "the agent to end", 15)


def test_what_is_told_as_tags_can_be_chosen(namespace: Namespace, tmp_path: Path) -> None:
    """Addresses and ports are fields, but for those that were asked for; packets are not told, unless asked for."""
    inputs = EXECD.replace('"telegraf"]', '"telegraf", "-poll_interval", "1s", "--tag", "client_address"]')
    settings = {**only(namespace), "TCPIO_TELEGRAF_PACKETS": "false"}
    with telegraf(tmp_path, inputs, environment=settings) as running:
        running.child()
        counted = namespace.traffic("exchange", "6", "10", "100", "100")
        assert running.stop() == 0
    assert running.metrics("tcp_packet") == []
    (ledger,) = ledgers(running)
    assert ledger["packets_seen"] == ledger["packets_filtered"]
    tags = {name for one in running.metrics("tcp_connection") for name in one.tags}
    assert tags == {
        "service_name", "process_executable_name", "connection_role", "close_reason", "close_initiator",
        "client_address",
    }  # fmt: skip
    server = [one for one in last(running.metrics("tcp_peer")) if one.tags["connection_role"] == "server"]
    assert [one.tags["client_address"] for one in server] == ["::1"]
    assert total(server, "bytes_received") == counted["server_received"]


def test_metrics_go_on_by_otlp(namespace: Namespace, tmp_path: Path) -> None:
    """Through Telegraf's own OpenTelemetry output, into a real Collector, with the values that came out of a file."""
    with collector(tmp_path) as receiver:
        inputs = f'{EXECD}\n[[outputs.opentelemetry]]\n  service_address = "127.0.0.1:{receiver.grpc_port}"\n'
        with telegraf(tmp_path, inputs, environment=environment(namespace)) as running:
            running.child()
            namespace.traffic("exchange", "4", "50", "1000", "30000")
            assert running.stop() == 0
    assert running.errors() == []
    found: Counter[tuple[str, str, int]] = Counter()
    for metric in receiver.received("resourceMetrics", "scopeMetrics", "metrics"):
        for point in next(iter(value for value in metric.values() if isinstance(value, dict)))["dataPoints"]:
            tags = plain(point.get("attributes", []))
            found[metric["name"], str(sorted(tags.items())), int(point["timeUnixNano"])] += int(point.get("asInt", 0))
    expected: Counter[tuple[str, str, int]] = Counter()
    for one in running.metrics("tcp_peer"):
        for field in ("bytes_sent", "packets_received", "connections_closed"):
            expected[f"tcp_peer_{field}", str(sorted(one.tags.items())), one.time_ns] = one.fields[field]
    assert expected.total() > 0
    assert {key: found[key] for key in expected} == dict(expected)


NOBODY = 65534
ENTER = r"""
mount --bind "$1" "$2" && mount -t tmpfs -o mode=755 none "$1" || exit
find "$2" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | while read -r name; do
    mkdir "$1/$name" && mount --bind "$2/$name" "$1/$name" || exit
done
shift 2
exec "$@"
"""
"""Shows a directory's subdirectories to everybody, under their names, in a mount namespace."""


def entered(scratch: Path) -> tuple[str, ...]:
    """What to put before a command so that others than its owner can start what this interpreter runs, and itself."""
    behind = Path(sys.executable).resolve().parents
    closed = [place for place in behind if not place.stat().st_mode & stat.S_IXOTH]
    if not closed:
        return ()
    kept = scratch / "kept"
    kept.mkdir()
    return ("unshare", "--mount", "sh", "-c", ENTER, "sh", str(closed[-1]), str(kept))


@pytest.fixture
def everyones() -> Iterator[Path]:
    """A directory that others than its owner may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_the_service_needs_no_more_than_the_drop_in_gives(namespace: Namespace, everyones: Path) -> None:
    """As a user without rights, with the capabilities that it grants; the agent keeps none of them."""
    drop_in = (SHIPPED / "telegraf.service.d" / "tcpio-otel.conf").read_text()
    (granted,) = re.findall("^AmbientCapabilities=(.*)$", drop_in, re.M)
    names = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in granted.split())
    home = everyones / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    user = (
        *entered(everyones), "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
        f"--inh-caps={names}", f"--ambient-caps={names}", f"--bounding-set=-all,{names}",
    )  # fmt: skip
    with telegraf(home, EXECD, before=user, environment=environment(namespace)) as running:
        child = running.child()
        assert Path(f"/proc/{child}").stat().st_uid == NOBODY
        counted = namespace.traffic("exchange", "4", "10", "100", "100")
        assert running.stop() == 0
    assert running.errors() == []
    agree(running, [counted])


PARTS = ["\\", "\\", '"', " ", ",", "=", "\n", "\t", "\r", "\v", "\f", "\0", "a", "i", "1", "#", "é", "\U0001f600", "'"]


@pytest.mark.parametrize("stream", [False, True])
def test_telegraf_reads_what_was_said(tmp_path: Path, stream: bool) -> None:
    """Texts of all kinds as tags and fields, by both of its parsers: whole files, and the stream of inputs.execd."""
    chance, expected, said = random.Random(7), [], []
    for number in range(4000):
        tag, field = ("".join(chance.choices(PARTS, k=chance.randrange(7))) for _ in range(2))
        others = chance.choice([2.5e-7, -1, True, 2**63 - 1, 1e22])
        said.append(lines.line("m", lines.tags([("t", tag)]), lines.fields([("f", field), ("o", others)]), number + 1))
        tags = {"t": sayable(tag, r"[\0\t\n\v\f\r]|\\\Z")} if tag else {}
        expected.append(Metric("m", tags, {"f": sayable(field, r"[\0\n]"), "o": others}, number + 1))
    (tmp_path / "lines").write_bytes(b"".join(said))
    command = f"cat {shlex.quote(str(tmp_path / 'lines'))}; cat; exec >&- 2>&-; sleep 0.2"
    if stream:
        inputs = f'[[inputs.execd]]\n  command = ["sh", "-c", "{command}"]\n  data_format = "influx"\n'
    else:
        inputs = f'[[inputs.file]]\n  files = ["{tmp_path}/lines"]\n  data_format = "influx"\n  precision = "1ns"\n'
    with telegraf(tmp_path, inputs, *([] if stream else ["--once"])) as running:
        if stream:
            wait_for(lambda: len(running.metrics()) == len(expected) or running.errors(), "Telegraf to read")
            running.stop()
        else:
            running.process.wait(60)
    assert running.errors() == []
    assert sorted(running.metrics(), key=lambda one: one.time_ns) == expected
