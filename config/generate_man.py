"""The command line's parser to its manual page, docs/tcpio-otel.1, which the wheel installs.

What a parser cannot know, of signals and files for example, stands here. Run it after a change of tcpio_otel/cli.py; a
test compares its output with the file.
"""

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tcpio_otel import __version__
from tcpio_otel.cli import parser
from tcpio_otel.config import DEFAULT_DIRECTORY, VARIABLES
from tcpio_otel.errors import TcpioError
from tcpio_otel.execd import ASK
from tcpio_otel.otel_environment import SIGNALS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tcpio-otel.1"
DESCRIPTION = (
    "`tcpio-otel` records every TCP segment that this host's sockets send and receive, in every network namespace, by "
    "an eBPF program. Each becomes an OpenTelemetry log record, each connection a span, and traffic between workloads "
    "metrics. They go to an OTLP receiver, to files, to Telegraf, or, as a table, to the terminal. What is not "
    "exported is counted, with the reason.",
    "To record needs root, or the capabilities CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN. All are dropped once the "
    "program is attached. With `--source pcap:FILE` a capture goes through the same stages, and that needs none.",
    "Durations are `250ms`, `5s`, `2m`, `1h`, or a number of seconds.",
)
CONFIGURATION = (
    "Everything that can be set is a key of a YAML file. What wins, from first to last: options, TCPIO_* variables, "
    "the file, OTEL_* variables, defaults. `tcpio-otel config` prints all keys with what is in effect, and "
    "`tcpio-otel config --schema` what each means. A key or TCPIO_* variable that does not exist is refused.",
)
STOPPED = "what an agent that was stopped prints at the end says what became of each packet, whatever its receiver did."
ROFF = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga"}


def roff(text: str) -> str:
    """Text as it is, on a line that is none of roff's own."""
    escaped = "".join(ROFF.get(character, character) for character in text)
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def bold(text: str) -> str:
    """What is typed as it stands here."""
    return rf"\fB{roff(text)}\fR"


def italic(text: str) -> str:
    """What something else stands for."""
    return rf"\fI{roff(text)}\fR"


def prose(text: str) -> str:
    """Text, in which what is between backticks is bold, as lines of a source that people read, too."""
    marked = "".join(bold(part) if odd % 2 else roff(part) for odd, part in enumerate(text.split("`")))
    lines = textwrap.wrap(marked, 78, break_long_words=False, break_on_hyphens=False)
    return "\n".join(rf"\&{line}" if line.startswith(".") else line for line in lines)


def paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """One below the other."""
    yield "\n.PP\n".join(map(prose, texts))


def listed(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A list of terms, which are roff already, and of what they mean."""
    for term, meaning in entries:
        yield from (".TP", term, prose(meaning))


@dataclass(frozen=True)
class Option:
    """What can stand behind a command; that of two commands is one, if both say the same of it."""

    names: tuple[str, ...]
    metavar: str
    meaning: str

    def entry(self) -> tuple[str, str]:
        """For a list."""
        value = f" {italic(self.metavar)}" if self.metavar else ""
        return ", ".join(bold(name) + value for name in self.names), self.meaning


def options(command: argparse.ArgumentParser) -> list[Option]:
    """Those of a command, but for `--help`."""
    return [
        Option(
            tuple(action.option_strings),
            str(action.metavar or "|".join(action.choices or ()) or action.dest.upper())
            if action.nargs is None
            else "",
            str(action.help) % (vars(action) | {"prog": command.prog}),
        )
        for action in command._actions  # argparse has no public way to them
        if action.option_strings and action.dest != "help"
    ]


def commands() -> tuple[dict[str, argparse.ArgumentParser], dict[str, str]]:
    """The parser of each command, and what help says of it."""
    (action,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices, {entry.dest: str(entry.help) for entry in action._get_subactions()}


def usage(name: str, command: argparse.ArgumentParser) -> str:
    """How a command is called."""
    words = [bold(f"tcpio-otel {name}")]
    words += [f"[{italic('OPTION')}]..."] * bool(options(command))
    words += ["|".join(map(bold, action.choices or ())) for action in command._actions if not action.option_strings]
    return " ".join(words)


def body() -> Iterator[str]:
    """What stands below the title, line by line."""
    parsers, helps = commands()
    takers: dict[Option, list[str]] = {}
    for name, command in parsers.items():
        for option in options(command):
            takers.setdefault(option, []).append(name)
    yield from (".SH NAME", r"tcpio\-otel \- every TCP packet of a host, as OpenTelemetry logs and spans")
    yield ".SH SYNOPSIS"
    calls = [usage(name, command) for name, command in parsers.items()]
    yield "\n.br\n".join([*calls, prose("`tcpio-otel --help`"), prose("`tcpio-otel --version`")])
    yield ".SH DESCRIPTION"
    yield from paragraphs(DESCRIPTION)
    yield ".SH COMMANDS"
    for name in parsers:
        yield from listed([(bold(name), helps[name])])
        if own := [option.entry() for option, names in takers.items() if names == [name]]:
            yield from (".RS", *listed(own), ".RE")
    yield ".SH OPTIONS"
    yield from listed(
        [(bold("-h") + ", " + bold("--help"), "show what there is, or what a command takes, with examples")]
    )
    yield from listed(option.entry() for option in options(parser()))
    of_several = sorted((-len(names), names) for names in takers.values() if len(names) > 1)
    for _, names in dict.fromkeys((count, tuple(names)) for count, names in of_several):
        *others, last = [f"`{name}`" for name in names]
        yield from (".PP", prose(f"Of {', '.join(others)} and {last}:"))
        yield from listed(option.entry() for option in takers if tuple(takers[option]) == names)
    yield ".SH CONFIGURATION"
    yield from paragraphs(CONFIGURATION)
    yield ".SH ENVIRONMENT"
    variables = {key: variable for variable, key in VARIABLES.items()}
    yield from listed(
        (
            (
                bold("TCPIO_") + italic("KEY"),
                f"A key of the configuration, in capitals and with underscores: `{variables['capture.ports']}` is "
                f"`capture.ports`, and `{variables['export.endpoint']}` is `export.endpoint`. Lists are separated by "
                "commas; mappings are `name=value,other=value`. Empty is unset.",
            ),
            (
                bold("OTEL_") + italic("NAME"),
                "The standard variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`, mean what OpenTelemetry's "
                "specification says.",
            ),
        )
    )
    yield ".SH FILES"
    files = ", ".join(f"`{signal}.jsonl`" for signal in SIGNALS)
    yield from listed(
        (
            (bold(f"./{DEFAULT_DIRECTORY}/"), f"Where `run` writes OTLP/JSON without a receiver: {files}."),
            (bold("/sys/kernel/btf/vmlinux"), "What the kernel says of its types; where it is missing, BCC is needed."),
        )
    )
    yield ".SH EXIT STATUS"
    failures = sorted((error.exit_code, str(error.__doc__).splitlines()[0]) for error in TcpioError.__subclasses__())
    yield from listed((bold(str(code)), said) for code, said in [(0, f"Success; {STOPPED}"), *failures])
    yield from (".PP", prose("Each failure is one line on standard error that says what, why, and what to do."))
    yield ".SH SIGNALS"
    asked = ", ".join(f"`{number.name}`" for number in ASK)
    yield from listed(
        (
            (
                prose("`SIGINT`, `SIGTERM`"),
                "Stop in order: what was recorded is sent, for as long as `export.flush_timeout` says, and accounted "
                "for. A second one ends it at once.",
            ),
            (prose(asked), "`telegraf` flushes, as it does for each line on standard input."),
        )
    )
    yield ".SH EXAMPLES"
    for name, command in parsers.items():
        if command.epilog:
            _, *lines = command.epilog.splitlines()
            yield from (f".SS {roff(name)}", ".EX", *(roff(line.removeprefix("  ")) for line in lines), ".EE")
    yield ".SH SEE ALSO"
    yield r"\fBtcpdump\fR(8), \fBss\fR(8)"


def page() -> str:
    """docs/tcpio-otel.1; its date is that of the last change."""
    text = "\n".join(body()) + "\n"
    before = PAGE.read_text() if PAGE.exists() else ""
    dated = re.search(r"^\.TH TCPIO\\-OTEL 1 (\S+) ", before, re.MULTILINE)
    days = ([dated[1]] if dated else []) + [date.today().isoformat()]
    pages = [
        '.\\" Generated by config/generate_man.py; not to be edited.\n'
        f'.TH TCPIO\\-OTEL 1 {day} "{roff(f"tcpio-otel {__version__}")}" "User Commands"\n.nh\n{text}'
        for day in days
    ]  # fmt: skip
    return before if before in pages else pages[-1]


FILES = {PAGE: page}

if __name__ == "__main__":
    for path, content in FILES.items():
        path.write_text(content())
