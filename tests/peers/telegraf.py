"""A real Telegraf, of the parts that the tests need: built once, started for a test, and asked what came out of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernel.harness import wait_for
from tests.peers.go import programs

VERSION = "v1.39.3"
MODULE = "github.com/influxdata/telegraf"
TAGS = (
    "custom",
    "inputs.exec",
    "inputs.execd",
    "inputs.file",
    "parsers.influx",
    "serializers.influx",
    "serializers.json",
    "outputs.file",
    "outputs.opentelemetry",
)
SHIPPED = Path(__file__).parents[2] / "config" / "telegraf"


def build() -> Path:
    """The program.

    Raises:
        LookupError: it cannot be built here; the message says why.
    """
    return programs("telegraf", MODULE, VERSION, {"telegraf": f"{MODULE}/cmd/telegraf"}, tags=TAGS) / "telegraf"


class Metric(NamedTuple):
    """A metric as Telegraf has it; `time_ns` is Unix time."""

    name: str
    tags: dict[str, str]
    fields: dict[str, Any]
    time_ns: int


class Telegraf:
    """A Telegraf that is running, and what it has written."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.process, self._directory = process, directory

    @property
    def log(self) -> str:
        """What it has said."""
        return (self._directory / "telegraf.log").read_text()

    def errors(self) -> list[str]:
        """What of that are errors."""
        return [line for line in self.log.splitlines() if " E! " in line]

    def metrics(self, *names: str) -> list[Metric]:
        """What has come out of it by now, by measurement; all, if none is named."""
        path = self._directory / "metrics.json"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [
            Metric(one["name"], one["tags"], one["fields"], one["timestamp"])
            for one in found
            if not names or one["name"] in names
        ]

    def child(self) -> int:
        """The process that it has started, once that has attached its probe: it has no capabilities any more then."""
        wait_for(lambda: any("0" * 16 in _capabilities(pid) for pid in self._children()), "the agent", 60)
        return next(pid for pid in self._children() if "0" * 16 in _capabilities(pid))

    def _children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]

    def stop(self) -> int:
        """Stop it as its service does; it stops what it has started, and writes out what it has."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _capabilities(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line for line in status.splitlines() if line.startswith("CapEff")), "")


OUTPUT = """
[agent]
  interval = "1s"
  round_interval = false
  flush_interval = "1s"
  metric_buffer_limit = 2000000
  metric_batch_size = 20000
  omit_hostname = true
[[outputs.file]]
  files = ["{directory}/metrics.json"]
  data_format = "json"
  json_timestamp_units = "1ns"
"""


@contextmanager
def telegraf(
    directory: Path,
    inputs: str,
    *arguments: str,
    before: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Telegraf]:
    """Start it with some inputs, and a file of JSON out; `tcpio-otel` is this interpreter's."""
    directory.mkdir(exist_ok=True)
    (directory / "telegraf.conf").write_text(OUTPUT.format(directory=directory) + inputs)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (directory / "telegraf.log").open("wb") as log:
        process = subprocess.Popen(
            [*before, build(), "--config", directory / "telegraf.conf", *arguments],
            stdout=log, stderr=log, cwd=directory,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": path, **(environment or {})},
        )  # fmt: skip
    running = Telegraf(process, directory)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(60)
