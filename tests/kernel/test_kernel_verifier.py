"""What the kernel's verifier makes of each program: how many instructions it walks, and that it stays so."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tcpio_otel.capture import bcc
from tcpio_otel.capture.libbpf import Library, Object, Types
from tcpio_otel.capture.loaders import OBJECT, left_out

SOURCE = Path(__file__).parents[2] / "bpf" / "tcpio.bpf.c"
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
STATISTICS = 4
CEILING = {
    "tcpio_ingress": 300_000,  # most of it once each: the functions that read the head of a request
    "tcpio_egress": 320_000,
    "tcpio_option": 6_000,
    "tcpio_drop": 4_000,
    "tcpio_queue": 6_000,
    "tcpio_state": 6_000,
    "tcpio_reset": 2_000,
    "tcpio_cgroup": 1_000,
    "tcpio_create": 400,
    "tcpio_read": 400,
    "tcpio_snapshot": 6_000,
}
CEILING_BY_BCC = {
    "tcpio_ingress": 40_000,
    "tcpio_egress": 120_000,
    "tcpio_create": 200,
    "tcpio_ops": 4_000,
}
"""Instructions that the verifier may process; a million is the kernel's own limit, and time goes with them."""


OTHER_CLANG = "clang-19"
"""Of Debian 13. What a compiler lays on the stack is its own choice, and three functions on top of each other have 512
bytes."""


def processed(object_file: Path = OBJECT) -> dict[str, int]:
    """Load every program that this kernel takes, and read from each one's log what it cost."""
    library = Library()
    for function, value in (("log_level", ctypes.c_uint32), ("log_buf", ctypes.c_char_p)):
        getattr(library, f"bpf_program__set_{function}").argtypes = [ctypes.c_void_p, value] + [ctypes.c_size_t] * (
            function == "log_buf"
        )
    with Types(library) as kernel:
        without = left_out(kernel)
    logs = {}
    with Object(library, object_file) as probe:
        for name, handle in probe.handles():
            if name in without:
                probe.leave_out(name)
                continue
            logs[name] = ctypes.create_string_buffer(1 << 20)
            library.bpf_program__set_log_level(handle, STATISTICS)
            library.bpf_program__set_log_buf(handle, logs[name], len(logs[name]))
        probe.load()
        return {name: int(re.findall(rb"processed (\d+) insns", log.value)[0]) for name, log in logs.items()}


def processed_by_bcc() -> dict[str, int]:
    """The same of the programs that BCC compiles."""
    logs = {name: ctypes.create_string_buffer(1 << 16) for name in bcc.PROGRAMS}
    with bcc.Object(Library()) as probe:
        probe.load()
        for name, log in logs.items():
            os.close(probe.load_program(name, log))
    return {name: int(re.findall(rb"processed (\d+) insns", log.value)[0]) for name, log in logs.items()}


def test_no_program_is_dear_to_verify(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Each stays under its ceiling, here and on every kernel of the matrix."""
    found = processed()
    assert found
    _judge(found, CEILING, "libbpf", record_testsuite_property)


def test_another_compiler(tmp_path: Path, record_testsuite_property: Callable[[str, object], None]) -> None:
    """The kernel takes the probe from a newer compiler as well."""
    if shutil.which(OTHER_CLANG) is None:
        pytest.skip(f"{OTHER_CLANG} is not installed")
    machine, compiled = platform.machine(), tmp_path / "tcpio.bpf.o"
    command = [OTHER_CLANG, "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{ARCHITECTURES[machine]}"]
    command += [f"-I/usr/include/{machine}-linux-gnu", "-c", str(SOURCE), "-o", str(compiled)]
    subprocess.run(command, check=True)
    _judge(processed(compiled), CEILING, OTHER_CLANG, record_testsuite_property)


def test_no_program_by_bcc_is_dear_either(
    record_testsuite_property: Callable[[str, object], None], lacks_bcc: str
) -> None:
    """It has no functions to verify apart, so its ceilings are its own."""
    if lacks_bcc:
        pytest.skip(lacks_bcc)
    _judge(processed_by_bcc(), CEILING_BY_BCC, "bcc", record_testsuite_property)


def _judge(found: dict[str, int], ceiling: dict[str, int], loader: str, note: Callable[[str, object], None]) -> None:
    note(f"{loader}.instructions", " ".join(f"{name}={count}" for name, count in found.items()))
    for name, count in found.items():
        assert 0 < count < ceiling[name], (name, count)
