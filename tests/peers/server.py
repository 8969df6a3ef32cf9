"""Servers that a test starts on loopback, and asks over HTTP."""

import os
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 30.0
REPOSITORY = Path(__file__).parents[2]


def listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a process listens on a port of loopback."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"nobody listens on port {port}:\n{log.read_text()[-4000:]}"
            time.sleep(0.05)


@contextmanager
def serving(
    command: Sequence[str | Path], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server, with what it says in a file; its URL, once it listens on the port.

    It is killed in the end: nobody needs what it still has to write.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=REPOSITORY, env={**os.environ, **(environment or {})}
        )
    try:
        listening(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def get(url: str, **parameters: str) -> str:
    """What a server answers to a GET."""
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=PATIENCE_S) as response:
        return str(response.read().decode())
