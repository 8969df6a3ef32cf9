"""Run a command under a seccomp profile in the form of OCI: `python -m tests.peers.seccomp FILE COMMAND`.

By libseccomp. Of the form it knows what the chart's profile uses: a default action, and names of calls that fail.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

ACTIONS = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}


def load(profile: Path) -> None:
    """Put this process and all that it starts under a profile; `no_new_privs` must be set.

    Raises:
        OSError: libseccomp refuses a rule, or the kernel the filter.
    """
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    given = json.loads(profile.read_text())
    context = ctypes.c_void_p(library.seccomp_init(ACTIONS[given["defaultAction"]]))
    for rule in given["syscalls"]:
        action = ACTIONS[rule["action"]] | rule["errnoRet"]
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number < 0:
                continue  # not on this architecture, or newer than the library: a runtime ignores it too
            _expect(library.seccomp_rule_add(context, ctypes.c_uint32(action), number, 0), name)
    _expect(library.seccomp_load(context), "the filter")


def _expect(result: int, what: str) -> None:
    if result:
        raise OSError(-result, f"seccomp: {what}: {os.strerror(-result)}")


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
