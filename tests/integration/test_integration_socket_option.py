"""The programs that docs/socket-option.md shows, in C and for Node, with an agent that takes what they tell."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcpio_otel import privileges
from tests.kernel.harness import agent, plain, spans

PROGRAMS = Path(__file__).with_name("socket_option")
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ANSWER = b"hello yourself\n"

pytestmark = pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")


def _c(directory: Path) -> tuple[list[str], dict[str, str]]:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-o", directory / "tag", PROGRAMS / "tag.c"], check=True)
    return [str(directory / "tag")], {}


def _node(directory: Path) -> tuple[list[str], dict[str, str]]:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("no Node with npm")
    installed = subprocess.run(
        ["npm", "install", "--prefix", directory, "--no-save", "koffi@3"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"koffi cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    return ["node", str(PROGRAMS / "tag.js")], {"NODE_PATH": str(directory / "node_modules")}


@contextmanager
def _answering() -> Iterator[int]:
    """A server on loopback that answers one connection's line by another; its port."""

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, accepted.makefile("rb") as lines:
            assert lines.readline() == b"hello\n"
            accepted.sendall(ANSWER)
            lines.read()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(60)


def _packets(directory: Path) -> list[dict[str, Any]]:
    """The packet records in OTLP/JSON files, with their attributes as plain values."""
    return [
        record | {"attributes": plain(record["attributes"])}
        for path in sorted(directory.glob("logs*.jsonl"))
        for line in path.read_text().splitlines()
        for resource in json.loads(line)["resourceLogs"]
        for scope in resource["scopeLogs"]
        for record in scope["logRecords"]
        if record["eventName"] == "tcp.packet"
    ]


@pytest.mark.parametrize("name", ["1", "2"])
@pytest.mark.parametrize("made", [_c, _node], ids=["c", "node"])
def test_the_programs_of_the_documentation_tag_their_connections(
    tmp_path: Path, made: Callable[[Path], tuple[list[str], dict[str, str]]], name: str
) -> None:
    """From the first byte after the tag on, packets carry its ids, if it is not shared; the span links to it."""
    command, environment = made(tmp_path)
    data = tmp_path / "data"
    with (
        _answering() as port,
        agent(tmp_path, "run", "--otlp-file", str(data), "--port", str(port), TCPIO_CAPTURE_LOADER="libbpf") as running,
    ):
        arguments = ["127.0.0.1", str(port), TRACE_ID, SPAN_ID, name]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=True,
            env={"PATH": "/usr/bin:/bin", **environment},
        )  # fmt: skip
        assert running.stop() == 0
    assert done.stdout == f"0\n{ANSWER.decode()}"
    client = [record for record in _packets(data) if record["attributes"]["network.peer.port"] == port]
    payload = [record for record in client if record["attributes"]["tcp.payload.size"]]
    opening = [record for record in client if "SYN" in record["attributes"]["tcp.flags"]]
    (span,) = [span for span in spans(data) if span["kind"] == 3]
    connection = span["traceId"], span["spanId"]
    ids = [[(record["traceId"], record["spanId"]) for record in records] for records in (opening, payload)]
    assert ids == [[connection] * 2, [connection if name == "2" else (TRACE_ID, SPAN_ID)] * 2]
    assert connection[0] != TRACE_ID
    (link,) = span["links"]
    assert (link["traceId"], link["spanId"]) == (TRACE_ID, SPAN_ID)
    told = plain(link["attributes"])
    assert told["tcp.context.source"] == "tag"
    places = [told.get(f"tcp.{way}.{end}") for way in ("sent", "received") for end in ("start", "end")]
    assert places == ([None] * 4 if name == "2" else [0, len(b"hello\n"), 0, len(ANSWER)])
