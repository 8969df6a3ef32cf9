"""Packets find the trace of the request that they served, says the programs' own log."""

import random
import uuid
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import conformance
from tests.kernel.harness import agent, logs_with_ids, spans
from tests.kernel.hosts import Direction, Packet
from tests.kernel.kept_alive import Journal, Traffic

CONNECTIONS, REQUESTS = 20, 50
LOSS = 0.05
BEFORE_FIRST = "with the first request"  # the last of TLS's handshake, where tickets were sent before the tag came
SAME_TRACE = "another span of the trace"  # the caller's instead of the server's own: known before the server had read
_MODULUS = 1 << 32


def losing(chance: random.Random) -> Any:
    """A wire that loses one packet in twenty, whatever it is."""

    def policy(packet: Packet, way: Direction) -> list[Packet]:
        del way
        return [] if chance.random() < LOSS else [packet]

    return policy


class Verdict:
    """What each packet's ids are, compared with whose bytes it carried or confirmed."""

    def __init__(self, journals: list[Journal], records: list[dict[str, Any]], server: tuple[str, int]) -> None:
        self._server = server
        self.right = self.own = 0
        self.wrong: list[str] = []
        self.unknown: Counter[str] = Counter()
        self.retransmits = 0
        self.joined: dict[tuple[int, bool], set[tuple[str, str]]] = defaultdict(set)
        """By end: the ids that at least one of its packets has, rightly."""
        self._journals = {(journal.client_port, journal.server): journal for journal in journals}
        self._isn: dict[tuple[int, bool], int] = {}  # by client port, and whether the server's
        for record in records:
            if "SYN" in record["tcp.flags"]:
                sent = record["network.io.direction"] == "transmit"
                self._isn[self.end(record)[0], self.end(record)[1] == sent] = record["tcp.seq"]
        for record in records:
            self._judge(record, *self.end(record))

    def __str__(self) -> str:
        return (
            f"right {self.right}, own {self.own}, unknown {dict(self.unknown)}, wrong {len(self.wrong)}, "
            f"retransmits {self.retransmits}"
        )

    def end(self, record: dict[str, Any]) -> tuple[int, bool]:
        """Which end of which connection a record is about: the client's port, and whether it is the server's."""
        server = (record["network.local.address"], record["network.local.port"]) == self._server
        return record["network.peer.port" if server else "network.local.port"], server

    def _judge(self, record: dict[str, Any], client_port: int, server: bool) -> None:
        sent, size = record["network.io.direction"] == "transmit", record["tcp.payload.size"]
        if not size and record["tcp.flags"] != "ACK":
            self.own += 1
            return
        by_us = sent if size else not sent  # whose bytes it is about: an acknowledgement, those of the other end
        isn = self._isn[client_port, server == by_us]
        first = (record["tcp.seq"] - isn - 1 if size else record["tcp.ack"] - isn - 2) % _MODULUS
        last = first + max(size, 1) - 1
        touched = [
            (number, entry.ids)
            for number, entry in enumerate(self._journals[client_port, server].entries)
            if (entry.sent if by_us else entry.received)[0] <= last
            and first < (entry.sent if by_us else entry.received)[1]
        ]
        told = record["traceId"], record["spanId"]
        known = [ids for _, ids in touched]
        self.retransmits += "tcp.retransmit" in record and told in known
        if told in known and (len(known) == 1 or len(record.get("tcp.contexts", ())) == len(known)):
            self.right += 1
            self.joined[client_port, server].add(told)
        elif not known and told == self._journals[client_port, server].entries[0].ids:
            self.unknown[BEFORE_FIRST] += 1
        elif any(told[0] == ids[0] for journal in self._journals.values() for ids in (e.ids for e in journal.entries)):
            if any(told[0] == ids[0] for ids in known):
                self.unknown[SAME_TRACE] += 1
            else:
                self.wrong.append(f"{record['body']} has {told}, serves {touched}")
        elif known:
            place = "first request" if touched[0][0] == 0 else "later request"
            self.unknown[f"{'server' if server else 'client'}, {'sent' if by_us else 'received'}, {place}"] += 1
        else:
            self.own += 1


MODES = {
    "header": {"header": True, "tags": False, "tls": False},
    "header-and-tags": {"header": True, "tags": True, "tls": False},
    "tags": {"header": False, "tags": True, "tls": False},
    "tls-and-tags": {"header": False, "tags": True, "tls": True},
}

PATIENT = {"TCPIO_CORRELATION_WAIT": "10s", "TCPIO_CORRELATION_QUIET": "60s"}
"""A server here tags once it has read all of a request, and a segment may be lost again and again before; so may one in
the middle of an answer, all that came so far being acknowledged."""

_BODY_FIRST = "server, received, later request"  # a body that overtook its head, which was lost
_WITH_HANDSHAKE = {"server, received, first request", "server, sent, first request"}  # it completed the handshake
_SLOW = "server, received, later request"  # its segments were lost again and again, for longer than anybody waits
_TICKETS = "server, received, first request"  # what had come when TLS sent its tickets, and more came before the tag
_EARLY = "client, received, first request"  # TLS tickets that came before the request was sent
EXPLAINED = {
    "header": {_BODY_FIRST, *_WITH_HANDSHAKE},
    "header-and-tags": {_BODY_FIRST, *_WITH_HANDSHAKE, SAME_TRACE},
    "tags": {_SLOW},
    "tls-and-tags": {_EARLY, _SLOW, _TICKETS, BEFORE_FIRST},
}
"""Why a packet may have no context, where one of twenty is lost."""


@pytest.mark.parametrize("mode", MODES)
def test_every_packet_of_a_thousand_requests_is_its_own_requests(mode: str, tmp_path: Path, capsys: Any) -> None:
    """Twenty at a time over kept-alive connections, one packet in twenty lost: none is another request's."""
    seed = random.randrange(1 << 20)
    with conformance.lane(50, "relay-ipv4", f"corr-{uuid.uuid4().hex[:6]}") as (lane, _):
        assert lane.relay
        traffic = Traffic(lane, lane.ports, seed=seed, **MODES[mode])
        with agent(
            tmp_path,
            "run",
            "--otlp-file",
            "out",
            "--port",
            str(lane.ports),
            "--cidr",
            f"{lane.server_address}/32",
            **PATIENT,
        ) as running:
            with lane.relay.policy(losing(random.Random(seed))):
                traffic.run(CONNECTIONS, REQUESTS)
            assert running.stop() == 0
    records = logs_with_ids(tmp_path / "out")
    packets = [record for record in records if record["eventName"] == "tcp.packet"]
    verdict = Verdict(traffic.journals, packets, (lane.server_address, lane.ports))
    with capsys.disabled():
        print(verdict)  # noqa: T201
    assert not verdict.wrong, verdict.wrong[:5]
    assert sum(len(journal.entries) for journal in traffic.journals) == 2 * CONNECTIONS * REQUESTS
    assert verdict.retransmits > REQUESTS
    explained = EXPLAINED[mode]
    assert set(verdict.unknown) <= explained, verdict.unknown
    assert verdict.unknown.total() - verdict.unknown[SAME_TRACE] < verdict.right / 20

    served = defaultdict(set)
    for journal in traffic.journals:
        for entry in journal.entries:
            served[journal.client_port, journal.server].add(entry.ids)
    summaries = [record for record in records if record["eventName"] == "tcp.request"]
    told = Counter((record["traceId"], record["spanId"]) for record in summaries)
    if mode != "header-and-tags":  # there a server's request may begin under the client's span
        assert set(told) == set.union(*served.values())
    links = defaultdict(set)
    for span in spans(tmp_path / "out"):
        server = span["kind"] == 2
        port = span["attributes"]["network.peer.port" if server else "network.local.port"]
        links[port, server] |= {(link["traceId"], link["spanId"]) for link in span["links"]}
    for end, ids in served.items():
        unseen = ids - verdict.joined[end]
        assert len(unseen) <= 1, unseen  # what completed the handshake at a server: then all of it is unknown
        assert ids - unseen <= links[end], (end, ids - links[end])

    _compare_sums(verdict, packets, summaries, mode)
    counted = {
        (*verdict.end(record), record["traceId"], record["spanId"]): (
            record["tcp.bytes.sent"], record["tcp.bytes.received"]
        )
        for record in summaries
    }  # fmt: skip
    for journal in traffic.journals:
        end = journal.client_port, journal.server
        # Under TLS the first request may have come with the handshake, and nobody knows where in the stream it begins.
        for entry in journal.entries[1 if MODES[mode]["tls"] else 0 :]:
            if entry.ids in verdict.joined[end]:
                assert counted[(*end, *entry.ids)] == (_size(entry.sent), _size(entry.received))


def _compare_sums(verdict: Verdict, packets: list[dict[str, Any]], summaries: list[dict[str, Any]], mode: str) -> None:
    """What packets add up to, by request: all but those that came long after all was acknowledged."""
    members = defaultdict(list)
    for record in packets:
        ids = {
            (record["traceId"], record["spanId"]),
            *(tuple(one.split("-")) for one in record.get("tcp.contexts", ())),
        }
        for one in ids:
            members[(*verdict.end(record), *one)].append(record)
    late = 0
    for summary in summaries:
        own = members[(*verdict.end(summary), summary["traceId"], summary["spanId"])]
        added: Counter[str] = Counter()
        for record in own:
            segments = record.get("tcp.gso.segments", 1)
            added["packets.sent" if record["network.io.direction"] == "transmit" else "packets.received"] += segments
            added["retransmits"] += segments * ("tcp.retransmit" in record)
        told = {name: summary[f"tcp.{name}"] for name in ("packets.sent", "packets.received", "retransmits")}
        assert all(told[name] <= added[name] for name in told)
        if any(told[name] < added[name] for name in told):
            late += 1
        elif mode in ("header", "tags"):  # in the others, an end's request can be two, or have what TLS says for itself
            _compare_times(summary, own)
    assert late <= len(summaries) / 20  # one of thousands, but where everything takes long


def _compare_times(summary: dict[str, Any], packets: list[dict[str, Any]]) -> None:
    times = sorted(record["time_ns"] for record in packets)
    first = [
        min(record["time_ns"] for record in packets
            if record["tcp.payload.size"] and record["network.io.direction"] == direction)
        for direction in ("transmit", "receive")
    ]  # fmt: skip
    # Each batch has its own look at how far Unix time is from the records' clock, which is being put right.
    assert summary["time_ns"] == pytest.approx(min(first), abs=100_000)
    for name, nanoseconds in (
        ("duration", times[-1] - min(first)),
        ("longest_gap", max(later - earlier for earlier, later in pairwise(times))),
        ("time_to_first_byte", max(first) - min(first)),
    ):
        assert summary[f"tcp.request.{name}"] == pytest.approx(nanoseconds / 1e9, abs=1e-4), name


def _size(offsets: tuple[int, int]) -> int:
    return offsets[1] - offsets[0]
