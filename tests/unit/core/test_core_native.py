"""The compiled part: what it refuses, and whether it keeps within the memory it is given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tcpio_otel
from tcpio_otel import native
from tcpio_otel.batch import RECORD, Packets
from tcpio_otel.connections.index import hashes_of
from tcpio_otel.encoding.otlp_logs import PacketLogEncoder
from tests import oracle, traffic

ROOT = Path(__file__).parents[3]
SANITIZED = [
    "tests/unit/encoding/test_encoding_packets.py", "tests/unit/connections",
    "tests/unit/correlation/test_correlation_contexts.py", "-k", "not json and not table and not given_back",
]  # fmt: skip


def test_arrays_of_another_layout_are_refused() -> None:
    """What is not contiguous, or of another type, never gets as far as an address."""
    slots, packets = np.zeros(4, np.int64), np.zeros(8, np.int64)
    for records, wrong in ((np.zeros(8, RECORD)[::2], slots), (np.zeros(4, RECORD), slots.astype(np.int32))):
        with pytest.raises((TypeError, native.ctypes.ArgumentError)):
            native.library.tcpio_count(records, wrong, 4, slots, packets, packets, packets.astype(np.uint32), packets)


def test_hashes_do_not_depend_on_where_keys_lie() -> None:
    """Keys hash alike within records and on their own."""
    words = np.random.default_rng(1).integers(0, 1 << 62, (100, 20)).astype(np.uint64)
    assert (hashes_of(words[:, 2:7]) == hashes_of(words[:, 2:7].copy())).all()
    assert len(np.unique(hashes_of(words[:, 2:7]))) == 100


def test_rows_are_padded_to_whole_steps() -> None:
    """A row is as wide as the copy that reads it."""
    data, lengths = native.rows_of([b"a" * 33, b""])
    assert data.shape == (2, 64)
    assert lengths.tolist() == [33, 0]
    assert bytes(data[0]) == b"a" * 33 + bytes(31)


def test_a_missing_library_is_one_line(tmp_path: Path) -> None:
    """A package without its compiled part says so."""
    copy = shutil.copytree(Path(tcpio_otel.__file__).parent, tmp_path / "tcpio_otel")
    for library in copy.glob("libtcpio*.so"):
        library.unlink()
    run = subprocess.run(
        [sys.executable, "-m", "tcpio_otel.cli", "watch", "--source", "pcap:/dev/null"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 3
    assert run.stderr.count("\n") == 1
    assert "install it again" in run.stderr


@pytest.mark.parametrize("path", sorted(native.LIBRARY.parent.glob("libtcpio*.so")), ids=lambda path: path.stem)
def test_every_build_of_it_does_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for whatever processor: the same bytes."""
    if path.stem.endswith("-v3") and native.LIBRARY.stem != path.stem:
        pytest.skip("this processor is no x86-64-v3")
    monkeypatch.setattr(native, "library", native.load(path))
    records, slots, flows = traffic.wild(3000, 200, 42)
    items = PacketLogEncoder({}).encode(Packets(records, slots, flows, 5, 6))
    expected = oracle.items(records, slots, flows, 5, 6, {})
    assert bytes(items.buffer) == b"".join(expected)
    assert items.ends.tolist() == np.cumsum([len(item) for item in expected]).tolist()


def test_nothing_is_read_or_written_beside_the_arrays(tmp_path: Path) -> None:
    """The tests of encoder, connections and contexts pass with the address and undefined behaviour sanitizers on."""
    runtime = subprocess.run(
        ["clang", f"-print-file-name=libclang_rt.asan-{os.uname().machine}.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(runtime).is_absolute():
        pytest.skip("clang has no sanitizers here (Debian, Ubuntu: libclang-rt-dev)")
    package = shutil.copytree(ROOT / "tcpio_otel", tmp_path / "tcpio_otel")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    for library in package.glob("libtcpio*.so"):
        library.unlink()
    sources = [str(source) for source in sorted(package.glob("*/*.c"))]
    subprocess.run(
        ["clang", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-shared-libasan",
         f"-I{ROOT / 'bpf'}", f"-I{package}", "-shared", "-fPIC", *sources, "-o", str(package / "libtcpio.so")],
        check=True,
    )  # fmt: skip
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PYTHONPATH": str(tmp_path),
    }
    probe = "import tcpio_otel.native as n; print(n.LIBRARY)"
    where = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.strip() == str(package / "libtcpio.so")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *SANITIZED],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
