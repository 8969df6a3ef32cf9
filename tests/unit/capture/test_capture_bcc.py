"""BCC as a compiler: what it is given, what it makes of it, and what it says when it cannot."""

import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tcpio_otel.capture import bcc
from tcpio_otel.capture.control import Role
from tcpio_otel.capture.inventory import HeldSocket, held_sockets
from tcpio_otel.errors import EnvironmentFault

NOBODY = 65534
SOURCE = Path(__file__).parents[3] / "bpf" / "tcpio.bcc.c"


@pytest.fixture(scope="module")
def compiled() -> bcc.Compiled:
    """The probe as BCC compiles it here."""
    try:
        return bcc.compile_probe()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


def test_the_source_stands_by_itself() -> None:
    """It is compiled far from its headers, so they are in it; and it names no kernel structure beyond UAPI's."""
    text = bcc.SOURCE.read_text()
    assert '#include "' not in text
    assert "BPF_CORE_READ" not in text
    assert {path for path in re.findall(r"#include <(.*)>", text) if not path.startswith("linux/")} == set()


def test_maps_are_numbered_alike_in_c_and_python() -> None:
    """The numbers that the source loads are positions in the table of maps."""
    (names,) = re.findall(r"enum map \{(.*?)\}", SOURCE.read_text(), re.DOTALL)
    assert re.findall(r"MAP_(\w+)", names) == list(bcc.MAPS)


def test_every_program_is_compiled(compiled: bcc.Compiled) -> None:
    """Whole instructions, no two programs alike, at a price that is told."""
    assert compiled.programs.keys() == bcc.PROGRAMS.keys()
    assert all(len(code) % 8 == 0 and len(code) > 80 for code in compiled.programs.values())
    assert len(set(compiled.programs.values())) == len(bcc.PROGRAMS)
    assert 10 << 20 < compiled.peak_bytes < 1 << 30


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.usefixtures("compiled")
def test_compiling_needs_no_privileges() -> None:
    """Nobody can do it: BCC touches no kernel here."""
    command = [bcc.PYTHONS[0], "-I", "-c", bcc.COMPILER.read_text(), *bcc.PROGRAMS]
    done = subprocess.run(
        command, input=bcc.SOURCE.read_text(), capture_output=True, text=True, check=False,
        user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_python_without_bcc_is_told_what_to_install(tmp_path: Path) -> None:
    """One line, which names that Python and the package."""
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    with pytest.raises(EnvironmentFault, match=r"No module named 'bcc': install BCC for .*python3-bpfcc") as told:
        bcc.compile_probe([str(bare / "bin" / "python")])
    assert "\n" not in str(told.value)


def test_no_python_at_all_is_one_line() -> None:
    """The path that was tried stands in it."""
    with pytest.raises(EnvironmentFault, match=r"cannot compile the probe: /nowhere/python: .*No such file"):
        bcc.compile_probe(["/nowhere/python"])


@pytest.mark.usefixtures("compiled")
def test_a_source_that_does_not_compile_gives_its_first_error(tmp_path: Path) -> None:
    """BCC prints pages; the agent says the one line that matters."""
    broken = tmp_path / "broken.c"
    broken.write_text("int tcpio_ingress(struct __sk_buff *skb) { return missing; }\n")
    with pytest.raises(EnvironmentFault, match="error: use of undeclared identifier 'missing'") as told:
        bcc.compile_probe(source=broken)
    assert "\n" not in str(told.value)


def test_descriptors_and_missing_helpers_are_filled_in() -> None:
    """A load of map 1 becomes one of its descriptor; a call that this kernel lacks becomes 0; the rest stays."""
    load, second = struct.pack("<BBhi", 0x18, 0x12, 0, 1), bytes(8)
    call, other = struct.pack("<BBhi", 0x85, 0, 0, 122), struct.pack("<BBhi", 0x85, 0, 0, 1)
    number = struct.pack("<BBhi", 0x18, 0x02, 0, 1)  # a plain 64-bit constant
    code = load + second + call + other + number + second
    assert bcc.filled_in(code, [7, 9], netns_cookie=True) == load[:4] + struct.pack("<i", 9) + code[8:]
    without = bcc.filled_in(code, [7, 9], netns_cookie=False)
    assert without[16:24] == struct.pack("<BBhi", 0xB7, 0, 0, 0)
    assert without[24:] == code[24:]


def _held(port: int) -> list[HeldSocket]:
    found = []
    for held in held_sockets():
        with socket.socket(fileno=os.dup(held.descriptor)) as one:
            if one.family == socket.AF_INET and port in (
                one.getsockname()[1], 0 if held.listening else one.getpeername()[1]
            ):  # fmt: skip
                found.append(held)
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="looking into other processes takes root")
def test_sockets_are_found_with_their_holder_and_role() -> None:
    """A listener, a client and a server of this very process, and who opened the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0] as server:
            client.sendall(b"x" * 1000)
            assert server.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
            found = _held(port)
    assert sorted((held.listening, held.role) for held in found) == [
        (False, Role.CLIENT), (False, Role.SERVER), (True, Role.UNKNOWN),
    ]  # fmt: skip
    name = os.fsencode(Path(os.readlink("/proc/self/exe")).name)[:15]
    assert {(held.pid, held.name) for held in found} == {(os.getpid(), name)}


def test_no_directory_to_write_to_is_one_line(tmp_path: Path) -> None:
    """A root that is read-only, as containers have it; what to do is said."""
    tempfile_of_nobody = tmp_path / "sitecustomize.py"
    tempfile_of_nobody.write_text("import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$2"\n')
    python.chmod(0o755)
    with pytest.raises(EnvironmentFault, match="set TMPDIR to one that is") as caught:
        bcc.compile_probe([str(python)])
    assert "Traceback" not in str(caught.value)
