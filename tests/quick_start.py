"""What the README's quick start has one type, and a shell to type it in."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.peers.server import REPOSITORY


def commands(part: str) -> list[str]:
    """Those of a part, by the words that it begins with, in their order; asserts that there are some."""
    _, _, section = (REPOSITORY / "README.md").read_text().partition("## Quick start\n")
    parts = re.split(r"^\*\*(.+?)\*\*", section.partition("\n## ")[0], flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[part]
    found = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert found
    return found


@contextmanager
def typed(
    command: str, programs: Path, log: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a shell in the clone, until Ctrl-C.

    Args:
        command: the command.
        programs: a directory of programs that are found first.
        log: gets what it says.
        environment: its variables.
    """
    variables = {**environment, "PATH": f"{programs}:{environment['PATH']}"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=REPOSITORY, env=variables, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
