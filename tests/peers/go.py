"""Programs of Go modules, built once into the cache, also where the module's replace lines make `go install` refuse."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.integration.collector import CACHE

Made = TypeVar("Made")


def or_skip(build: Callable[[], Made]) -> Made:
    """What a peer's builder makes; where it cannot be built, the test that needs it is skipped and says why."""
    try:
        return build()
    except LookupError as reason:
        pytest.skip(str(reason))


BUILD_BACKENDS = "BUILD_BACKENDS"
"""The variable that asks for what takes long to build."""


def asked_for(built: Path) -> None:
    """Go on only if a peer that takes long to build is there, or was asked for.

    Raises:
        LookupError: it is neither; the message says how to ask.
    """
    if not built.exists() and not os.environ.get(BUILD_BACKENDS):
        raise LookupError(f"{built.name} is not built yet: make test-backends builds it, which takes a while")


def sources(module: str, version: str) -> Path:
    """The directory of a module's files, as Go keeps them.

    Raises:
        LookupError: there is no Go here, or it cannot get them; the message says which.
    """
    if shutil.which("go") is None:
        raise LookupError(f"Go is not installed: {module} cannot be had")
    with tempfile.TemporaryDirectory() as scratch:
        return Path(json.loads(_go(Path(scratch), "mod", "download", "-json", f"{module}@{version}"))["Dir"])


def programs(
    name: str,
    module: str,
    version: str,
    packages: Mapping[str, str],
    *,
    link: str = "",
    sibling: str = "",
    slow: bool = False,
    tags: Sequence[str] = (),
) -> Path:
    """The directory of a module's programs in the cache, where they are built if it is not there.

    Args:
        name: what the directory is called, before its version.
        module: the module's path.
        version: its version, as in v1.2.3.
        packages: what to call each program, and the package it is built from.
        link: options for the linker; that is where some programs learn their version.
        sibling: the version to take of modules that this one replaces by folders of its own repository.
        slow: whether to build it only where that was asked for.
        tags: build tags, where a program is made of parts; the directory's name tells which they were.

    Raises:
        LookupError: there is no Go here to build them with, or the build failed; the message says which.
    """
    parts = f"-{hashlib.sha256(','.join(sorted(tags)).encode()).hexdigest()[:8]}" if tags else ""
    built = CACHE / f"{name}-{version.removeprefix('v')}{parts}"
    if built.exists():
        return built
    if slow:
        asked_for(built)
    if shutil.which("go") is None:
        raise LookupError(f"Go is not installed: {', '.join(packages)} cannot be built")
    CACHE.mkdir(parents=True, exist_ok=True)
    # In the cache as well, since only within a file system does a directory move in one step.
    with tempfile.TemporaryDirectory(prefix=f"{built.name}-", dir=CACHE) as scratch:
        wrapper, finished = Path(scratch, "wrapper"), Path(scratch, "finished")
        wrapper.mkdir()
        source = json.loads(_go(wrapper, "list", "-m", "-json", f"{module}@{version}"))
        needs = json.loads(_go(wrapper, "mod", "edit", "-json", source["GoMod"]))
        (wrapper / "go.mod").write_text(_wrapper(module, version, needs, sibling))
        for program, package in packages.items():
            output = ["-o", str(finished / program)]
            options = ["-mod=mod", "-trimpath", "-ldflags", f"-s -w {link}", "-tags", ",".join(tags)]
            _go(wrapper, "build", *options, *output, package)
        if not built.exists():  # somebody else may have built the same meanwhile
            finished.rename(built)
    return built


def _wrapper(module: str, version: str, needs: dict[str, Any], sibling: str) -> str:
    """The go.mod of a module that requires another, and repeats its replace lines: they count in a main module only."""
    lines = ["module wrapper", f"go {needs['Go']}", f"require {module} {version}"]
    for line in needs["Replace"] or []:
        old, new = line["Old"], line["New"]
        lines.append(
            f"replace {old['Path']} {old.get('Version', '')} => "
            + (f"{old['Path']} {sibling}" if new["Path"].startswith(".") else f"{new['Path']} {new['Version']}")
        )
    return "\n".join(lines) + "\n"


def _go(directory: Path, *arguments: str) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0"}
    result = subprocess.run(
        ["go", *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        progress = ("go: downloading", "go: finding")
        said = [line for line in result.stderr.splitlines() if not line.startswith(progress)]
        raise LookupError(f"go {arguments[0]} {arguments[-1]} failed: {' / '.join(said[-3:]) or result.returncode}")
    return result.stdout
