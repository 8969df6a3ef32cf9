"""The container image as its Dockerfile makes it of this checkout, by buildah, on a base that debootstrap makes.

No registry is asked. Bases, layers and images are kept in the cache, apart from the machine's own.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.collector import CACHE
from tests.matrix.images import UnavailableError, archive

REPOSITORY = Path(__file__).parents[2]
RELEASE = "bookworm"
BASE = f"localhost/tcpio-otel-test-base:{RELEASE}"
IMAGES = "localhost/tcpio-otel-test"

BUILDAH = ("buildah", "--root", str(CACHE / "containers"), "--runroot", "/run/tcpio-otel-test")
"""What it knows of mounts is where a restart of the machine forgets both."""

SECRETS = {"pip.conf": Path("/etc/pip.conf"), "certificates": Path("/etc/ssl/certs/ca-certificates.crt")}
"""How this machine's pip finds packages: the builder sees it, the image does not."""


@dataclass(frozen=True)
class Image:
    """An image with its root mounted, to which can be written without changing the image.

    Attributes:
        name: what buildah calls it.
        root: the mounted root.
        config: what the image says of itself, as in the OCI specification.
    """

    name: str
    root: Path
    config: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that its processes have."""
        return dict(entry.split("=", 1) for entry in self.config["Env"])


def buildah(*arguments: str) -> str:
    """What buildah prints; bases, layers and images are in the cache.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    return _printed(*BUILDAH, *arguments)


def _printed(*command: str) -> str:
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError("\n".join([*result.stdout.splitlines()[-10:], *result.stderr.splitlines()[-20:]]))
    return result.stdout.strip()


def base() -> str:
    """The name of the smallest Debian, made if it is not in the cache.

    Raises:
        LookupError: it cannot be made here; the message says why.
    """
    if os.geteuid():
        raise LookupError("needs root: images are built with debootstrap and mounted")
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            raise LookupError(f"{program} is not installed: no image can be built")
    try:
        mirror = archive()
    except UnavailableError as reason:
        raise LookupError(str(reason)) from None
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        with _container("scratch") as (container, root):
            command = ["debootstrap", "--variant=minbase", RELEASE, str(root), mirror]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                said = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("E:")]
                raise LookupError(f"debootstrap makes no base: {' / '.join(said) or result.returncode}")
            for directory in ("var/cache/apt", "var/lib/apt/lists"):
                shutil.rmtree(root / directory)
            buildah("commit", "--quiet", container, BASE)
    return BASE


def build(target: str = "") -> str:
    """The name of the image, as `make image` builds it from the checkout as it is now.

    Args:
        target: of the Dockerfile; empty: none is named.

    Raises:
        LookupError: none can be built here; the message says why.
        RuntimeError: the build failed.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "containers.lock").open("w") as lock:  # one that prunes would take away what another builds on
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(f"{IMAGES}:{target or 'plain'}", target)


def _build(name: str, target: str) -> str:
    options = ["--pull-never", "--layers", "--isolation=chroot", f"--build-arg=BASE={base()}"]
    options += [f"--secret=id={secret},src={path}" for secret, path in SECRETS.items() if path.exists()]
    # What compiles has a name as well, so that its layers outlast the pruning of earlier checkouts'.
    for stage, tag in (("build", f"{IMAGES}:build"), (target, name)):
        arguments = [*options, *([f"--target={stage}"] if stage else [])]
        _printed("make", "image", f"BUILDER={' '.join(BUILDAH)}", f"IMAGE={tag}", f"ARGS={' '.join(arguments)}")
    buildah("rmi", "--prune")
    return name


@contextmanager
def mounted(name: str) -> Iterator[Image]:
    """An image with its root mounted."""
    with _container(name) as (_, root):
        yield Image(name, root, json.loads(buildah("inspect", "--type=image", name))["OCIv1"]["config"])


@contextmanager
def _container(image: str) -> Iterator[tuple[str, Path]]:
    """A container of buildah's, in which nothing runs, and its root."""
    name = buildah("from", "--pull-never", image)
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)
