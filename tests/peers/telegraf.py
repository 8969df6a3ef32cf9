"""A real Telegraf, of the parts that the tests need, built once from the module proxy."""

from pathlib import Path

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


def telegraf() -> Path:
    """The program.

    Raises:
        LookupError: it cannot be built here; the message says why.
    """
    return programs("telegraf", MODULE, VERSION, {"telegraf": f"{MODULE}/cmd/telegraf"}, tags=TAGS) / "telegraf"
