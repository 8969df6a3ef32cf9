"""Boots each kernel of the matrix, runs the conformance suite in it, and prints how it went.

`python -m tests.matrix [VERSION ...]`; the exit code is 1 when a scenario failed. The guests have no network. They see
this machine's files, read-only, and write to a directory of their own.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.matrix.environment import CHECKOUT, MOUNTED, make, mounting
from tests.matrix.images import RELEASES, Image, UnavailableError, image
from tests.matrix.results import KEPT, Result, commit, keep

BOOT_LIMIT_S = 1800
AT_ONCE = 2
LOADERS = ("libbpf", "bcc")
TESTS = (
    "tests/kernel/test_kernel_conformance.py",
    "tests/kernel/test_kernel_verifier.py",
    "tests/kernel/test_kernel_contexts.py::test_no_crafted_head_gives_wrong_ids",
    "tests/kernel/test_kernel_socket_option.py::test_tables_of_thousands_of_rules_arrive_whole",
)
"""What is run where nothing else is asked for: of correlation's tests, those that a kernel is likeliest to fail."""
SELECT = "not flood"
"""Floods say little under emulation, and take long."""
MODULES = "veth tun nf_tables nft_chain_nat nft_nat nft_masq nf_nat iptable_filter ip6table_filter"
GUEST = """
exec >{out}/console 2>&1
{mounting}
for module in {modules}; do modprobe $module; done
cd {mounted}/checkout
{python} -m pytest -p no:cacheprovider -q --tb=short --junitxml={out}/report.xml {tests}
"""


@dataclass
class Boot:
    """What came of one kernel."""

    results: list[Result]
    minutes: float
    console: str


def run(kernel: Image, environment: Path, out: Path, tests: list[str]) -> Boot:
    """Boot a kernel, run tests in it, and read their report."""
    out.mkdir(parents=True, exist_ok=True)
    guest, disk, report = out / "guest.sh", out / "disk", out / "report.xml"
    report.unlink(missing_ok=True)
    shutil.copyfile(environment, disk)  # a disk belongs to one machine
    guest.write_text(
        GUEST.format(
            out=out, modules=MODULES, mounting=mounting(), mounted=MOUNTED, python=sys.executable, tests=" ".join(tests)
        )
    )
    started = time.monotonic()
    _boot(kernel, disk, out, guest)
    disk.unlink()
    results = read(kernel.release, report) if report.exists() else [Result(kernel.release)]
    return Boot(results, (time.monotonic() - started) / 60, _last_words(out))


def _boot(kernel: Image, disk: Path, out: Path, guest: Path) -> None:
    command = [
        Path(sys.executable).with_name("vng"), "--run", kernel.kernel,
        f"--rwdir={out}={out}", "--disk", disk, "--exec", f"bash {guest}",
        "--force-9p", "--disable-microvm", "--disable-kvm", "--cpus", "2", "--memory", "3G", "--verbose",
        "--append", "mitigations=off", "--append", "no_timer_check",
    ]  # fmt: skip
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (out / "boot").open("w") as boot:
        machine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=boot, stderr=boot, env=variables, start_new_session=True
        )
        try:
            machine.wait(BOOT_LIMIT_S)
        except subprocess.TimeoutExpired:
            boot.write(f"did not end within {BOOT_LIMIT_S} s\n")
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
                machine.wait()


def _last_words(out: Path) -> str:
    console = out / "console"
    return "\n".join((console if console.exists() else out / "boot").read_text(errors="replace").splitlines()[-20:])


def read(release: str, report: Path) -> list[Result]:
    """A kernel's results from the report of its tests: a scenario has passed when all that was asked of it holds."""
    suite = ET.parse(report).getroot()
    properties = {item.get("name") or "": item.get("value") or "-" for item in suite.iter("property")}
    good: dict[str, dict[str, bool]] = defaultdict(lambda: defaultdict(lambda: True))
    skipped: dict[str, set[str]] = defaultdict(set)
    for case in suite.iter("testcase"):
        test, _, scenario = (case.get("name") or "").rstrip("]").partition("[")
        loader, _, name = scenario.partition("-")
        if loader not in LOADERS:  # a test that does not know of loaders
            loader, name = LOADERS[0], f"{test} {scenario}".strip()
        if case.find("skipped") is not None:
            skipped[loader].add(name)
        else:
            good[loader][name] &= case.find("failure") is None and case.find("error") is None
    return [
        Result(
            release, loader, properties.get(f"{loader}.hooks", "-"), len(good[loader]),
            tuple(name for name, passed in good[loader].items() if not passed),
            len(skipped[loader] - set(good[loader])),
            *(properties.get(f"{loader}.{name}", "-") for name in ("segments", "unseen", "differences")),
        )
        for loader in LOADERS
    ]  # fmt: skip


def guests(versions: list[str], tests: list[str], out: Path, scratch: Path, console: Console) -> Iterator[Boot]:
    """Boot kernels, some at once, and run tests in them."""
    kernels = []
    for version in versions:
        try:
            kernels.append(image(version))
        except UnavailableError as reason:
            console.print(f"{version}: skipped: {reason}", markup=False)
    make(scratch / "environment", scratch)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda kernel: run(kernel, scratch / "environment", out / kernel.version, tests), kernels)


def host(tests: list[str], out: Path) -> Boot:
    """Run tests on this host's own kernel, and read their report."""
    out.mkdir(parents=True, exist_ok=True)
    report, started = out / "report.xml", time.monotonic()
    with (out / "console").open("w") as console:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=CHECKOUT, stdout=console, stderr=console, check=False)
    return Boot(read(os.uname().release, report), (time.monotonic() - started) / 60, _last_words(out))


def main() -> int:
    """Run the matrix; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the conformance suite under other kernels.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(RELEASES)} (default: all)")
    parser.add_argument("--host", action="store_true", help="boot nothing: run on this host's own kernel, as root")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave consoles and reports there")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help=f"default: {' '.join(TESTS)}")
    parser.add_argument(
        "-k", dest="select", metavar="EXPRESSION", default=SELECT, help="only these tests, as pytest has it"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"keep what came of it in {KEPT.name}; of whole runs alone"
    )
    given = parser.parse_args()
    if given.record and (given.tests is not TESTS or given.select != SELECT):
        parser.error("--record is for whole runs, without --tests and -k")
    if given.host and given.versions:
        parser.error("--host is this host's own kernel, whatever its version")
    console, good, whole = Console(), True, []
    of = commit() if given.record else ""
    table = Table(
        "kernel", "loader", "hooks", "scenarios passed", "segments", "not shown", "differences", box=box.SIMPLE
    )
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        out = (given.keep or scratch).resolve()
        if given.host:
            boots = iter([host([*given.tests, "-k", given.select], out)])
        else:
            tests = [*given.tests, "-k", f"'{given.select}'"]  # for a shell
            boots = guests(given.versions or list(RELEASES), tests, out, scratch, console)
        for boot in boots:
            console.print(f"{boot.results[0].release}: {boot.minutes:.1f} minutes", markup=False)
            # Of the default tests each loader must have run some; others may know of one alone.
            ran = [result for result in boot.results if result.scenarios or result.skipped]
            whole += ran
            for result in boot.results if given.tests is TESTS or not ran else ran:
                table.add_row(*result.row())
                if not result.good:
                    good = False
                    console.print(f"by {result.loader}: {', '.join(result.failed)}\n{boot.console}", markup=False)
    console.print(table)
    if given.record:
        keep(whole, "host" if given.host else "matrix", of)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
