"""What `--help` says: that it fits, and that what it offers to copy is right."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tcpio_otel.cli import flags, parser
from tcpio_otel.config import load
from tcpio_otel.errors import TcpioError
from tests.integration.test_integration_collector import capture
from tests.parsers import commands

ROOT = Path(__file__).parents[3]


def examples() -> list[str]:
    """The command lines of all epilogs."""
    text = "\n".join(command.epilog or "" for command in commands().values()).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#") and line != "examples:"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that examples name."""
    shutil.copy(ROOT / "config" / "tcpio-otel.yaml", tmp_path)
    capture(tmp_path / "trace.pcap", 400)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", [line for line in examples() if line.startswith("sudo ")])
def test_an_example_for_root_leads_to_a_configuration(line: str, files: Path) -> None:
    """The parser takes it, and so does whatever validates its values."""
    _, program, *arguments = shlex.split(line)
    given = parser().parse_args(arguments)
    assert program == "tcpio-otel"
    assert load(given.config, {}, flags(given))[1] == []


@pytest.mark.parametrize("line", [line for line in examples() if not line.startswith(("sudo ", "eval "))])
def test_an_example_for_anybody_works(line: str, files: Path) -> None:
    """It runs as it stands there; what a shell of another kind would read goes to a file."""
    line = line.replace("| source", "> script")
    run = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, cwd=files,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (run.returncode, "Traceback" in run.stderr) == (0, False)
    assert run.stdout or list(files.glob("*/logs.jsonl")) or (files / "script").read_text()


def test_most_commands_have_examples() -> None:
    """Of each kind."""
    assert {line.removeprefix("sudo ").split()[1] for line in examples() if not line.startswith("eval")} >= {
        "run", "watch", "check", "config", "telegraf", "completion",
    }  # fmt: skip


def test_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 columns; a line for each command; examples as they were written."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in (parser(), *commands().values()):
        assert max(map(len, command.format_help().splitlines())) <= 80
    lines = parser().format_help().splitlines()
    for name in commands():
        assert [line for line in lines if line.startswith(f"    {name} ")]
    assert "\n  # a capture; this needs no privilege\n  tcpio-otel watch" in commands()["watch"].format_help()


def test_exit_codes_are_in_the_help() -> None:
    """Those of all errors."""
    _, _, said = parser().format_help().partition("Exit codes: 0; ")
    for error in TcpioError.__subclasses__():
        assert f"{error.exit_code} for " in said.replace("\n", " ")


def test_what_a_program_of_telegrafs_imports_before_it_listens() -> None:
    """A signal that comes before its handler ends the process: whatever takes long to import comes later."""
    script = (
        "import sys; from tcpio_otel.cli import parser; parser();"
        "print([name for name in ('yaml', 'shtab', 'numpy', 'grpc', 'tcpio_otel.config') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
