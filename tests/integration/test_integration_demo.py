"""`make demo-trace` as a person runs it: what it prints of an order, and of the packet that the wire lost meanwhile."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tcpio_otel import privileges
from tests.demo.stage import RUNS
from tests.demo.trace import ASKED, HIT

CHECKOUT = Path(__file__).parents[2]
LIMIT_S = 300
ENDS = ("shop", "stock")

pytestmark = pytest.mark.skipif(bool(privileges.missing_to_load()), reason="needs root: the probe cannot be loaded")


@pytest.fixture(scope="module")
def printed() -> str:
    """All of it, once the demo has ended well."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.demo"], cwd=CHECKOUT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    return result.stdout


@pytest.fixture(params=range(len(RUNS)), ids=[run.name for run in RUNS])
def told(request: pytest.FixtureRequest, printed: str) -> str:
    """What it printed of one run."""
    _, *parts = re.split(r"^Run \d\. ", printed, flags=re.MULTILINE)
    assert len(parts) == len(RUNS)
    return str(parts[request.param])


def section(told: str, title: str) -> str:
    """The packets beneath a request's title, up to an empty line."""
    return told.split(f"\n{title}: ", 1)[1].split("\n\n", 1)[0]


def words(told: str) -> str:
    """The answer, on one line."""
    return " ".join(told.split("╭", 1)[1].split("╰", 1)[0].replace("│", " ").split())


def test_each_request_has_its_spans_and_figures(told: str) -> None:
    """The client's span and, beneath it, the server's; of each end what TCP made of the request."""
    tree = told.split("tcp.connection", 1)[0]
    for title in ASKED:
        assert re.search(rf"─ {title} +shop +client", tree)
    assert len(re.findall(r"stock +server", tree)) == len(ASKED)
    for end in ENDS:
        assert tree.count(f"tcp.request at the {end}:") == len(ASKED)


def test_both_connection_spans_link_to_the_requests(told: str) -> None:
    """By the header where it can be read, and by the tag where it cannot."""
    assert "the client's end" in told
    assert "the server's end" in told
    ways = re.findall(r"↳ (.+?) +by (\w+): +bytes sent", told)
    (way,) = {way for _, way in ways}
    assert way == ("tag" if told.startswith("TLS") else "traceparent")
    assert [title for title, _ in ways] == 2 * list(ASKED)


def test_the_packets_are_those_of_both_ends(told: str) -> None:
    """Each request was sent and received at both ends; the hit one can be followed on its way, there and back."""
    for title in ASKED:
        belong = rf"{title}: \d+ of the \d+ packets belong to it "
        counts = r"\(shop: (\d+) sent, (\d+) received; stock: (\d+) sent, (\d+) received\)"
        (found,) = re.findall(belong + counts, words(told))
        assert all(int(number) for number in found)
    for way in (r"shop ──▶ .* B ", r"──▶ stock .* B ", r"◀── stock .* B ", r"shop ◀── .* B "):
        assert re.search(way, section(told, HIT)), way


def test_the_lost_packet_is_told_of_the_request_it_hit(told: str) -> None:
    """As never arrived and sent again, in that request, and in words."""
    (size,) = re.findall(r"◀── stock +(\d+) B .* never arrived", section(told, HIT))
    assert re.search(rf"◀── stock +{size} B .* retransmit", section(told, HIT))
    answer = words(told).split(HIT, 1)[1].split("GET ", 1)[0]
    assert f"The stock sent {size} B that never arrived, and sent them again" in answer
    assert f"The wire itself says that it lost one packet, of {size} B to the shop" in words(told)
