"""Ids of cgroups to places: the directories of this host's hierarchies, as they are and as the probe saw them made.

A cgroup is known by the lower half of its id, which is its directory's inode number and unique among those that exist
(fs/kernfs/dir.c). One that is gone is remembered for a while: its packets may still be on their way.
"""

import os
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.attribution.naming import Place, place_of

Records = NDArray[np.void]

LOOK_NS = 1_000_000_000
"""How often the directories are read when somebody asks for one that is not known."""

REFRESH_NS = 60_000_000_000
"""How often they are read anyway: a cgroup of version 1 can be renamed, and those that are gone need not be kept."""

REMEMBERED_NS = 300_000_000_000
"""For how long one that is gone is known."""

_DEEPEST = 64  # of directories: more would be a circle
_HALF = 0xFFFF_FFFF


class Hierarchy(IntEnum):
    """`enum tcpio_hierarchy`: the unified tree, or that of cgroup v1's memory controller."""

    UNIFIED = 0
    MEMORY = 1


class _Cgroup:
    """A directory: its name, the id of the one it stands in (0: it is the root), and when it was last seen."""

    __slots__ = ("name", "parent", "seen_ns")

    def __init__(self, name: str, parent: int, seen_ns: int) -> None:
        self.name, self.parent, self.seen_ns = name, parent, seen_ns


Key = tuple[Hierarchy, int]


class Cgroups:
    """The cgroups of this host.

    Args:
        roots: where hierarchies are mounted.
        now_ns: the time, on any clock that goes on; so for all methods.
    """

    def __init__(self, roots: Mapping[Hierarchy, Path], now_ns: int) -> None:
        self._roots = roots
        self._known: dict[Key, _Cgroup] = {}
        self._read(now_ns)

    def learn(self, made: Records, now_ns: int) -> None:
        """Take in records of kind CGROUP (dtype RECORD)."""
        for ids, hierarchy, name in zip(
            made["socket_cookie"].tolist(), made["state"].tolist(), made["cgroup_name"].tolist(), strict=True
        ):
            text = name.decode("utf-8", "replace")
            self._known[Hierarchy(hierarchy), ids & _HALF] = _Cgroup(text, ids >> 32, now_ns)

    def refresh(self, now_ns: int, *, asked: bool) -> bool:
        """Read the directories again if it is time to, which is sooner when somebody has `asked`; whether it was."""
        if now_ns - self._read_ns < (LOOK_NS if asked else REFRESH_NS):
            return False
        self._read(now_ns)
        return True

    def place(self, cgroup: int, cgroup_v1: int) -> Place | None:
        """Where a process is at home that stands there in both hierarchies; None while that is not known.

        Containers count more than units, whichever hierarchy they are found in: on hosts with both, drivers differ in
        which of them they use.
        """
        found = [
            place_of(names)
            for key in ((Hierarchy.UNIFIED, cgroup), (Hierarchy.MEMORY, cgroup_v1))
            if key[1] and (names := self._names(key)) is not None
        ]
        if not found:
            return None
        return max(found, key=lambda place: (bool(place.container_id), bool(place.pod_uid), bool(place.unit)))

    def _names(self, key: Key) -> list[str] | None:
        """The directories from the root on; None when one of them is not known."""
        hierarchy, number = key
        names: list[str] = []
        for _ in range(_DEEPEST):
            known = self._known.get((hierarchy, number))
            if known is None:
                return None
            if not known.parent:
                return names[::-1]
            names.append(known.name)
            number = known.parent
        return None

    def _read(self, now_ns: int) -> None:
        self._read_ns = now_ns
        for hierarchy, root in self._roots.items():
            try:
                top = root.stat().st_ino & _HALF
            except OSError:
                continue  # it was unmounted: what is known of it stays good for a while
            self._known[hierarchy, top] = _Cgroup("", 0, now_ns)
            for name, number, parent in _directories(root, top):
                self._known[hierarchy, number] = _Cgroup(name, parent, now_ns)
        self._known = {
            key: known for key, known in self._known.items() if now_ns - known.seen_ns < REMEMBERED_NS
        }  # fmt: skip


def _directories(top: Path, number: int) -> Iterator[tuple[str, int, int]]:
    """Everything below a directory: name, inode number, and that of the directory it stands in."""
    pending = [(str(top), number)]
    while pending:
        path, parent = pending.pop()
        try:
            with os.scandir(path) as entries:
                below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # it is gone by now
        for entry in below:
            inode = entry.inode() & _HALF
            yield entry.name, inode, parent
            pending.append((entry.path, inode))
