"""What a guest runs, as a disk image: the file system that shares the host's files is too slow to import from."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
NEEDLESS = (
    "site-packages", "dist-packages", "test", "idlelib", "tkinter", "lib2to3", "ensurepip", "config-*",
    "mypy*", "*__mypyc*", "ruff*", "clang_format*", "pip", "virtme*", "pandas", "scipy",
)  # fmt: skip


MOUNTED = "/run/environment"
"""Where a guest has the image; the checkout is in it."""

_PYTHON = {"library": Path(sysconfig.get_path("stdlib")), "packages": Path(sysconfig.get_path("purelib"))}


def make(image: Path, scratch: Path) -> None:
    """Write the image (ext4) of this checkout, its virtual environment, and Python's own library."""
    tree = scratch / "tree"
    for name, origin in {**_PYTHON, "checkout": CHECKOUT}.items():
        needless = NEEDLESS if name != "checkout" else (".venv", ".git", ".*_cache", "build", "dist")
        shutil.copytree(
            origin, tree / name, symlinks=True, copy_function=_link, ignore=shutil.ignore_patterns(*needless)
        )
    used = sum(path.lstat().st_size for path in tree.rglob("*"))
    megabytes = used * 3 // 2 // 2**20 + 64
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, image, f"{megabytes}M"],
        check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )  # fmt: skip
    shutil.rmtree(tree)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def mounting() -> str:
    """Shell commands that have a guest's Python import from the image."""
    lines = ["modprobe virtio_blk", "modprobe ext4", f"mkdir -p {MOUNTED}", f"mount -o ro /dev/vda {MOUNTED}"]
    lines += [f"mount --bind {MOUNTED}/{name} {place}" for name, place in _PYTHON.items()]
    return "\n".join(lines)
