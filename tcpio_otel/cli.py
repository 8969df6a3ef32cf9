"""Arguments and exit codes; nothing else.

What takes long to import is imported only once the arguments are known: a program of Telegraf's must listen to its
signals before they come.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcpio_otel import __version__
from tcpio_otel.errors import TcpioError
from tcpio_otel.execd import Log, Orders, hang_up

if TYPE_CHECKING:
    from tcpio_otel.config import Config

_EXIT_CODES = (
    "Exit codes: 0; 2 for a wrong command line or configuration; 3 for a host, kernel, privilege or receiver that does "
    "not offer what is needed; 4 for an unreadable input file."
)
# A test runs them as they stand here: those without sudo for real, the others as far as the configuration.
_EXAMPLES = {
    "run": """\
  # to a Collector on this host, by OTLP/HTTP
  sudo tcpio-otel run --otlp-endpoint http://localhost:4318
  # by gRPC, and only what has one of these ports at either end
  sudo tcpio-otel run --port 443 --port 8000-8999 \\
    --otlp-endpoint http://localhost:4317 --otlp-protocol grpc
  # with a configuration, for a minute, to files in ./tcpio-data
  sudo tcpio-otel run -c tcpio-otel.yaml --duration 1m
  # a capture to files in ./out; this needs no privilege
  tcpio-otel run --source pcap:trace.pcap --local 10.0.0.0/24 --otlp-file out
""",
    "watch": """\
  # every packet, with the time and the process
  sudo tcpio-otel watch --time --process
  # one service and one network, as JSON, for ten seconds
  sudo tcpio-otel watch --port 5432 --cidr 10.0.0.0/8 --json --duration 10s
  # a capture; this needs no privilege
  tcpio-otel watch --source pcap:trace.pcap --seq
""",
    "top": """\
  # live; ? shows the keys
  sudo tcpio-otel top
  # one service by retransmits, as a table, of what three seconds showed
  sudo tcpio-otel top --port 5432 --sort retransmits --once --interval 3s
  # how the connections of a capture stood at its end
  tcpio-otel top --source pcap:trace.pcap
""",
    "telegraf": """\
  # what Telegraf starts for inputs.execd: it flushes when Telegraf asks
  sudo tcpio-otel telegraf -config tcpio-otel.yaml -poll_interval 30s
  # for inputs.exec, or to have a look: lines of five seconds
  sudo tcpio-otel telegraf --once --duration 5s --packets
  # ports of servers as tags, from a capture; this needs no privilege
  tcpio-otel telegraf --once --source pcap:trace.pcap --tag server_port
""",
    "check": """\
  # this host and its kernel
  sudo tcpio-otel check
  # and whether a receiver answers
  sudo tcpio-otel check --otlp-endpoint http://localhost:4318
  # what BCC would offer in libbpf's place
  sudo tcpio-otel check --loader bcc
""",
    "config": """\
  # every key, with what is in effect
  tcpio-otel config
  # is this file right, and what does a flag change?
  tcpio-otel config -c tcpio-otel.yaml --port 443
  # for editors that check YAML as it is written
  tcpio-otel config --schema
""",
    "completion": """\
  # for this shell; in ~/.bashrc, for each
  eval "$(tcpio-otel completion bash)"
  # the same for zsh, in ~/.zshrc behind compinit
  eval "$(tcpio-otel completion zsh)"
  # for fish, in ~/.config/fish/config.fish
  tcpio-otel completion fish | source
""",
}
_SOURCE_FLAGS = (
    ("--source", "source", "live|pcap:FILE", "where packets come from (default: live)"),
    ("--duration", "duration", "SECONDS", "stop by itself after this"),
    ("--loader", "capture.loader", "NAME", "auto, libbpf or bcc: what loads the probe (default: auto)"),
    ("--cgroup", "capture.cgroup", "DIR", "root of the cgroup v2 tree (default: found by itself)"),
    ("--latency", "capture.latency", "TIME", "longest time a packet waits in the kernel (default: 100ms)"),
)
_LIST_FLAGS = (
    ("--port", "capture.ports", "N|N-M", "only connections with this port at either end; may be repeated"),
    ("--cidr", "capture.cidrs", "NET", "only connections with an address in this network; may be repeated"),
    ("--local", "capture.local", "NET", "for captures: addresses that are this host's; may be repeated"),
)
_RUN_FLAGS = (
    ("--otlp-endpoint", "export.endpoint", "URL", "OTLP receiver (default: none; write files)"),
    ("--otlp-protocol", "export.protocol", "NAME", "grpc, http/protobuf or http/json (default: http/protobuf)"),
    ("--otlp-file", "file.directory", "DIR", "write OTLP/JSON files there (default: ./tcpio-data)"),
)

SORTS = ("out", "in", "bytes", "rtt", "retransmits", "retransmit-rate", "age", "state")
"""What `top` sorts by: `board.Sort`, which takes long to import."""

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0


def _line(text: object) -> str:
    """One line of text, whatever names of files and the like hold."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in str(text))


def _interval(text: str) -> float:
    """A time between two refreshes."""
    from tcpio_otel.config_values import Seconds, parse

    try:
        seconds = float(parse(Seconds, text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from None
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: give at least 100ms and at most 1h")
    return seconds


class _Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {_line(message)}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Everything that can stand on the command line; help, completion and the manual page are made from it."""
    parser = _Parser(
        prog="tcpio-otel", description="Every TCP packet of a host, as OpenTelemetry logs and spans.",
        epilog=f"COMMAND --help has examples. {_EXIT_CODES}",
    )  # fmt: skip
    parser.add_argument("-V", "--version", action="version", version=f"tcpio-otel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    run = commands.add_parser("run", help="export packets and connections until stopped")
    watch = commands.add_parser("watch", help="print the tcpio table, live, in time order")
    top = commands.add_parser("top", help="show connections, live: rates, round-trip times, retransmits, how they end")
    check = commands.add_parser("check", help="say what this host, kernel and collector allow")
    config = commands.add_parser("config", help="validate the configuration and print it, or its schema")
    telegraf = commands.add_parser("telegraf", help="print lines for Telegraf's inputs.execd, or once for inputs.exec")
    for command in (run, watch, top, check, config):
        command.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML configuration")
    # As Telegraf's own programs for inputs.execd are called (plugins/inputs/execd/shim).
    telegraf.add_argument("-c", "--config", "-config", type=Path, metavar="FILE", help="YAML configuration")
    for command in (run, watch, top, check, config, telegraf):
        for flag, key, metavar, text in _SOURCE_FLAGS:
            command.add_argument(flag, dest=key, metavar=metavar, help=text)
        for flag, key, metavar, text in _LIST_FLAGS:
            command.add_argument(flag, dest=key, metavar=metavar, help=text, action="append")
    for command in (run, check, config):
        for flag, key, metavar, text in _RUN_FLAGS:
            command.add_argument(flag, dest=key, metavar=metavar, help=text)
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--time", action="store_true", help="local time in front")
    watch.add_argument("--process", action="store_true", help="pid and process name behind")
    watch.add_argument("--seq", action="store_true", help="sequence number, acknowledgement and window behind")
    top.add_argument(
        "--interval", type=_interval, default="1s", metavar="TIME", help="time between two refreshes (default: 1s)"
    )
    top.add_argument(
        "--once", action="store_true",
        help="print one plain table after --duration (default: the interval), as is done without a terminal",
    )  # fmt: skip
    top.add_argument("--sort", choices=SORTS, default=SORTS[0], metavar="NAME", help=f"{', '.join(SORTS)}")
    top.add_argument("--workloads", action="store_true", help="a row for each workload, not for each connection")
    top.add_argument("--filter", default="", metavar="TEXT", help="only what holds this: process, address, peer")
    telegraf.add_argument("--once", action="store_true", help="capture for --duration (default: 2s), print, and exit")
    telegraf.add_argument(
        "--packets", dest="telegraf.packets", action="store_const", const="true", help="a line for each packet, too"
    )
    telegraf.add_argument(
        "--tag", dest="telegraf.tags", metavar="NAME", action="append",
        help="an address or port that is a tag, not a field, such as server_port; may be repeated",
    )  # fmt: skip
    telegraf.add_argument(
        "--poll_interval", "-poll_interval", dest="telegraf.interval", metavar="TIME",
        help="time between two flushes, until Telegraf asks for one by itself (default: 10s)",
    )  # fmt: skip
    telegraf.add_argument(
        "--poll_interval_disabled", "-poll_interval_disabled", dest="telegraf.interval", action="store_const",
        const="0s", help="flush only when asked to",
    )  # fmt: skip
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of the file")
    config.add_argument("--secrets", action="store_true", help="print headers as they are")
    completion = commands.add_parser("completion", help="print what has a shell complete this command line")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    for name, command in commands.choices.items():
        if name in _EXAMPLES:
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            command.epilog = f"examples:\n{_EXAMPLES[name]}"
    return parser


def flags(given: argparse.Namespace) -> dict[str, Any]:
    """What was said of the configuration's keys; None: nothing."""
    return {name: value for name, value in vars(given).items() if "." in name or name in ("source", "duration")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or that of `errors`."""
    if sys.stderr is None:  # whoever started us closed it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as we run
    given = parser().parse_args(arguments)
    if given.command == "telegraf":
        given.orders = Orders(None if given.once else 0)
        given.orders.listen()
        logging.basicConfig(handlers=[Log(sys.stderr.fileno())], level=logging.INFO, format="%(message)s")
    else:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if given.command == "completion":  # a wrong configuration must not spoil every new shell
            return _completion(given.shell)
        from tcpio_otel.config import load

        config, warnings = load(given.config, os.environ, flags(given))
        logging.getLogger().setLevel(config.log.level.upper())
        for warning in warnings:
            logging.getLogger(__name__).warning("%s", warning)
        return _COMMANDS[given.command](config, given)
    except TcpioError as error:
        if given.command == "telegraf":
            logging.getLogger(__name__).error("%s", _line(error))  # noqa: TRY400 - the one line that a failure gets
            hang_up()
        else:
            print(f"tcpio-otel: {_line(error)}", file=sys.stderr)  # noqa: T201 - likewise
        return error.exit_code


def _run(config: Config, given: argparse.Namespace) -> int:
    del given
    from tcpio_otel.agent import run

    return run(config, sys.stderr)


def _watch(config: Config, given: argparse.Namespace) -> int:
    from tcpio_otel.agent import watch

    return watch(config, json=given.json, time_of_day=given.time, process=given.process, seq=given.seq)


def _top(config: Config, given: argparse.Namespace) -> int:
    from tcpio_otel.top import top

    return top(
        config, interval_s=given.interval, once=given.once, sort=given.sort, by_workload=given.workloads,
        text=given.filter,
    )  # fmt: skip


def _telegraf(config: Config, given: argparse.Namespace) -> int:
    from tcpio_otel.telegraf import telegraf

    code = telegraf(config, given.orders, once=given.once)
    hang_up()
    return code


def _check(config: Config, given: argparse.Namespace) -> int:
    del given
    from tcpio_otel.agent import check

    return check(config)


def _completion(shell: str) -> int:
    from tcpio_otel.agent import tell
    from tcpio_otel.completion import script

    tell(script(parser(), shell))
    return 0


def _config(config: Config, given: argparse.Namespace) -> int:
    from tcpio_otel.agent import tell
    from tcpio_otel.config import effective, schema

    if given.schema:
        import json

        tell(json.dumps(schema(), indent=2) + "\n")
    else:
        tell(effective(config, secrets=given.secrets))
    return 0


_COMMANDS = {"run": _run, "watch": _watch, "top": _top, "telegraf": _telegraf, "check": _check, "config": _config}


if __name__ == "__main__":
    sys.exit(main())
