"""The agent as its users run it, on real traffic, against tcpdump's and the programs' own account."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tcpio_otel.capture.loaders import Loader
from tcpio_otel.memory import CALM_NS
from tests.kernel import capture as recording
from tests.kernel import conformance, hosts
from tests.kernel.harness import (
    AGENT,
    TRAFFIC,
    Namespace,
    agent,
    attached,
    logs,
    resident_bytes,
    segments,
    spans,
    wait_for,
)

NAME = Path(sys.executable).resolve().name
"""What the kernel calls the programs of these tests."""


@pytest.mark.parametrize("family", ["4", "6"])
def test_watch_shows_both_ends_in_order(tmp_path: Path, namespace: Namespace, family: str) -> None:
    """One request over loopback: every packet at both ends, handshake in order, BYTES adding up."""
    with agent(tmp_path, "watch") as running:
        counted = namespace.traffic("exchange", family, "1", "500", "20000")
        wait_for(lambda: running.stdout().count("FIN|ACK") >= 4, "the table")
        assert running.stop() == 0
    address = "127.0.0.1" if family == "4" else "[::1]"
    server = f"{address}:{counted['port']}"
    lines = [line.split() for line in running.stdout().splitlines()[1:] if server in line]
    handshake = [(line[1] == server, line[2], line[5]) for line in lines[:6]]
    assert handshake == [
        (False, "->", "(SYN)"),
        (True, "<-", "(SYN)"),
        (True, "->", "(SYN|ACK)"),
        (False, "<-", "(SYN|ACK)"),
        (False, "->", "(ACK)"),
        (True, "<-", "(ACK)"),
    ]
    moved = Counter[tuple[bool, str]]()
    for line in lines:
        moved[line[1] == server, line[2]] += int(line[4])
    assert moved[False, "->"] == moved[True, "<-"] == counted["server_received"]
    assert moved[True, "->"] == moved[False, "<-"] == counted["client_received"]
    ledger = running.ledger()
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]


@pytest.mark.parametrize("family", ["4", "6"])
def test_probe_and_capture_file_tell_the_same(tmp_path: Path, namespace: Namespace, family: str) -> None:
    """What the probe records is, segment by segment, what tcpdump captured at once and the agent replays."""
    capture = tmp_path / "lo.pcap"
    live, replayed = tmp_path / "live", tmp_path / "replayed"
    with agent(tmp_path, "run", "--otlp-file", str(live)) as running, namespace.tcpdump(capture):
        for program in (("exchange", family, "20", "100", "100000"), ("refused", family), ("half_close",), ("reset",)):
            namespace.traffic(*program)
        wait_for(lambda: running.process.poll() is None, "the agent")
    subprocess.run([*AGENT, "run", "--source", f"pcap:{capture}", "--otlp-file", str(replayed)], check=True)
    theirs = segments(logs(replayed))
    # The probe sees the whole host: what else happens on it is not in the capture.
    ports = {(segment[2], segment[4]) for segment in theirs}
    ours = Counter({segment: n for segment, n in segments(logs(live)).items() if (segment[2], segment[4]) in ports})
    assert sum(theirs.values()) > 400
    assert ours - theirs == Counter()
    assert theirs - ours == Counter()


def _spans_of_connections(directory: Path) -> int:
    return sum(path.read_bytes().count(b'"name":"tcp.connection"') for path in directory.glob("traces*.jsonl"))


def test_spans_of_ten_thousand_short_connections_are_complete(
    tmp_path: Path, namespace: Namespace, loader: Loader
) -> None:
    """Two spans a connection, in one trace, server under client, with the programs' own totals; memory comes back.

    Rings and queues hold the burst whole, so that nothing is lost where the machine has other things to do.
    """
    data = tmp_path / "data"
    roomy = {"TCPIO_CAPTURE_RING_MEMORY": "128MiB", "TCPIO_EXPORT_QUEUE_MEMORY": "512MiB", "TCPIO_FILE_ROTATE": "1GiB"}
    with agent(tmp_path, "run", "--otlp-file", str(data), TCPIO_CAPTURE_LOADER=loader, **roomy) as running:
        namespace.traffic("exchange", "4", "300", "700", "9000")
        time.sleep(CALM_NS / 1e9 + 2)
        before, most = resident_bytes(running.pid, "RssAnon"), 0
        counted = namespace.traffic("exchange", "4", "10000", "700", "9000")

        def written() -> bool:
            nonlocal most
            most = max(most, resident_bytes(running.pid, "RssAnon"))
            return _spans_of_connections(data) >= 20_600

        wait_for(written, "the spans", 300)
        quarter = before + (most - before) // 4
        wait_for(lambda: resident_bytes(running.pid, "RssAnon") < quarter, "most of its memory to be given back", 300)
        assert running.stop() == 0
    found = [span for span in spans(data) if counted["port"] in (
        span["attributes"]["network.local.port"], span["attributes"]["network.peer.port"])]  # fmt: skip
    assert len(found) == 20_000, running.stderr()[-2000:]
    assert len({span["spanId"] for span in found}) == 20_000
    clients = {span["spanId"]: span for span in found if span["kind"] == 3}
    for span in found:
        attributes = span["attributes"]
        sent, received = (700, 9000) if span["kind"] == 3 else (9000, 700)
        assert (attributes["tcp.bytes.sent"], attributes["tcp.bytes.received"]) == (sent, received)
        assert (attributes["tcp.close.reason"], attributes["tcp.connection.end"]) == ("fin", "observed")
        assert attributes["tcp.close.initiator"] == ("peer" if span["kind"] == 3 else "local")
        assert attributes["tcp.totals.source"] == "kernel"
        if span["kind"] == 2:
            assert clients[span["parentSpanId"]]["traceId"] == span["traceId"]
    assert {event["name"] for event in found[0]["events"]} >= {"tcp.syn", "tcp.syn_ack", "tcp.established", "tcp.fin"}


def test_failures_say_so(tmp_path: Path, namespace: Namespace) -> None:
    """Refused and reset connections are errors with a type, at the end that had a socket."""
    data = tmp_path / "data"
    with agent(tmp_path, "run", "--otlp-file", str(data)) as running:
        for program in (("refused", "4"), ("refused", "6"), ("reset",), ("mapped",)):
            namespace.traffic(*program)
        assert running.stop() == 0
    found = [span["attributes"] for span in spans(data) if span["attributes"]["process.executable.name"] == NAME]
    told = Counter((span.get("error.type"), span["tcp.close.reason"], span["tcp.close.initiator"]) for span in found)
    assert told["connection_refused", "refused", "peer"] == 2
    assert told["connection_reset", "reset", "local"] == told["connection_reset", "reset", "peer"] == 1
    assert {span["network.type"] for span in found if span["tcp.close.reason"] != "refused"} == {"ipv4"}
    dropped = [
        log for log in logs(data) if log.get("tcp.drop.reason") == "NO_SOCKET" and log["network.local.port"] == 9
    ]
    assert len(dropped) == 2


def test_connections_older_than_the_agent_and_younger_than_its_end(tmp_path: Path, namespace: Namespace) -> None:
    """A connection that was there before and is there after is inherited, with its process and exact totals."""
    data = tmp_path / "data"
    command = ["ip", "netns", "exec", namespace.name, sys.executable, str(TRAFFIC), "hold"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with agent(tmp_path, "run", "--otlp-file", str(data)) as running:
            assert running.stop() == 0
        holder.communicate("")
        found = [span for span in spans(data) if span["attributes"].get("process.pid") == holder.pid]
    assert Counter(span["kind"] for span in found) == {2: 1, 3: 1}
    assert len({span["traceId"] for span in found}) == 1
    for span in found:
        attributes = span["attributes"]
        assert (attributes["tcp.connection.start"], attributes["tcp.connection.end"]) == ("inherited", "agent_shutdown")
        totals = (attributes["tcp.bytes.sent"], attributes["tcp.bytes.received"])
        assert totals == ((1234, 0) if span["kind"] == 3 else (0, 1234))


def test_a_start_amid_a_thousand_connections(tmp_path: Path, namespace: Namespace, loader: Loader) -> None:
    """Each has two spans, inherited, with the right process and totals, in one trace; half of them end meanwhile.

    Without the kernel's types a connection is known once it sends: one that stays silent has none.
    """
    data, count = tmp_path / "data", 1000
    command = ["ip", "netns", "exec", namespace.name, sys.executable, str(TRAFFIC), "hold_many", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        held = json.loads(holder.stdout.readline())
        with agent(
            tmp_path, "run", "--otlp-file", str(data), TCPIO_CAPTURE_LOADER=loader, TCPIO_FILE_ROTATE="1GiB"
        ) as running:
            holder.stdin.write("close\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "closed\n"
            assert running.stop() == 0
        holder.communicate("")
    traces: dict[int, set[str]] = {}
    for span in spans(data):
        attributes = span["attributes"]
        if held["port"] not in (attributes["network.local.port"], attributes["network.peer.port"]):
            continue
        client = attributes["network.peer.port"] == held["port"]
        port = attributes["network.local.port" if client else "network.peer.port"]
        number = held["ports"][str(port)]
        totals = (100 + number, 5000 + number)
        assert (attributes["tcp.bytes.sent"], attributes["tcp.bytes.received"]) == (totals if client else totals[::-1])
        assert attributes["process.pid"] == (holder.pid if client else held["server"])
        assert attributes["tcp.connection.start"] == "inherited"
        ended = attributes["tcp.connection.end"] == "observed"
        # Without the kernel's word an end is known by both FINs, and a TIME_WAIT may get the second one.
        assert ended != number % 2 or (loader is Loader.BCC and client)
        assert attributes.get("tcp.close.reason") == (None if number % 2 else "fin")
        assert span["kind"] == (3 if client else 2)
        traces.setdefault(number, set()).add(span["traceId"])
    assert len(traces) == (count if loader is Loader.LIBBPF else count / 2)
    assert all(len(both) == 1 for both in traces.values())
    assert len(set.union(*traces.values())) == len(traces)


def test_ten_agents_at_once_are_each_complete(tmp_path: Path, namespace: Namespace, loader: Loader) -> None:
    """Every one of them tells what tcpdump tells, and finds room to start beside the others."""
    capture, before = tmp_path / "lo.pcap", attached()
    with ExitStack() as stack:
        agents = []
        for number in range(10):
            (directory := tmp_path / str(number)).mkdir()
            agents.append(
                stack.enter_context(
                    agent(directory, "run", "--otlp-file", str(directory / "data"), TCPIO_CAPTURE_LOADER=loader)
                )
            )
        with namespace.tcpdump(capture):
            port = namespace.traffic("exchange", "4", "50", "100", "50000")["port"]
        assert all(running.stop() == 0 for running in agents)
    wait_for(lambda: attached() == before, "the kernel to let go")
    subprocess.run([*AGENT, "run", "--source", f"pcap:{capture}", "--otlp-file", str(tmp_path / "theirs")], check=True)
    theirs = segments(logs(tmp_path / "theirs"))
    assert theirs.total() > 1000
    for number in range(10):
        ours = segments(
            [log for log in logs(tmp_path / str(number) / "data")
             if port in (log["network.local.port"], log["network.peer.port"])]
        )  # fmt: skip
        assert not ours - theirs
        for way, _, local_port, *_, flags, size, _ in theirs - ours:
            # What BCC cannot show: a TIME_WAIT may get the last FIN, and answer it.
            assert (loader, local_port, size) == (Loader.BCC, port, 0)
            assert (way, flags) in {("receive", "FIN|ACK"), ("transmit", "ACK")}


def test_long_lived_connections_tell_of_themselves_meanwhile(tmp_path: Path, namespace: Namespace) -> None:
    """Open connections send summaries, growing, under the ids of the span to come; the ledger knows only packets."""
    data = tmp_path / "data"
    with agent(tmp_path, "run", "--otlp-file", str(data), TCPIO_CONNECTIONS_SUMMARY_INTERVAL="300ms") as running:
        counted = namespace.traffic("chat", "2")
        assert running.stop() == 0
    everything = logs(data)
    summaries = [log for log in everything if "tcp.connection.start" in log]
    assert running.ledger()["exported"] == len(everything) - len(summaries)
    assert f"logs: exported {len(everything)}" in running.stderr()
    for port in ("network.local.port", "network.peer.port"):
        ours = [summary for summary in summaries if summary[port] == counted["port"]]
        assert len(ours) >= 4
        sent = [summary["tcp.bytes.sent"] for summary in ours]
        assert sent == sorted(sent)
        assert 0 < sent[0] < sent[-1] <= counted["sent"]
        (span,) = [span["attributes"] for span in spans(data) if span["attributes"][port] == counted["port"]]
        assert {summary["tcp.connection.id"] for summary in ours} == {span["tcp.connection.id"]}
        assert span["tcp.bytes.sent"] == counted["sent"]


def test_no_thread_keeps_a_capability(tmp_path: Path, namespace: Namespace, loader: Loader) -> None:
    """While packets flow, every thread of the agent has given up every capability."""
    with agent(tmp_path, "run", "--otlp-file", str(tmp_path / "data"), TCPIO_CAPTURE_LOADER=loader) as running:
        namespace.traffic("exchange", "4", "50", "100", "100")
        threads = list(Path(f"/proc/{running.pid}/task").iterdir())
        assert len(threads) > 4
        for thread in threads:
            status = (thread / "status").read_text()
            for line in ("CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"):
                assert line in status
        assert running.stop() == 0
    assert running.ledger()["exported"] >= 500


def test_filters_keep_the_rest_out_and_count_it(tmp_path: Path, namespace: Namespace, loader: Loader) -> None:
    """A port and a network are filtered in the kernel; what did not pass is in the ledger."""
    # A refused attempt is four records, of which BCC's probe misses what no socket received or, over IPv6, sent.
    shown = {4: 4, 6: 4} if loader is Loader.LIBBPF else {4: 3, 6: 2}
    with agent(tmp_path, "watch", "--port", "9", "--json", TCPIO_CAPTURE_LOADER=loader) as running:
        namespace.traffic("exchange", "4", "3", "10", "10")
        namespace.traffic("refused", "4")
        wait_for(lambda: len(running.stdout().splitlines()) >= shown[4], "the lines")
        assert running.stop() == 0
    lines = [json.loads(line) for line in running.stdout().splitlines()]
    assert {9} == {min(line["network.local.port"], line["network.peer.port"]) for line in lines}
    ledger = running.ledger()
    assert ledger["exported"] == len(lines) == shown[4]
    assert ledger["filtered"] >= 30
    assert ledger["seen"] == ledger["exported"] + ledger["filtered"]
    with agent(tmp_path, "watch", "--cidr", "::1/128", "--json", TCPIO_CAPTURE_LOADER=loader) as running:
        namespace.traffic("refused", "4")
        namespace.traffic("refused", "6")
        wait_for(lambda: len(running.stdout().splitlines()) >= shown[6], "the lines")
        assert running.stop() == 0
    assert {json.loads(line)["network.local.address"] for line in running.stdout().splitlines()} == {"::1"}


def test_a_killed_agent_leaves_nothing_attached(tmp_path: Path, loader: Loader) -> None:
    """After SIGKILL the kernel has let go of every program, and the next agent starts at once."""
    before = attached()
    with agent(tmp_path, "run", "--otlp-file", str(tmp_path / "data"), TCPIO_CAPTURE_LOADER=loader) as running:
        assert attached() > before
        running.stop(signal.SIGKILL)
    wait_for(lambda: attached() == before, "the kernel to let go")
    with agent(tmp_path, "run", "--otlp-file", str(tmp_path / "data"), TCPIO_CAPTURE_LOADER=loader) as running:
        assert running.stop() == 0


def test_watch_ends_cleanly_when_its_reader_does(tmp_path: Path, namespace: Namespace) -> None:
    """`watch | head` ends by itself, without a word."""
    script = f"{' '.join(AGENT)} watch 2>{tmp_path}/said | head -n 3"
    with subprocess.Popen(["bash", "-o", "pipefail", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        wait_for(lambda: namespace.traffic("exchange", "4", "1", "1", "1") and shell.poll() is not None, "the end")
        assert len(shell.stdout.read().splitlines()) == 3
    assert shell.returncode == 0
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("types", ["shown", "hidden"])
def test_check_tells_what_each_loader_offers(types: str, lacks_bcc: str) -> None:
    """Time, memory and hooks of each; `auto` takes BCC where the kernel does not describe its types."""
    if lacks_bcc:
        pytest.skip(lacks_bcc)
    hide = "mount -t tmpfs none /sys/kernel/btf && " if types == "hidden" else ""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{hide}exec {' '.join(AGENT)} check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    lines = {line[4:18].strip(): line for line in done.stdout.splitlines()}
    offer = r"in \d+ ms with \d+ MB, and attaches it at .*ingress, egress"
    assert re.search(offer, lines["by bcc"])
    assert "segments received by TIME_WAIT or no socket are not recorded" in lines["by bcc"]
    if types == "shown":
        assert re.search(offer, lines["by libbpf"])
        assert lines["loader"].endswith("auto: libbpf")
    else:
        assert lines["kernel BTF"].startswith("--")
        assert lines["by libbpf"].startswith("--")
        assert lines["loader"].endswith("auto: bcc")


def test_a_namespace_deleted_mid_connection(tmp_path: Path, loader: Loader) -> None:
    """Its end closes on the way out, and takes the device along; what the other end then sends goes nowhere."""
    data, capture = tmp_path / "data", tmp_path / "server.pcap"
    with hosts.host(f"tcpio-test-{os.getpid()}-s") as server, ExitStack() as client_exists:
        client = client_exists.enter_context(hosts.host(f"tcpio-test-{os.getpid()}-c"))
        hosts.veth(client, server)
        hosts.add_address(client, "eth0", "10.199.0.1/24")
        hosts.add_address(server, "eth0", "10.199.0.2/24")
        # A process of its own holds the client's end: the namespace goes when it goes.
        command = [*("ip", "netns", "exec", client.name), sys.executable, str(TRAFFIC), "dial", "10.199.0.2", "9000"]
        with (
            recording.tcpdump(server, capture),
            agent(tmp_path, "run", "--otlp-file", str(data), TCPIO_CAPTURE_LOADER=loader) as running,
        ):
            with server.socket(socket.AF_INET) as listener:
                listener.bind(("10.199.0.2", 9000))
                listener.listen()
                with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
                    accepted, _ = listener.accept()
                    assert accepted.recv(5, socket.MSG_WAITALL) == b"hello"
                    holder.kill()
                client_exists.close()
                assert accepted.recv(1) == b""
                wait_for(lambda: "eth0" not in server.run("ip", "link"), "the device to go with its peer's namespace")
                with suppress(OSError):
                    accepted.sendall(b"into nothing")
            assert running.stop() == 0
            accepted.close()
    theirs = Counter({segment: count for segment, count in recording.segments(capture).items() if segment[2] == 9000})
    ours = Counter(
        conformance.segment_of(log) for log in logs(data) if log.get("network.local.port") == 9000 and "tcp.seq" in log
    )
    assert ours == theirs
    assert ours.total() > 6
    ends = {span["kind"]: span["attributes"] for span in spans(data)
            if 9000 in (span["attributes"]["network.local.port"], span["attributes"]["network.peer.port"])}  # fmt: skip
    assert (ends[2]["tcp.connection.end"], ends[3]["tcp.connection.end"]) == ("agent_shutdown", "observed")
    assert (ends[2]["tcp.bytes.received"], ends[3]["tcp.bytes.sent"]) == (5, 5)
    assert ends[3]["tcp.close.initiator"] == "local"
