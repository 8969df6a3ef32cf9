"""Arguments, exit codes, and the order of things.

    python -m tests.demo            as root: two runs, a trace of each
    python -m tests.demo --build    only build the Collector that it needs
    python -m tests.demo --keep DIR leave there what the Collector received, and what everybody logged

Exit codes: 0; 1 when a trace does not hold what it should, or something did not start; 3 for a machine that does not
offer what is needed.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tcpio_otel import privileges
from tests.demo import report, stage, trace
from tests.integration import collector

FAILED, UNAVAILABLE, STOPPED = 1, 3, 128 + signal.SIGINT


def run(console: Console, directory: Path) -> int:
    """Run both, and print their traces; returns the exit code."""
    lost: dict[str, stage.Lost | None] = {}
    with console.status("Making two hosts and a wire") as status, stage.stage(directory) as on:
        for run in stage.RUNS:
            status.update(f"Run {run.name}: the services start, a customer orders")
            lost[run.name] = stage.order(on, run).lost
        status.update("Waiting for the last spans")
    complaints = 0
    for number, run in enumerate(stage.RUNS, 1):
        try:
            told = trace.read(on.received, run)
        except trace.NoTraceError as reason:
            missing = [str(reason)]
        else:
            report.show(console, told, lost[run.name], number)
            missing = trace.missing(told, lost[run.name])
        report.show_missing(console, run.name, missing)
        complaints += len(missing)
    if complaints:
        return FAILED
    console.print("Both traces hold what they should: packets of every request at both ends, the loss where it was.")
    return 0


def _stop_by_signals() -> None:
    """Clean up after Ctrl-C and SIGTERM; but pyroute2 ends by SIGTERM what it forks, and that has nothing to clean."""
    own = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != own:
            os._exit(STOPPED)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="A trace, and the packets in it.")
    parser.add_argument("--build", action="store_true", help="only build the Collector that it needs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave what was received and logged there")
    given = parser.parse_args()
    console, stderr = Console(width=report.WIDTH), Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    _stop_by_signals()
    lacking = [] if given.build else privileges.missing_to_load()
    if lacking:
        stderr.print(f"demo: needs {', '.join(f'CAP_{name.name}' for name in lacking)}: run it as root")
        return UNAVAILABLE
    try:
        if not collector.BINARY.exists() and shutil.which("go"):
            stderr.print("Building an OpenTelemetry Collector, once: this takes a few minutes")
        collector.build()
    except LookupError as reason:
        stderr.print(f"demo: {reason}; without one there is nothing to show")
        return UNAVAILABLE
    if given.build:
        return 0
    for name in [name for name in os.environ if name.startswith(("OTEL_", "TCPIO_"))]:
        del os.environ[name]  # meant for other programs than those of the demo; the agent refuses TCPIO_CACHE
    try:
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tcpio-demo-"))
            directory = (given.keep or Path(scratch)).resolve()
            directory.mkdir(parents=True, exist_ok=True)
            return run(console, directory)
    except (stage.StageError, AssertionError) as reason:
        stderr.print(f"demo: {reason}")
        return FAILED
    except KeyboardInterrupt:
        stderr.print("demo: stopped")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
