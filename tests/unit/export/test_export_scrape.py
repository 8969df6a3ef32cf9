"""Metrics over HTTP, asked for as Prometheus asks, and as others do."""

import gzip
import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
from prometheus_client import Metric as Family

from tcpio_otel.errors import EnvironmentFault
from tcpio_otel.export import scrape
from tcpio_otel.export.scrape import Scrape
from tcpio_otel.export.settings import Listen

LOOPBACK = Listen("127.0.0.1", 0)


def rendered(found: int) -> list[Family]:
    """One metric."""
    family = Family("answers", "How many there were.", "counter")
    family.add_sample("answers_total", {}, found)
    return [family]


@contextmanager
def listening(where: Listen = LOOPBACK, *, answers: bool = True) -> Iterator[Scrape]:
    """A server, and an agent that answers a number, each time the next."""
    with closing(Scrape(where, rendered)) as made:
        over, count = threading.Event(), 0

        def work() -> None:
            nonlocal count
            while not over.wait(0.005):
                if made.wanted:
                    count += 1
                    made.answer(count)

        agent = threading.Thread(target=work)
        if answers:
            agent.start()
        try:
            yield made
        finally:
            over.set()
            if answers:
                agent.join()


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)) as connection:
        connection.request(
            method, parts.path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()


@pytest.mark.parametrize("where", [LOOPBACK, Listen("::1", 0), Listen("::", 0), Listen("0.0.0.0", 0)], ids=str)
def test_each_scrape_has_an_answer_of_its_own(where: Listen) -> None:
    """As of then, in the format that is asked for."""
    with listening(where) as made:
        url = made.url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        status, kind, body = ask(url)
        assert (status, kind.partition(";")[0]) == (200, "text/plain")
        assert b"# TYPE answers_total counter\nanswers_total 1.0\n" in body
        status, kind, body = ask(url, Accept="application/openmetrics-text;version=1.0.0")
        assert (status, kind.partition(";")[0]) == (200, "application/openmetrics-text")
        assert body.endswith(b"answers_total 2.0\n# EOF\n")
        assert b"answers_total 3.0\n" in gzip.decompress(ask(url, Accept_Encoding="gzip")[2])


def test_other_questions() -> None:
    """They are refused without bothering the agent."""
    with listening(answers=False) as made:
        assert ask(made.url.replace("/metrics", "/"))[0] == 404
        assert ask(made.url, "POST")[0] == 405
        assert ask(made.url, "HEAD")[0] == 405


def test_an_agent_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as a failed scrape, and the next is another."""
    monkeypatch.setattr(scrape, "PATIENCE_S", 0.05)
    with listening(answers=False) as made:
        assert ask(made.url)[::2] == (503, b"The agent does not answer: it has had no time for 0 s.\n")
        assert not made.wanted
    monkeypatch.undo()
    with listening() as made:
        assert ask(made.url)[0] == 200


def test_stopping_does_not_wait_for_who_asks() -> None:
    """They are told that it is stopping."""
    told: list[tuple[int, str, bytes]] = []
    with listening(answers=False) as made:
        asking = threading.Thread(target=lambda: told.append(ask(made.url)))
        asking.start()
        while not made.wanted:
            time.sleep(0.005)
    asking.join()
    assert told[0][::2] == (503, b"The agent does not answer: it is stopping.\n")


def test_stopping_does_not_wait_for_who_never_finishes_asking() -> None:
    """A byte now and then does not keep the agent."""
    over = threading.Event()
    with listening() as made, socket.create_connection(("127.0.0.1", urlsplit(made.url).port or 0)) as trickle:

        def dribble() -> None:
            trickle.sendall(b"GET /metrics HTTP/1.0\r\n")
            while not over.wait(0.05):
                trickle.sendall(b"x")

        dribbling = threading.Thread(target=dribble)
        dribbling.start()
        closing_it = threading.Thread(target=made.close)
        closing_it.start()
        closing_it.join(20)
        assert not closing_it.is_alive()
        over.set()
        dribbling.join()


def test_a_silent_client_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """So that it does not keep others out; neither it nor one that breaks off is worth a word."""
    monkeypatch.setattr(scrape._Handler, "timeout", 0.05)
    with caplog.at_level(logging.DEBUG), listening() as made:
        port = urlsplit(made.url).port or 0
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as broken:
            broken.sendall(b"GET /metrics HTTP/1.0\r\n")
            assert ask(made.url)[0] == 200
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert ask(made.url)[0] == 200
    assert not caplog.records


def test_a_port_that_is_taken() -> None:
    """One line says which, and what stands in the way."""
    with listening() as made:
        taken = Listen("127.0.0.1", urlsplit(made.url).port or 0)
        with pytest.raises(
            EnvironmentFault, match=f"cannot listen on {taken} .metrics.listen.: Address already in use"
        ):
            Scrape(taken, rendered)
    with pytest.raises(EnvironmentFault, match=r"cannot listen on 192\.0\.2\.1:0 .*: Cannot assign requested address"):
        Scrape(Listen("192.0.2.1", 0), rendered)
