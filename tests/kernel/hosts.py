"""Hosts made of network namespaces, the wires between them, and a relay that loses, delays and alters at will."""

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyroute2
from pyroute2 import netns

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LIBC = ctypes.CDLL(None, use_errno=True)

KERNEL = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
"""Major and minor version."""

PATIENCE_S = 60.0
"""After this a socket that waits for something gives up: kernels under emulation are slow."""


def _enter(file_descriptor: int) -> None:
    if _LIBC.setns(file_descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@dataclass(frozen=True)
class Host:
    """A network namespace of the test's own; sockets made in it work from any thread, wherever that is."""

    name: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have the calling thread in this host's network."""
        with ExitStack() as stack:
            before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            stack.callback(os.close, before)
            there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
            stack.callback(os.close, there)
            _enter(there)
            stack.callback(_enter, before)
            yield

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of this host."""
        with self.inside():
            made = socket.socket(family, kind, protocol)
        made.settimeout(PATIENCE_S)
        return made

    def sysctl(self, name: str, value: object) -> None:
        """Set one of the network's own parameters."""
        with self.inside():
            Path("/proc/sys/net", name).write_text(str(value))

    def run(self, *command: str, **options: Any) -> str:
        """Run a command in it to its end; returns what it printed."""
        full = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(full, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@contextmanager
def host(name: str) -> Iterator[Host]:
    """A new host with its loopback up, where addresses work at once."""
    netns.create(name)
    try:
        made = Host(name)
        for which in ("all", "default"):
            made.sysctl(f"ipv6/conf/{which}/accept_dad", 0)
            made.sysctl(f"ipv6/conf/{which}/router_solicitations", 0)
        with pyroute2.NetNS(name, flags=0) as network:
            network.link("set", index=1, state="up")
        yield made
    finally:
        netns.remove(name)


def add_address(where: Host, device: str, *addresses: str) -> None:
    """Give a device its addresses, written with their prefix lengths, and set it up."""
    with pyroute2.NetNS(where.name, flags=0) as network:
        (index,) = network.link_lookup(ifname=device)
        network.link("set", index=index, state="up")
        for address in addresses:
            plain, _, length = address.partition("/")
            network.addr("add", index=index, address=plain, prefixlen=int(length))


def veth(one: Host, other: Host, device: str = "eth0", other_device: str = "eth0") -> None:
    """A wire between two hosts."""
    with pyroute2.NetNS(one.name, flags=0) as network:
        network.link("add", ifname=device, kind="veth", peer={"ifname": other_device, "net_ns_fd": other.name})


def switch_offloads_off(where: Host, device: str) -> None:
    """No segmentation and no receive offload, as `ethtool -K` does it."""
    where.run("ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off", stderr=subprocess.DEVNULL)


Packet = bytes
Policy = Callable[[Packet, "Direction"], list[Packet]]


@dataclass(eq=False)
class Direction:
    """One way through a relay; `other` is the way back."""

    name: str
    incoming: int
    outgoing: int
    other: "Direction" = field(init=False)

    def deliver(self, packet: Packet) -> None:
        """Hand a packet to the host at the end of this way."""
        os.write(self.outgoing, packet)


class Relay:
    """A wire whose packets pass through a policy: packets in, packets to deliver out, in that order."""

    def __init__(self, client: Host, server: Host) -> None:
        ends = [_tun(client), _tun(server)]
        self.to_server, self.to_client = Direction("to_server", *ends), Direction("to_client", *reversed(ends))
        self.to_server.other, self.to_client.other = self.to_client, self.to_server
        self._policy: Policy = lambda packet, _: [packet]
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="relay")
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        for descriptor in (self.to_server.incoming, self.to_client.incoming, self._stop_read, self._stop_write):
            os.close(descriptor)
        if self._fault:
            raise self._fault

    @contextmanager
    def policy(self, policy: Policy) -> Iterator[None]:
        """Treat packets so for a while."""
        before, self._policy = self._policy, policy
        try:
            yield
        finally:
            self._policy = before

    def _run(self) -> None:
        try:
            self._carry()
        except BaseException as fault:
            self._fault = fault

    def _carry(self) -> None:
        ways = {way.incoming: way for way in (self.to_server, self.to_client)}
        while True:
            ready, _, _ = select.select([*ways, self._stop_read], [], [])
            if self._stop_read in ready:
                return
            for descriptor in ready:
                way = ways[descriptor]
                for packet in self._policy(os.read(descriptor, 1 << 16), way):
                    way.deliver(packet)


def _tun(where: Host) -> int:
    with where.inside():
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return descriptor


@dataclass
class Lane:
    """Where a scenario runs: two hosts that reach each other by one family over one kind of wire.

    `ports` is the first of a run of ports that nothing else on this machine uses; a scenario takes from those it is
    given. On loopback both hosts are the same.
    """

    name: str
    family: int
    client: Host
    server: Host
    client_address: str
    server_address: str
    ports: int
    relay: Relay | None = None

    @property
    def domain(self) -> int:
        """The address family of sockets."""
        return socket.AF_INET if self.family == 4 else socket.AF_INET6

    def listen(self, port: int, backlog: int = 16, *, protocol: int = 0, **options: int) -> socket.socket:
        """A listening socket of the server; `options` are TCP options by name."""
        listener = self.server.socket(self.domain, protocol=protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for name, value in options.items():
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.bind((self.server_address, port))
        listener.listen(backlog)
        return listener

    def dialling(self, port: int = 0, *, protocol: int = 0, **options: int) -> socket.socket:
        """An unconnected socket of the client, bound to a port if one is given."""
        made = self.client.socket(self.domain, protocol=protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for name, value in options.items():
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if port:
            made.bind((self.client_address, port))
        return made

    def pair(self, port: int, client_port: int = 0) -> tuple[socket.socket, socket.socket]:
        """A connection: the client's end and the server's."""
        with self.listen(port) as listener:
            client = self.dialling(client_port)
            client.connect((self.server_address, port))
            accepted, _ = listener.accept()
        accepted.settimeout(PATIENCE_S)
        return client, accepted


def settle(seconds: float = 0.2) -> None:
    """Let what is under way arrive."""
    time.sleep(seconds)
