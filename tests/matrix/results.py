"""What came of each kernel, kept as JSON: docs/compatibility.md has its table from there."""

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

KEPT = Path(__file__).parents[2] / "docs" / "compatibility.json"


@dataclass
class Result:
    """What came of one kernel, by one loader."""

    release: str
    loader: str = "-"
    hooks: str = "-"
    scenarios: int = 0
    failed: tuple[str, ...] = ()
    skipped: int = 0
    segments: str = "-"
    unseen: str = "-"
    differences: str = "-"

    @property
    def good(self) -> bool:
        """Whether it ran scenarios, and all passed."""
        return bool(self.scenarios) and not self.failed

    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        passed = f"{self.scenarios - len(self.failed)} of {self.scenarios}"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return self.release, self.loader, self.hooks, passed + skipped, self.segments, self.unseen, self.differences

    @property
    def version(self) -> str:
        """The kernel's version as its makers number it, without what a build adds: 6.12.118, or 5.10.0-46."""
        found = re.match(r"\d+\.\d+\.\d+(?:-\d+)?", self.release)
        return found[0] if found else self.release

    @property
    def kernel(self) -> str:
        """Without what changes from one stock kernel to the next, too: 6.12."""
        return ".".join(self.version.split(".")[:2])


def keep(results: Iterable[Result], where: str, of: str, path: Path = KEPT) -> None:
    """Put results in the place of older ones of the same kernels and loaders.

    Args:
        results: of whole runs.
        where: it was run: `matrix` or `host`.
        of: the commit that was run.
        path: of the JSON file.
    """
    kept = {(each["kernel"], each["loader"]): each for each in json.loads(path.read_text())} if path.exists() else {}
    told = {"date": datetime.now(UTC).date().isoformat(), "commit": of, "where": where}
    for result in results:
        kept[result.kernel, result.loader] = {
            "kernel": result.kernel,
            **asdict(result),
            "release": result.version,
            **told,
        }
    path.write_text(json.dumps([kept[key] for key in sorted(kept, key=_order)], indent=1) + "\n")


def _order(key: tuple[str, str]) -> tuple[list[int], bool]:
    kernel, loader = key
    return [int(number) for number in kernel.split(".")], loader == "bcc"


def commit() -> str:
    """The commit that was run, with `-dirty` behind it if it was not quite that."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return subprocess.run(
        described, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    ).stdout.strip()
