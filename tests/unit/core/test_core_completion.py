"""What real shells make of the scripts for them: somebody types, asks, and reads the line."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpio_otel.config import LineTag
from tests.parsers import commands

# Ctrl-X T completes as Tab does, Ctrl-X A puts in everything that could stand there, Ctrl-X D shows the line.
BASH_KEYS = r"""
bind '"\C-xt": complete' '"\C-xa": insert-completions' 'set bell-style none'
bind -x '"\C-xd": printf "<<%s>>" "$READLINE_LINE"'
"""
ZSH_KEYS = r"""
zle -C everything complete-word _generic
zstyle ':completion:everything::::' completer _all_matches _complete
zstyle ':completion:everything:*' insert true
shown() { print -nr -- "<<$BUFFER>>" }
zle -N shown
bindkey '^Xt' complete-word '^Xa' everything '^Xd' shown
"""
FISH = "tcpio-otel completion fish | source"
COMPINIT = "autoload -Uz compinit && compinit -D -u\n"
SHELLS = {
    "bash": (["bash", "--norc", "-i"], 'eval "$(tcpio-otel completion bash)"\n' + BASH_KEYS),
    "zsh": (["zsh", "-f", "-i"], COMPINIT + 'eval "$(tcpio-otel completion zsh)"\n' + ZSH_KEYS),
    "zsh that loads a file": (
        ["zsh", "-f", "-i"],
        "tcpio-otel completion zsh > folder/_tcpio-otel; fpath=($PWD/folder $fpath)\n" + COMPINIT + ZSH_KEYS,
    ),
}


def environment(home: Path) -> dict[str, str]:
    """That of somebody who has just installed the agent: shells write to the home directory."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {"HOME": str(home), "LC_ALL": "C.UTF-8", "PATH": path, "TERM": "dumb"}


class Shell:
    """An interactive shell on a terminal.

    Args:
        command: what it is started by.
        setup: lines that it reads first.
        cwd: where.
    """

    def __init__(self, command: list[str], setup: str, cwd: Path) -> None:
        self._terminal, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment(cwd), start_new_session=True
        )
        os.close(theirs)
        for line in (*setup.strip().splitlines(), "echo set''up"):
            os.write(self._terminal, line.encode() + b"\n")
        self._read(r"setup\r?\n")

    def _read(self, pattern: str) -> str:
        text, deadline = "", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.1)[0]:
                text += os.read(self._terminal, 65536).decode()
            if found := re.search(pattern, text):
                return found[found.re.groups]
        raise AssertionError(f"no {pattern} in what the shell said: {text!r}")

    def _line(self, typed: str, key: str) -> str:
        os.write(self._terminal, f"\x15{typed}\x18{key}\x18d".encode())
        return self._read("<<([^>]*)>>")

    def completed(self, typed: str) -> str:
        """The line after a Tab."""
        return self._line(typed, "t")

    def candidates(self, typed: str) -> set[str]:
        """Every word that could be the last, without the sign that says that more may follow."""
        start = typed[: typed.rindex(" ") + 1]
        line = self._line(typed, "a")
        assert line.startswith(start)
        return {word.rstrip("/=") for word in shlex.split(line.removeprefix(start))} - {typed.removeprefix(start)}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


class Fish:
    """Fish tells without a terminal what it would offer there."""

    def __init__(self, cwd: Path) -> None:
        self._cwd = cwd

    def candidates(self, typed: str) -> set[str]:
        """Every word that could be the last, without the slash behind folders."""
        run = subprocess.run(
            ["fish", "--no-config", "-c", f"{FISH}; complete -C {shlex.quote(typed)}"],
            capture_output=True, text=True, check=True, cwd=self._cwd, env=environment(self._cwd),
        )  # fmt: skip
        assert run.stderr == ""
        return {line.partition("\t")[0].rstrip("/") for line in run.stdout.splitlines()}

    def close(self) -> None:
        """Nothing runs."""


def started(name: str, files: Path) -> Shell | Fish:
    """A shell that completes our command line, beside a folder with something to choose from."""
    (files / "folder" / "inner").mkdir(parents=True)
    (files / "folder" / "one.yaml").touch()
    (files / "folder" / "two words.pcap").touch()
    program = name.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian, Ubuntu: apt install {program})")
    return Fish(files) if program == "fish" else Shell(*SHELLS[name], files)


@pytest.fixture(scope="module", params=[*SHELLS, "fish"])
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell | Fish]:
    """One that says what it would offer."""
    found = started(request.param, tmp_path_factory.mktemp("shell"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """One that shows its line after a Tab."""
    found = started(request.param, tmp_path_factory.mktemp("shell"))
    assert isinstance(found, Shell)
    yield found
    found.close()


def test_the_help_says_how_to_have_it() -> None:
    """By the lines that the shells of these tests have read."""
    said = str(commands()["completion"].epilog)
    for line in ('eval "$(tcpio-otel completion bash)"', 'eval "$(tcpio-otel completion zsh)"', FISH):
        assert f"  {line}\n" in said


def test_every_command_and_option_is_offered(shell: Shell | Fish) -> None:
    """Whatever the parser knows, but for Telegraf's own spelling of options."""
    assert shell.candidates("tcpio-otel ") == {*commands()}
    for name, command in commands().items():
        options = {option for action in command._actions for option in action.option_strings}
        assert shell.candidates(f"tcpio-otel {name} --") == {option for option in options if option.startswith("--")}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tcpio-otel run --loader ", {"auto", "libbpf", "bcc"}),
        ("tcpio-otel run --otlp-protocol ", {"grpc", "http/protobuf", "http/json"}),
        ("tcpio-otel run --port 443 --otlp-protocol http/", {"http/protobuf", "http/json"}),
        ("tcpio-otel telegraf --tag ", {*LineTag}),
        ("tcpio-otel watch --source ", {"live", "pcap:"}),
        ("tcpio-otel completion ", {"bash", "zsh", "fish"}),
        ("tcpio-otel check -c folder/", {"folder/inner", "folder/one.yaml", "folder/two words.pcap"}),
        ("tcpio-otel run --otlp-file folder/", {"folder/inner"}),
        ("tcpio-otel run --cgroup folder/", {"folder/inner"}),
        ("tcpio-otel watch --port ", set()),
        ("tcpio-otel run --otlp-endpoint ", set()),
    ],
)
def test_what_an_option_takes_is_offered(shell: Shell | Fish, typed: str, offered: set[str]) -> None:
    """Choices, files where a file is wanted, folders where a folder is; nothing where anything may stand."""
    found = shell.candidates(typed)
    assert {name for name in found if name not in ("folder/_tcpio-otel", "pcap:folder")} == offered


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("tcpio-otel w", "tcpio-otel watch "),
        ("tcpio-otel frob", "tcpio-otel frob"),
        ("tcpio-otel watch --proc", "tcpio-otel watch --process "),
        ("tcpio-otel run --otlp-protocol g", "tcpio-otel run --otlp-protocol grpc "),
        ("tcpio-otel run --otlp-protocol=g", "tcpio-otel run --otlp-protocol=grpc "),
        ("tcpio-otel run --otlp-protocol=http", "tcpio-otel run --otlp-protocol=http/"),
        ("tcpio-otel run -c folder/o", "tcpio-otel run -c folder/one.yaml "),
        ("tcpio-otel run --otlp-file folder/i", "tcpio-otel run --otlp-file folder/inner/"),
        ("tcpio-otel watch --source p", "tcpio-otel watch --source pcap:"),
        ("tcpio-otel watch --source pcap:", "tcpio-otel watch --source pcap:folder/"),
        ("tcpio-otel watch --source pcap:folder/t", r"tcpio-otel watch --source pcap:folder/two\ words.pcap "),
        ("tcpio-otel watch --source=pcap:folder/t", r"tcpio-otel watch --source=pcap:folder/two\ words.pcap "),
    ],
)
def test_tab_completes(terminal: Shell, typed: str, line: str) -> None:
    """As far as there is one way to go on, with a space behind what is complete."""
    assert terminal.completed(typed) == line
