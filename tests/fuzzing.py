"""The probe's parsers on this machine, under sanitizers: built as a fuzzer that libFuzzer drives, or as a filter."""

import random
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "unit/capture"
BPF = Path(__file__).parents[1] / "bpf"
SANITIZED = ["-O1", "-g", "-Wall", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# Steps of an input, as fuzz_http.c takes them.
SEGMENT, LONG, AGAIN, OVERLAP, GAP, ANSWER, ANNOUNCE, PEER = range(8)
LOADING, REPORTING, KEEPING = 0x20, 0x40, 0x80  # another program interrupts


def case(stream: bytes, *steps: tuple[int, int], seq: int = 1) -> bytes:
    """An input: a stream, and steps with their lengths."""
    return struct.pack("<IB", seq, len(steps)) + b"".join(struct.pack("<BH", *step) for step in steps) + stream


def build(source: str, target: Path, *flags: str) -> Path:
    """Compile one of the programs in `SOURCES`."""
    clang = shutil.which("clang")
    if not clang:
        pytest.skip("needs clang, as the probe's build does")
    subprocess.run([clang, *SANITIZED, *flags, f"-I{BPF}", str(SOURCES / source), "-o", str(target)], check=True)
    return target


def fuzz(
    source: str,
    directory: Path,
    seeds: Iterable[bytes],
    *,
    seconds: int,
    longest_bytes: int = 9000,
    words: Sequence[bytes] = (),
) -> int:
    """Fuzz for so long, from these seeds and words; returns how many inputs that were, all of them good."""
    target, corpus, dictionary = build(source, directory / "fuzz", "-fsanitize=fuzzer"), directory / "corpus", []
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    if words:
        escaped = ["".join(f"\\x{byte:02x}" for byte in word) for word in words]
        (directory / "words").write_text("".join(f'"{word}"\n' for word in escaped))
        dictionary = [f"-dict={directory / 'words'}"]
    done = subprocess.run(
        [target, f"-max_total_time={seconds}", f"-max_len={longest_bytes}", f"-seed={random.randrange(1, 1 << 31)}",
         *dictionary, f"-artifact_prefix={directory}/", "-print_final_stats=1", str(corpus)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return int(re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)[0])


def reported(driver: Path, inputs: Iterable[bytes]) -> list[dict[int, str]]:
    """By input: where in the stream a context begins, and its ids; none where it only ends.

    Args:
        driver: built with PRINTS_REPORTS.
        inputs: as the fuzzer takes them.
    """
    frames = b"".join(struct.pack("<I", len(data)) + data for data in inputs)
    done = subprocess.run([driver], input=frames, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [[report.split(":", 1) for report in line.split()] for line in done.stdout.decode().splitlines()]
    return [{int(at): ids for at, ids in line if ids != ":"} for line in lines]
