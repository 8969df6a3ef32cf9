"""What the probe needs of a host, read from files like the kernel's; and the contract between C and Python."""

import ctypes
import ipaddress
from pathlib import Path

import pytest

from tcpio_otel.batch import RECORD
from tcpio_otel.capture import loaders, probe
from tcpio_otel.capture.control import Control, Counters, Owner, network_key, tally
from tcpio_otel.capture.libbpf import Library, Types
from tcpio_otel.errors import EnvironmentFault

MOUNTS = """\
24 29 0:22 / /proc rw,relatime shared:12 - proc proc rw
31 25 0:27 /system.slice /inner rw,relatime - cgroup2 cgroup2 rw
30 25 0:26 / /sys/fs/cgroup\\040v2 rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""

SYMBOLS = b"""\
ffffffff81000000 T _stext
ffffffff82000100 T tcp_v4_rcv
ffffffff82000100 t alias_of_it
ffffffff82000f00 t tcp_v4_early_demux
ffffffff82001000 T tcp_v4_rcv_not_this
"""


def test_the_cgroup_root_is_found_among_mounts(tmp_path: Path) -> None:
    """Only a mount of the whole tree will do, and blanks in its path are understood."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert probe.cgroup_root(mounts) == Path("/sys/fs/cgroup v2")


def test_a_host_without_cgroup_v2_is_told_so(tmp_path: Path) -> None:
    """One line says what is missing and how to get it."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.splitlines()[0])
    with pytest.raises(EnvironmentFault, match="no cgroup v2 is mounted: mount"):
        probe.cgroup_root(mounts)


def test_a_function_ends_where_the_next_symbol_begins() -> None:
    """Aliases at the same address do not make it empty."""
    assert loaders.code_range("tcp_v4_rcv", SYMBOLS) == (0xFFFFFFFF82000100, 0xFFFFFFFF82000F00)


@pytest.mark.parametrize("symbols", [b"", b"0000000000000000 T tcp_v4_rcv\n0000000000000000 T other\n"])
def test_hidden_symbols_give_no_range(symbols: bytes) -> None:
    """Without CAP_SYSLOG kallsyms shows zeros: no address must match then."""
    assert loaders.code_range("tcp_v4_rcv", symbols) == (0, 0)


@pytest.mark.parametrize(("text", "cpus"), [("0\n", [0]), ("0-3\n", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8])])
def test_cpu_lists_are_read_as_the_kernel_writes_them(text: str, cpus: list[int]) -> None:
    """Gaps in the numbering, after a CPU was taken offline, are kept."""
    assert probe.online_cpus(text) == cpus


def test_ring_memory_is_a_total() -> None:
    """More CPUs get smaller rings, of a power of two, and never less than the smallest."""
    assert probe.ring_bytes(32 << 20, 2) == 16 << 20
    assert probe.ring_bytes(32 << 20, 3) == 8 << 20
    assert probe.ring_bytes(1 << 20, 256) == probe.SMALLEST_RING_BYTES


def test_networks_are_keys_of_mapped_prefixes() -> None:
    """An IPv4 block matches where its addresses lie in IPv6."""
    assert (
        network_key(ipaddress.ip_network("192.0.2.0/24")) == bytes([120, 0, 0, 0]) + bytes(10) + b"\xff\xff\xc0\0\2\0"
    )
    assert network_key(ipaddress.ip_network("2001:db8::/32"))[:8] == bytes([32, 0, 0, 0, 0x20, 0x01, 0x0D, 0xB8])


def test_port_ranges_become_bits() -> None:
    """Both ends of a range are in it."""
    control = Control()
    control.filter_ports([(1, 1), (63, 65), (65535, 65535)])
    assert control.port_filter == 1
    assert [port for port in range(65536) if control.ports[port >> 6] >> (port & 63) & 1] == [1, 63, 64, 65, 65535]


def test_a_packet_in_progress_is_in_nobodys_pocket() -> None:
    """While programs run, what was seen and not yet disposed of shows as in progress, never as a loss."""
    earlier = (Counters * 2)(Counters(seen=5, submitted=3, lost=1, filtered_own=1), Counters(seen=1, submitted=1))
    later = (Counters * 2)(Counters(seen=7, submitted=4, lost=1, filtered_own=1), Counters(seen=1, submitted=1))
    counted = tally(earlier, later)
    assert (counted.seen, counted.submitted, counted.lost, counted.filtered["own"]) == (8, 4, 1, 1)
    assert counted.in_progress == 2


def test_the_record_in_c_is_the_record_in_python() -> None:
    """Every field of every struct that both sides read lies at the same place, says the object's BTF."""
    library = Library()
    with Types(library, loaders.OBJECT) as types:
        record = types.layout("tcpio_record")
        counters, control = types.layout("tcpio_counters"), types.layout("tcpio_control")
        owner = types.layout("tcpio_owner")
    members = {name.rpartition(".")[2]: place for name, place in record.items() if not name.endswith("reserved")}
    expected = {
        name: (offset, dtype.itemsize)
        for name, (dtype, offset) in ((name, RECORD.fields[name][:2]) for name in RECORD.names or ())
    }
    assert members == expected
    assert max(offset + size for offset, size in record.values()) == RECORD.itemsize
    for layout, structure in ((counters, Counters), (control, Control), (owner, Owner)):
        assert layout == {
            name: (getattr(structure, name).offset, getattr(structure, name).size) for name, *_ in structure._fields_
        }
        assert ctypes.sizeof(structure) == max(offset + size for offset, size in layout.values())


def test_a_missing_library_is_one_clear_line() -> None:
    """A host without libbpf is told which package to install."""
    with pytest.raises(EnvironmentFault, match=r"cannot load libbpf\.so\.0\.none: .*libbpf1"):
        Library("libbpf.so.0.none")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("35 29 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory", Path("/sys/fs/cgroup/memory")),
        (r"35 29 0:31 / /host\040cgroups/memory ro - cgroup none rw,memory", Path("/host cgroups/memory")),
        ("35 29 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids", None),
        ("35 29 0:31 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory", None),
        ("35 29 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup rw,memory_recursiveprot", None),
    ],
)
def test_the_memory_controllers_own_tree_is_found(tmp_path: Path, line: str, found: Path | None) -> None:
    """Where it is mounted from its root on."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text("20 1 0:5 / /proc rw - proc proc rw\n" + line + "\n")
    assert probe.memory_hierarchy(mounts) == found
