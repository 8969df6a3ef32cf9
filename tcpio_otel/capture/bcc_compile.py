"""C to BPF instructions by BCC: a program of its own, for whichever Python has BCC.

BCC comes with the distribution, for the distribution's Python; the agent may run under another, in a virtual
environment. So the agent runs this file by that Python, and nothing of the package is imported here. It also keeps out
of the agent what BCC brings along: a hundred megabytes of LLVM. It needs no privileges.

Standard input: the source. Arguments: names of functions. Standard output, as JSON: the instructions of each function
in hex, BCC's version, and the most memory that it took, in bytes. A failure is one line on standard error, and exit
code 1.
"""

import json
import os
import re
import sys
import tempfile

HEADERS = "/usr/include"
STUBS = {
    "include/linux/kconfig.h": """\
#define CONFIG_BPF_SYSCALL 1
#define NULL ((void *)0)
#define true 1
#define false 0
#define offsetof(type, member) __builtin_offsetof(type, member)
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
""",
    "include/linux/types.h": """\
#pragma once
#include <uapi/linux/types.h>
typedef _Bool bool;
typedef __SIZE_TYPE__ size_t, uintptr_t;
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
""",
    "include/linux/log2.h": "",
    "include/asm/page.h": "",
}
"""Of a kernel's own headers, what BCC asks for before it comes to the source. The source has only use for UAPI ones, so
those of the kernel that runs, or any at all, need not be there."""


class _FaultError(Exception):
    """What stands in the way, in one line."""


def _header_tree(directory: str) -> None:
    """Lay out what BCC takes for a kernel's headers: our stubs, and the UAPI headers of the system."""
    for path, text in STUBS.items():
        target = os.path.join(directory, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w") as file:
            file.write(text)
    os.makedirs(os.path.join(directory, "include/uapi"))
    for part in ("linux", "asm-generic", "asm"):
        found = [os.path.join(HEADERS, part), *_by_architecture(part)]
        found = [path for path in found if os.path.isdir(path)]
        if not found:
            raise _FaultError(
                f"{HEADERS}/{part} is missing: install the kernel's UAPI headers (Debian, Ubuntu: linux-libc-dev)"
            )
        os.symlink(found[0], os.path.join(directory, "include/uapi", part))


def _by_architecture(part: str) -> list[str]:
    """Where Debian keeps headers that differ between architectures."""
    return [os.path.join(HEADERS, f"{os.uname().machine}-linux-gnu", part)]


def _compile(source: str, functions: list[str]) -> tuple[dict[str, str], str]:
    try:
        from bcc import BPF, __version__
    except ImportError as error:
        raise _FaultError(f"{error}: install BCC for {sys.executable} (Debian, Ubuntu: python3-bpfcc)") from None
    with tempfile.TemporaryDirectory() as directory:
        _header_tree(directory)
        os.environ["BCC_KERNEL_SOURCE"] = directory
        # BCC brings its own linux/bpf.h, and the system's must not come on top of it.
        module = BPF(text=source, cflags=["-D__LINUX_BPF_H__", "-Wno-everything"])
    return {name: module.dump_func(name.encode()).hex() for name in functions}, __version__


def _peak_bytes() -> int:
    """Of this program alone: getrusage(2) counts what its parent had when it started it, too."""
    with open("/proc/self/status") as status:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> int:
    """Compile; returns the exit code."""
    # BCC's own messages come from C, past sys.stderr: they are kept, to be told in one line.
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            programs, version = _compile(sys.stdin.read(), sys.argv[1:])
        except Exception as error:
            said.seek(0)
            messages = re.findall(r"error: .*", said.read().decode(errors="replace"))
            text = str(error) if isinstance(error, _FaultError) or not messages else messages[0]
            os.write(stderr, (" ".join(text.split())[:500] + "\n").encode())
            return 1
    sys.stdout.write(json.dumps({"programs": programs, "version": version, "peak_bytes": _peak_bytes()}))
    return 0


if __name__ == "__main__":
    try:
        tempfile.gettempdir()
    except OSError:
        sys.exit("it lays out headers first, and no directory is writable here: set TMPDIR to one that is")
    sys.exit(main())
