"""The memory that probe and agent share: counters that the agent reads, wishes that the probe reads.

The layouts are `struct tcpio_counters` (bpf/record.h) and `struct tcpio_control`, `struct tcpio_owner` and
`struct tcpio_network` (bpf/filter.h); a test compares them through the object's BTF. No NumPy here: this runs before
privileges go.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

Network = IPv4Network | IPv6Network
IPV4_MAPPED = bytes(10) + b"\xff\xff"


class Counters(ctypes.Structure):
    """`struct tcpio_counters`: one CPU's, in packets but for `lost_facts`."""

    _fields_ = (
        ("seen", ctypes.c_uint64),
        ("submitted", ctypes.c_uint64),
        ("filtered_port", ctypes.c_uint64),
        ("filtered_cidr", ctypes.c_uint64),
        ("filtered_own", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("lost_facts", ctypes.c_uint64),
        ("filtered_netns", ctypes.c_uint64),
    )


class Control(ctypes.Structure):
    """`struct tcpio_control`."""

    _fields_ = (
        ("agent_tgid", ctypes.c_uint32),
        ("port_filter", ctypes.c_uint32),
        ("network_filter", ctypes.c_uint32),
        ("netns", ctypes.c_uint32),
        ("wakeup_bytes", ctypes.c_uint32),
        ("sees_syn_acks", ctypes.c_uint32),
        ("http_headers", ctypes.c_uint32),
        ("packet_bytes", ctypes.c_uint32),
        ("tcp_v4_rcv", ctypes.c_uint64 * 2),
        ("tcp_v6_rcv", ctypes.c_uint64 * 2),
        ("sock_edemux", ctypes.c_uint64),
        ("ports", ctypes.c_uint64 * 1024),
        ("own_ports", ctypes.c_uint8 * 65536),
    )

    def filter_ports(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Let only connections pass that have a port in one of the inclusive ranges at either end."""
        for first, last in ranges:
            self.port_filter = 1
            for port in range(first, last + 1):
                self.ports[port >> 6] |= 1 << (port & 63)


class Role(IntEnum):
    """`enum tcpio_role`: which end of its connection a socket is."""

    UNKNOWN = 0
    CLIENT = 1
    SERVER = 2


class Owner(ctypes.Structure):
    """`struct tcpio_owner`."""

    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("observed", ctypes.c_uint32),
        ("name", ctypes.c_uint8 * 16),
        ("netns", ctypes.c_uint32),
        ("role", ctypes.c_uint32),
        ("cgroup", ctypes.c_uint32),
        ("cgroup_v1", ctypes.c_uint32),
        ("stream.next", ctypes.c_uint32),
        ("stream.answer", ctypes.c_uint32),
        ("stream.state", ctypes.c_uint8),
        ("stream.direction", ctypes.c_uint8),
        ("stream.in_context", ctypes.c_uint8),
        ("stream.facts", ctypes.c_uint8),
        ("contexts", ctypes.c_uint16),
        ("idle_tags", ctypes.c_uint16),
        ("tagged_at", ctypes.c_uint32),
        ("published", ctypes.c_uint64),
        ("placed", ctypes.c_uint64),
    )


def network_key(network: Network) -> bytes:
    """`struct tcpio_network`: the key of a CIDR block in the probe's longest-prefix-match map."""
    packed = network.network_address.packed
    if network.version == 4:
        return (network.prefixlen + 96).to_bytes(4, "little") + IPV4_MAPPED + packed
    return network.prefixlen.to_bytes(4, "little") + packed


@dataclass(frozen=True)
class Filters:
    """What the probe is asked to record: either port, and either address; empty means everything.

    `netns` is the inode of the only network namespace to record, 0 for all.
    """

    ports: Sequence[tuple[int, int]] = ()
    networks: Sequence[Network] = ()
    netns: int = 0


@dataclass(frozen=True)
class ContextSources:
    """Where the probe looks for trace contexts: what applications tell it, requests, a map of threads' contexts."""

    socket_tags: bool = False
    http_headers: bool = False
    published_map: Path | None = None


@dataclass(frozen=True)
class Tally:
    """The probe's counters, summed over CPUs, at one moment."""

    seen: int
    submitted: int
    filtered: dict[str, int]
    lost: int
    lost_facts: int

    @property
    def in_progress(self) -> int:
        """Packets that a program was working on while the counters were read; zero once it is detached."""
        return self.seen - self.submitted - sum(self.filtered.values()) - self.lost


def tally(counters: Any, later: Any) -> Tally:
    """Sum two looks at the same ctypes array of `Counters`, one after the other.

    `seen` is taken from the later look: a packet is counted there first, so nothing else can run ahead of it.
    """

    def total(field: str) -> int:
        return sum(getattr(cpu, field) for cpu in counters)

    return Tally(
        seen=sum(cpu.seen for cpu in later),
        submitted=total("submitted"),
        filtered={reason: total(f"filtered_{reason}") for reason in ("port", "cidr", "own", "netns")},
        lost=total("lost"),
        lost_facts=total("lost_facts"),
    )
