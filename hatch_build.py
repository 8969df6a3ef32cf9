"""Compiles the C parts into the package: runs whenever the package is built or installed, editable or not."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROBE = Path("tcpio_otel/capture/tcpio.bpf.o")
BCC_SOURCE = Path("tcpio_otel/capture/tcpio.bcc")  # compiled on the host that needs it
NATIVE = Path("tcpio_otel/libtcpio.so")
NATIVE_V3 = Path("tcpio_otel/libtcpio-v3.so")  # for processors of the last ten years; tcpio_otel/native.py chooses
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")


def inlined(source: Path) -> str:
    """A C file with the headers beside it in their places, so that it compiles wherever it is put."""
    lines: list[str] = []
    for line in source.read_text().splitlines():
        name = line.removeprefix('#include "').removesuffix('"')
        lines.append(line if name == line else inlined(source.with_name(name)))
    return "\n".join(lines)


class CompileHook(BuildHookInterface[Any]):
    """Runs clang on the probe, whose object serves every kernel by CO-RE, and on the passes over batches."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build both where the wheel's file list expects them."""
        root = Path(self.root)
        machine = platform.machine()
        clang = shutil.which("clang")
        if clang is None:
            raise SystemExit("tcpio-otel: clang is needed to build the probe (Debian, Ubuntu: apt install clang)")
        if machine not in ARCHITECTURES:
            raise SystemExit(f"tcpio-otel: no probe for {machine}; known: {', '.join(ARCHITECTURES)}")
        multiarch = sysconfig.get_config_var("MULTIARCH") or f"{machine}-linux-gnu"
        common = [clang, "-O2", *WARNINGS, f"-ffile-prefix-map={root}=.", f"-I{root / 'bpf'}"]
        probe = [
            *("-g", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{ARCHITECTURES[machine]}"),
            # Debian keeps asm/ apart by architecture, and clang for BPF does not look there by itself.
            *("-I", f"/usr/include/{multiarch}", "-c", str(root / "bpf/tcpio.bpf.c")),
        ]
        native = [
            *("-shared", "-fPIC", f"-I{root / 'tcpio_otel'}"),
            *map(str, sorted((root / "tcpio_otel").glob("*/*.c"))),
        ]
        targets = [("probe", PROBE, probe), ("native part", NATIVE, native)]
        if machine == "x86_64":
            targets.append(("native part", NATIVE_V3, ["-march=x86-64-v3", *native]))
        for what, target, arguments in targets:
            # A process that runs the old one keeps it: the new file takes its name, not its place.
            fresh = root / target.with_suffix(".new")
            result = subprocess.run(
                [*common, *arguments, "-o", str(fresh)], capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise SystemExit(
                    f"tcpio-otel: the {what} does not compile; are libbpf-dev and linux-libc-dev installed?\n"
                    + result.stderr
                )
            if target is PROBE and (strip := shutil.which("llvm-strip")):
                # DWARF goes, BTF stays: a fifth of the size.
                subprocess.run([strip, "-g", str(fresh)], check=True)
            fresh.replace(root / target)
        (root / BCC_SOURCE).write_text(inlined(root / "bpf/tcpio.bcc.c") + "\n")
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"
