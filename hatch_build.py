"""Compiles the probe into the package: runs whenever the package is built or installed, editable or not."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("bpf/tcpio.bpf.c")
TARGET = Path("tcpio_otel/capture/tcpio.bpf.o")
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}


class ProbeBuildHook(BuildHookInterface[Any]):
    """Runs clang on the probe; the object is the same for every kernel, by CO-RE."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the object where the wheel's file list expects it."""
        root = Path(self.root)
        target = root / TARGET
        machine = platform.machine()
        clang = shutil.which("clang")
        if clang is None:
            raise SystemExit("tcpio-otel: clang is needed to build the probe (Debian, Ubuntu: apt install clang)")
        if machine not in ARCHITECTURES:
            raise SystemExit(f"tcpio-otel: no probe for {machine}; known: {', '.join(ARCHITECTURES)}")
        multiarch = sysconfig.get_config_var("MULTIARCH") or f"{machine}-linux-gnu"
        command = [
            *(clang, "-g", "-O2", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{ARCHITECTURES[machine]}"),
            *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"),
            # Debian keeps asm/ apart by architecture, and clang for BPF does not look there by itself.
            *("-I", f"/usr/include/{multiarch}", f"-ffile-prefix-map={root}=."),
            *("-c", str(root / SOURCE), "-o", str(target)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(
                "tcpio-otel: the probe does not compile; are libbpf-dev and linux-libc-dev installed?\n" + result.stderr
            )
        if strip := shutil.which("llvm-strip"):
            # DWARF goes, BTF stays: a fifth of the size.
            subprocess.run([strip, "-g", str(target)], check=True)
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"
