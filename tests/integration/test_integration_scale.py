"""The program that measures what a fleet takes runs, with next to nothing to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tcpio_otel import privileges
from tests.peers import clickhouse, collector_contrib, kubernetes
from tests.peers.go import or_skip

REPOSITORY = Path(__file__).parents[2]


def measured(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench.scale", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("server", ["pods of one node", "endpointslices", "services", "nodes"]),
        ("node", ["all, peers by services and endpointslices, 50", "spans and metrics"]),
        ("gateway", ["all, peers not named, logs", "traces by gRPC"]),
    ],
)
def test_each_part_gives_its_figures(part: str, rows: list[str]) -> None:
    """How large they are is not asserted."""
    for build in (kubernetes.build, collector_contrib.build, clickhouse.build):
        or_skip(build)
    if part != "server" and (missing := privileges.missing_to_load()):
        pytest.skip(f"needs {', '.join(f'CAP_{name.name}' for name in missing)}: run the tests as root")
    run = measured("--quick", part)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert all(any(line.startswith(row) for line in lines) for row in rows), run.stdout


def test_a_part_that_there_is_not() -> None:
    """One line says which there are."""
    run = measured("nodes")
    assert run.returncode == 2
    assert "there is no part nodes; there are server, node, gateway" in run.stderr
