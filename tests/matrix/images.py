"""Stock kernels as Debian ships them: found in its archive, unpacked into a cache outside the checkout."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tcpio-otel" / "kernels"
RELEASES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}
"""The kernels of the matrix, and the release that has each."""

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class UnavailableError(Exception):
    """This machine cannot have a kernel, and why."""


@dataclass(frozen=True)
class Image:
    """An unpacked kernel: its file to boot, with its modules where that is looked for beside it."""

    version: str
    kernel: Path

    @property
    def release(self) -> str:
        """What `uname -r` says in it."""
        return self.kernel.name.removeprefix("vmlinuz-") if "-" in self.kernel.name else self.kernel.parent.name


def image(version: str) -> Image:
    """A kernel of the matrix, from the cache or else from the archive.

    Raises:
        UnavailableError: this machine has no apt, or apt does not find it.
    """
    directory = CACHE / version
    if not (directory / ".complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _unpack(version, directory)
        (directory / ".complete").touch()
    found = [*directory.glob("boot/vmlinuz-*"), *directory.glob("usr/lib/modules/*/vmlinuz")]
    return Image(version, found[0])


def _unpack(version: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as state:
        apt = _Apt(Path(state), RELEASES[version])
        for package in apt.download(apt.newest(version)):
            subprocess.run(["dpkg-deb", "-x", package, directory], check=True)


class _Apt:
    """apt with sources and state of its own, so that the machine's stay as they are."""

    def __init__(self, state: Path, release: str) -> None:
        self._state, self._release = state, release
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        suites = [release] if release == "sid" else [release, f"{release}-security"]
        lines = [
            f"deb [signed-by={_KEYRING}] {archive()}{'-security' if suite.endswith('-security') else ''} {suite} main"
            for suite in suites
        ]
        (state / "sources.list").write_text("\n".join(lines) + "\n")
        self._run("apt-get", "update")

    def _run(self, *command: str, where: Path | None = None) -> str:
        options = {
            "Dir::Etc::SourceList": self._state / "sources.list", "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": self._state / "lists", "Dir::Cache": self._state / "cache",
            "Dir::Etc::Preferences": "-", "Dir::Etc::PreferencesParts": "-", "APT::Sandbox::User": "root",
        }  # fmt: skip
        arguments = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        try:
            done = subprocess.run(
                [command[0], *arguments, *command[1:]], check=True, capture_output=True, text=True, cwd=where
            )
        except FileNotFoundError:
            raise UnavailableError(f"there is no {command[0]} here") from None
        except subprocess.CalledProcessError as error:
            raise UnavailableError(f"{' '.join(command)}: {error.stderr.strip().splitlines()[-1]}") from None
        return done.stdout

    def newest(self, version: str) -> list[str]:
        """The packages of the newest stock kernel of a version: one, or an image and its modules."""
        stock = re.compile(rf"linux-(?:image|binary)-{re.escape(version)}\.\d+(?:-\d+)?(?:\+deb\d+)?-amd64")
        found = [name for name in self._run("apt-cache", "pkgnames", "linux-").split() if stock.fullmatch(name)]
        if not found:
            raise UnavailableError(f"{self._release} has no kernel {version}")
        # Where both exist, linux-image only depends on linux-binary and linux-modules.
        newest = max(found, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name < "linux-i"))
        return list(dict.fromkeys((newest, newest.replace("linux-binary", "linux-modules"))))

    def download(self, names: list[str]) -> list[Path]:
        """Fetch packages; where they are."""
        self._run("apt-get", "download", *names, where=self._state)
        return list(self._state.glob("*.deb"))


def archive() -> str:
    """The address of the Debian archive that this machine's own apt uses.

    Raises:
        UnavailableError: it uses none.
    """
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt").glob("sources.list.d/*")]
    for source in sources:
        if source.exists() and (found := re.search(r"^[^#\n]*?(https?://\S+/debian)/?\s", source.read_text(), re.M)):
            return found[1]
    raise UnavailableError("no Debian archive is among this machine's package sources")
