"""The command line as a stranger meets it: one line, an exit code, no traceback."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tcpio_otel.config import LEAVES
from tests.integration.test_integration_collector import capture
from tests.parsers import commands

AGENT = [sys.executable, "-m", "tcpio_otel.cli"]
ROOT = Path(__file__).parents[3]


def called(
    *arguments: str, cwd: Path | None = None, before: tuple[str, ...] = (), **environment: str
) -> tuple[int, str, str]:
    """Run the command; its exit code, and both outputs."""
    result = subprocess.run(
        [*before, *AGENT, *arguments], cwd=cwd or ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "--prot", "1"], 2, "unrecognized arguments: --prot"),
        (["frobnicate"], 2, "invalid choice"),
        (["watch", "--port", "70000"], 2, "'70000'] is not a port"),
        (["watch", "--cidr", "here"], 2, "'here'] is not a network"),
        (["watch", "--duration", "5 parsecs"], 2, "duration"),
        (["watch", "--source", "tape"], 2, "source: 'tape' is not live, or pcap:FILE"),
        (["run", "-c", "/nonexistent.yaml"], 2, "cannot read the configuration /nonexistent.yaml: No such file"),
        (["run", "--otlp-endpoint", "ftp://x:1"], 2, "ftp://x:1"),
        (["run", "--otlp-endpoint", "http://x:1", "--otlp-file", "d"], 2, "choose one"),
        (["run", "--po\nrt"], 2, r"unrecognized arguments: --po\nrt"),
        (["run", "-c", "a\x1b\nb"], 2, r"cannot read the configuration a\x1b\nb: No such file"),
        (["completion", "csh"], 2, "invalid choice: 'csh'"),
        (["watch", "--source", "pcap:/nonexistent.pcap"], 4, "cannot read the capture /nonexistent.pcap: No such file"),
        (["watch", "--source", f"pcap:{__file__}"], 4, "pcapng"),
        (["top", "--source", "pcap:/nonexistent.pcap"], 4, "cannot read the capture /nonexistent.pcap: No such file"),
        (["top", "--interval", "soon"], 2, "argument --interval: 'soon' is not a duration"),
        (["top", "--interval", "1ms"], 2, "'1ms' is out of range: give at least 100ms and at most 1h"),
        (["top", "--sort", "colour"], 2, "invalid choice: 'colour'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], code: int, said: str) -> None:
    """Bad input gets a line that says what, an exit code that says whose fault, and nothing else."""
    found, _, stderr = called(*arguments)
    assert (found, len(stderr.splitlines())) == (code, 1)
    assert stderr.startswith("tcpio-otel")
    assert said in stderr


def test_every_option_refuses_what_it_cannot_read() -> None:
    """Whatever the parser takes for a key of the configuration; nothing is a value of none."""
    wrong = {
        action.dest: [name, f"{action.option_strings[0]}="]
        for name, command in commands().items() for action in command._actions
        if action.dest in LEAVES and action.nargs is None
    }  # fmt: skip
    assert len(wrong) > 10
    for key, arguments in wrong.items():
        code, _, stderr = called(*arguments)
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert f"command line: {key}: " in stderr


def test_a_wrong_file_says_where(tmp_path: Path) -> None:
    """A key that does not exist is refused with its line and the nearest that does."""
    path = tmp_path / "c.yaml"
    path.write_text("capture:\n  prots: [443]\n")
    code, _, stderr = called("run", "-c", str(path))
    assert code == 2
    assert f"{path}:2:" in stderr
    assert "did you mean ports?" in stderr


@pytest.mark.skipif(shutil.which("setpriv") is None or os.getuid() != 0, reason="needs root and setpriv")
def test_without_privileges_live_capture_is_refused() -> None:
    """The line names what is missing, and the way that needs no privilege."""
    without = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    code, _, stderr = called("watch", before=without)
    assert (code, len(stderr.splitlines())) == (3, 1)
    assert "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN" in stderr
    assert "--source pcap:FILE" in stderr
    code, stdout, _ = called("check", before=without)
    assert code == 3
    assert "NO  capabilities" in stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_a_cgroup_that_is_none_is_refused() -> None:
    """A wrong cgroup leaves nothing attached behind."""
    code, _, stderr = called("watch", "--cgroup", "/nonexistent")
    assert (code, len(stderr.splitlines())) == (3, 1)
    assert "cannot open the cgroup /nonexistent" in stderr
    code, _, stderr = called("watch", "--cgroup", "/tmp")
    assert (code, stderr) == (3, "tcpio-otel: /tmp is no cgroup v2 tree; leave capture.cgroup unset to have it found\n")


def test_captures_run_anywhere(tmp_path: Path) -> None:
    """A capture goes through every stage, and the ledger balances."""
    source = capture(tmp_path / "made.pcap", 400)
    code, _, stderr = called("run", "--source", f"pcap:{source}", cwd=tmp_path)
    assert code == 0
    assert "seen 400 = exported 400 + filtered 0 + sampled 0 + dropped 0 + in flight 0" in stderr
    assert {path.name for path in (tmp_path / "tcpio-data").iterdir()} == {
        "logs.jsonl", "traces.jsonl", "metrics.jsonl",
    }  # fmt: skip
    code, stdout, _ = called("watch", "--source", f"pcap:{source}", "--port", "10000")
    assert [line.split()[-1] for line in stdout.splitlines()[1:]] == ["(SYN)", "(SYN|ACK)", "(ACK)", "(RST|ACK)"]


def test_a_capture_becomes_a_table_of_connections(tmp_path: Path) -> None:
    """As any user: plain fields, one line a connection; ordered, filtered or by workload as is asked for."""
    source = capture(tmp_path / "made.pcap", 400)
    code, stdout, stderr = called("top", "--source", f"pcap:{source}", "--sort", "age")
    heading, *rows = [line.split() for line in stdout.splitlines()]
    assert (code, len(rows), {len(row) for row in rows}) == (0, 100, {len(heading)})
    assert stderr.splitlines()[-1].endswith("exported 400 + filtered 0 + sampled 0 + dropped 0 + in flight 0")
    assert {(row[heading.index("STATE")], row[heading.index("RTT_MS")]) for row in rows} == {("reset/local", "-")}
    code, stdout, _ = called("top", "--source", f"pcap:{source}", "--once", "--filter", ":10007")
    assert [line.split()[1] for line in stdout.splitlines()[1:]] == ["10.0.0.1:10007"]
    code, stdout, _ = called("top", "--source", f"pcap:{source}", "--port", "10000-10009", "--workloads")
    heading, row = (line.split() for line in stdout.splitlines())
    assert dict(zip(heading, row, strict=True)) == {
        "WORKLOAD": "-", "CONNECTIONS": "0", "OUT_BYTES/S": "0", "IN_BYTES/S": "0", "RETRANSMITS": "0",
        "RETRANSMITS/S": "0.00", "RESETS": "10", "FAILED_CONNECTS": "0",
    }  # fmt: skip


def test_what_can_be_read_of_a_broken_capture_is_shown(tmp_path: Path) -> None:
    """Then comes the line that says what is wrong with it."""
    source = capture(tmp_path / "made.pcap", 400)
    source.write_bytes(source.read_bytes()[:-10])
    code, stdout, stderr = called("top", "--source", f"pcap:{source}")
    assert (code, len(stdout.splitlines())) == (4, 101)
    assert stderr.splitlines()[-1].startswith("tcpio-otel: ")


def read_lines(stdout: str) -> Counter[str]:
    """How many lines there are of each measurement."""
    return Counter(re.split("[, ]", line)[0] for line in stdout.splitlines())


def test_captures_become_lines_for_telegraf(tmp_path: Path) -> None:
    """As any user; what is told is chosen by flags, among them those that Telegraf's own programs take."""
    source, config = capture(tmp_path / "made.pcap", 400), tmp_path / "c.yaml"
    config.write_text("telegraf:\n  connections: false\n")
    replayed = ("telegraf", "--source", f"pcap:{source}")
    code, stdout, stderr = called(*replayed, "--once", "--packets", "--tag", "server_port")
    assert (code, read_lines(stdout)["tcp_packet"], read_lines(stdout)["tcp_connection"]) == (0, 400, 100)
    assert stderr.startswith("I! seen 400 = exported 400 + ")
    assert ",server_port=443 " in stdout
    code, stdout, _ = called(*replayed, "--once", "-config", str(config), "-poll_interval_disabled")
    assert (code, set(read_lines(stdout))) == (0, {"tcp_peer", "tcpio", "tcpio_packets"})
    code, stdout, stderr = called(*replayed, "--once", TCPIO_TELEGRAF_PEERS="false", TCPIO_LOG_LEVEL="error")
    assert (code, stderr, set(read_lines(stdout))) == (0, "", {"tcp_connection", "tcpio", "tcpio_packets"})


def test_what_is_wrong_is_said_to_telegraf_in_its_own_way() -> None:
    """One line, of its level error."""
    for arguments, code, said in (
        (("--source", "pcap:/nonexistent.pcap"), 4, "cannot read the capture /nonexistent.pcap: No such file"),
        (("-poll_interval", "soon"), 2, "telegraf.interval: 'soon' is not a duration"),
        (("--tag", "colour"), 2, "'colour'] is not one of local_address"),
    ):
        found, _, stderr = called("telegraf", *arguments, TCPIO_LOG_LEVEL="error")
        assert (found, len(stderr.splitlines())) == (code, 1)
        assert stderr.startswith("E! ")
        assert said in stderr


def test_a_reader_that_comes_too_late_finds_whole_lines(tmp_path: Path) -> None:
    """As many as the ledger says; the rest is dropped when the time to stop is over."""
    source = capture(tmp_path / "made.pcap", 4000)
    read, write = os.pipe()
    result = subprocess.run(
        [*AGENT, "telegraf", "--once", "--packets", "--source", f"pcap:{source}"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TCPIO_EXPORT_FLUSH_TIMEOUT": "300ms"},
    )  # fmt: skip
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        found = pipe.read()
    assert result.returncode == 3
    (ledger,) = re.findall(
        r"I! seen 4000 = exported (\d+) .* dropped (\d+) \(shutdown \2\) \+ in flight 0\n", result.stderr
    )
    assert read_lines(found)["tcp_packet"] == int(ledger[0]) == 4000 - int(ledger[1])
    assert int(ledger[0]) < 4000
    assert found.endswith("\n")  # of packets, or of connections: who comes first has the room that there is
    assert re.match(r"E! not everything reached .*: \d+ lines of packets \(shutdown\)", result.stderr.splitlines()[-1])


def test_outputs_that_take_nothing_end_it_in_order(tmp_path: Path) -> None:
    """A full disk or a closed output is one line and a code; a reader that has gone is no error."""
    source = capture(tmp_path / "made.pcap", 400)
    agent = f"{sys.executable} -m tcpio_otel.cli"
    for script, expected, said in (
        (f"{agent} watch --source pcap:{source} > /dev/full", 3, "tcpio-otel: cannot print: No space left on device\n"),
        (f"{agent} top --source pcap:{source} > /dev/full", 3, "tcpio-otel: cannot print: No space left on device\n"),
        (f"set -o pipefail; {agent} top --source pcap:{source} | true", 0, ""),
        (f"{agent} top --source pcap:{source} >&-", 2, "tcpio-otel: top prints to standard output, which is closed\n"),
        (
            f"{agent} watch --source pcap:{source} >&-",
            2,
            "tcpio-otel: watch prints to standard output, which is closed\n",
        ),
        (
            f"{agent} telegraf --once --source pcap:{source} >&-",
            2,
            "E! telegraf prints to standard output, which is closed\n",
        ),
        (
            f"{agent} telegraf --source pcap:{source} <&-",
            2,
            "E! telegraf takes its orders from standard input, which is closed; give --once to do without\n",
        ),
        (
            f"TCPIO_LOG_LEVEL=warning {agent} telegraf --once --source pcap:{source} > /dev/full",
            3,
            "W! standard output: cannot write: No space left on device\n"
            * 2
            + "E! not everything reached standard output: 100 lines of connections (write_failed), "
            "3 lines of totals (write_failed)\n",
        ),
        (f"{agent} run --source pcap:{source} 2>&-", 0, ""),
        (f"{agent} config > /dev/full", 3, "tcpio-otel: cannot print: No space left on device\n"),
        (f"{agent} check > /dev/full", 3, "tcpio-otel: cannot print: No space left on device\n"),
        (
            f"{agent} config --schema >&-",
            2,
            "tcpio-otel: there is nowhere to print: standard output is closed\n",
        ),
        (f"(sleep 0.2; {agent} config; echo $? > code) | true; exit $(cat code)", 0, ""),
        (f"({agent} run --source pcap:{source}; echo $? > code) 2>&1 | true; exit $(cat code)", 0, ""),
    ):
        run = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (run.returncode, run.stderr) == (expected, said)


def test_a_truncated_capture_gives_what_it_holds(tmp_path: Path) -> None:
    """What came before the cut is exported; the exit code says that there was a cut."""
    source = capture(tmp_path / "made.pcap", 400)
    source.write_bytes(source.read_bytes()[:-30])
    code, _, stderr = called("run", "--source", f"pcap:{source}", cwd=tmp_path)
    assert code == 4
    assert "seen 399 = exported 399" in stderr
    assert "truncated" in stderr.splitlines()[-1]


def test_a_receiver_that_is_away_costs_its_packets_and_says_so(tmp_path: Path) -> None:
    """A replay whose receiver refuses connections ends with exit code 3, and every packet accounted for."""
    source = capture(tmp_path / "made.pcap", 400)
    code, _, stderr = called(
        "run", "--source", f"pcap:{source}", "--otlp-endpoint", "http://127.0.0.1:9", cwd=tmp_path,
        TCPIO_EXPORT_FLUSH_TIMEOUT="100ms",
    )  # fmt: skip
    assert code == 3
    assert "connection refused; is a receiver listening there?" in stderr
    assert "seen 400 = exported 0 + filtered 0 + sampled 0 + dropped 400 (shutdown 400) + in flight 0" in stderr


def test_the_effective_configuration_and_its_schema_are_printed() -> None:
    """`config` shows what is in effect, secrets masked, and the schema."""
    code, stdout, _ = called("config", "--port", "443", OTEL_EXPORTER_OTLP_HEADERS="authorization=secret")
    assert code == 0
    assert "secret" not in stdout
    assert "authorization: '***'" in stdout
    assert '"$schema"' in called("config", "--schema")[1]


def test_a_wrong_configuration_is_not_in_the_way_of_a_shell() -> None:
    """Its start file asks for completion, whatever the environment."""
    code, stdout, stderr = called("completion", "bash", TCPIO_NONSENSE="1")
    assert (code, stderr) == (0, "")
    assert "complete " in stdout
    assert called("completion", "tcsh")[0] == 2


def test_what_needs_privileges_imports_nothing_that_starts_threads() -> None:
    """NumPy and gRPC come only after the capabilities have gone: they would keep them in their threads."""
    script = (
        "import sys, tcpio_otel.cli, tcpio_otel.agent, tcpio_otel.telegraf, tcpio_otel.check, tcpio_otel.capture.probe;"
        "print([name for name in ('numpy', 'grpc', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
