"""Directories of hierarchies to places, as they come and go."""

from pathlib import Path

import numpy as np

from tcpio_otel.attribution.cgroups import LOOK_NS, REFRESH_NS, REMEMBERED_NS, Cgroups, Hierarchy
from tcpio_otel.attribution.naming import Place
from tcpio_otel.batch import RECORD, Kind

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def inode(path: Path) -> int:
    """What the probe would say of a cgroup."""
    return path.stat().st_ino & 0xFFFF_FFFF


def made(path: Path, hierarchy: Hierarchy = Hierarchy.UNIFIED) -> np.ndarray:
    """The record of a cgroup's making."""
    record = np.zeros(1, RECORD)
    record["kind"], record["state"], record["cgroup_name"] = Kind.CGROUP, hierarchy, path.name
    record["socket_cookie"] = inode(path.parent) << 32 | inode(path)
    return record


def test_directories_are_found_as_they_are(tmp_path: Path) -> None:
    """At any depth; the root itself is a place too."""
    deep = tmp_path / "system.slice" / f"docker-{ID}.scope" / "below"
    deep.mkdir(parents=True)
    (tmp_path / "cgroup.procs").touch()
    cgroups = Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)
    assert cgroups.place(inode(deep), 0) == Place(ID, "docker")
    assert cgroups.place(inode(tmp_path), 0) == Place()
    assert cgroups.place(0, 0) is None


def test_one_that_was_made_later_is_known_from_its_record(tmp_path: Path) -> None:
    """Also when it is gone already; and when nobody told of it, once the directories are read again."""
    cgroups = Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)
    told, quiet = tmp_path / f"docker-{ID}.scope", tmp_path / f"docker-{OTHER}.scope"
    told.mkdir()
    quiet.mkdir()
    record, told_id, quiet_id = made(told), inode(told), inode(quiet)
    told.rmdir()
    cgroups.learn(record, 1)
    assert cgroups.place(told_id, 0) == Place(ID, "docker")
    assert cgroups.place(quiet_id, 0) is None
    assert not cgroups.refresh(LOOK_NS - 1, asked=True)
    assert not cgroups.refresh(LOOK_NS, asked=False)
    assert cgroups.refresh(LOOK_NS, asked=True)
    assert cgroups.place(quiet_id, 0) == Place(OTHER, "docker")
    assert cgroups.place(told_id, 0) == Place(ID, "docker")


def test_what_is_gone_is_forgotten_in_the_end(tmp_path: Path) -> None:
    """Not before its last packets can have come; what is renamed meanwhile has its new name."""
    short, long = tmp_path / f"docker-{ID}.scope", tmp_path / "before.service"
    short.mkdir()
    long.mkdir()
    short_id, long_id = inode(short), inode(long)
    cgroups = Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)
    short.rmdir()
    long.rename(tmp_path / "after.service")
    assert cgroups.place(long_id, 0) == Place(unit="before")
    assert cgroups.refresh(REFRESH_NS, asked=False)
    assert cgroups.place(short_id, 0) == Place(ID, "docker")
    assert cgroups.place(long_id, 0) == Place(unit="after")
    assert cgroups.refresh(REMEMBERED_NS, asked=False)
    assert cgroups.place(short_id, 0) is None


def test_containers_count_whichever_hierarchy_they_are_in(tmp_path: Path) -> None:
    """On a host with both, drivers differ in the one that they use."""
    unit, container = tmp_path / "unified" / "containerd.service", tmp_path / "memory" / "docker" / ID
    unit.mkdir(parents=True)
    container.mkdir(parents=True)
    cgroups = Cgroups({Hierarchy.UNIFIED: tmp_path / "unified", Hierarchy.MEMORY: tmp_path / "memory"}, 0)
    assert cgroups.place(inode(unit), inode(container)) == Place(ID, "docker")
    assert cgroups.place(inode(unit), inode(container.parent)) == Place(unit="containerd")
    assert cgroups.place(inode(tmp_path / "unified"), inode(container)) == Place(ID, "docker")


def test_a_circle_of_records_has_no_end_and_no_place(tmp_path: Path) -> None:
    """Whatever records say, looking for a place ends."""
    cgroups = Cgroups({Hierarchy.UNIFIED: tmp_path}, 0)
    record = np.zeros(2, RECORD)
    record["kind"], record["cgroup_name"] = Kind.CGROUP, "again"
    record["socket_cookie"] = [1001 << 32 | 1002, 1002 << 32 | 1001]
    cgroups.learn(record, 0)
    assert cgroups.place(1001, 0) is None
