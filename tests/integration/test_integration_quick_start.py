"""The README's quick start as it is written; its part on Kubernetes is in test_integration_node."""

import json
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tcpio_otel import privileges
from tests.integration import collector
from tests.kernel.harness import wait_for
from tests.kernel.hosts import host
from tests.peers import telegraf
from tests.peers.go import or_skip
from tests.peers.server import listening
from tests.quick_start import commands, typed

pytestmark = pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")

MESSAGE = b"x" * 5000


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for what a user has on the path. It has sudo, where the machine has none."""
    (directory := tmp_path / "bin").mkdir()
    (directory / "sudo").write_text('#!/bin/sh\nexec env "$@"\n')
    (directory / "sudo").chmod(0o755)
    return directory


@pytest.fixture(autouse=True)
def _network() -> Iterator[None]:
    """One of the test's own: nobody else has its ports."""
    with host(f"quick-{uuid.uuid4().hex[:6]}") as made, made.inside():
        yield


@contextmanager
def talking() -> Iterator[None]:
    """Connections over loopback, one after another, until the end."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        while not over.wait(0.1):
            with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
                client.sendall(MESSAGE)
                server.recv(len(MESSAGE), socket.MSG_WAITALL)

    thread = threading.Thread(target=talk)  # in the network of whoever starts it
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        listener.close()


def test_on_this_host(programs: Path, tmp_path: Path) -> None:
    """A table of what passes, and one of what is open, until Ctrl-C."""
    watch, top = commands("On this host")
    log = tmp_path / "log"
    with talking():
        with typed(watch, programs, log) as process:
            wait_for(lambda: log.read_text().count("(PUSH|ACK)") > 10, "packets")
        assert process.returncode == 0
        assert "LADDR:LPORT" in log.read_text()
        with typed(top, programs, tmp_path / "top") as process:
            assert process.wait(30) == 0  # not on a terminal, it looks once
    assert "127.0.0.1" in (tmp_path / "top").read_text()


def test_to_a_collector(programs: Path, tmp_path: Path) -> None:
    """What the agent records is in the file, and check says that the receiver answers."""
    (programs / "otelcol-contrib").symlink_to(or_skip(collector.build))
    collect, check, run = commands("To a Collector.")
    received = tmp_path / "received.jsonl"
    assert "OTLP_FILE=/tmp/received.jsonl " in collect
    collect = f"env {collect.replace('/tmp/received.jsonl', str(received))}"
    with typed(collect, programs, tmp_path / "collector.log") as running, talking():
        listening(running, 4318, tmp_path / "collector.log")
        with typed(check, programs, tmp_path / "check") as process:
            assert process.wait(60) == 0, (tmp_path / "check").read_text()
        with typed(run, programs, log := tmp_path / "log") as process:
            wait_for(lambda: received.exists() and b"tcp.connection" in received.read_bytes(), "connections")
        assert process.returncode == 0, log.read_text()
    kinds = {kind for line in received.read_text().splitlines() for kind in json.loads(line)}
    assert kinds == {"resourceLogs", "resourceSpans", "resourceMetrics"}


def test_through_telegraf(programs: Path, tmp_path: Path) -> None:
    """Telegraf prints the lines that it was given."""
    (programs / "telegraf").symlink_to(or_skip(telegraf.build))
    (command,) = commands("Through Telegraf")
    log = tmp_path / "log"
    with talking(), typed(command, programs, log) as process:
        assert process.wait(60) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert not [line for line in lines if " E! " in line]
    assert [line for line in lines if line.startswith("> tcp_connection,") and f"bytes_sent={len(MESSAGE)}i" in line]
